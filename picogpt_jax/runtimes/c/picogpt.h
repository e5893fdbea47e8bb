/* A GPT in integers from end to end: the reference in C99, which needs no library, no float, no memory.
 *
 * The arithmetic is "Version 2" of picogpt_jax/int8/README.md, the draws "Drawing a token": the same bits of every
 * logit and the same text as in every other runtime.
 *
 *     static PICOGPT_MEMORY(chunk) memory;
 *     picogpt_init(&state, &model, memory.words, memory.bytes, chunk);
 *     picogpt_start(&state, prompt, length);
 *     for (index = 0; index < count; index++) {
 *         id = picogpt_draw(state.logits, model.vocab_size, &sampling, stream, index);
 *         picogpt_next(&state, id);
 *     }
 */
#ifndef PICOGPT_H
#define PICOGPT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Tensors of one kind, of all layers one after the other. */
typedef struct {
    const int8_t *codes;     /* [layers, outputs, inputs] */
    const int8_t *exponents; /* [layers, outputs], or [layers] where the model is not per channel */
    const int32_t *biases;   /* [layers, outputs], or 0 */
    const int32_t *sums;     /* [layers, outputs], of each row of codes; 0 for wpe */
} picogpt_matrix;

typedef struct {
    const int16_t *mantissas; /* [layers, n_embd] */
    const int8_t *exponents;  /* [layers] */
    const int32_t *biases;    /* [layers, n_embd], or 0 */
} picogpt_norm;

typedef struct {
    int32_t n_layer, n_head, n_embd, n_hidden, block_size, vocab_size;
    int32_t is_relu, is_per_channel;
    uint32_t digest; /* what picogpt_digest gives */
    picogpt_matrix wte, wpe, c_attn, attn_c_proj, c_fc, mlp_c_proj;
    picogpt_norm ln_1, ln_2, ln_f;
} picogpt_model;

/* One text. All of it but `logits` and `position` is of interest to picogpt.c alone. */
typedef struct {
    const picogpt_model *model;
    int32_t *logits;  /* [vocab_size], 10 fraction bits: of the token after the last one */
    int32_t position; /* tokens in the cache */
    int32_t chunk, root_bits, root, layers;
    const int32_t *layers_before; /* see picogpt_share */
    int32_t *ids, *x, *wide, *exponents, *scores, *heads, *head_exponents;
    uint8_t *keys, *values, *codes; /* keys and codes are 128 above what they say, values have a sign */
    int8_t *key_exponents, *value_exponents, *query;
} picogpt_state;

typedef struct {
    int32_t is_greedy;   /* the likeliest token, whatever the rest says */
    uint32_t multiplier; /* round(131072 log2(e) / temperature): 189097 at temperature 1 */
    uint32_t top_k;      /* 0: all */
    uint32_t seed;
} picogpt_sampling;

/* The memory of a text: two arrays, whose lengths these are. `chunk` tokens of a prompt are computed at a time, 1 to
 * 256; 1 takes the least memory. */
#define PICOGPT_WORDS(n_head, n_embd, n_hidden, block_size, vocab_size, chunk) \
    ((size_t)(chunk) * ((size_t)(n_embd) + PICOGPT_MAX(3 * (size_t)(n_embd), (size_t)(n_hidden)) + 1) + \
     (size_t)(n_embd) + (size_t)(n_head) + (size_t)(vocab_size) + 2 * (size_t)(block_size))
#define PICOGPT_BYTES(n_layer, n_head, n_embd, n_hidden, block_size, chunk) \
    (2 * (size_t)(n_layer) * (size_t)(block_size) * ((size_t)(n_embd) + (size_t)(n_head)) + \
     (size_t)(chunk) * (size_t)(n_hidden) + (size_t)(n_embd))
#define PICOGPT_MAX(a, b) ((a) > (b) ? (a) : (b))
void picogpt_memory(const picogpt_model *model, int32_t chunk, size_t lengths[2]);

/* Reads the model that `bytes` hold, a file model.bin, whose weights stay where they are: 4-byte aligned, on a
 * little-endian machine. Returns 0 where it is none. */
int picogpt_open(picogpt_model *model, const void *bytes, size_t length);
#define PICOGPT_MAGIC 0x54504770u /* "pGPT" */
#define PICOGPT_HEADER_WORDS 12
#define PICOGPT_ALIGNMENT 64 /* bytes, of the codes */

void picogpt_init(picogpt_state *state, const picogpt_model *model, int32_t *words, uint8_t *bytes, int32_t chunk);

/* Begins a text with a prompt, at least one token, of which the last block_size are seen. Ids are below vocab_size. */
void picogpt_start(picogpt_state *state, const int32_t *ids, int32_t count);

/* Adds a token. A full cache goes on with its newest half (`--overflow=refill`). */
void picogpt_next(picogpt_state *state, int32_t id);

/* Adds tokens that fit behind those in the cache; `logits` [rows, vocab_size] are of the last `rows` of them. */
void picogpt_forward(picogpt_state *state, const int32_t *ids, int32_t count, int32_t *logits, int32_t rows);

/* Two threads compute one prompt, where picogpt.c is compiled with -DPICOGPT_THREADS: `behind` has the tokens that follow
 * those of `state`, shares its cache, and waits for each layer's keys and values. Set the position of both, share, then
 * let each thread call picogpt_forward, `state` with at most `chunk` tokens. */
void picogpt_share(picogpt_state *behind, picogpt_state *state);

/* The token of `index` (from 0, the first after the prompt) in `stream` (a text of several). */
int32_t picogpt_draw(const int32_t *logits, int32_t vocab_size, const picogpt_sampling *sampling, uint32_t stream,
                     uint32_t index);

/* Draws tokens for `count` texts, streams from `stream` on, from `index` on. `ids`: the texts so far, `length` tokens each
 * and room for the new ones, `step` apart. Index 0 begins the texts. What is faster together is computed together.
 * `slides`: a full cache is computed anew for each token (`--overflow=slide`). */
void picogpt_generate(picogpt_state *const *texts, int32_t count, const picogpt_sampling *sampling, uint32_t stream,
                      uint32_t index, int32_t *ids, int32_t step, int32_t length, int32_t new_tokens, int32_t slides);

/* FNV-1a, 32 bits, of the logits and the draws of 16 tokens. A port that computes what it should gets model->digest. */
uint32_t picogpt_digest(picogpt_state *state);

#ifdef __cplusplus
}
#endif
#endif
