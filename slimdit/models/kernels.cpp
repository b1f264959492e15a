// What stands between two matrix products of a block, in one pass, for CPUs with AVX-512 and its bfloat16 products:
// softmax attention, and GELU with the rounding to 8 bits. `kernels.py` says what the functions are given.
#include <immintrin.h>

#include <cmath>
#include <cstdint>

using bf16 = uint16_t;

namespace {

constexpr int LANES = 16;             // floats of a register
constexpr int COLUMNS = 4;            // registers of columns of a tile of a product
constexpr int ROWS = 6;               // its rows: 6 x 4 sums, 4 columns and 1 row's pair fill 32 registers
constexpr long KEYS = COLUMNS * LANES;  // scores are computed for so many keys at a time
constexpr long AHEAD = 12;              // rows to prefetch
constexpr float SMALLEST_STEP = 1.17549435e-38f;

__mmask16 first(long count) { return count >= LANES ? 0xFFFF : (1u << (count < 0 ? 0 : count)) - 1; }

__m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

__m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

__m512 load(const bf16* from, long count) { return widen(_mm256_maskz_loadu_epi16(first(count), from)); }

void store(bf16* to, __m512 x, long count) { _mm256_mask_storeu_epi16(to, first(count), narrow(x)); }

// A row's numbers as a layer means them: from * step + bias, or from itself without a step.
__m512 meant(const bf16* from, const float* step, const bf16* bias, long count) {
    __m512 x = load(from, count);
    if (step) x = _mm512_mul_ps(x, _mm512_set1_ps(*step));
    return bias ? _mm512_add_ps(x, load(bias, count)) : x;
}

// exp(x) for x <= 0 as 2^n times a polynomial of 2^f, |f| <= 1/2: to 4e-5, below the steps of bfloat16.
__m512 exp_nonpositive(__m512 x) {
    const __m512 y = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.f)), _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(y, n);
    __m512 p = _mm512_set1_ps(0.00961813f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0555041f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2402265f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931472f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(p, n);
}

// A tile of a b: R rows of `pairs` pairs of bfloat16 times (pairs, columns, 2), C registers of columns. Inlined and its
// loops unrolled, with those around it, or the sums would live in memory.
template <int R, int C>
[[gnu::always_inline]] inline void tile(const bf16* a, long a_stride, const bf16* b, long b_stride, long pairs,
                                        __m512 (&sums)[R][C]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
    for (long k = 0; k < pairs; ++k) {
        __m512bh columns[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) columns[c] = (__m512bh)_mm512_load_si512(b + k * b_stride + c * 2 * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(((const int32_t*)(a + r * a_stride))[k]);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], pair, columns[c]);
        }
    }
}

// One head of one image. Sizes ending in `padded` count zeros up to whole registers.
struct Head {
    long tokens, tokens_padded, size, size_padded;
    bf16 *q;       // (tokens, size_padded), divided by sqrt(size)
    bf16 *k;       // (size_padded / 2, tokens_padded, 2)
    bf16 *v;       // (tokens_padded / 2, size_padded, 2)
    float *scores; // (ROWS, tokens_padded)
    bf16 *shares;  // (ROWS, tokens_padded): exp(score - largest)

    Head(long tokens, long size)
        : tokens(tokens), tokens_padded((tokens + KEYS - 1) / KEYS * KEYS), size(size),
          size_padded((size + LANES - 1) / LANES * LANES) {
        q = numbers<bf16>(tokens * size_padded);
        k = numbers<bf16>(tokens_padded * size_padded);
        v = numbers<bf16>(tokens_padded * size_padded);
        scores = numbers<float>(ROWS * tokens_padded);
        shares = numbers<bf16>(ROWS * tokens_padded);
    }

    ~Head() { _mm_free(q), _mm_free(k), _mm_free(v), _mm_free(scores), _mm_free(shares); }
    Head(const Head&) = delete;

    template <typename T> static T* numbers(long count) { return (T*)_mm_malloc(sizeof(T) * count, 64); }

    // From rows of q, k and v, each `inner` numbers after the last, rows 3 * inner apart.
    void read(const bf16* from, const float* steps, const bf16* bias, long inner) {
        const __m512 shrink = _mm512_set1_ps(1.f / std::sqrt((float)size));
        for (long i = 0; i < tokens_padded; i += 2)
            for (long c = 0; c < size_padded; c += LANES) {
                __m512 keys[2], values[2];
                for (int odd = 0; odd < 2; ++odd) {
                    const long row = i + odd;
                    for (int which = 0; which < 3; ++which)  // rows lie too far apart for the CPU to guess the next
                        _mm_prefetch(from + (row + AHEAD) * 3 * inner + which * inner + c, _MM_HINT_T0);
                    if (row >= tokens) {
                        keys[odd] = values[odd] = _mm512_setzero_ps();
                        continue;
                    }
                    auto part = [&](int which) {
                        return meant(from + row * 3 * inner + which * inner + c, steps ? steps + row : nullptr,
                                     bias ? bias + which * inner + c : nullptr, size - c);
                    };
                    store(q + row * size_padded + c, _mm512_mul_ps(part(0), shrink), LANES);
                    keys[odd] = part(1), values[odd] = part(2);
                }
                const __m512i even = _mm512_cvtepu16_epi32(narrow(values[0]));
                const __m512i odd = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(values[1])), 16);
                _mm512_store_si512(v + i * size_padded + 2 * c, _mm512_or_si512(even, odd));
                alignas(64) int32_t pairs[2][LANES / 2];
                for (int j = 0; j < 2; ++j) _mm256_store_si256((__m256i*)pairs[j], narrow(keys[j]));
                for (int pair = 0; pair < LANES / 2; ++pair)
                    for (int j = 0; j < 2; ++j)
                        ((int32_t*)(k + (c / 2 + pair) * 2 * tokens_padded))[i + j] = pairs[j][pair];
            }
    }

    // R tokens, from the first on, mixed: (R, size), rows `stride` apart.
    template <int R> void mix(long token, bf16* to, long stride) {
        for (long j = 0; j < tokens_padded; j += KEYS) {
            __m512 sums[R][COLUMNS];
            tile<R, COLUMNS>(q + token * size_padded, size_padded, k + 2 * j, 2 * tokens_padded, size_padded / 2, sums);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < COLUMNS; ++c) _mm512_store_ps(scores + r * tokens_padded + j + c * LANES, sums[r][c]);
        }
        float inverse[R];
        for (int r = 0; r < R; ++r) inverse[r] = 1.f / exponentiate(r);
        long c = 0;
        for (; c + COLUMNS * LANES <= size_padded; c += COLUMNS * LANES) out<R, COLUMNS>(c, inverse, to, stride);
        switch ((size_padded - c) / LANES) {
            case 3: out<R, 3>(c, inverse, to, stride); break;
            case 2: out<R, 2>(c, inverse, to, stride); break;
            case 1: out<R, 1>(c, inverse, to, stride); break;
        }
    }

    // A row of scores to shares, not yet divided by their sum, which is returned.
    float exponentiate(int r) {
        float* row = scores + r * tokens_padded;
        for (long j = tokens; j < tokens_padded; ++j) row[j] = -INFINITY;
        __m512 largest[2] = {_mm512_load_ps(row), _mm512_load_ps(row)};
        for (long j = 0; j < tokens_padded; j += 2 * LANES)
            for (int half = 0; half < 2; ++half)
                largest[half] = _mm512_max_ps(largest[half], _mm512_load_ps(row + j + half * LANES));
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(largest[0], largest[1])));
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (long j = 0; j < tokens_padded; j += 2 * LANES) {
            __m512 share[2];
            for (int half = 0; half < 2; ++half) {
                share[half] = exp_nonpositive(_mm512_sub_ps(_mm512_load_ps(row + j + half * LANES), top));
                sum[half] = _mm512_add_ps(sum[half], share[half]);
            }
            _mm512_store_si512(shares + r * tokens_padded + j, (__m512i)_mm512_cvtne2ps_pbh(share[1], share[0]));
        }
        return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
    }

    template <int R, int C> void out(long column, const float (&inverse)[R], bf16* to, long stride) {
        __m512 sums[R][C];
        tile<R, C>(shares, tokens_padded, v + 2 * column, 2 * size_padded, tokens_padded / 2, sums);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c)
                store(to + r * stride + column + c * LANES, _mm512_mul_ps(sums[r][c], _mm512_set1_ps(inverse[r])),
                      size - column - c * LANES);
    }
};

// GELU by a polynomial: within 0.001 for |x| <= 4 and 0.0003 |x| beyond, a fraction of the 8-bit steps that follow.
// sigmoid(2 u(x)) - 1/2 by odd powers of x: least squares, reweighted until the error of x times it was even.
__m512 coarse_gelu(__m512 x) {
    const __m512 inside = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-4.f)), _mm512_set1_ps(4.f));
    const __m512 square = _mm512_mul_ps(inside, inside);
    __m512 odd = _mm512_set1_ps(-3.63831e-07f);
    odd = _mm512_fmadd_ps(odd, square, _mm512_set1_ps(2.18662e-05f));
    odd = _mm512_fmadd_ps(odd, square, _mm512_set1_ps(-0.000543541f));
    odd = _mm512_fmadd_ps(odd, square, _mm512_set1_ps(0.00735417f));
    odd = _mm512_fmadd_ps(odd, square, _mm512_set1_ps(-0.0611192f));
    odd = _mm512_fmadd_ps(odd, square, _mm512_set1_ps(0.395002f));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(odd, inside, _mm512_set1_ps(0.5f)));
}

}  // namespace

extern "C" void attend(const bf16* qkv, const float* steps, const bf16* bias, bf16* out, long images, long tokens,
                       long heads, long size) {
    const long inner = heads * size;
#pragma omp parallel
    {
        Head head(tokens, size);
#pragma omp for schedule(dynamic)
        for (long job = 0; job < images * heads; ++job) {
            const long image = job / heads, column = job % heads * size;
            head.read(qkv + image * tokens * 3 * inner + column, steps ? steps + image * tokens : nullptr,
                      bias ? bias + column : nullptr, inner);
            bf16* to = out + image * tokens * inner + column;
            long token = 0;
            for (; token + ROWS <= tokens; token += ROWS) head.mix<ROWS>(token, to + token * inner, inner);
            for (; token < tokens; ++token) head.mix<1>(token, to + token * inner, inner);
        }
    }
}

extern "C" void gelu_levels(const bf16* x, const float* steps, const bf16* bias, uint8_t* levels, float* level_steps,
                            long rows, long width) {
#pragma omp parallel
    {
        float* y = (float*)_mm_malloc(sizeof(float) * (width + LANES), 64);
#pragma omp for
        for (long i = 0; i < rows; ++i) {
            __m512 largest = _mm512_setzero_ps();
            for (long c = 0; c < width; c += LANES) {
                const __m512 value = coarse_gelu(meant(x + i * width + c, steps + i, bias ? bias + c : nullptr, width - c));
                largest = _mm512_max_ps(_mm512_abs_ps(value), largest);
                _mm512_store_ps(y + c, value);
            }
            // A step that is not a number reaches every output of the row through what follows the next product.
            const float step = std::fmax(_mm512_reduce_max_ps(largest) / 127.f, SMALLEST_STEP);
            level_steps[i] = std::isfinite(steps[i]) ? step : steps[i];
            const __m512 inverse = _mm512_set1_ps(1.f / step);
            for (long c = 0; c < width; c += LANES) {
                const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(y + c), inverse));
                _mm_mask_storeu_epi8(levels + i * width + c, first(width - c),
                                     _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, _mm512_set1_epi32(128))));
            }
        }
        _mm_free(y);
    }
}
