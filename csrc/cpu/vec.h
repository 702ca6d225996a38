// A vector of floats and a row of them, whatever the instruction set: the CPU kernels' platform
// header. The including file defines RK_LANES first.
//
// GCC and Clang vector extensions do the arithmetic, so a kernel is written once and reads like the
// formula. Intrinsics serve only where they save instructions. Everything is in an anonymous
// namespace: each instruction set has its own copy, so the linker cannot put an AVX-512 function
// into the baseline kernels.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "rows.h"

namespace {

#define RK_INLINE inline __attribute__((always_inline))
#define RK_LAMBDA __attribute__((always_inline))
// Compiled apart: in one function with all of its callers, the innermost loops would lack
// registers, which costs a tenth of the time.
#define RK_NOINLINE __attribute__((noinline))

constexpr int64_t kLanes = RK_LANES;
typedef float vfloat __attribute__((vector_size(RK_LANES * 4)));
typedef int32_t vint __attribute__((vector_size(RK_LANES * 4)));
typedef uint32_t vuint __attribute__((vector_size(RK_LANES * 4)));
typedef uint16_t vhalf __attribute__((vector_size(RK_LANES * 2)));

template <class To, class From>
RK_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

RK_INLINE vfloat widen(vfloat v) {
  return v;
}

// 16 bits to 32 and back; the upper half is dropped. Without intrinsics GCC 12 emits four
// instructions instead of one with AVX-512, and three with AVX2.
RK_INLINE vuint extend(vhalf v) {
#if RK_LANES == 16
  return (vuint)_mm512_maskz_cvtepu16_epi32(-1, (__m256i)v);
#elif RK_LANES == 8
  return (vuint)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, vuint);
#endif
}
RK_INLINE vhalf truncate(vuint v) {
#if RK_LANES == 16
  return (vhalf)_mm512_maskz_cvtepi32_epi16(-1, (__m512i)v);
#else
  return __builtin_convertvector(v, vhalf);
#endif
}

RK_INLINE vfloat widen_bf16(vhalf v) {
  return bits<vfloat>(extend(v) << 16);
}

// Round to nearest even; a NaN stays a NaN.
RK_INLINE vhalf narrow_bf16(vfloat f) {
  const vuint u = bits<vuint>(f);
  const vuint rounded = (u & 0x10000u) != 0u ? u + 0x8000u : u + 0x7fffu;
  return truncate((f == f ? rounded : vuint{} + 0x7fc00000u) >> 16);
}

#if RK_F16_INSTRUCTIONS == 512
// The zero-masked forms: GCC warns about an undefined operand of the plain ones.
RK_INLINE vfloat widen_f16(vhalf v) {
  return (vfloat)_mm512_maskz_cvtph_ps(-1, (__m256i)v);
}
RK_INLINE vhalf narrow_f16(vfloat f) {
  return (vhalf)_mm512_maskz_cvtps_ph(-1, (__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif RK_F16_INSTRUCTIONS == 256
RK_INLINE vfloat widen_f16(vhalf v) {
  return (vfloat)_mm256_cvtph_ps((__m128i)v);
}
RK_INLINE vhalf narrow_f16(vfloat f) {
  return (vhalf)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// Without F16C. Subnormals go through the integer value, so that flush-to-zero cannot touch them.
RK_INLINE vfloat widen_f16(vhalf v) {
  const vuint h = extend(v);
  const vuint magnitude = h & 0x7fffu;
  const vuint normal = (magnitude << 13) + (112u << 23);
  const vuint special = (magnitude << 13) | 0x7f800000u;
  const vuint tiny = bits<vuint>(__builtin_convertvector((vint)magnitude, vfloat) * 0x1p-24f);
  const vuint finite = magnitude < 0x400u ? tiny : normal;
  return bits<vfloat>((magnitude >= 0x7c00u ? special : finite) | ((h & 0x8000u) << 16));
}
RK_INLINE vhalf narrow_f16(vfloat f) {
  const vuint u = bits<vuint>(f);
  const vuint magnitude = u & 0x7fffffffu;
  const vuint normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  // adding 0.5 aligns the last place of a subnormal half with the float's: the addition rounds it
  const vuint tiny = bits<vuint>(bits<vfloat>(magnitude) + 0.5f) - 0x3f000000u;
  const vuint overflow = magnitude > 0x7f800000u ? vuint{} + 0x7e00u : vuint{} + 0x7c00u;
  const vuint finite = magnitude < 0x38800000u ? tiny : normal;
  const vuint half = magnitude >= 0x477ff000u ? overflow : finite;  // 65520 and above
  return truncate(half | ((u >> 16) & 0x8000u));
}
#endif

// Element types in memory. Storage is what a vector of them looks like before it is widened.
struct F32 {
  static constexpr rk::Dtype dtype = rk::Dtype::f32;
  using Element = float;
  using Storage = vfloat;
  static RK_INLINE vfloat widen(Storage v) { return v; }
  static RK_INLINE Storage narrow(vfloat v) { return v; }
};
struct BF16 {
  static constexpr rk::Dtype dtype = rk::Dtype::bf16;
  using Element = uint16_t;
  using Storage = vhalf;
  static RK_INLINE vfloat widen(Storage v) { return widen_bf16(v); }
  static RK_INLINE Storage narrow(vfloat v) { return narrow_bf16(v); }
};
struct F16 {
  static constexpr rk::Dtype dtype = rk::Dtype::f16;
  using Element = uint16_t;
  using Storage = vhalf;
  static RK_INLINE vfloat widen(Storage v) { return widen_f16(v); }
  static RK_INLINE Storage narrow(vfloat v) { return narrow_f16(v); }
};

#ifdef RK_BF16_TABLE
// BF16 for processors that convert it in one instruction each way, with the same results.
struct FastBF16 : BF16 {
  // Moves an element's bytes to the upper half of a float. VPERMB, since VPERMW is two
  // micro-operations on Intel.
  static RK_INLINE vfloat widen(Storage v) {
    static constexpr auto kUpper = [] {
      struct {
        alignas(64) uint8_t from[64];
      } bytes{};
      for (int i = 0; i < 64; i++) bytes.from[i] = uint8_t(i / 4 * 2 + i % 2);
      return bytes;
    }();
    return (vfloat)_mm512_maskz_permutexvar_epi8(
        0xccccccccccccccccu, _mm512_load_si512(kUpper.from), _mm512_castsi256_si512((__m256i)v));
  }
  // The instruction flushes denormals to zero and keeps a NaN's sign. Vectors that hold either are
  // rounded by narrow_bf16, so that the bits are those of the other instruction sets.
  static RK_INLINE Storage narrow(vfloat v) {
    constexpr int kQuietNan = 0x01, kDenormal = 0x20, kSignalingNan = 0x80;
    if (__builtin_expect(
            _mm512_fpclass_ps_mask((__m512)v, kQuietNan | kDenormal | kSignalingNan) != 0, 0))
      return narrow_bf16(v);
    return (Storage)_mm512_cvtneps_pbh((__m512)v);
  }
};
#endif

// n lanes, the missing ones zero. If the compiler knows that n is kLanes, this is one plain load.
// memcpy makes misaligned addresses legal.
template <class T>
RK_INLINE vfloat load(const typename T::Element* p, int64_t n = kLanes) {
  typename T::Storage raw{};
  __builtin_memcpy(&raw, p, n * sizeof(*p));
  return T::widen(raw);
}

template <class T>
RK_INLINE void store(typename T::Element* p, vfloat v, int64_t n = kLanes) {
  const typename T::Storage raw = T::narrow(v);
  __builtin_memcpy(p, &raw, n * sizeof(*p));
}

constexpr bool kCanStream = kLanes >= 8;

// Writes a whole vector past the caches, so that memory is not read first. p must be a multiple of
// the vector's size in memory.
template <class T>
RK_INLINE void stream(typename T::Element* p, vfloat v) {
  [[maybe_unused]] const typename T::Storage raw = T::narrow(v);
#if RK_LANES == 16
  if constexpr (sizeof(raw) == 64)
    _mm512_stream_si512((__m512i*)p, (__m512i)raw);
  else
    _mm256_stream_si256((__m256i*)p, (__m256i)raw);
#elif RK_LANES == 8
  if constexpr (sizeof(raw) == 32)
    _mm256_stream_si256((__m256i*)p, (__m256i)raw);
  else
    _mm_stream_si128((__m128i*)p, (__m128i)raw);
#endif  // never called without kCanStream
}

// From here on, other threads see what was streamed.
RK_INLINE void end_stream() {
#if RK_LANES >= 8
  _mm_sfence();
#endif
}

// Zeroes all vector registers. A register with a value occupies a physical register, which the code
// that runs next then lacks for reading ahead: without this, MKL's GEMV of one token's row
// takes 1.0 to 1.2 % longer after a row kernel (Zen 4).
RK_INLINE void release_registers() {
#if RK_LANES == 16
#define RK_ZERO(n) "vpxorq %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"
  __asm__ volatile(RK_ZERO(16) RK_ZERO(17) RK_ZERO(18) RK_ZERO(19) RK_ZERO(20) RK_ZERO(21)
                       RK_ZERO(22) RK_ZERO(23) RK_ZERO(24) RK_ZERO(25) RK_ZERO(26) RK_ZERO(27)
                           RK_ZERO(28) RK_ZERO(29) RK_ZERO(30) RK_ZERO(31)
                   :
                   :
                   : "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",
                     "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
#undef RK_ZERO
#endif
#if RK_LANES >= 8
  _mm256_zeroall();
#endif
}

// The order of the lanes is fixed, so the same row always gives the same bits.
RK_INLINE float sum(vfloat v) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

// body(offset, lanes, accumulator) over a row. Four accumulators hide the latency of the FMA. The
// remainder is whole vectors, then one partial vector.
template <class Body>
RK_INLINE void for_row(int64_t hidden, Body body) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= hidden; j += 4 * kLanes) {
    body(j, kLanes, 0);
    body(j + kLanes, kLanes, 1);
    body(j + 2 * kLanes, kLanes, 2);
    body(j + 3 * kLanes, kLanes, 3);
  }
  for (; j + kLanes <= hidden; j += kLanes) body(j, kLanes, 0);
  if (j < hidden) body(j, hidden - j, 1);
}

// The same vectors from the last to the first.
template <class Body>
RK_INLINE void for_row_backward(int64_t hidden, Body body) {
  int64_t j = hidden / kLanes * kLanes;
  if (j < hidden) body(j, hidden - j);
  for (; j % (4 * kLanes) != 0; j -= kLanes) body(j - kLanes, kLanes);
  for (; j > 0; j -= 4 * kLanes) {
    body(j - kLanes, kLanes);
    body(j - 2 * kLanes, kLanes);
    body(j - 3 * kLanes, kLanes);
    body(j - 4 * kLanes, kLanes);
  }
}

}  // namespace
