// Owns: exact copies of whole KV blocks from one cache to another, over all layers in one call.
// Does not know: what a block holds, nor which of the caches is the one in use.
#include "../common/block_copy.hpp"

// Of each layer the addresses in both caches, the bytes from block to block there, and those of a block.
// Returns 1 if an id is out of range; then nothing was copied.
SERVD_EXPORT(swap_blocks)(const int64_t* src_caches, const int64_t* src_strides, int64_t src_blocks,
                          const int64_t* dst_caches, const int64_t* dst_strides, int64_t dst_blocks,
                          const int64_t* block_bytes, int64_t layers, const int64_t* src, const int64_t* dst,
                          int64_t count) {
    using namespace SERVD_ISA;
    return copy_between({src_caches, src_strides, src_blocks}, {dst_caches, dst_strides, dst_blocks}, block_bytes,
                        layers, src, dst, count);
}
