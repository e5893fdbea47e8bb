/* The products of picogpt.c for x86-64 processors with AVX-512 VNNI, through `-include avx512.h`; for others it is empty.
 *
 * The compiler finds the instruction by itself. What it does not find is that four products can be added up together:
 * rows of a small model are short, and half of the time goes into the sums of the lanes.
 */
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#include <immintrin.h>
#include <stdint.h>

static inline __m128i four_dots(const int8_t *a, int32_t a_step, const uint8_t *b, int32_t b_step, int32_t length)
{
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
    int32_t i = 0;
#define WHOLE(p) _mm256_loadu_si256((const __m256i *)(p))
#define PART(p) _mm256_maskz_loadu_epi8(0xFFFFFFFFu >> (32 - (length - i < 32 ? length - i : 32)), p)
#define ADD(sum, k, load, at) \
    sum = _mm256_dpbusd_epi32(sum, load(b + (k) * b_step + (at)), load(a + (k) * a_step + (at)));
#define ADD_FOUR(load, at) ADD(s0, 0, load, at) ADD(s1, 1, load, at) ADD(s2, 2, load, at) ADD(s3, 3, load, at)
    for (; i + 64 <= length; i += 64) {
        ADD_FOUR(WHOLE, i)
        ADD_FOUR(WHOLE, i + 32)
    }
    for (; i < length; i += 32) {
        ADD_FOUR(PART, i)
    }
    s0 = _mm256_hadd_epi32(_mm256_hadd_epi32(s0, s1), _mm256_hadd_epi32(s2, s3));
    return _mm_add_epi32(_mm256_castsi256_si128(s0), _mm256_extracti128_si256(s0, 1));
}

#define PICOGPT_PRODUCTS avx512_products
static inline void avx512_products(int32_t *restrict y, int32_t count, const int8_t *restrict a, int32_t a_step,
                                   const uint8_t *restrict b, int32_t b_step, int32_t length)
{
    int32_t o, i;
    for (o = 0; o + 4 <= count; o += 4, a += 4 * a_step, b += 4 * b_step)
        _mm_storeu_si128((__m128i *)(y + o), four_dots(a, a_step, b, b_step, length));
    for (; o < count; o++, a += a_step, b += b_step)
        for (y[o] = 0, i = 0; i < length; i++)
            y[o] += a[i] * b[i];
}
#endif
