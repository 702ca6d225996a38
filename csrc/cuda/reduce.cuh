// Sums over the threads of a row, in one order whatever the launch plan.
#pragma once

#include "packed.cuh"

namespace rk::cuda {

// Adds up kSums numbers over kThreads threads (a warp, or a whole block); every thread gets the
// result. Neighbours first, then pairs of neighbours, and so on, within the warp and then over the
// warps: the same tree for 256 threads as for 512 of which two share the work of one, so a row's
// bits do not depend on the plan (see plans.h).
//
// One barrier per call: the buffers take turns, and nobody writes the third call's numbers before
// everybody has passed the second's barrier.
template <int kThreads, int kMost>
struct TeamSum {
  static constexpr int kWarps = kThreads / 32;
  using Buffers = float[2][kWarps][kMost];

  RK_DEVICE explicit TeamSum(Buffers& shared) : buffers(shared) {}

  template <int kSums>
  RK_DEVICE void operator()(float (&sums)[kSums]) {
    static_assert(kSums <= kMost, "the buffers are too small");
#pragma unroll
    for (int k = 0; k < kSums; k++)
#pragma unroll
      for (int step = 1; step < 32; step *= 2)
        sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], step);
    if constexpr (kWarps > 1) {
      auto& buffer = buffers[turn];
      turn ^= 1;
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      if (lane == 0)
#pragma unroll
        for (int k = 0; k < kSums; k++) buffer[warp][k] = sums[k];
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kSums; k++) {
        sums[k] = buffer[lane % kWarps][k];
#pragma unroll
        for (int step = 1; step < kWarps; step *= 2)
          sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], step);
      }
    }
  }

  Buffers& buffers;
  int turn = 0;
};

// phi(t) = a*t + c*clamp(t, low, high) + b. A NaN score compares false twice and stays a NaN.
RK_DEVICE float phi(const float* p, float t) {
  float clamped = t;
  if (t < p[LOW]) clamped = p[LOW];
  if (clamped > p[HIGH]) clamped = p[HIGH];
  return fmaf(p[A], t, fmaf(p[C], clamped, p[B]));
}

// What a dot product does to its slot: phi of it, or, in the adjoint, the slope of phi at the saved
// score times it.
RK_DEVICE float coefficient(const SteerArgs& args, int64_t at, const float* p, float dot) {
  if (!args.saved) return phi(p, dot);
  const float t = args.saved[at];
  return (t < p[LOW] || t > p[HIGH] ? p[A] : p[A] + p[C]) * dot;
}

// The program of a row, -1 for none; out of range counts as none, since no kernel can raise.
RK_DEVICE int64_t program_of(const Programs& programs, int64_t row) {
  const int64_t program = programs.route ? programs.route[row] : 0;
  return program < programs.count && programs.slots > 0 ? program : -1;
}

}  // namespace rk::cuda
