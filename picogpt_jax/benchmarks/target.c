/* What targets.py compiles with the model and runs: it asks in `request` and reads `answer` and `text`. */

#include "picogpt.h"

#include "model.h"

volatile int32_t request[6]; /* what; tokens of the text; then a picogpt_sampling */
volatile uint32_t answer[2];
int32_t text[TEXT_SIZE]; /* begins with the prompt, one token */
static PICOGPT_MEMORY(1) memory;
static picogpt_state state, *const texts = &state;

void run(void)
{
    const picogpt_sampling sampling = {request[2], (uint32_t)request[3], (uint32_t)request[4], (uint32_t)request[5]};
    const int32_t count = request[1];
    if (request[0] == 0) {
        picogpt_init(&state, &picogpt_weights, memory.words, memory.bytes, 1);
        answer[0] = picogpt_digest(&state);
        answer[1] = (uint32_t)(sizeof memory + sizeof state);
    } else if (request[0] == 1) {
        picogpt_generate(&texts, 1, &sampling, 0, 0, text, 0, 1, count, 0);
    } else {
        picogpt_next(&state, text[count]);
        answer[0] = (uint32_t)picogpt_draw(state.logits, PICOGPT_VOCAB_SIZE, &sampling, 0, (uint32_t)count);
    }
}

#ifdef BARE /* no program calls `run`: the machine begins here, and ends where the emulator stops it */
__attribute__((noinline)) void stop(void)
{
    for (;;)
        answer[1] = answer[1];
}

void _start(void)
{
    run();
    stop();
}
#endif
