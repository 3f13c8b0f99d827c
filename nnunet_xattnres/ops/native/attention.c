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

void run_in_parallel(int64_t threads, parallel_runner parallel, void (*work)(void *), void *argument) {
    if (threads > 1 && parallel) {
        parallel(work, argument, (unsigned)threads, 0);
        return;
    }
    /* The calling thread works too, and alone if no thread can be started. */
    task task = {work, argument};
    pthread_t *others = threads > 1 ? malloc(sizeof *others * (size_t)(threads - 1)) : NULL;
    int64_t started = 0;
    while (others && started < threads - 1 && !pthread_create(&others[started], NULL, run, &task)) started++;
    work(argument);
    for (int64_t other = 0; other < started; other++) pthread_join(others[other], NULL);
    free(others);
}

EXPORT int nnunet_xattnres_abi(void) { return ABI; }

EXPORT int64_t nnunet_xattnres_forward(const call *call) {
    const kernels *kernels = kernels_here();
    return (call->is_double ? kernels->forward_double : kernels->forward_float)(call);
}

EXPORT int64_t nnunet_xattnres_backward(const call *call) {
    const kernels *kernels = kernels_here();
    return (call->is_double ? kernels->backward_double : kernels->backward_float)(call);
}

EXPORT int64_t nnunet_xattnres_average(const average *average) {
    const kernels *kernels = kernels_here();
    return (average->is_double ? kernels->average_double : kernels->average_float)(average);
}
