// Owns: exact copies of whole blocks between two sets of layers, or within one.
// Does not know: what a block holds.
#pragma once
#include "kernel.hpp"

namespace SERVD_ISA {

// The layers of one cache: of each its address, and how far its blocks lie apart.
struct BlockSet {
    const int64_t* addresses;
    const int64_t* strides;  // bytes
    int64_t num_blocks;
    char* at(int64_t layer, int64_t block) const {
        return reinterpret_cast<char*>(addresses[layer]) + block * strides[layer];
    }
};

// Block src[i] of `from` onto block dst[i] of `to`, block_bytes[layer] each, in every layer. Returns 1 if an id is
// out of range; then nothing was copied.
SERVD_INLINE int copy_between(const BlockSet& from, const BlockSet& to, const int64_t* block_bytes, int64_t layers,
                              const int64_t* src, const int64_t* dst, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (src[i] < 0 || src[i] >= from.num_blocks || dst[i] < 0 || dst[i] >= to.num_blocks) return 1;
    int64_t bytes = 0;
    for (int64_t layer = 0; layer < layers; ++layer) bytes += block_bytes[layer];
    parallel(layers * count, count * bytes / 16, [=](int64_t unit) {
        int64_t layer = unit / count, i = unit % count;
        memcpy(to.at(layer, dst[i]), from.at(layer, src[i]), block_bytes[layer]);
    });
    return 0;
}

}  // namespace SERVD_ISA
