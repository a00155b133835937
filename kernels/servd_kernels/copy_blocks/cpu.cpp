// Owns: exact copies of whole KV blocks within one cache, over all layers in one call.
// Does not know: what a block holds.
#include "../common/block_copy.hpp"

// caches, strides, block_bytes: of each layer its address, the bytes from block to block, and those of a block.
// Returns 1 if an id is out of range; then nothing was copied.
SERVD_EXPORT(copy_blocks)(const int64_t* caches, const int64_t* strides, const int64_t* block_bytes, int64_t layers,
                          int64_t num_blocks, const int64_t* src, const int64_t* dst, int64_t count) {
    using namespace SERVD_ISA;
    BlockSet cache = {caches, strides, num_blocks};
    return copy_between(cache, cache, block_bytes, layers, src, dst, count);
}
