// Owns: how a token's numbers become codes and scales in a block of the paged cache, and back (kv_format.py in C++).
// Does not know: rotary embedding, attention, or how slots were assigned.
#pragma once
#include <type_traits>

#include "simd.hpp"

namespace SERVD_ISA {

constexpr int64_t kMaxKvHeadDim = 1024;  // rows are worked on in arrays on the stack

// The order of CODES in kv_format.py.
enum Code { kCodeFloat32, kCodeBFloat16, kCodeFloat16, kCodeFp8, kCodeInt8, kCodeInt4 };

// Offsets are in bytes from the beginning of a head's part of a block; num_params counts the numbers of one token.
struct KVSide {
    int64_t code, data_offset, params_offset, row_bytes, group, num_params, is_rotated, is_words;
};

// What `KVFormat.native_layout` hands over, in this order.
struct KVLayout {
    int64_t block_bytes, head_bytes, kv_heads, block_size, head_dim;
    KVSide k, v;
    uint8_t* head(void* cache, int64_t slot, int64_t head) const {
        return static_cast<uint8_t*>(cache) + slot / block_size * block_bytes + head * head_bytes;
    }
};

// A token's codes and parameters, before they go to their places. Vectors may write past the end of a row.
struct KVRow {
    alignas(64) uint8_t codes[kMaxKvHeadDim * 4 + 64];
    uint16_t params[kMaxKvHeadDim / 4];
};

template <class A, class B>
SERVD_INLINE void convert_row(const A* x, B* out, int64_t count) {
    if constexpr (std::is_same_v<A, B>) {
        memcpy(out, x, count * sizeof(A));
        return;
    }
    int64_t i = 0;
    for (; i + W <= count; i += W) store(out + i, load(x + i));
    if (i < count) store_n(out + i, load_n(x + i, count - i), count - i);
}

// --- the Hadamard transform ---------------------------------------------------------------------------

// One step of butterflies between lanes S apart, over x[0, padded).
template <int S>
SERVD_INLINE void butterfly_lanes(float* x, int64_t padded) {
    vi sign;
    for (int i = 0; i < W; ++i) sign[i] = i & S ? INT32_MIN : 0;
    for (int64_t i = 0; i < padded; i += W) {
        vf v = load(x + i);
        store(x + i, swap_lanes<S>(v) + (vf)((vi)v ^ sign));
    }
}

// `hadamard` of kv_format.py, in place; x has room up to a multiple of W.
SERVD_INLINE void hadamard(float* x, int64_t dim) {
    int64_t width = dim & -dim, padded = (dim + W - 1) / W * W;
    for (int64_t i = dim; i < padded; ++i) x[i] = 0.f;
    if (width > 1) butterfly_lanes<1>(x, padded);
    if (width > 2) butterfly_lanes<2>(x, padded);
    if constexpr (W > 4) if (width > 4) butterfly_lanes<4>(x, padded);
    if constexpr (W > 8) if (width > 8) butterfly_lanes<8>(x, padded);
    for (int64_t step = W; step < width; step *= 2)
        for (int64_t i = 0; i < dim; i += 2 * step)
            for (int64_t j = i; j < i + step; j += W) {
                vf first = load(x + j), second = load(x + j + step);
                store(x + j, first + second);
                store(x + j + step, first - second);
            }
    vf scale = broadcast(float(1.0 / __builtin_sqrt(double(width))));
    for (int64_t i = 0; i < padded; i += W) store(x + i, load(x + i) * scale);
}

// --- codes of 8 and 4 bits ----------------------------------------------------------------------------

SERVD_INLINE void store_bytes(uint8_t* p, vi v) {
    vb bytes = __builtin_convertvector(v, vb);
    memcpy(p, &bytes, sizeof bytes);
}

SERVD_INLINE vu load_bytes(const uint8_t* p) {
    vb bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, vu);
}

// To nearest even, for |v| < 2^22; NaN becomes 0.
SERVD_INLINE vi round_to_int(vf v) {
    const vf magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    return (v == v) ? (vi)(v + magic) - (vi)magic : vi{};
}

SERVD_INLINE vf clamp(vf v, float low, float high) {
    v = v < low ? broadcast(low) : v;
    return v > high ? broadcast(high) : v;  // NaN stays
}

// float32 in [-448, 448] or NaN -> fp8 e4m3 (OCP: no infinity, NaN is 0x7F), to nearest even.
SERVD_INLINE vi encode_e4m3(vf x) {
    vu bits = (vu)x, rest = bits & 0x7FFFFFFF;
    vu normal = ((rest + 0x7FFFF + ((rest >> 20) & 1)) >> 20) - (120 << 3);
    // Below 2^-6 the adder rounds to multiples of 2^-9: 2^14 has that unit in its last place.
    vu subnormal = (vu)((vf)rest + 16384.f) - 0x46800000;
    vu code = rest < 0x3C800000 ? subnormal : normal;
    code = rest > 0x7F800000 ? vu{} + 0x7F : code;
    return (vi)(code | ((bits >> 24) & 0x80));
}

SERVD_INLINE vf decode_e4m3(vu bits) {
    vu rest = bits & 0x7F;
    vf subnormal = __builtin_convertvector((vi)rest, vf) * 0.001953125f;  // multiples of 2^-9
    vu magnitude = rest < 8 ? (vu)subnormal : (rest << 20) + (120u << 23);
    magnitude = rest == 0x7F ? vu{} + 0x7FC00000 : magnitude;
    return (vf)(magnitude | (bits & 0x80) << 24);
}

// The largest magnitude, or NaN if there is one: as integers the bits of a magnitude are in order, NaN above all.
SERVD_INLINE float largest_magnitude(const float* x, int64_t padded) {
    vi most = {};
    for (int64_t i = 0; i < padded; i += W) {
        vi bits = (vi)load(x + i) & 0x7FFFFFFF;
        most = bits > most ? bits : most;
    }
    int32_t bits = max_lanes(most);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// One float16 scale for the row: largest magnitude / 127.
SERVD_INLINE void encode_int8(const float* x, int64_t padded, KVRow& row) {
    row.params[0] = float_to_half(largest_magnitude(x, padded) / 127.f);
    float scale = half_to_float(row.params[0]);
    for (int64_t i = 0; i < padded; i += W) {
        vf v = scale == 0.f ? vf{} : clamp(load(x + i) / scale, -127.f, 127.f);
        store_bytes(row.codes + i, round_to_int(v));
    }
}

// One float16 scale for the row: that number of the top octave for the largest magnitude with which the squared error
// is least, see `_encode_fp8` of kv_format.py. x is zero from head_dim to padded.
SERVD_INLINE void encode_fp8(const float* x, int64_t padded, KVRow& row) {
    float most = largest_magnitude(x, padded), best = 0.f;
    uint8_t trial[kMaxKvHeadDim + W];
    for (int limit = 448; limit >= 256; limit -= 32) {
        uint16_t stored = float_to_half(most / float(limit));
        float scale = half_to_float(stored);
        vf error = {};
        for (int64_t i = 0; i < padded; i += W) {
            vf v = load(x + i);
            vi code = encode_e4m3(scale == 0.f ? vf{} : clamp(v / scale, -448.f, 448.f));
            store_bytes(trial + i, code);
            vf off = fma(decode_e4m3((vu)code), broadcast(scale), -v);
            error += off * off;
        }
        float sum = sum_lanes(error);
        if (limit == 448 || sum < best) {
            best = sum;
            row.params[0] = stored;
            memcpy(row.codes, trial, padded);
        }
    }
}

// The sums over a group that tell how well a scale and a minimum suit it, and which would suit its codes best.
struct GroupSums {
    float error, codes, squares, products;  // of squared errors; of c, c * c, c * (x - mean)
};

// Codes 0..15 of a group under a scale and a minimum. Lanes from `group` on count for nothing.
SERVD_INLINE GroupSums encode_group_with(const float* x, int64_t group, float mean, float scale, float minimum,
                                         uint8_t* numbers) {
    vf error = {}, codes = {}, squares = {}, products = {};
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    for (int64_t i = 0; i < group; i += W) {
        vi is_in = lane < int32_t(lesser(group - i, int64_t(W)));
        vf v = load(x + i);
        vi number = scale == 0.f ? vi{} : round_to_int(clamp((v - minimum) / scale, 0.f, 15.f));
        store_bytes(numbers + i, number);
        vf c = __builtin_convertvector(number, vf), off = fma(c, broadcast(scale), minimum - v);
        error += is_in ? off * off : vf{};
        codes += is_in ? c : vf{};
        squares += is_in ? c * c : vf{};
        products += is_in ? c * (v - mean) : vf{};
    }
    return {sum_lanes(error), sum_lanes(codes), sum_lanes(squares), sum_lanes(products)};
}

constexpr int kFitPasses = 3;  // FIT_PASSES of kv_format.py, which tells the method

// Codes 0..15 above the minimum of a group, one a byte; params: scale, minimum. x and numbers have room for W more.
SERVD_INLINE void encode_group(const float* x, int64_t group, uint8_t* numbers, uint16_t* params) {
    vf least = broadcast(x[0]), most = least, total = {};
    vi is_nan = {};
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    for (int64_t i = 0; i < group; i += W) {
        vi is_in = lane < int32_t(lesser(group - i, int64_t(W)));
        vf v = is_in ? load(x + i) : broadcast(x[0]);
        least = v < least ? v : least;
        most = v > most ? v : most;
        is_nan |= v != v;
        total += is_in ? v : vf{};
    }
    float low = -max_lanes(-least), high = max_lanes(most), count = float(group);
    if (max_lanes(is_nan & 1)) low = high = __builtin_nanf("");
    float mean = sum_lanes(total) / count, scale = (high - low) / 15.f, minimum = low, best = 0.f;
    for (int fit = 0; fit <= kFitPasses; ++fit) {
        uint16_t stored[2] = {float_to_half(scale), float_to_half(minimum)};
        uint8_t trial[64 + W];
        GroupSums sums =
            encode_group_with(x, group, mean, half_to_float(stored[0]), half_to_float(stored[1]), trial);
        if (fit == 0 || sums.error < best) {
            best = sums.error;
            memcpy(numbers, trial, group);
            memcpy(params, stored, sizeof stored);
        }
        float average = sums.codes / count, spread = sums.squares - sums.codes * average;
        scale = sums.products / (spread > 1e-9f ? spread : 1e-9f);
        minimum = mean - average * scale;
    }
}

SERVD_INLINE void encode_int4(const float* x, int64_t head_dim, int64_t group, KVRow& row) {
    uint8_t numbers[kMaxKvHeadDim];
    for (int64_t g = 0; g < head_dim / group; ++g)
        encode_group(x + g * group, group, numbers + g * group, row.params + 2 * g);
    for (int64_t i = 0; i < head_dim / 2; ++i)
        row.codes[i] = uint8_t(numbers[2 * i] | numbers[2 * i + 1] << 4);
}

// --- rows ---------------------------------------------------------------------------------------------

template <class T>
SERVD_INLINE void encode_plain(const T* x, int64_t code, int64_t count, uint8_t* out) {
    if (code == kCodeFloat32) convert_row(x, reinterpret_cast<float*>(out), count);
    else if (code == kCodeBFloat16) convert_row(x, reinterpret_cast<bf16*>(out), count);
    else convert_row(x, reinterpret_cast<f16*>(out), count);
}

// values[i] = x[order[i]], in place.
SERVD_INLINE void reorder(float* values, const int32_t* order, int64_t head_dim) {
    float x[kMaxKvHeadDim];
    memcpy(x, values, head_dim * sizeof(float));
    for (int64_t i = 0; i < head_dim; ++i) values[i] = x[order[i]];
}

// `encode` of kv_format.py, after the transform if the code is rotated. x is [head_dim]; order [head_dim] or null:
// of the dimensions before the transform.
template <class T>
void encode_row(const KVSide& side, const T* x, const int32_t* order, int64_t head_dim, KVRow& row) {
    if (side.code <= kCodeFloat16 && !side.is_rotated) return encode_plain(x, side.code, head_dim, row.codes);
    alignas(64) float values[kMaxKvHeadDim + W];
    int64_t padded = (head_dim + W - 1) / W * W;
    convert_row(x, values, head_dim);
    for (int64_t i = head_dim; i < padded; ++i) values[i] = 0.f;
    if (side.is_rotated) {
        if (order) reorder(values, order, head_dim);
        hadamard(values, head_dim);
    }
    switch (side.code) {
        case kCodeFp8: return encode_fp8(values, padded, row);
        case kCodeInt8: return encode_int8(values, padded, row);
        case kCodeInt4: return encode_int4(values, head_dim, side.group, row);
        default: return encode_plain(values, side.code, head_dim, row.codes);
    }
}

// Puts a row to its places in the head's part of a block; `offset`: of the token in the block.
SERVD_INLINE void place_row(const KVLayout& layout, const KVSide& side, const KVRow& row, uint8_t* head,
                            int64_t offset) {
    uint8_t* data = head + side.data_offset;
    if (side.is_words)
        for (int64_t w = 0; w < side.row_bytes / 4; ++w)
            memcpy(data + (w * layout.block_size + offset) * 4, row.codes + w * 4, 4);
    else memcpy(data + offset * side.row_bytes, row.codes, side.row_bytes);
    uint8_t* params = head + side.params_offset;
    for (int64_t p = 0; p < side.num_params; ++p)
        memcpy(params + (p * layout.block_size + offset) * 2, row.params + p, 2);
}

SERVD_INLINE void fetch_row(const KVLayout& layout, const KVSide& side, const uint8_t* head, int64_t offset,
                            KVRow& row) {
    const uint8_t* data = head + side.data_offset;
    if (side.is_words)
        for (int64_t w = 0; w < side.row_bytes / 4; ++w)
            memcpy(row.codes + w * 4, data + (w * layout.block_size + offset) * 4, 4);
    else memcpy(row.codes, data + offset * side.row_bytes, side.row_bytes);
    const uint8_t* params = head + side.params_offset;
    for (int64_t p = 0; p < side.num_params; ++p)
        memcpy(row.params + p, params + (p * layout.block_size + offset) * 2, 2);
}

SERVD_INLINE void decode_int4(const KVRow& row, int64_t head_dim, int64_t group, float* out) {
    uint8_t numbers[kMaxKvHeadDim + 64];
    for (int64_t i = 0; i < head_dim / 2; ++i) {
        numbers[2 * i] = row.codes[i] & 15;
        numbers[2 * i + 1] = row.codes[i] >> 4;
    }
    for (int64_t g = 0; g < head_dim / group; ++g) {
        vf scale = broadcast(half_to_float(row.params[2 * g]));
        vf minimum = broadcast(half_to_float(row.params[2 * g + 1]));
        for (int64_t i = g * group; i < (g + 1) * group; i += W)
            store(out + i, __builtin_convertvector((vi)load_bytes(numbers + i), vf) * scale + minimum);
    }
}

// `decode` of kv_format.py: rotated still if the code is. out has room for head_dim + W.
SERVD_INLINE void decode_row(const KVSide& side, const KVRow& row, int64_t head_dim, float* out) {
    switch (side.code) {
        case kCodeFloat32: return convert_row(reinterpret_cast<const float*>(row.codes), out, head_dim);
        case kCodeBFloat16: return convert_row(reinterpret_cast<const bf16*>(row.codes), out, head_dim);
        case kCodeFloat16: return convert_row(reinterpret_cast<const f16*>(row.codes), out, head_dim);
        default: break;
    }
    if (side.code == kCodeInt4) return decode_int4(row, head_dim, side.group, out);
    vf scale = broadcast(half_to_float(row.params[0]));
    for (int64_t i = 0; i < head_dim; i += W) {
        vu bits = load_bytes(row.codes + i);
        vf number = side.code == kCodeFp8 ? decode_e4m3(bits) : __builtin_convertvector((vi)(bits << 24) >> 24, vf);
        store(out + i, number * scale);
    }
}

}  // namespace SERVD_ISA
