// How the kernels read and write rows: sixteen bytes at a time, a pack.
//
// If everything is aligned, a row is a multiple of packs. Otherwise the same packs are assembled
// element by element. One flag for the whole launch says which: a uniform branch, or none in the
// steering kernels, where the flag is a template parameter.
#pragma once

#include <type_traits>

#include "../args.h"
#include "platform.cuh"

namespace rk::cuda {

// Element types. A pack is 16 bytes of raw bits, a uint4, whatever the type.
struct F32 {
  using Element = uint32_t;
  static constexpr Dtype kDtype = Dtype::f32;
  static constexpr int kPack = 4;
  static RK_DEVICE void unpack(uint4 raw, float* v) {
    v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
    v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
  }
  static RK_DEVICE uint4 pack(const float* v) {
    return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
            __float_as_uint(v[3])};
  }
};

// The 16-bit types differ in how two of them become floats and back.
template <class Pair>
struct Half {
  using Element = uint16_t;
  static constexpr int kPack = 8;
  static RK_DEVICE void unpack(uint4 raw, float* v) {
    Pair::widen(raw.x, v), Pair::widen(raw.y, v + 2);
    Pair::widen(raw.z, v + 4), Pair::widen(raw.w, v + 6);
  }
  static RK_DEVICE uint4 pack(const float* v) {
    return {Pair::narrow(v[0], v[1]), Pair::narrow(v[2], v[3]), Pair::narrow(v[4], v[5]),
            Pair::narrow(v[6], v[7])};
  }
};
struct BF16Pair {  // a bfloat16 is the upper half of a float
  static RK_DEVICE void widen(uint32_t two, float* v) {
    v[0] = __uint_as_float(two << 16);
    v[1] = __uint_as_float(two & 0xffff0000u);
  }
  static RK_DEVICE uint32_t narrow(float low, float high) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(two);
  }
};
struct F16Pair {
  static RK_DEVICE void widen(uint32_t two, float* v) {
    const float2 wide = __half22float2(reinterpret_cast<const __half2&>(two));
    v[0] = wide.x, v[1] = wide.y;
  }
  static RK_DEVICE uint32_t narrow(float low, float high) {
    const __half2 two = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(two);
  }
};
struct BF16 : Half<BF16Pair> {
  static constexpr Dtype kDtype = Dtype::bf16;
};
struct F16 : Half<F16Pair> {
  static constexpr Dtype kDtype = Dtype::f16;
};

// The type of s, sums, scores and the edit: float64 for float32 rows. If nearly all of such a row
// lies along v, little of it is left after ablation, and s or v.s rounded to float32 would make an
// error as large as that.
template <class T>
using WideOf = std::conditional_t<T::kPack == 4, double, float>;

// a b + c, rounded once
RK_DEVICE float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
RK_DEVICE double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// The pack that begins at element `at`; zeros beyond `end`. `read_once`: no other thread or kernel
// will read it soon, so caches need not keep it.
template <class T>
RK_DEVICE uint4 load_pack(const typename T::Element* row, int at, int end, bool aligned,
                          bool read_once = false) {
  uint4 raw = {0, 0, 0, 0};
  if (aligned) {
    const auto* p = reinterpret_cast<const uint4*>(row + at);
    if (at < end) raw = read_once ? __ldcs(p) : *p;
    return raw;
  }
  uint32_t* words = &raw.x;
#pragma unroll
  for (int e = 0; e < T::kPack; e++) {
    const uint32_t bits = at + e < end ? row[at + e] : 0;
    words[e * 4 / T::kPack] |= bits << (T::kPack == 8 ? 16 * (e % 2) : 0);
  }
  return raw;
}

template <class T>
RK_DEVICE void store_pack(typename T::Element* row, int at, int end, bool aligned, uint4 raw) {
  if (aligned) {
    if (at < end) *reinterpret_cast<uint4*>(row + at) = raw;
    return;
  }
  const uint32_t* words = &raw.x;
#pragma unroll
  for (int e = 0; e < T::kPack; e++)
    if (at + e < end)
      row[at + e] = static_cast<typename T::Element>(words[e * 4 / T::kPack] >>
                                                     (T::kPack == 8 ? 16 * (e % 2) : 0));
}

template <class T>
RK_DEVICE void load(const typename T::Element* row, int at, int end, bool aligned, float* v) {
  T::unpack(load_pack<T>(row, at, end, aligned), v);
}

// The kPack floats of a float32 vector that belong to a pack of T: one or two packs
template <class T>
RK_DEVICE void load_floats(const float* vector, int at, int end, bool aligned, float* v) {
#pragma unroll
  for (int e = 0; e < T::kPack; e += F32::kPack)
    load<F32>(reinterpret_cast<const uint32_t*>(vector), at + e, end, aligned, v + e);
}

// kPack values of weight + offset. A launch with a weight of the other 16-bit type is never
// `aligned`.
template <class T>
RK_DEVICE void load_gain(const Weight& weight, int at, int end, bool aligned, float* v) {
  if (weight.dtype == T::kDtype) {  // the usual case
    load<T>(static_cast<const typename T::Element*>(weight.data), at, end, aligned, v);
  } else if (aligned || weight.dtype == Dtype::f32) {
    load_floats<T>(static_cast<const float*>(weight.data), at, end, aligned, v);
  } else {
    const auto* w = static_cast<const uint16_t*>(weight.data);
#pragma unroll
    for (int e = 0; e < T::kPack; e++) {
      float two[2];
      const uint32_t bits = at + e < end ? w[at + e] : 0;
      weight.dtype == Dtype::bf16 ? BF16Pair::widen(bits, two) : F16Pair::widen(bits, two);
      v[e] = two[0];
    }
  }
#pragma unroll
  for (int e = 0; e < T::kPack; e++) v[e] += weight.offset;
}

template <class T>
RK_DEVICE typename T::Element* row_of(const Rows& rows, int64_t i) {
  return static_cast<typename T::Element*>(rows.data) + i * rows.stride;
}

// Prefetches `bytes` bytes, a line of 128 per thread. The loop is not unrolled because it seldom
// turns twice.
RK_DEVICE void prefetch_bytes(const void* from, int64_t bytes, int thread, int threads) {
#pragma unroll 1
  for (int64_t at = thread * 128; at < bytes; at += threads * 128)
    prefetch(static_cast<const char*>(from) + at);
}

}  // namespace rk::cuda
