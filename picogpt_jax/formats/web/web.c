/* The model in a web page: picogpt.c with a product for WebAssembly's vectors, and what worker.js calls.
 *
 * Plain simd128: the relaxed instructions may round in another way on another machine. */

#include <wasm_simd128.h>

#include "picogpt.h"

/* Of an int8 row and a uint8 vector: both widened to 16 bits, whose products are added in pairs. */
static inline int32_t web_dot(const int8_t *restrict row, const uint8_t *restrict codes, int32_t count)
{
    v128_t sums = wasm_i32x4_const(0, 0, 0, 0);
    int32_t i, sum;
    for (i = 0; i + 16 <= count; i += 16) {
        const v128_t a = wasm_v128_load(row + i), b = wasm_v128_load(codes + i);
        const v128_t low = wasm_i32x4_dot_i16x8(wasm_i16x8_extend_low_i8x16(a), wasm_u16x8_extend_low_u8x16(b));
        const v128_t high = wasm_i32x4_dot_i16x8(wasm_i16x8_extend_high_i8x16(a), wasm_u16x8_extend_high_u8x16(b));
        sums = wasm_i32x4_add(sums, wasm_i32x4_add(low, high));
    }
    sum = wasm_i32x4_extract_lane(sums, 0) + wasm_i32x4_extract_lane(sums, 1) + wasm_i32x4_extract_lane(sums, 2) +
          wasm_i32x4_extract_lane(sums, 3);
    for (; i < count; i++)
        sum += row[i] * codes[i];
    return sum;
}

#define PICOGPT_PRODUCTS web_products
static inline void web_products(int32_t *restrict y, int32_t count, const int8_t *restrict a, int32_t a_step,
                                const uint8_t *restrict b, int32_t b_step, int32_t length)
{
    int32_t o;
    for (o = 0; o < count; o++, a += a_step, b += b_step)
        y[o] = web_dot(a, b, length);
}
#include "picogpt.c"

#define EXPORT __attribute__((visibility("default"), used))
enum { CHUNK = 32, PAGE = 65536 }; /* tokens at a time; bytes of a page of memory */

extern uint8_t __heap_base; /* of the linker: where its own data end */
static picogpt_model model;
static picogpt_state state;
static picogpt_sampling sampling;

/* Memory that stays; 0 where the browser gives no more. */
EXPORT void *web_reserve(size_t bytes)
{
    static size_t end;
    const size_t first = ((end ? end : (size_t)&__heap_base) + PICOGPT_ALIGNMENT - 1) / PICOGPT_ALIGNMENT * PICOGPT_ALIGNMENT;
    const size_t pages = (first + bytes + PAGE - 1) / PAGE, there = __builtin_wasm_memory_size(0);
    if (pages > there && __builtin_wasm_memory_grow(0, pages - there) == (size_t)-1)
        return 0;
    end = first + bytes;
    return (void *)first;
}

/* Opens the file model.bin. Returns 1 where this machine computes what the converter did. */
EXPORT int web_open(const void *bytes, size_t length)
{
    size_t lengths[2];
    int32_t *words;
    uint8_t *rest;
    if (!picogpt_open(&model, bytes, length))
        return 0;
    picogpt_memory(&model, CHUNK, lengths);
    words = web_reserve(lengths[0] * sizeof(int32_t));
    rest = web_reserve(lengths[1]);
    if (!words || !rest)
        return 0;
    picogpt_init(&state, &model, words, rest, CHUNK);
    return picogpt_digest(&state) == model.digest;
}

EXPORT int32_t *web_logits(void) { return state.logits; }

EXPORT void web_sample(int32_t is_greedy, uint32_t multiplier, uint32_t top_k, uint32_t seed)
{
    sampling = (picogpt_sampling){is_greedy, multiplier, top_k, seed};
}

/* Draws the token of an index behind `ids`: at index 0 the prompt, else the newest token alone. */
EXPORT void web_draw(int32_t *ids, int32_t length, uint32_t index)
{
    picogpt_state *text = &state;
    picogpt_generate(&text, 1, &sampling, 0, index, ids, 0, length, 1, 0);
}

/* Logits [count, vocab_size] of the tokens from `position` on in a window. */
EXPORT void web_forward(const int32_t *ids, int32_t position, int32_t count, int32_t *logits)
{
    state.position = position;
    picogpt_forward(&state, ids, count, logits, count);
}
