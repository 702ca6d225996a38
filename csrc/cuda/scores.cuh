// v_j . h for every token: one read of h.
#pragma once

#include "reduce.cuh"

namespace rk::cuda {

constexpr int kScoresThreads = 128;

// kGroup slots are read per reduction: 1 for the usual single direction, else 4 at a time.
template <class T, int kGroup>
__global__ void __launch_bounds__(kScoresThreads, kGroup == 1 ? 8 : 1)
    scores_kernel(const ScoresArgs args, const bool aligned) {
  using Sum = TeamSum<float, kScoresThreads, kGroup>;
  __shared__ typename Sum::Buffers buffers;
  Sum team_sum(buffers);
  const int64_t row = blockIdx.x, slots = args.programs.slots;
  const int hidden = static_cast<int>(args.hidden);
  let_the_next_kernel_start();
  wait_for_the_kernel_before();
  const int64_t program = program_of(args.programs, row);
  const float* read = args.programs.bank + (program < 0 ? 0 : program) * 2 * slots * hidden;
  const auto* h = row_of<T>(args.h, row);

  for (int64_t first = 0; first < slots; first += kGroup) {
    float sums[kGroup] = {};
    if (program >= 0) {
#pragma unroll(kGroup == 1 ? 4 : 2)
      for (int at = threadIdx.x * T::kPack; at < hidden; at += kScoresThreads * T::kPack) {
        float values[T::kPack], vector[T::kPack];
        load<T>(h, at, hidden, aligned, values);
#pragma unroll
        for (int k = 0; k < kGroup; k++) {
          if (first + k >= slots) break;
          load_floats<T>(read + (first + k) * hidden, at, hidden, aligned, vector);
#pragma unroll
          for (int e = 0; e < T::kPack; e++) sums[k] = fmaf(values[e], vector[e], sums[k]);
        }
      }
    }
    team_sum(sums);
    const int k = threadIdx.x;
    if (k < kGroup && first + k < slots) {
      float mine = sums[0];  // no run-time index into registers
#pragma unroll
      for (int i = 1; i < kGroup; i++) mine = k == i ? sums[i] : mine;
      args.out[row * slots + first + k] = mine;
    }
  }
}

}  // namespace rk::cuda
