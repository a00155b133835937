// Owns: the least and the greatest key of each page, by head and channel, on CPU vectors.
// Does not know: which pages are chosen by them.
#include <algorithm>

#include "../common/kernel.hpp"
#include "../common/kv_side.hpp"

namespace SERVD_ISA {
namespace {

struct Slot {
    int64_t value;
    bool operator<(const Slot& other) const { return value < other.value; }
};

// The slots of this step that are the last of their page, in place; returns how many there are.
int64_t last_of_pages(Slot* slots, int64_t count, int64_t block_size) {
    std::sort(slots, slots + count);
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i)
        if (i + 1 == count || slots[i].value / block_size != slots[i + 1].value / block_size) slots[kept++] = slots[i];
    return kept;
}

// Rounded outwards, so that what comes out still bounds: the bits of a float grow with its magnitude.
SERVD_INLINE void store_bound(bf16* p, vf v, bool is_upper) {
    vu bits = (vu)v;
    vi grows = is_upper ? (vi)bits >= 0 : (vi)bits < 0;
    vu rounded = (bits + ((vu)grows & 0xFFFF)) >> 16;
    vh h = __builtin_convertvector((v == v) ? rounded : vu{} + 0x7FC0, vh);
    memcpy(p, &h, sizeof h);
}

SERVD_INLINE void store_bound(float* p, vf v, bool) { store(p, v); }

template <class T>
SERVD_INLINE void store_bounds(T* out, const float* values, int64_t count, bool is_upper) {
    for (int64_t i = 0; i < count; i += W) {
        T full[W];
        store_bound(full, load(values + i), is_upper);
        memcpy(out + i, full, lesser(int64_t(W), count - i) * sizeof(T));
    }
}

// Keys 0..last of a page, as attention sees them -> out [2, head_dim]. NaN among a channel's keys makes it NaN.
template <class T>
void bound_page(const KVLayout& layout, const uint8_t* head, int64_t last, T* out) {
    int64_t dim = layout.head_dim;
    alignas(64) float least[kMaxKvHeadDim + W], most[kMaxKvHeadDim + W], key[kMaxKvHeadDim + W];
    KVRow row;
    for (int64_t offset = 0; offset <= last; ++offset) {
        fetch_row(layout, layout.k, head, offset, row);
        decode_row(layout.k, row, dim, offset ? key : least);
        if (offset == 0) memcpy(most, least, dim * sizeof(float));
        else for (int64_t i = 0; i < dim; i += W) {
            vf v = load(key + i), low = load(least + i), high = load(most + i);
            store(least + i, ((v < low) | (v != v)) ? v : low);
            store(most + i, ((v > high) | (v != v)) ? v : high);
        }
    }
    store_bounds(out, least, dim, false);
    store_bounds(out + dim, most, dim, true);
}

template <class T>
void bound_pages(const KVLayout& layout, void* cache, const Slot* slots, int64_t count, T* bounds) {
    parallel(count * layout.kv_heads, count * layout.kv_heads * layout.block_size * layout.head_dim / 2,
             [=, &layout](int64_t unit) {
        int64_t slot = slots[unit / layout.kv_heads].value, h = unit % layout.kv_heads;
        int64_t page = slot / layout.block_size * layout.kv_heads + h;
        bound_page(layout, layout.head(cache, slot, h), slot % layout.block_size, bounds + page * 2 * layout.head_dim);
    });
}

}  // namespace
}  // namespace SERVD_ISA

// bounds [num_blocks, kv_heads, 2, head_dim] float32 or bfloat16, contiguous; layout: KVLayout. Returns 1 for a slot
// outside the cache; then nothing was written.
SERVD_EXPORT(page_bounds)(void* cache, const void* layout, int64_t num_blocks, const int64_t* slots,
                          int64_t num_tokens, void* bounds, int dtype) {
    using namespace SERVD_ISA;
    const KVLayout& kv = *static_cast<const KVLayout*>(layout);
    Scratch<Slot> written(num_tokens);
    int64_t count = 0;
    for (int64_t t = 0; t < num_tokens; ++t) {
        if (slots[t] < -1 || slots[t] >= num_blocks * kv.block_size) return 1;
        if (slots[t] >= 0) written.data[count++] = {slots[t]};
    }
    count = last_of_pages(written.data, count, kv.block_size);
    if (dtype == kFloat32) bound_pages(kv, cache, written.data, count, static_cast<float*>(bounds));
    else bound_pages(kv, cache, written.data, count, static_cast<bf16*>(bounds));
    return 0;
}
