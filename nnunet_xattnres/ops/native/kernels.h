/* The kernels in float and double, for the instruction set of the including file, which defines KERNELS and VECTOR_BYTES. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"

/* Tests choose less. */
#ifndef CACHE_BYTES
#define CACHE_BYTES (512 * 1024) /* what a tile's buffers may take */
#endif
#ifndef HALO_BYTES
#define HALO_BYTES (16 * 1024 * 1024) /* what the halos of several batch items may take, if all threads have work then */
#endif
#define BLOCKS 16 /* per batch item, at most */

/* Memory between the buffers of a thread that no code may touch. The address sanitizer reports who does. */
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define GUARD 16 /* voxels or elements */
#define GUARD_MEMORY(begin, bytes) ASAN_POISON_MEMORY_REGION(begin, bytes)
#else
#define GUARD 0
#define GUARD_MEMORY(begin, bytes) ((void)(begin), (void)(bytes))
#endif

/* exp(x) for x <= 0, without branches, so that a loop over it is vectorised. The relative error is below 3e-7.
   exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2, and exp(r) by its Taylor series. */
static inline float exponential(float x) {
    const float bounded = x > -87.0f ? x : -87.0f;
    const float n = floorf(bounded * 1.44269504f + 0.5f);
    const float r = bounded - n * 0.693147181f;
    const float series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720.f)))));
    union {
        int32_t bits;
        float value;
    } power = {((int32_t)n + 127) << 23};
    const float result = x > -87.0f ? series * power.value : 0;
    return x != x ? x : result;
}

#define REAL float
#define INTEGER int32_t
#define NAME(name) name##_float
#define EXP exponential
#define SQRT sqrtf
#include "kernel.h"
#undef REAL
#undef INTEGER
#undef NAME
#undef EXP
#undef SQRT

#define REAL double
#define INTEGER int64_t
#define NAME(name) name##_double
#define EXP exp
#define SQRT sqrt
#include "kernel.h"

const kernels KERNELS = {forward_float, forward_double, backward_float, backward_double, average_float, average_double};
