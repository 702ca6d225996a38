// Sums over the threads of a row, in one order whatever the launch plan.
#pragma once

#include "packed.cuh"

namespace rk::cuda {

template <int kCluster>
RK_DEVICE int block_of_cluster() {
  return kCluster == 1 ? 0 : blockIdx.x % kCluster;
}

// Adds up kSums numbers over kThreads threads (a warp, or a whole block); every thread gets the
// results. Neighbors are added first, then pairs of neighbors, and so on, within the warp and then
// over the warps. The tree is the same for 256 threads as for 512 of which two share the work of
// one, so a row's bits do not depend on the plan (see plans.h).
//
// Every shuffle costs a turn of the warp, so several sums share them: in the first steps a lane
// gives half of its sums away for its neighbor's part of the other half. It is then left with one
// of them, and with as many lanes fewer to add it up over. Four sums over 512 threads take 13
// shuffles a warp instead of 36.
//
// There is one barrier per call: the two buffers take turns, and nobody writes the numbers of the
// third call before everybody has passed the barrier of the second.
//
// If a cluster of blocks shares the row, every block has buffers for the warps of all blocks. A
// warp writes its sums to all of them, and the barrier is the cluster's.
template <class Number, int kThreads, int kMaxSums, int kCluster = 1>
struct TeamSum {
  static constexpr int kWarps = kThreads / 32;
  using Buffers = Number[2][kMaxSums][kWarps];

  RK_DEVICE explicit TeamSum(Buffers& shared) : buffers(shared) {}

  template <int kSums>
  RK_DEVICE void operator()(Number (&sums)[kSums]) {
    static_assert(kSums <= kMaxSums && (kSums == 1 || kSums == 2 || kSums == 4), "1, 2 or 4 sums");
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int left = kSums / 2, step = 1; left >= 1; left /= 2, step *= 2) {
      const bool upper = lane & step;
#pragma unroll
      for (int k = 0; k < left; k++) {
        const Number given = upper ? sums[k] : sums[k + left];
        sums[k] = (upper ? sums[k + left] : sums[k]) + __shfl_xor_sync(kAllLanes, given, step);
      }
    }
    const int index = kSums == 4 ? (lane & 1) * 2 + (lane & 2) / 2 : lane % kSums;
    Number sum = add_lanes<kSums, 32>(sums[0]);
    if constexpr (kWarps > 1) sum = add_warps<kSums>(sum, lane, index);
    sums[0] = sum;
    if constexpr (kSums > 1)
#pragma unroll
      for (int k = 0; k < kSums; k++)
        sums[k] = __shfl_sync(kAllLanes, sum, kSums == 4 ? (k & 1) * 2 + k / 2 : k);
  }

 private:
  // Adds up the sums of all warps: of each sum, a lane holds the one that `index` names.
  template <int kSums>
  RK_DEVICE Number add_warps(Number sum, int lane, int index) {
    auto& buffer = buffers[turn];
    turn ^= 1;
    if constexpr (kCluster > 1) {
      static_assert(kSums * kCluster <= 32, "a lane for every number and block");
      const int warp = block_of_cluster<kCluster>() * (kWarps / kCluster) + threadIdx.x / 32;
      if (lane < kSums * kCluster) store_in_block(&buffer[index][warp], lane / kSums, sum);
      arrive_at_cluster<true>();
      wait_for_cluster();
    } else {
      if (lane < kSums) buffer[index][threadIdx.x / 32] = sum;
      __syncthreads();
    }
    // a lane adds up the sums of some neighboring warps, and then the lanes are added up
    constexpr int kWarpsOfLane = kWarps * kSums > 32 ? kWarps * kSums / 32 : 1;
    static_assert(kWarpsOfLane <= 4, "a lane adds up four warps at most");
    const Number* sums_of_warps = buffer[index] + lane / kSums * kWarpsOfLane % kWarps;
    sum = sums_of_warps[0];
    if constexpr (kWarpsOfLane > 1) sum += sums_of_warps[1];
    if constexpr (kWarpsOfLane > 2) sum += sums_of_warps[2] + sums_of_warps[3];
    return add_lanes<kSums, kWarps * kSums / kWarpsOfLane>(sum);
  }

  // Adds up the lanes that are kFrom, 2 kFrom, 4 kFrom ... apart, within groups of kTo.
  template <int kFrom, int kTo>
  static RK_DEVICE Number add_lanes(Number sum) {
#pragma unroll
    for (int step = kFrom; step < kTo; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return sum;
  }

  static constexpr uint32_t kAllLanes = 0xffffffffu;
  Buffers& buffers;
  int turn = 0;
};

}  // namespace rk::cuda
