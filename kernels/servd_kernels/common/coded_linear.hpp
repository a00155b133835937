// Owns: x @ weight.T over coded weights: the walk over panels, segments of k and tiles of rows, and the last steps.
// Does not know: which op it serves. Sums are in float32, segment by segment in ascending order whatever the number
// of rows, so that a row's bits are its own (Goto & van de Geijn 2008, for the blocking).
#pragma once
#include "linear_end.hpp"

namespace SERVD_ISA {

constexpr int64_t kUnitRows = 64;  // rows of one unit of work: they and a panel share the second-level cache
constexpr int64_t kDirectRows = 4;  // up to here a panel is decoded in registers, once for each tile

// f(row, Count<n>) for tiles of even height: 9 rows as 5 + 4, since a tile's cost hardly falls with its height.
template <class F>
SERVD_INLINE void for_tiles(int64_t rows, F&& f) {
    int64_t row = 0;
    for (int64_t tiles = quotient_up(rows, kTileRows); tiles > 0; --tiles) {
        int height = int(quotient_up(rows - row, tiles));
        with_count<kTileRows>(height, [&](auto count) { f(row, count); });
        row += height;
    }
}

// What a call of a coded linear reads and writes. Scales, zeros and minima: [panels][groups][kCodePanel]. With a gate
// the panels of the gate and of the other matrix alternate.
struct CodedCall {
    const uint32_t* words;
    const void* scales;
    const uint8_t* zeros;
    const void* minima;
    int64_t m, k, group;  // group: columns of x that share a weight's scale
    int scale_dtype;
    LinearEnd end;
    const float* row_scales;  // [m], or null
    const float* sums;        // [m][segments], of x; null where no weight has an offset

    int64_t segment() const { return round_up(lesser(group, kMaxSegment), 8); }
    int64_t segments() const { return quotient_up(k, segment()); }
    bool has_offsets() const { return zeros || minima; }
};

struct Scales {
    vf scale[kTileVectors], offset[kTileVectors];
};

// Of weight = (number - centre) * scale + offset, where `number` is the code. Without zeros or minima the zero point
// is `middle`.
SERVD_INLINE Scales load_scales(const CodedCall& call, int64_t panel, int64_t group, float centre, float middle) {
    int64_t first = (panel * quotient_up(call.k, call.group) + group) * kCodePanel;
    Scales out;
    for (int v = 0; v < kTileVectors; ++v) {
        vf scale = load_any(call.scales, call.scale_dtype, first + v * W, W);
        vf zero = call.zeros ? load_bytes(call.zeros + first + v * W) : broadcast(middle);
        out.scale[v] = scale;
        out.offset[v] = (centre - zero) * scale;
        if (call.minima) {
            vf minimum = load_any(call.minima, call.scale_dtype, first + v * W, W);
            out.offset[v] = fma(broadcast(centre), scale, minimum);
        }
    }
    return out;
}

// totals [ROWS][kCodePanel] += scale * (x * weights) + offset * sums, over one segment. The weights are `decoded`, or
// null: then `words` are decoded in registers. Not inlined, for the registers' sake.
template <class Code, class X, int ROWS>
__attribute__((noinline)) void multiply_segment(const X* x, int64_t x_stride, const X* decoded, const uint32_t* words,
                                                int64_t depth, const Scales& scales, const float* sums,
                                                int64_t sum_stride, float* totals) {
    vf acc[ROWS][kTileVectors] = {};
    if constexpr (ROWS <= kDirectRows) {
        if (decoded) multiply_decoded<X, ROWS>(x, x_stride, decoded, depth, acc);
        else multiply_coded<Code, X, ROWS>(x, x_stride, words, depth, acc);
    } else {
        multiply_decoded<X, ROWS>(x, x_stride, decoded, depth, acc);
    }
    asm volatile("" ::: "memory");  // scales loaded before the loop would push sums out of the registers
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
            float* place = totals + r * kCodePanel + v * W;
            vf total = fma(scales.scale[v], acc[r][v], load(place));
            if (sums) total = fma(scales.offset[v], broadcast(sums[r * sum_stride]), total);
            store(place, total);
        }
    }
}

// totals [rows][kCodePanel] = x times a panel of the weight.
template <class Code, class X>
void multiply_coded_panel(const CodedCall& call, const X* x, int64_t x_stride, int64_t panel, int64_t first_row,
                          int64_t rows, float* totals) {
    alignas(64) X decoded[kMaxSegment * kCodePanel];
    int64_t depth = round_up(call.k, Code::kDepth), segment = call.segment(), segments = call.segments();
    const uint32_t* words = call.words + panel * (depth / Code::kDepth) * kCodePanel;
    bool is_decoded = rows > kDirectRows;
    memset(totals, 0, rows * kCodePanel * sizeof(float));
    for (int64_t s = 0; s < segments; ++s) {
        int64_t first = s * segment, length = lesser(segment, depth - first);
        const uint32_t* piece = words + first / Code::kDepth * kCodePanel;
        Scales scales = load_scales(call, panel, first / call.group, Code::kCentre, Code::kCentre);
        if (is_decoded) decode_panel<Code>(piece, length, decoded);
        for_tiles(rows, [&](int64_t row, auto count) {
            multiply_segment<Code, X, decltype(count)::value>(
                x + (first_row + row) * x_stride + first, x_stride, is_decoded ? decoded : nullptr, piece, length,
                scales, call.sums ? call.sums + (first_row + row) * segments + s : nullptr, segments,
                totals + row * kCodePanel);
        });
    }
    if (!call.row_scales) return;
    for (int64_t i = 0; i < rows * kCodePanel; i += W)
        store(totals + i, load(totals + i) * call.row_scales[first_row + i / kCodePanel]);
}

// A unit of work: multiply(weight panel, first row, rows, totals, done) computes totals [rows][kCodePanel], of the
// gate first where there is one, and calls done(row, height) for rows that are whole.
template <class Multiply>
SERVD_INLINE void panel_unit(const LinearEnd& end, int64_t m, int64_t panel, int64_t first_row, Multiply multiply) {
    alignas(64) float totals[kUnitRows * kCodePanel], gates[kUnitRows * kCodePanel];
    int64_t rows = lesser(kUnitRows, m - first_row), column = panel * kCodePanel;
    if (end.is_gated) multiply(panel * 2, first_row, rows, gates, [](int64_t, int64_t) {});
    prepare_rows(end, first_row, lesser(int64_t(kTileRows), rows), column, kCodePanel);
    multiply(end.is_gated ? panel * 2 + 1 : panel, first_row, rows, totals, [&](int64_t row, int64_t height) {
        finish_rows<kTileVectors>(end, first_row + row, height, column, totals + row * kCodePanel,
                                  end.is_gated ? gates + row * kCodePanel : nullptr);
        int64_t next = row + height;
        prepare_rows(end, first_row + next, lesser(int64_t(kTileRows), rows - next), column, kCodePanel);
    });
}

// f(panel, first row) for every unit of work of an [m, n] result.
template <class F>
SERVD_INLINE void for_units(int64_t m, const LinearEnd& end, int64_t k, F f) {
    int64_t blocks = quotient_up(m, kUnitRows);
    prefer_huge_pages(end.out, m * end.n * (end.out_dtype == kFloat32 ? 4 : 2));
    parallel(quotient_up(end.n, kCodePanel) * blocks, m * end.n * k / 8,
             [f, blocks](int64_t unit) { f(unit / blocks, unit % blocks * kUnitRows); });
}

// x [m, stride], padded with zeros to whole words of codes.
template <class Code, class X>
void coded_linear(const CodedCall& call, const X* x, int64_t x_stride) {
    for_units(call.m, call.end, call.k, [&call, x, x_stride](int64_t panel, int64_t first_row) {
        panel_unit(call.end, call.m, panel, first_row,
                   [&](int64_t weight_panel, int64_t first, int64_t rows, float* totals, auto done) {
                       multiply_coded_panel<Code>(call, x, x_stride, weight_panel, first, rows, totals);
                       done(0, rows);
                   });
    });
}

// What multiplies activations of type T: pairs of bfloat16 where the processor can, floats elsewhere.
template <class T>
using Operand = std::conditional_t<std::is_same<T, bf16>::value && kPairs, bf16, float>;

template <class T, class X>
SERVD_INLINE void copy_row(const T* x, int64_t k, int64_t depth, X* out) {
    if constexpr (std::is_same<T, X>::value) {
        memcpy(out, x, k * sizeof(X));
    } else {
        for (int64_t i = 0; i < k; i += W) {
            int64_t n = lesser(int64_t(W), k - i);
            store_n(out + i, load_n(x + i, n), n);
        }
    }
    memset(static_cast<void*>(out + k), 0, (depth - k) * sizeof(X));
}

// x of type T, as it comes: used in place where it can be.
template <class Code, class T>
void coded_linear_of(CodedCall call, const T* x, int64_t x_stride) {
    using X = Operand<T>;
    int64_t depth = round_up(call.k, Code::kDepth), segment = call.segment(), segments = call.segments();
    bool in_place = std::is_same<T, X>::value && depth == call.k;
    Scratch<X> own(in_place ? 0 : call.m * depth);
    Scratch<float> sums(call.has_offsets() ? call.m * segments : 0);
    if (call.has_offsets()) call.sums = sums.data;
    if (!in_place || call.has_offsets()) {
        parallel(call.m, call.m * call.k, [&](int64_t row) {
            const T* from = x + row * x_stride;
            if (!in_place) copy_row(from, call.k, depth, own.data + row * depth);
            if (call.has_offsets())
                for (int64_t s = 0; s < segments; ++s)
                    sums.data[row * segments + s] = sum_of(from + s * segment, lesser(segment, call.k - s * segment));
        });
    }
    if constexpr (std::is_same<T, X>::value)
        if (in_place) return coded_linear<Code, X>(call, x, x_stride);
    coded_linear<Code, X>(call, own.data, depth);
}

}  // namespace SERVD_ISA
