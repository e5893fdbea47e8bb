/* The model and the draws; picogpt.h says what there is, picogpt_jax/int8/README.md what is computed. */

#include "picogpt.h"

enum {
    LIMIT = 1 << 22,         /* of a fixed-point value */
    LARGEST = (1 << 23) - 1, /* of the residual stream */
    RESIDUAL_BITS = 10,
    HEAD_BITS = 12,
    NORM_BITS = 12,
    GELU_BITS = 8,
    OFFSET = 128,   /* of codes without a sign: of all activations but values */
    NEVER = -10000, /* below every exponent */
    LANES = 8,      /* values that are added up side by side */
    ROWS = 16       /* of a matrix, that several vectors meet in turn */
};

/* ---- integers ---- */

/* x / 2^s rounded down, s from 0 to 31. What C leaves open for a negative x is asked, and costs nothing. */
static inline int32_t floor_shift(int32_t x, int32_t s)
{
    if (-1 >> 1 == -1)
        return x >> s;
    return x < 0 ? ~(~x >> s) : x >> s;
}

static inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

static inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

static inline int32_t clip(int32_t x, int32_t limit) { return larger(smaller(x, limit), -limit); }

static inline int32_t magnitude(int32_t x) { return x < 0 ? -x : x; }

/* round(x / 2^s), halves up; to the left it saturates. No branch, so that loops of it become vector instructions. */
static inline int32_t shift(int32_t x, int32_t s)
{
    const int32_t right = smaller(larger(s, 0), 31), left = smaller(larger(-s, 0), 22);
    const int32_t half = (int32_t)(((uint32_t)1 << right) >> 1);
    const int32_t limit = left ? LIMIT >> left : 1 << 30;
    return floor_shift(clip(x, limit) + half, right) * ((int32_t)1 << left);
}

/* The length of a number in bits. */
static int32_t bits(uint32_t a)
{
    int32_t n = 0, step;
    for (step = 16; step; step >>= 1) {
        if (a >> step) {
            a >>= step;
            n += step;
        }
    }
    return n + (int32_t)a;
}

/* The largest integer whose square is at most n, by digits: additions alone. */
static uint32_t isqrt(uint64_t n)
{
    uint64_t root = 0, digit = (uint64_t)1 << 40;
    while (digit) {
        const uint64_t next = root + digit;
        root >>= 1;
        if (n >= next) {
            n -= next;
            root += digit;
        }
        digit >>= 2;
    }
    return (uint32_t)root;
}

static int32_t largest_magnitude(const int32_t *x, int32_t count)
{
    int32_t i, largest = 0;
    for (i = 0; i < count; i++)
        largest = larger(largest, magnitude(x[i]));
    return largest;
}

/* The smallest shift that makes codes of a vector whose largest magnitude this is. */
static int32_t fit(int32_t largest)
{
    const int32_t t = larger(bits((uint32_t)largest) - 7, 0);
    return t + (shift(largest, t) > 127);
}

/* Codes, each `offset` above what it says, and their exponent. */
static int32_t quantize(uint8_t *restrict codes, const int32_t *restrict u, int32_t count, int32_t offset)
{
    const int32_t t = fit(largest_magnitude(u, count));
    int32_t i;
    for (i = 0; i < count; i++)
        codes[i] = (uint8_t)(shift(u[i], t) + offset);
    return t;
}

/* y [count]: the products of `count` pairs of vectors of codes; of one of the two the step is 0: it is always the same.
 * Most of the time is spent here. A port may have a faster one. One of the vectors is without a sign: processors have an
 * instruction for such bytes, which compilers find in a loop as plain as this. */
#ifndef PICOGPT_PRODUCTS
#define PICOGPT_PRODUCTS products
static inline void products(int32_t *restrict y, int32_t count, const int8_t *restrict a, int32_t a_step,
                            const uint8_t *restrict b, int32_t b_step, int32_t length)
{
    int32_t o, i;
    for (o = 0; o < count; o++, a += a_step, b += b_step) {
        int32_t sum = 0;
        for (i = 0; i < length; i++)
            sum += a[i] * b[i];
        y[o] = sum;
    }
}
#endif

/* ---- the parts of the model ---- */

/* y [count, rows] of codes [count, columns] with their exponents e [count]. */
static void linear(const picogpt_matrix *matrix, int32_t layer, int32_t rows, int32_t columns, int32_t is_per_channel,
                   const uint8_t *restrict codes, const int32_t *restrict e, int32_t count, int32_t fraction_bits,
                   int32_t *restrict y)
{
    const size_t row = (size_t)layer * (size_t)rows;
    const int8_t *weights = matrix->codes + row * (size_t)columns;
    const int8_t *restrict exponents = matrix->exponents + (is_per_channel ? row : (size_t)layer);
    const int32_t *restrict biases = matrix->biases ? matrix->biases + row : 0;
    const int32_t *restrict sums = matrix->sums + row;
    int32_t o, t;
    for (o = 0; o < rows; o += ROWS, weights += ROWS * columns)
        for (t = 0; t < count; t++)
            PICOGPT_PRODUCTS(y + t * rows + o, smaller(rows - o, ROWS), weights, columns, codes + t * columns, 0,
                             columns);
    for (t = 0; t < count; t++, y += rows) {
        const int32_t s = -(e[t] + fraction_bits);
        if (is_per_channel)
            for (o = 0; o < rows; o++)
                y[o] = clip(shift(y[o] - OFFSET * sums[o], s - exponents[o]), LIMIT);
        else
            for (o = 0; o < rows; o++)
                y[o] = clip(shift(y[o] - OFFSET * sums[o], s - exponents[0]), LIMIT);
        if (biases)
            for (o = 0; o < rows; o++)
                y[o] += biases[o];
    }
}

/* LayerNorm of x [n_embd], quantized: codes and their exponent. */
static int32_t norm(const picogpt_state *state, const picogpt_norm *parameters, int32_t layer,
                    const int32_t *restrict x, uint8_t *restrict codes)
{
    const int32_t width = state->model->n_embd, n = bits((uint32_t)largest_magnitude(x, width)) - 11;
    const int32_t v = width <= 1024 ? 5 : width <= 4096 ? 6 : 7;
    const int16_t *restrict m = parameters->mantissas + (size_t)layer * (size_t)width;
    int32_t *restrict u = state->wide;
    int32_t i, j, e, mean, r, total = 0, squares = 0;
    uint32_t q;
    for (i = 0; i < width; i++)
        total += u[i] = shift(x[i], n);
    mean = (int32_t)(((uint32_t)magnitude(total) + ((uint32_t)width >> 1)) / (uint32_t)width);
    mean = total < 0 ? -mean : mean;
    for (i = 0; i < width; i++) {
        const int32_t d = u[i] - mean, small = shift(d, v);
        u[i] = d;
        squares += small * small;
    }
    squares = larger(squares, 1);
    j = (24 - bits((uint32_t)squares)) >> 1;
    q = isqrt((uint32_t)squares << (2 * j));
    r = (int32_t)(((uint32_t)state->root + (q >> 1)) / q);
    for (i = 0; i < width; i++)
        u[i] = shift(u[i] * m[i], 12) * r;
    e = j - state->root_bits - v + 12 + parameters->exponents[layer];
    if (parameters->biases) {
        const int32_t *restrict biases = parameters->biases + (size_t)layer * (size_t)width;
        for (i = 0; i < width; i++)
            u[i] = clip(shift(u[i], -(e + NORM_BITS)), LIMIT) + biases[i];
        e = -NORM_BITS;
    }
    return quantize(codes, u, width, OFFSET) + e;
}

static void activate(int32_t *u, int32_t count, int32_t is_relu)
{
    int32_t i;
    if (is_relu) {
        for (i = 0; i < count; i++)
            u[i] = larger(u[i], 0);
        return;
    }
    for (i = 0; i < count; i++) {
        const int32_t h = clip(u[i], 32767), a = smaller(magnitude(h), 1024);
        const int32_t p = 4096 - ((a * (3276 + ((a * (4220 - ((a * 3908) >> 10))) >> 10))) >> 10);
        const int32_t square = (p * p) >> 12;
        u[i] = 4 * larger(h, 0) - ((a * ((square * square) >> 12) + 1024) >> 11);
    }
}

/* The keys, or values, of a layer's head: [block_size, head size]; their exponents are [block_size]. */
static size_t head_offset(const picogpt_model *model, int32_t layer, int32_t head)
{
    return ((size_t)layer * (size_t)model->n_head + (size_t)head) * (size_t)model->block_size;
}

/* Puts the keys, or the values, of a position [n_embd] into the cache, `offset` above what they say. */
static void remember(const picogpt_state *state, int32_t layer, int32_t position, const int32_t *u, uint8_t *cache,
                     int8_t *exponents, int32_t offset)
{
    const picogpt_model *model = state->model;
    const int32_t size = model->n_embd / model->n_head;
    int32_t h;
    for (h = 0; h < model->n_head; h++, u += size) {
        const size_t place = head_offset(model, layer, h) + (size_t)position;
        exponents[place] = (int8_t)quantize(cache + place * (size_t)size, u, size, offset);
    }
}

/* The scores of a query [size] become weights of the keys [keys]; returns their sum, and their exponent in `top`. */
static int32_t weigh(const picogpt_state *state, size_t offset, const int32_t *query, int32_t size, int32_t keys,
                     int32_t *top)
{
    const int8_t *restrict key_exponents = state->key_exponents + offset;
    const int8_t *restrict value_exponents = state->value_exponents + offset;
    const uint8_t *key = state->keys + offset * (size_t)size;
    const int32_t weight_bits = 8 - bits((uint32_t)(state->model->block_size - 1) >> 9);
    const int32_t cap = (24 - bits((uint32_t)(127 * 127) * (uint32_t)size)) >> 1;
    const int32_t query_fit = fit(largest_magnitude(query, size)), query_exponent = smaller(query_fit - 8, cap);
    int8_t *restrict codes = state->query;
    int32_t *restrict score = state->scores;
    int32_t i, j, exponent, excess = 0, largest = -(1 << 25), sum = 0;
    uint32_t reach = 0;
    for (i = 0; i < size; i++) {
        const int32_t code = shift(query[i], query_fit);
        codes[i] = (int8_t)code;
        excess += OFFSET * code;
    }
    PICOGPT_PRODUCTS(score, keys, codes, 0, key, size, size);
    for (j = 0; j < keys; j++) {
        const int32_t e = query_exponent + smaller(key_exponents[j] - 8, cap);
        const int32_t right = larger(-e, 0), left = larger(e, 0);
        const int32_t half = (int32_t)(((uint32_t)1 << right) >> 1);
        score[j] = floor_shift(score[j] - excess + half, right) * ((int32_t)1 << left);
        largest = larger(largest, score[j]);
    }
    for (j = 0; j < keys; j++) {
        const int32_t d = smaller(largest - score[j], 15 * 256), f = d & 255;
        const int32_t p = (4096 - ((f * (2753 - ((705 * f) >> 8))) >> 8)) >> (d >> 8);
        score[j] = p;
        sum += p;
        reach |= (uint32_t)p << value_exponents[j]; /* as many bits as the largest of them */
    }
    *top = exponent = bits(reach) - weight_bits;
    for (j = 0; j < keys; j++)
        score[j] = smaller(shift(score[j], exponent - value_exponents[j]), ((int32_t)1 << weight_bits) - 1);
    return sum;
}

/* LANES features of the sum of all values [keys, size], each times its weight; they stay in registers. */
static void mix(int32_t *restrict o, const int32_t *restrict weights, const int8_t *restrict values, int32_t keys,
                int32_t size)
{
    int32_t sums[LANES] = {0}, i, j;
    for (j = 0; j < keys; j++, values += size)
        for (i = 0; i < LANES; i++)
            sums[i] += weights[j] * values[i];
    for (i = 0; i < LANES; i++)
        o[i] = sums[i];
}

/* Attention of the query [n_embd] at a position to all up to it: codes [n_embd] and their exponent. */
static int32_t attend(const picogpt_state *state, int32_t layer, int32_t position, const int32_t *query, uint8_t *codes)
{
    const picogpt_model *model = state->model;
    const int32_t size = model->n_embd / model->n_head;
    int32_t h, i, j, t = NEVER;
    for (h = 0; h < model->n_head; h++) {
        const size_t offset = head_offset(model, layer, h);
        const int8_t *restrict value = (const int8_t *)state->values + offset * (size_t)size;
        int32_t *restrict o = state->heads + h * size;
        int32_t top, n, sum_bits, narrow, r, largest;
        const int32_t sum = weigh(state, offset, query + h * size, size, position + 1, &top);
        for (i = 0; i + LANES <= size; i += LANES)
            mix(o + i, state->scores, value + i, position + 1, size);
        for (; i < size; i++)
            for (o[i] = 0, j = 0; j <= position; j++)
                o[i] += state->scores[j] * value[j * size + i];
        n = larger(bits((uint32_t)largest_magnitude(o, size)) - 15, 0);
        sum_bits = bits((uint32_t)sum) - 8;
        narrow = shift(sum, sum_bits);
        r = (int32_t)(((uint32_t)(1 << 15) + ((uint32_t)narrow >> 1)) / (uint32_t)narrow);
        for (i = 0; i < size; i++)
            o[i] = shift(o[i], n) * r;
        state->head_exponents[h] = top - HEAD_BITS + n - 15 - sum_bits;
        largest = largest_magnitude(o, size);
        if (largest)
            t = larger(t, fit(largest) + state->head_exponents[h]);
    }
    if (t == NEVER)
        t = 0;
    for (h = 0; h < model->n_head; h++)
        for (i = h * size; i < (h + 1) * size; i++)
            codes[i] = (uint8_t)(shift(state->heads[i], t - state->head_exponents[h]) + OFFSET);
    return t;
}

static void add(int32_t *restrict x, const int32_t *restrict y, int32_t count)
{
    int32_t i;
    for (i = 0; i < count; i++)
        x[i] = clip(x[i] + y[i], LARGEST);
}

static void embed(const picogpt_matrix *table, int32_t is_per_channel, int32_t row, int32_t width, int32_t *restrict x)
{
    const int8_t *restrict codes = table->codes + (size_t)row * (size_t)width;
    const int32_t s = -(table->exponents[is_per_channel ? row : 0] + RESIDUAL_BITS);
    int32_t i;
    for (i = 0; i < width; i++)
        x[i] += shift(codes[i], s);
}

/* Tells another thread that a layer's keys and values are there, and waits for those before one's own. */
static void hand_on(picogpt_state *state, int32_t layer)
{
#ifdef PICOGPT_THREADS
    __atomic_store_n(&state->layers, layer + 1, __ATOMIC_RELEASE);
    while (state->layers_before && __atomic_load_n(state->layers_before, __ATOMIC_ACQUIRE) <= layer)
        ;
#else
    (void)state, (void)layer;
#endif
}

/* The text of token t of a pass, and its place there. */
static picogpt_state *text_of(picogpt_state *const *texts, int32_t is_one_each, int32_t t)
{
    return texts[is_one_each ? t : 0];
}

static int32_t place_of(picogpt_state *const *texts, int32_t is_one_each, int32_t t)
{
    return is_one_each ? texts[t]->position : texts[0]->position + t;
}

/* At most `chunk` tokens, `step` apart in `ids`, and logits of the last `rows`: of one text, one behind the other, or one
 * token of each text, for which every matrix is read once. Then the logits are those of each text. */
static void pass(picogpt_state *const *texts, int32_t is_one_each, const int32_t *ids, int32_t step, int32_t count,
                 int32_t *logits, int32_t rows)
{
    const picogpt_state *const state = texts[0];
    const picogpt_model *m = state->model;
    const int32_t width = m->n_embd, hidden = m->n_hidden, scales = m->is_per_channel, all = count;
    int32_t *const wide = state->wide, *const e = state->exponents, *x = state->x;
    uint8_t *const codes = state->codes;
    int32_t i, layer, t, skipped = 0;
    for (i = 0; i < count * width; i++)
        x[i] = 0;
    for (t = 0; t < count; t++) {
        const int32_t place = place_of(texts, is_one_each, t), id = ids[t * step];
        text_of(texts, is_one_each, t)->ids[place] = id;
        embed(&m->wte, scales, id, width, x + t * width);
        embed(&m->wpe, scales, place, width, x + t * width);
    }
    for (layer = 0; layer < m->n_layer; layer++) {
        for (t = 0; t < count; t++)
            e[t] = norm(state, &m->ln_1, layer, x + t * width, codes + t * width);
        linear(&m->c_attn, layer, 3 * width, width, scales, codes, e, count, HEAD_BITS, wide);
        for (t = 0; t < count; t++) {
            const int32_t *key = wide + t * 3 * width + width, place = place_of(texts, is_one_each, t);
            const picogpt_state *text = text_of(texts, is_one_each, t);
            remember(text, layer, place, key, text->keys, text->key_exponents, OFFSET);
            remember(text, layer, place, key + width, text->values, text->value_exponents, 0);
        }
        hand_on(texts[0], layer);
        if (layer + 1 == m->n_layer) { /* what comes after is for logits alone */
            skipped = count - rows;
            x += skipped * width;
            count = rows;
        }
        for (t = 0; t < count; t++)
            e[t] = attend(text_of(texts, is_one_each, t), layer, place_of(texts, is_one_each, skipped + t),
                          wide + (skipped + t) * 3 * width, codes + t * width);
        linear(&m->attn_c_proj, layer, width, width, scales, codes, e, count, RESIDUAL_BITS, wide);
        add(x, wide, count * width);
        for (t = 0; t < count; t++)
            e[t] = norm(state, &m->ln_2, layer, x + t * width, codes + t * width);
        linear(&m->c_fc, layer, hidden, width, scales, codes, e, count, m->is_relu ? RESIDUAL_BITS : GELU_BITS, wide);
        activate(wide, count * hidden, m->is_relu);
        for (t = 0; t < count; t++)
            e[t] = quantize(codes + t * hidden, wide + t * hidden, hidden, OFFSET) - RESIDUAL_BITS;
        linear(&m->mlp_c_proj, layer, width, hidden, scales, codes, e, count, RESIDUAL_BITS, wide);
        add(x, wide, count * width);
    }
    for (t = 0; t < rows; t++)
        e[t] = norm(state, &m->ln_f, 0, x + t * width, codes + t * width);
    if (is_one_each)
        for (t = 0; t < rows; t++)
            linear(&m->wte, 0, m->vocab_size, width, scales, codes + t * width, e + t, 1, RESIDUAL_BITS,
                   texts[t]->logits);
    else
        linear(&m->wte, 0, m->vocab_size, width, scales, codes, e, rows, RESIDUAL_BITS, logits);
    for (t = 0; t < all; t++)
        text_of(texts, is_one_each, t)->position++;
}

/* ---- a text ---- */

void picogpt_memory(const picogpt_model *m, int32_t chunk, size_t lengths[2])
{
    lengths[0] = PICOGPT_WORDS(m->n_head, m->n_embd, m->n_hidden, m->block_size, m->vocab_size, chunk);
    lengths[1] = PICOGPT_BYTES(m->n_layer, m->n_head, m->n_embd, m->n_hidden, m->block_size, chunk);
}

void picogpt_init(picogpt_state *state, const picogpt_model *m, int32_t *words, uint8_t *bytes, int32_t chunk)
{
    const size_t positions = (size_t)m->n_layer * (size_t)m->block_size, width = (size_t)m->n_embd;
    const size_t heads = positions * (size_t)m->n_head;
    uint64_t square = (uint64_t)m->n_embd;
    int32_t i;
    state->model = m;
    state->position = 0;
    state->layers_before = 0;
    state->chunk = chunk;
    state->root_bits = (40 - bits((uint32_t)m->n_embd)) >> 1;
    for (i = 0; i < state->root_bits; i++)
        square <<= 2;
    state->root = (int32_t)isqrt(square);
    state->x = words;
    state->wide = state->x + (size_t)chunk * width;
    state->exponents = state->wide + (size_t)chunk * (size_t)larger(3 * m->n_embd, m->n_hidden);
    state->heads = state->exponents + chunk;
    state->head_exponents = state->heads + width;
    state->logits = state->head_exponents + m->n_head;
    state->scores = state->logits + m->vocab_size;
    state->ids = state->scores + m->block_size;
    state->keys = bytes;
    state->values = state->keys + positions * width;
    state->codes = state->values + positions * width;
    state->key_exponents = (int8_t *)(state->codes + (size_t)chunk * (size_t)m->n_hidden);
    state->value_exponents = state->key_exponents + heads;
    state->query = state->value_exponents + heads;
}

void picogpt_share(picogpt_state *behind, picogpt_state *state)
{
    state->layers = 0;
    behind->layers_before = &state->layers;
    behind->ids = state->ids;
    behind->keys = state->keys;
    behind->values = state->values;
    behind->key_exponents = state->key_exponents;
    behind->value_exponents = state->value_exponents;
}

void picogpt_forward(picogpt_state *state, const int32_t *ids, int32_t count, int32_t *logits, int32_t rows)
{
    while (count > 0) {
        const int32_t n = smaller(count, state->chunk), wanted = larger(rows - (count - n), 0);
        pass(&state, 0, ids, 1, n, logits, wanted);
        ids += n;
        count -= n;
        rows -= wanted;
        logits += (size_t)wanted * (size_t)state->model->vocab_size;
    }
}

void picogpt_start(picogpt_state *state, const int32_t *ids, int32_t count)
{
    const int32_t seen = smaller(count, state->model->block_size);
    state->position = 0;
    picogpt_forward(state, ids + (count - seen), seen, state->logits, 1);
}

/* A token for each text, `step` apart. */
static void next(picogpt_state *const *texts, int32_t count, const int32_t *ids, int32_t step)
{
    const int32_t full = texts[0]->model->block_size, kept = larger(full >> 1, 1) - 1, chunk = texts[0]->chunk;
    int32_t i;
    for (i = 0; i < count; i++)
        if (texts[i]->position == full) {
            texts[i]->position = 0;
            picogpt_forward(texts[i], texts[i]->ids + (full - kept), kept, texts[i]->logits, 0);
        }
    for (i = 0; i < count; i += chunk)
        pass(texts + i, 1, ids + i * step, step, smaller(count - i, chunk), 0, smaller(count - i, chunk));
}

void picogpt_next(picogpt_state *state, int32_t id) { next(&state, 1, &id, 0); }

/* ---- draws ---- */

/* The first word of Threefry-2x32 of 20 rounds, of the counter (index, 0). */
static uint32_t threefry(uint32_t seed, uint32_t stream, uint32_t index)
{
    static const uint8_t rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    const uint32_t keys[3] = {seed, stream, seed ^ stream ^ 0x1BD11BDAu};
    uint32_t a = index + keys[0], b = keys[1], group;
    int i;
    for (group = 0; group < 5; group++) {
        for (i = 0; i < 4; i++) {
            const uint32_t r = rotations[group % 2][i];
            a += b;
            b = (b << r | b >> (32 - r)) ^ a;
        }
        a += keys[(group + 1) % 3];
        b += keys[(group + 2) % 3] + group + 1;
    }
    return a;
}

/* 2^-x in fixed point, of a distance to the largest logit; 0 beyond the limit. */
static uint32_t weight(uint32_t d, uint32_t multiplier, uint32_t limit, int32_t weight_bits)
{
    const uint32_t x = (d * multiplier) >> 11, f = x & 65535;
    const uint32_t power = 65536 - ((f * (45308 - ((f * (15096 - ((f * 2556) >> 16))) >> 16))) >> 16);
    return d > limit ? 0 : ((power << 8) >> (x >> 16)) >> (24 - weight_bits);
}

/* How many logits are at least `bound`. */
static uint32_t count_from(const int32_t *logits, int32_t count, int32_t bound)
{
    uint32_t found = 0;
    int32_t i;
    for (i = 0; i < count; i++)
        found += logits[i] >= bound;
    return found;
}

int32_t picogpt_draw(const int32_t *logits, int32_t vocab_size, const picogpt_sampling *sampling, uint32_t stream,
                     uint32_t index)
{
    const uint32_t multiplier = sampling->multiplier, limit = 0xFFFFFFFFu / (multiplier ? multiplier : 1);
    const int32_t weight_bits = smaller(24, 32 - bits((uint32_t)vocab_size));
    int32_t i, best = 0, bound = -LIMIT, pass_number, token = 0;
    uint32_t ties = (uint32_t)vocab_size, total = 0, target = 0;
    for (i = 1; i < vocab_size; i++)
        best = logits[i] > logits[best] ? i : best;
    if (sampling->is_greedy)
        return best;
    if (sampling->top_k && sampling->top_k < (uint32_t)vocab_size) { /* the k-th largest logit, by bisection */
        int32_t beyond = LIMIT + 1;
        while (beyond - bound > 1) {
            const int32_t middle = bound + ((beyond - bound) >> 1);
            if (count_from(logits, vocab_size, middle) >= sampling->top_k)
                bound = middle;
            else
                beyond = middle;
        }
        ties = sampling->top_k - count_from(logits, vocab_size, bound + 1); /* of those at the bound the first ones */
    }
    /* First the sum of all weights, then the first token with which the sum is above target. */
    for (pass_number = 0; pass_number < 2; pass_number++) {
        uint32_t left = ties, sum = 0;
        for (i = 0; i < vocab_size; i++) {
            if (logits[i] < bound || (logits[i] == bound && left == 0))
                continue;
            left -= logits[i] == bound;
            sum += weight((uint32_t)(logits[best] - logits[i]), multiplier, limit, weight_bits);
            if (pass_number == 1 && sum > target) {
                token = i;
                break;
            }
        }
        if (pass_number == 0) {
            total = sum;
            target = (uint32_t)(((uint64_t)threefry(sampling->seed, stream, index) * total) >> 32);
        }
    }
    return token;
}

void picogpt_generate(picogpt_state *const *texts, int32_t count, const picogpt_sampling *sampling, uint32_t stream,
                      uint32_t index, int32_t *ids, int32_t step, int32_t length, int32_t new_tokens, int32_t slides)
{
    const picogpt_model *model = texts[0]->model;
    int32_t i;
    for (; new_tokens > 0; new_tokens--, index++, length++) {
        if (index == 0 || (slides && texts[0]->position == model->block_size))
            for (i = 0; i < count; i++)
                picogpt_start(texts[i], ids + i * step, length);
        else
            next(texts, count, ids + (length - 1), step);
        for (i = 0; i < count; i++)
            ids[i * step + length] =
                picogpt_draw(texts[i]->logits, model->vocab_size, sampling, stream + (uint32_t)i, index);
    }
}

/* ---- the test of itself, and models in a file ---- */

static uint32_t hashed(uint32_t hash, uint32_t word)
{
    int i;
    for (i = 0; i < 4; i++, word >>= 8)
        hash = (hash ^ (word & 255)) * 16777619u;
    return hash;
}

uint32_t picogpt_digest(picogpt_state *state)
{
    static const picogpt_sampling sampling = {0, 189097, 5, 1337};
    const int32_t vocab_size = state->model->vocab_size, count = smaller(16, state->model->block_size);
    int32_t ids[16], i, last;
    uint32_t hash = 2166136261u;
    for (i = 0; i < count; i++)
        ids[i] = (7 * i * i + 3 * i + 1) % vocab_size;
    picogpt_start(state, ids, (count + 1) / 2);
    for (last = (count + 1) / 2 - 1; last < count; last++) {
        for (i = 0; i < vocab_size; i++)
            hash = hashed(hash, (uint32_t)state->logits[i]);
        hash = hashed(hash, (uint32_t)picogpt_draw(state->logits, vocab_size, &sampling, 1, (uint32_t)last));
        if (last + 1 < count)
            picogpt_next(state, ids[last + 1]);
    }
    return hash;
}

/* A piece of a file: `a` times `b` times `c` elements; 0, and nothing left, where the file ends before. */
static const void *take(const uint8_t **at, size_t *left, size_t size, int32_t a, int32_t b, int32_t c)
{
    const int32_t factors[3] = {a, b, c};
    const uint8_t *found = *at;
    size_t bytes = size;
    int i;
    for (i = 0; i < 3; i++) {
        if (bytes > *left / (size_t)factors[i]) {
            *left = 0;
            *at = 0;
            return 0;
        }
        bytes *= (size_t)factors[i];
    }
    *at += bytes;
    *left -= bytes;
    return found;
}

int picogpt_open(picogpt_model *m, const void *bytes, size_t length)
{
    const uint32_t *header = (const uint32_t *)bytes;
    static const uint32_t limits[6] = {1 << 20, 1 << 13, 1 << 13, 1 << 15, 1 << 12, 1 << 20};
    int32_t has_bias, i, layers, c, f;
    const uint8_t *at = (const uint8_t *)bytes + 4 * PICOGPT_HEADER_WORDS;
    size_t left = length - 4 * PICOGPT_HEADER_WORDS;
    if (length < 4 * PICOGPT_HEADER_WORDS || header[0] != PICOGPT_MAGIC)
        return 0;
    for (i = 0; i < 6; i++)
        if (header[1 + i] == 0 || header[1 + i] > limits[i])
            return 0;
    m->n_layer = layers = (int32_t)header[1];
    m->n_head = (int32_t)header[2];
    m->n_embd = c = (int32_t)header[3];
    m->n_hidden = f = (int32_t)header[4];
    m->block_size = (int32_t)header[5];
    m->vocab_size = (int32_t)header[6];
    m->is_relu = (int32_t)(header[7] & 1);
    m->is_per_channel = (int32_t)(header[8] & 1);
    has_bias = (int32_t)(header[9] & 1);
    m->digest = header[10];
    if (c % m->n_head || c / m->n_head > 1024 || f % c)
        return 0;
    {
        /* The order of the file: the biases and the sums, int32; the LayerNorms' mantissas, int16; the rest, int8, the
         * codes aligned. */
        picogpt_matrix *const matrices[6] = {&m->wte, &m->wpe, &m->c_attn, &m->attn_c_proj, &m->c_fc, &m->mlp_c_proj};
        picogpt_norm *const norms[3] = {&m->ln_1, &m->ln_2, &m->ln_f};
        const int32_t n[6] = {1, 1, layers, layers, layers, layers};
        const int32_t rows[6] = {m->vocab_size, m->block_size, 3 * c, c, f, c}, columns[6] = {c, c, c, c, c, f};
        for (i = 0; i < 6; i++)
            matrices[i]->biases = has_bias && i >= 2 ? (const int32_t *)take(&at, &left, 4, n[i], rows[i], 1) : 0;
        for (i = 0; i < 3; i++)
            norms[i]->biases = has_bias ? (const int32_t *)take(&at, &left, 4, i < 2 ? layers : 1, c, 1) : 0;
        for (i = 0; i < 6; i++)
            matrices[i]->sums = i != 1 ? (const int32_t *)take(&at, &left, 4, n[i], rows[i], 1) : 0;
        for (i = 0; i < 3; i++)
            norms[i]->mantissas = (const int16_t *)take(&at, &left, 2, i < 2 ? layers : 1, c, 1);
        for (i = 0; i < 3; i++)
            norms[i]->exponents = (const int8_t *)take(&at, &left, 1, i < 2 ? layers : 1, 1, 1);
        for (i = 0; i < 6; i++)
            matrices[i]->exponents = (const int8_t *)take(&at, &left, 1, n[i], m->is_per_channel ? rows[i] : 1, 1);
        for (; left > 0 && (at - (const uint8_t *)bytes) % PICOGPT_ALIGNMENT; left--)
            at++;
        for (i = 0; i < 6; i++)
            matrices[i]->codes = (const int8_t *)take(&at, &left, 1, n[i], rows[i], columns[i]);
    }
    return at != 0 && left == 0;
}
