/* The entry points: choose the kernels for this processor, and run work on threads. */

#include <pthread.h>
#include <stdlib.h>

#include "attention.h"

#define EXPORT __attribute__((visibility("default")))

extern const kernels kernels_baseline;
#ifdef HAS_AVX2_KERNELS
extern const kernels kernels_avx2;
#endif

static const kernels *kernels_here(void) {
#ifdef HAS_AVX2_KERNELS
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kernels_avx2;
#endif
    return &kernels_baseline;
}

typedef struct {
    void (*work)(void *);
    void *argument;
} task;

static void *run(void *argument) {
    const task *task = argument;
    task->work(task->argument);
    return NULL;
}

void run_in_parallel(const call *call, void (*work)(void *), void *argument) {
    if (call->threads > 1 && call->parallel) {
        call->parallel(work, argument, (unsigned)call->threads, 0);
        return;
    }
    /* The calling thread works too, and alone if no thread can be started. */
    task task = {work, argument};
    pthread_t *threads = call->threads > 1 ? malloc(sizeof *threads * (size_t)(call->threads - 1)) : NULL;
    int64_t started = 0;
    while (threads && started < call->threads - 1 && !pthread_create(&threads[started], NULL, run, &task)) started++;
    work(argument);
    for (int64_t thread = 0; thread < started; thread++) pthread_join(threads[thread], NULL);
    free(threads);
}

EXPORT int nnunet_xattnres_abi(void) { return ABI; }

EXPORT int nnunet_xattnres_forward(const call *call) {
    const kernels *kernels = kernels_here();
    return (call->is_double ? kernels->forward_double : kernels->forward_float)(call);
}

EXPORT int nnunet_xattnres_backward(const call *call) {
    const kernels *kernels = kernels_here();
    return (call->is_double ? kernels->backward_double : kernels->backward_float)(call);
}
