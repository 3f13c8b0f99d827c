/* The interface between Python (native_library.py), the entry points (attention.c) and the kernels. */

#ifndef ATTENTION_H
#define ATTENTION_H

#include <stdint.h>

/* Raised with every change of the structures below. Python refuses a library of another number. */
#define ABI 4

/* ONLY_BASELINE is for tests. */
#if defined(__x86_64__) && !defined(ONLY_BASELINE)
#define HAS_AVX2_KERNELS
#endif

/* What a target reads, projected, at its own resolution (z, y, x). A 2D candidate has z = 1.

   Channels last: (B, z, y, x, C). channels_first: (B, C, z, y, x), only at the target's resolution.
   cells: the steps of a transposed convolution along z and y, (1, 1) otherwise. With cells, the values are at the
   target's resolution, (cells z, cells y, B, z / cells z, y / cells y, x, C), as its matrix products compute them.
   gradient: in the layout of the values. NULL if it is not wanted. It may be where the values are if these are channels
   last and at the target's resolution. */
typedef struct {
    const void *values;
    void *gradient;
    int64_t size[3];
    int64_t cells[2];
    int64_t channels_first;
} candidate;

/* Runs `work(argument)` on that many threads at once: GOMP_parallel of PyTorch's own OpenMP runtime. */
typedef void (*parallel_runner)(void (*work)(void *), void *argument, unsigned threads, unsigned flags);

typedef struct {
    const candidate *candidates;
    const void *query;     /* (C) */
    const void *gradient;  /* backward: dout, (B, C, z, y, x) */
    void *output;          /* forward: out, (B, C, z, y, x). backward: the gradient of the query, (C) */
    int64_t count;
    int64_t batch;
    int64_t channels;
    int64_t size[3];
    double eps;
    int64_t is_double;
    int64_t threads;
    parallel_runner parallel; /* NULL: threads of our own */
} call;

/* The area average of whole cells of factor z * factor y * factor x voxels. The channels of all batch items are planes. */
typedef struct {
    const void *values; /* (planes, z, y, x) */
    void *output;       /* (planes, size z, size y, size x), each size times its factor being that of the values */
    int64_t planes;
    int64_t size[3];
    int64_t factor[3];
    int64_t is_double;
    int64_t threads;
    parallel_runner parallel;
} average;

/* Return 0, or the bytes that cannot be allocated. */
typedef struct {
    int64_t (*forward_float)(const call *);
    int64_t (*forward_double)(const call *);
    int64_t (*backward_float)(const call *);
    int64_t (*backward_double)(const call *);
    int64_t (*average_float)(const average *);
    int64_t (*average_double)(const average *);
} kernels;

/* Runs `work(argument)` on that many threads. parallel: NULL for threads of our own. */
void run_in_parallel(int64_t threads, parallel_runner parallel, void (*work)(void *), void *argument);

#endif
