// Owns: the copy of a table's rows by id.
// Does not know: what the numbers are.
#include "../common/kernel.hpp"

// ids [count]; table [rows] rows, row_stride bytes apart, of row_bytes bytes; out [count] such rows without gaps.
// Returns 1 if an id has no row; the output is then undefined.
SERVD_EXPORT(embedding)(const int64_t* ids, const char* table, int64_t row_stride, char* out, int64_t count,
                        int64_t rows, int64_t row_bytes) {
    using namespace SERVD_ISA;
    for (int64_t i = 0; i < count; ++i) {
        if (uint64_t(ids[i]) >= uint64_t(rows)) return 1;
    }
    parallel(count, count * row_bytes / 16, [&](int64_t i) {
        memcpy(out + i * row_bytes, table + ids[i] * row_stride, row_bytes);
    });
    return 0;
}
SERVD_RECORDABLE(embedding)
