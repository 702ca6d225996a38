// The row kernels for AVX2 with FMA and F16C (Haswell and later, every Zen).
#if defined(__x86_64__)
#include <immintrin.h>

#include "rows.h"

#define RK_LANES 8
#define RK_F16_INSTRUCTIONS 256
#define RK_TABLE kernels_avx2
#define RK_NAME "avx2"
// The pragma follows every include: otherwise an inline function of the standard library would be
// compiled for this instruction set, and the linker could choose it for all others.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "rows.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
