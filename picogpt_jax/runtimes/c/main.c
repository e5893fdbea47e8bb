/* A program that prints text: the flags and the letters of scripts/sample.py --overflow=refill. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "picogpt.h"

#include "model.h"

#ifndef PICOGPT_CHUNK
#define PICOGPT_CHUNK 16 /* tokens of a prompt that are computed at a time */
#endif

static PICOGPT_MEMORY(PICOGPT_CHUNK) memory;

static const char help[] =
    "usage: picogpt [--start=TEXT | --start=FILE:PATH] [--num_samples=1] [--max_new_tokens=500]\n"
    "               [--temperature=0.8] [--top_k=0] [--seed=1337] [--self-test]\n"
    "A temperature of 0 takes the likeliest token, a top_k of 0 draws among all tokens.\n";

static void fail(const char *what, const char *value, const char *way_out)
{
    fprintf(stderr, "error: %s%s%s\n", what, value, way_out);
    exit(2);
}

static void *allocate(size_t bytes)
{
    void *found = malloc(bytes ? bytes : 1);
    if (!found)
        fail("there is not enough memory", "", "");
    return found;
}

/* A file as a whole; a zero follows it. */
static unsigned char *read_file(const char *path, size_t *length)
{
    FILE *file = fopen(path, "rb");
    size_t room = 1 << 16, n;
    unsigned char *bytes = (unsigned char *)allocate(room);
    if (!file)
        fail("cannot read ", path, "");
    *length = 0;
    while ((n = fread(bytes + *length, 1, room - 1 - *length, file)) > 0) {
        *length += n;
        if (*length == room - 1) {
            unsigned char *larger = (unsigned char *)realloc(bytes, room *= 2);
            if (!larger)
                fail("there is not enough memory for ", path, "");
            bytes = larger;
        }
    }
    if (ferror(file))
        fail("cannot read ", path, "");
    fclose(file);
    bytes[*length] = 0;
    return bytes;
}

/* ---- text ---- */

#if PICOGPT_HAS_TEXT

static void print_token(int32_t id)
{
    const uint32_t c = picogpt_characters[id];
    if (c < 0x80) {
        putchar((int)c);
    } else if (c < 0x800) {
        putchar((int)(0xC0 | c >> 6));
    } else {
        if (c < 0x10000) {
            putchar((int)(0xE0 | c >> 12));
        } else {
            putchar((int)(0xF0 | c >> 18));
            putchar((int)(0x80 | (c >> 12 & 63)));
        }
        putchar((int)(0x80 | (c >> 6 & 63)));
    }
    if (c >= 0x80)
        putchar((int)(0x80 | (c & 63)));
}

/* The ids of UTF-8. */
static int32_t encode(const unsigned char *text, size_t length, int32_t *ids)
{
    int32_t count = 0, id;
    char found[64];
    size_t i = 0;
    while (i < length) {
        const unsigned char first = text[i];
        const size_t more = first < 0x80 ? 0 : first < 0xE0 ? 1 : first < 0xF0 ? 2 : 3;
        uint32_t c = more == 0 ? first : more == 1 ? first & 31u : more == 2 ? first & 15u : first & 7u;
        size_t k;
        if ((first >= 0x80 && first < 0xC2) || first > 0xF4 || i + more >= length)
            fail("--start is not UTF-8", "", "; save it as UTF-8");
        for (k = 1; k <= more; k++) {
            if ((text[i + k] & 0xC0) != 0x80)
                fail("--start is not UTF-8", "", "; save it as UTF-8");
            c = c << 6 | (text[i + k] & 63u);
        }
        i += more + 1;
        for (id = 0; id < PICOGPT_VOCAB_SIZE && picogpt_characters[id] != c; id++)
            ;
        if (id == PICOGPT_VOCAB_SIZE) {
            sprintf(found, "U+%04lX at position %ld", (unsigned long)c, (long)count);
            fail("--start has the character ", found, ", which is not in the vocabulary; leave it out");
        }
        ids[count++] = id;
    }
    return count;
}

#else /* byte pairs, or ids alone: a text is numbers, which a tokenizer reads and writes */

static void print_token(int32_t id) { printf("%ld ", (long)id); }

static int32_t encode(const unsigned char *text, size_t length, int32_t *ids)
{
    int32_t count = 0;
    size_t i = 0;
    while (i < length) {
        uint32_t id = 0;
        if (text[i] == ' ' || text[i] == ',' || text[i] == '\n') {
            i++;
            continue;
        }
        for (; i < length && text[i] >= '0' && text[i] <= '9' && id < PICOGPT_VOCAB_SIZE; i++)
            id = 10 * id + (uint32_t)(text[i] - '0');
        if (id >= PICOGPT_VOCAB_SIZE || (i < length && !strchr(" ,\n", text[i])))
            fail("--start: this model takes token ids below its vocabulary size, such as --start=\"15496 11\", not ",
                 (const char *)text, "");
        ids[count++] = (int32_t)id;
    }
    return count;
}

#endif

/* ---- flags ---- */

/* The value of `argument`, or of the one after it, if it is the flag `name`. */
static const char *flag_value(const char *name, int count, char **arguments, int *at)
{
    const char *argument = arguments[*at];
    const size_t length = strlen(name);
    if (strncmp(argument, name, length))
        return 0;
    if (argument[length] == '=')
        return argument + length + 1;
    if (argument[length])
        return 0;
    if (*at + 1 == count)
        fail(name, " needs a value", "");
    return arguments[++*at];
}

static uint32_t number(const char *name, const char *text, uint32_t low, uint32_t high)
{
    uint64_t value = 0;
    const char *at = text;
    char range[64];
    for (; *at >= '0' && *at <= '9' && value <= high; at++)
        value = 10 * value + (uint64_t)(*at - '0');
    sprintf(range, "; expected an integer from %lu to %lu", (unsigned long)low, (unsigned long)high);
    if (at == text || *at || value < low || value > high) {
        fprintf(stderr, "error: %s=", name);
        fprintf(stderr, "%s%s\n", text, range);
        exit(2);
    }
    return (uint32_t)value;
}

/* The specification's M: the one division of doubles. */
static void set_temperature(picogpt_sampling *sampling, const char *text)
{
    static volatile double one = 131072 * 1.4426950408889634; /* log2(e) */
    volatile double quotient;
    char *end;
    const double temperature = strtod(text, &end);
    double rest;
    if (end == text || *end || !(temperature >= 0 && temperature <= 1e30))
        fail("--temperature=", text, " is not a number from 0 to 1e30; 1 draws as trained");
    sampling->is_greedy = temperature == 0;
    if (sampling->is_greedy)
        return;
    quotient = one / temperature;
    sampling->multiplier = 0xFFFFFFFFu;
    if (quotient < 4294967295.0) {
        sampling->multiplier = (uint32_t)quotient; /* rounded down; halves go to even */
        rest = quotient - sampling->multiplier;
        sampling->multiplier += rest > 0.5 || (rest == 0.5 && sampling->multiplier % 2);
    }
}

/* ---- the model ---- */

#ifdef PICOGPT_WEIGHTS_FILE

/* The weights lie beside the program. */
static const picogpt_model *load(const char *program)
{
    static picogpt_model model;
    const char *slash = strrchr(program, '/');
    const size_t folder = slash ? (size_t)(slash - program) + 1 : 0;
    char *path = (char *)allocate(folder + sizeof PICOGPT_WEIGHTS_FILE);
    size_t length, lengths[2];
    const unsigned char *bytes;
    int fits;
    memcpy(path, program, folder);
    strcpy(path + folder, PICOGPT_WEIGHTS_FILE);
    bytes = read_file(path, &length);
    fits = picogpt_open(&model, bytes, length) && model.digest == PICOGPT_DIGEST &&
           model.vocab_size == PICOGPT_VOCAB_SIZE;
    if (fits) {
        picogpt_memory(&model, PICOGPT_CHUNK, lengths);
        fits = lengths[0] == sizeof memory.words / 4 && lengths[1] == sizeof memory.bytes;
    }
    if (!fits)
        fail(path, " is not the file that was written with this program's model.h", "; convert the model again");
    return &model;
}

#else

static const picogpt_model *load(const char *program)
{
    (void)program;
    return &picogpt_weights;
}

#endif

int main(int count, char **arguments)
{
    picogpt_sampling sampling = {0, 0, 0, 1337};
    const char *start = 0, *value;
    uint32_t num_samples = 1, max_new_tokens = 500, sample, index;
    const int32_t *prompt = picogpt_default_prompt;
    int32_t length = sizeof picogpt_default_prompt / sizeof *picogpt_default_prompt, *ids = 0, i;
    unsigned char *file = 0;
    int self_test = 0, at;
    const picogpt_model *model;
    picogpt_state state;

    set_temperature(&sampling, "0.8");
    for (at = 1; at < count; at++) {
        if (!strcmp(arguments[at], "--self-test")) {
            self_test = 1;
        } else if (!strcmp(arguments[at], "--help")) {
            fputs(help, stdout);
            return 0;
        } else if ((value = flag_value("--start", count, arguments, &at))) {
            start = value;
        } else if ((value = flag_value("--num_samples", count, arguments, &at))) {
            num_samples = number("--num_samples", value, 1, 1 << 20);
        } else if ((value = flag_value("--max_new_tokens", count, arguments, &at))) {
            max_new_tokens = number("--max_new_tokens", value, 0, 1 << 30);
        } else if ((value = flag_value("--temperature", count, arguments, &at))) {
            set_temperature(&sampling, value);
        } else if ((value = flag_value("--top_k", count, arguments, &at))) {
            sampling.top_k = number("--top_k", value, 0, 0xFFFFFFFFu);
        } else if ((value = flag_value("--seed", count, arguments, &at))) {
            sampling.seed = number("--seed", value, 0, 0xFFFFFFFFu);
        } else {
            fail("unknown argument ", arguments[at], "; --help lists the flags");
        }
    }

    model = load(arguments[0]);
    picogpt_init(&state, model, memory.words, memory.bytes, PICOGPT_CHUNK);
    if (self_test) {
        const uint32_t digest = picogpt_digest(&state);
        const int passed = digest == model->digest;
        printf("%s: digest %08lx, expected %08lx\n", passed ? "passed" : "FAILED", (unsigned long)digest,
               (unsigned long)model->digest);
        return !passed;
    }
    if (start) {
        const unsigned char *text = (const unsigned char *)start;
        size_t bytes = strlen(start);
        if (!strncmp(start, "FILE:", 5)) {
            text = file = read_file(start + 5, &bytes);
            if (bytes >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3)) {
                text += 3;
                bytes -= 3;
            }
        }
        prompt = ids = (int32_t *)allocate(bytes * sizeof *ids);
        length = encode(text, bytes, ids);
        if (length == 0)
            fail("--start is empty", "", "; give at least one token");
    }

    for (sample = 0; sample < num_samples; sample++) {
        if (num_samples > 1)
            printf("--- sample %lu\n", (unsigned long)sample + 1);
        for (i = 0; i < length; i++)
            print_token(prompt[i]);
        if (max_new_tokens)
            picogpt_start(&state, prompt, length);
        for (index = 0; index < max_new_tokens; index++) {
            const int32_t id = picogpt_draw(state.logits, model->vocab_size, &sampling, sample, index);
            print_token(id);
            fflush(stdout);
            if (index + 1 < max_new_tokens)
                picogpt_next(&state, id);
        }
        putchar('\n');
    }
    if (fflush(stdout) || ferror(stdout))
        fail("cannot write to the standard output", "", "; send it elsewhere");
    free(ids);
    free(file);
    return 0;
}
