// Sums over the threads of a row, in one order whatever the launch plan.
#pragma once

#include "packed.cuh"

namespace rk::cuda {

// --- clusters of blocks: sm_90 and later ---

template <int kCluster>
RK_DEVICE int block_of_cluster() {
  return kCluster == 1 ? 0 : blockIdx.x % kCluster;
}

// With kRelease what was stored before is seen by who has waited.
template <bool kRelease>
RK_DEVICE void arrive_at_the_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kRelease)
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  else
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
RK_DEVICE void wait_for_the_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Stores to the same place of another block's shared memory.
template <class R>
RK_DEVICE void store_in_block(R* place, int block, R value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto here = static_cast<uint32_t>(__cvta_generic_to_shared(place));
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
  if constexpr (sizeof(R) == 8)
    asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(there), "d"(value) : "memory");
  else
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
#endif
}

// Adds up kSums numbers over kThreads threads (a warp, or a whole block); every thread gets the
// results. Neighbours first, then pairs of neighbours, and so on, within the warp and then over the
// warps: the same tree for 256 threads as for 512 of which two share the work of one, so a row's
// bits do not depend on the plan (see plans.h).
//
// A shuffle costs a warp's turn, so several sums share them: in the first steps a lane gives half
// of its sums away for its neighbour's part of the other half, and is then left with one of them,
// and with as many lanes fewer to add it up over. Four sums over 512 threads take 13 shuffles a
// warp for 36.
//
// One barrier per call: the buffers take turns, and nobody writes the third call's numbers before
// everybody has passed the second's barrier.
//
// Where a cluster of blocks shares the row, every block has buffers for all of its warps: a warp
// writes to those of all blocks, the barrier is the cluster's, and the rest is as above.
template <class R, int kThreads, int kMost, int kCluster = 1>
struct TeamSum {
  static constexpr int kWarps = kThreads / 32;
  using Buffers = R[2][kMost][kWarps];

  RK_DEVICE explicit TeamSum(Buffers& shared) : buffers(shared) {}

  template <int kSums>
  RK_DEVICE void operator()(R (&sums)[kSums]) {
    static_assert(kSums <= kMost && (kSums == 1 || kSums == 2 || kSums == 4), "1, 2 or 4 sums");
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int left = kSums / 2, step = 1; left >= 1; left /= 2, step *= 2) {
      const bool upper = lane & step;
#pragma unroll
      for (int k = 0; k < left; k++) {
        const R given = upper ? sums[k] : sums[k + left];
        sums[k] = (upper ? sums[k + left] : sums[k]) + __shfl_xor_sync(kAll, given, step);
      }
    }
    const int own = kSums == 4 ? (lane & 1) * 2 + (lane & 2) / 2 : lane % kSums;
    R sum = added<kSums, 32>(sums[0]);
    if constexpr (kWarps > 1) {
      auto& buffer = buffers[turn];
      turn ^= 1;
      if constexpr (kCluster > 1) {
        static_assert(kSums * kCluster <= 32, "a lane for every number and block");
        const int warp = block_of_cluster<kCluster>() * (kWarps / kCluster) + threadIdx.x / 32;
        if (lane < kSums * kCluster) store_in_block(&buffer[own][warp], lane / kSums, sum);
        arrive_at_the_cluster<true>();
        wait_for_the_cluster();
      } else {
        if (lane < kSums) buffer[own][threadIdx.x / 32] = sum;
        __syncthreads();
      }
      // of the warps whose sums a lane takes, neighbours again come first
      constexpr int kTaken = kWarps * kSums > 32 ? kWarps * kSums / 32 : 1;
      static_assert(kTaken <= 4, "more warps than the lanes can take in fours");
      const R* taken = buffer[own] + lane / kSums * kTaken % kWarps;
      sum = taken[0];
      if constexpr (kTaken > 1) sum += taken[1];
      if constexpr (kTaken > 2) sum += taken[2] + taken[3];
      sum = added<kSums, kWarps * kSums / kTaken>(sum);
    }
    sums[0] = sum;
    if constexpr (kSums > 1)
#pragma unroll
      for (int k = 0; k < kSums; k++)
        sums[k] = __shfl_sync(kAll, sum, kSums == 4 ? (k & 1) * 2 + k / 2 : k);
  }

  // over the lanes that are kFrom, 2 kFrom, 4 kFrom ... apart, within groups of kTo
  template <int kFrom, int kTo>
  static RK_DEVICE R added(R sum) {
#pragma unroll
    for (int step = kFrom; step < kTo; step *= 2) sum += __shfl_xor_sync(kAll, sum, step);
    return sum;
  }

  static constexpr uint32_t kAll = 0xffffffffu;
  Buffers& buffers;
  int turn = 0;
};

// phi(t) = a*t + c*clamp(t, low, high) + b. A NaN score compares false twice and stays a NaN.
template <class R>
RK_DEVICE R phi(const float* p, R t) {
  R clamped = t;
  if (t < p[LOW]) clamped = p[LOW];
  if (clamped > p[HIGH]) clamped = p[HIGH];
  return fused(R{p[A]}, t, fused(R{p[C]}, clamped, R{p[B]}));
}

// What a dot product does to its slot: phi of it, or, in the adjoint, the slope of phi at the saved
// score times it.
template <class R>
RK_DEVICE R coefficient(const SteerArgs& args, int64_t at, const float* p, R dot) {
  if (!args.saved) return phi(p, dot);
  const float t = args.saved[at];
  return (t < p[LOW] || t > p[HIGH] ? p[A] : p[A] + p[C]) * dot;
}

RK_DEVICE void* dynamic_shared() {
#ifdef RK_CUDA_EMULATED
  return emulated_dynamic_shared();
#else
  extern __shared__ uint4 memory[];
  return memory;
#endif
}

// Arguments live in constant memory, and the first use of each line of it waits: not after the
// kernel before has ended, but here.
RK_DEVICE void ask_for_the_arguments(const SteerArgs& args) {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::"l"(args.x.data), "l"(args.programs.bank), "l"(args.weight.data),
               "l"(args.normed.data), "l"(args.h.data));
#endif
}

// The program of a row, -1 for none; out of range counts as none, since no kernel can raise.
RK_DEVICE int64_t program_of(const Programs& programs, int64_t row) {
  const int64_t program = programs.route ? programs.route[row] : 0;
  return program < programs.count && programs.slots > 0 ? program : -1;
}

}  // namespace rk::cuda
