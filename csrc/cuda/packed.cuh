// Sixteen bytes at a time: how the kernels read and write rows.
//
// A row is a multiple of packs where everything is aligned; otherwise the same packs are assembled
// element by element. The choice is one flag for the whole launch, so it is a uniform branch; where
// the flag is a constant, which the steering kernels make of it, it is none.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../args.h"

namespace rk::cuda {

#define RK_DEVICE __device__ __forceinline__

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

// What s, sums, scores and the edit are worked out in. Where nearly all of a float32 row lies along
// v, the rounding of s or of v.s to float32 would be most of what is left of it.
template <class T>
using Real = std::conditional_t<T::kPack == 4, double, float>;

RK_DEVICE float fused(float a, float b, float c) {
  return fmaf(a, b, c);
}
RK_DEVICE double fused(double a, double b, double c) {
  return fma(a, b, c);
}

// The pack that begins at element `at`; zeros beyond `end`. `once` marks what nobody reads again.
template <class T>
RK_DEVICE uint4 load_pack(const typename T::Element* row, int at, int end, bool aligned,
                          bool once = false) {
  uint4 raw = {0, 0, 0, 0};
  if (aligned) {
    const auto* p = reinterpret_cast<const uint4*>(row + at);
    if (at < end) raw = once ? __ldcs(p) : *p;
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

// kPack floats of a float32 vector beside a row of T: one or two packs
template <class T>
RK_DEVICE void load_floats(const float* vector, int at, int end, bool aligned, float* v) {
#pragma unroll
  for (int e = 0; e < T::kPack; e += F32::kPack)
    load<F32>(reinterpret_cast<const uint32_t*>(vector), at + e, end, aligned, v + e);
}

// kPack values of weight + offset; no launch with a weight of the other half type is `aligned`
template <class T>
RK_DEVICE void load_gain(const Weight& weight, int at, int end, bool aligned, float* v) {
  if (weight.dtype == T::kDtype) {  // nearly always
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

// --- copies into shared memory, waited for when they are needed
// -----------------------------------

RK_DEVICE void copy_pack_async(uint4* to, const void* from, bool inside) {
#if defined(__CUDA_ARCH__)
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
#else
  *to = inside ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#endif
}

RK_DEVICE void wait_for_the_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// --- programmatic dependent launch (sm_90 and later; nothing before)
// ------------------------------

// Everything the kernel before has written is visible from here on.
RK_DEVICE void wait_for_the_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start its prologue; it waits for our end, and so for our writes, by itself.
RK_DEVICE void let_the_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Into L2, and no further: the kernel before may still be writing it, and L2 is where it is
// written.
RK_DEVICE void prefetch(const void* p) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Ask for `bytes` bytes, one line of 128 per thread; seldom more than one, so the loop stays small.
RK_DEVICE void prefetch_bytes(const void* from, int64_t bytes, int thread, int threads) {
#pragma unroll 1
  for (int64_t at = thread * 128; at < bytes; at += threads * 128)
    prefetch(static_cast<const char*>(from) + at);
}

}  // namespace rk::cuda
