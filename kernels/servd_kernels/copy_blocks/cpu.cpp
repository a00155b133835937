// Owns: exact copies of whole KV blocks, over all layers in one call.
// Does not know: what a block holds.
#include "../common/kernel.hpp"

// caches: `layers` base addresses, each with `block_bytes` a block at a stride of `block_stride_bytes`.
// Returns 1 if an id is out of range; then nothing was copied.
SERVD_EXPORT(copy_blocks)(const int64_t* caches, int64_t layers, const int64_t* src, const int64_t* dst,
                          int64_t count, int64_t num_blocks, int64_t block_bytes,
                          int64_t block_stride_bytes) {
    using namespace SERVD_ISA;
    for (int64_t i = 0; i < count; ++i)
        if (src[i] < 0 || src[i] >= num_blocks || dst[i] < 0 || dst[i] >= num_blocks) return 1;
    parallel(layers * count, layers * count * block_bytes / 16, [=](int64_t unit) {
        char* base = reinterpret_cast<char*>(caches[unit / count]);
        int64_t i = unit % count;
        memcpy(base + dst[i] * block_stride_bytes, base + src[i] * block_stride_bytes, block_bytes);
    });
    return 0;
}
