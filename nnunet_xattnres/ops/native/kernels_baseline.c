/* For every processor of the platform the compiler builds for. */
#define KERNELS kernels_baseline
#define VECTOR_BYTES 16
#include "kernels.h"
