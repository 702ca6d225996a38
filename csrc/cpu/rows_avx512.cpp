// The row kernels for AVX-512 (Skylake-X and later, Zen 4 and later), and for AVX-512 with
// instructions that convert bfloat16 (Sapphire Rapids and later, Zen 4 and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "rows.h"

#define RK_LANES 16
#define RK_F16_INSTRUCTIONS 512
#define RK_TABLE kernels_avx512
#define RK_NAME "avx512"
#define RK_BF16_TABLE kernels_avx512_bf16
// AVX512_BF16 and AVX512_VBMI serve FastBF16 alone: no other vector of bfloat16 or of bytes exists
// that a compiler might use them for. The pragma follows every include: otherwise an inline
// function of the standard library would be compiled for this instruction set, and the linker could
// choose it for all others.
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((                                                                         \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c,prefer-vector-width=512")
#endif
#include "rows.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
