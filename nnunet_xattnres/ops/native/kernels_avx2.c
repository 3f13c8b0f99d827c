/* For x86 processors with AVX2 and FMA. */
#include "attention.h"

#ifdef HAS_AVX2_KERNELS
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define KERNELS kernels_avx2
#define VECTOR_BYTES 32
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
