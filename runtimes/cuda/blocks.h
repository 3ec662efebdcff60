// ggml's blocks of quantised weights, eight values at a time (ggml-common.h and ggml-quants.c at the pinned version).
//
// Compiled twice: by nvcc into prompts.cu, and by a C++ compiler into a test, which holds it against gguf's own arithmetic.
#pragma once
#include <stdint.h>
#ifdef __CUDACC__
#include <cuda_fp16.h>
#define EACH_SIDE __host__ __device__ __forceinline__
#else
#define EACH_SIDE inline
#endif

EACH_SIDE float half_value(uint16_t bits) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(bits));
#else
    const float sign = bits & 0x8000 ? -1.0f : 1.0f;
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = exponent ? 1024.0f + fraction : (float) fraction;
    for (int i = exponent ? exponent : 1; i < 25; ++i) value *= 0.5f;
    for (int i = 25; i < exponent; ++i) value *= 2.0f;
    return sign * value;
#endif
}

// 256 values of 4 bits: d and dmin, 6-bit scales and minima of 8 groups of 32, then two groups in each 32 bytes.
struct Q4K {
    static constexpr int VALUES = 256, BYTES = 144;

    static EACH_SIDE void unpack(const uint8_t *block, int eighth, float *out) {
        const uint32_t *head = (const uint32_t *) block;
        const int group = eighth >> 2, shift = 8 * (group & 3);
        const uint32_t first = head[1] >> shift & 255, second = head[2] >> shift & 255, third = head[3] >> shift & 255;
        const uint32_t scale = group < 4 ? first & 63 : (third & 15) | (first >> 6) << 4;
        const uint32_t least = group < 4 ? second & 63 : third >> 4 | (second >> 6) << 4;
        const float d = half_value(head[0] & 65535) * scale, m = half_value(head[0] >> 16) * least;
        const uint32_t *words = (const uint32_t *) (block + 16 + 32 * (group >> 1) + 8 * (eighth & 3));
        for (int i = 0; i < 8; ++i) out[i] = d * (words[i >> 2] >> (8 * (i & 3) + 4 * (group & 1)) & 15) - m;
    }
};

// 256 values of 6 bits: low halves, high pairs, 8-bit scales of 16 groups of 16, d.
struct Q6K {
    static constexpr int VALUES = 256, BYTES = 210;

    static EACH_SIDE void unpack(const uint8_t *block, int eighth, float *out) {
        const int half = eighth >> 4, quarter = eighth >> 2 & 3, at = 8 * (eighth & 3);
        const uint16_t *low = (const uint16_t *) (block + 64 * half + 32 * (quarter & 1) + at);
        const uint16_t *high = (const uint16_t *) (block + 128 + 32 * half + at);
        const int8_t scale = (int8_t) block[192 + 8 * half + 2 * quarter + at / 16];
        const float d = half_value(*(const uint16_t *) (block + 208)) * scale;
        for (int i = 0; i < 8; ++i) {
            const int byte = 8 * (i & 1);
            const int bits = (low[i >> 1] >> (byte + 4 * (quarter >> 1)) & 15) | (high[i >> 1] >> (byte + 2 * quarter) & 3) << 4;
            out[i] = d * (bits - 32);
        }
    }
};

// 32 values of 8 bits after their d.
struct Q80 {
    static constexpr int VALUES = 32, BYTES = 34;

    static EACH_SIDE void unpack(const uint8_t *block, int eighth, float *out) {
        const uint16_t *words = (const uint16_t *) (block + 2 + 8 * eighth);
        const float d = half_value(*(const uint16_t *) block);
        for (int i = 0; i < 8; ++i) out[i] = d * (int8_t) (words[i >> 1] >> 8 * (i & 1));
    }
};
