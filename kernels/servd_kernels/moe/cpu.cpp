// Owns: the experts' feed-forward layers over packed weights, each expert's rows gathered and multiplied together.
// Does not know: how tokens are routed (route), nor the packed layout (dense_panels.hpp). The paper: Shazeer et al.,
// "Outrageously Large Neural Networks".
//
// A row is a pair (token, slot), numbered token * top_k + slot. Its sums are its own: neither the rows that share its
// expert nor its place among them change a bit, and a token adds its slots in ascending order.
#include "../common/activation.hpp"
#include "../common/dense_panels.hpp"
#include "../common/groups.hpp"

namespace SERVD_ISA {
namespace {

// X: what the tiles take, T where pairs are multiplied, else float.
template <class T, class X>
struct Experts {
    const T *gate_up, *down;
    const Groups& groups;
    const X* x;        // [rows in order][hidden]
    X* intermediate;   // [rows in order][width]
    float* parts;      // [tokens * top_k][hidden], by row number: before the weights
    int64_t hidden, width;
    int activation;
};

SERVD_INLINE int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// n values rounded to T, as the next product takes them.
template <class T, class X>
SERVD_INLINE void store_rounded(X* out, vf value, int64_t n) {
    if constexpr (std::is_same_v<T, X>) {
        if (n == W) store(out, value);
        else store_n(out, value, n);
    } else {
        T rounded[W];
        store(rounded, value);
        store_n(out, load(rounded), n);
    }
}

template <class T, class X>
void multiply_gate_up(const Experts<T, X>& call, int64_t expert, int64_t panel, int64_t first, int64_t rows) {
    alignas(64) float gates[kRowBlock * kPanel], sums[kRowBlock * kPanel];
    int64_t size = packed_depth<T>(call.hidden) * kPanel, column = panel * kPanel;
    int64_t all = call.groups.size(expert), start = call.groups.first(expert) + first;
    const T* weight = call.gate_up + (expert * panels_of(call.width) + panel) * 2 * size;
    const X* x = call.x + start * call.hidden;
    multiply_panel(x, call.hidden, first, rows, all, weight, call.hidden, gates, [](int64_t, int64_t) {});
    multiply_panel(x, call.hidden, first, rows, all, weight + size, call.hidden, sums, [&](int64_t row, int64_t height) {
        for (int64_t r = row; r < row + height; ++r) {
            X* out = call.intermediate + (start + r) * call.width + column;
            for (int64_t at = 0; at < lesser(int64_t(kPanel), call.width - column); at += W) {
                vf gate = activated(call.activation, load(gates + r * kPanel + at));
                store_rounded<T>(out + at, load(sums + r * kPanel + at) * gate,
                                 lesser(int64_t(W), call.width - column - at));
            }
        }
    });
}

template <class T, class X>
void multiply_down(const Experts<T, X>& call, int64_t expert, int64_t panel, int64_t first, int64_t rows) {
    alignas(64) float sums[kRowBlock * kPanel];
    int64_t column = panel * kPanel, columns = lesser(int64_t(kPanel), call.hidden - column);
    int64_t start = call.groups.first(expert) + first;
    const T* weight = call.down + (expert * panels_of(call.hidden) + panel) * packed_depth<T>(call.width) * kPanel;
    multiply_panel(call.intermediate + start * call.width, call.width, first, rows, call.groups.size(expert), weight,
                   call.width, sums, [&](int64_t row, int64_t height) {
        for (int64_t r = row; r < row + height; ++r)
            memcpy(call.parts + call.groups.order.data[start + r] * call.hidden + column, sums + r * kPanel,
                   columns * sizeof(float));
    });
}

// out[token] = sum over its slots of weight * part; a slot without an expert adds nothing.
template <class T>
void combine(const float* parts, const float* weights, const int32_t* ids, T* out, int64_t tokens, int64_t top_k,
             int64_t experts, int64_t hidden) {
    parallel(tokens, tokens * top_k * hidden / W, [=](int64_t token) {
        for (int64_t column = 0; column < hidden; column += W) {
            int64_t n = lesser(int64_t(W), hidden - column);
            vf total = {};
            for (int64_t row = token * top_k; row < (token + 1) * top_k; ++row)
                if (ids[row] >= 0 && ids[row] < experts) {
                    const float* part = parts + row * hidden + column;
                    total = fma(broadcast(weights[row]), n == W ? load(part) : load_n(part, n), total);
                }
            if (n == W) store(out + token * hidden + column, total);
            else store_n(out + token * hidden + column, total, n);
        }
    });
}

template <class T, class X>
void compute(const Experts<T, X>& call) {
    int64_t work = call.groups.rows() * call.hidden * call.width / 8;
    for_group_blocks(call.groups, panels_of(call.width), kRowBlock, 2 * work,
                     [&](int64_t expert, int64_t panel, int64_t first, int64_t rows) {
                         multiply_gate_up(call, expert, panel, first, rows);
                     });
    for_group_blocks(call.groups, panels_of(call.hidden), kRowBlock, work,
                     [&](int64_t expert, int64_t panel, int64_t first, int64_t rows) {
                         multiply_down(call, expert, panel, first, rows);
                     });
}

template <class T, class X>
void gather(const T* x, int64_t x_stride, const Groups& groups, int64_t top_k, int64_t hidden, X* out) {
    parallel(groups.rows(), groups.rows() * hidden / W, [&](int64_t place) {
        const T* row = x + groups.order.data[place] / top_k * x_stride;
        if constexpr (std::is_same_v<T, X>) memcpy(out + place * hidden, row, hidden * sizeof(T));
        else widen_row(row, hidden, out + place * hidden);
    });
}

}  // namespace
}  // namespace SERVD_ISA

// x [tokens, hidden] with a row stride; gate_up and down: `experts` packed weights, [2 * width, hidden] with a gate and
// [hidden, width]; weights and ids [tokens, top_k]; out [tokens, hidden].
SERVD_EXPORT(moe)(const void* x, int64_t x_stride, const void* gate_up, const void* down, const float* weights,
                  const int32_t* ids, void* out, int64_t tokens, int64_t top_k, int64_t experts, int64_t hidden,
                  int64_t width, int activation, int dtype) {
    using namespace SERVD_ISA;
    return with_dtype(dtype, [=](auto tag) {
        using T = typename decltype(tag)::type;
        using X = std::conditional_t<IsPaired<T>::value, T, float>;
        Groups groups(ids, tokens * top_k, experts);
        Scratch<X> gathered(groups.rows() * hidden), intermediate(groups.rows() * width);
        Scratch<float> parts(tokens * top_k * hidden);
        gather(static_cast<const T*>(x), x_stride, groups, top_k, hidden, gathered.data);
        compute(Experts<T, X>{static_cast<const T*>(gate_up), static_cast<const T*>(down), groups, gathered.data,
                              intermediate.data, parts.data, hidden, width, activation});
        combine(parts.data, weights, ids, static_cast<T*>(out), tokens, top_k, experts, hidden);
        return 0;
    });
}
SERVD_RECORDABLE(moe)
