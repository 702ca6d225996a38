// v_j . h for every token: one read of h.
#pragma once

#include "reduce.cuh"

namespace rk::cuda {

constexpr int kScoresThreads = 128, kScoresGroup = 4;

template <class T>
__global__ void __launch_bounds__(kScoresThreads)
    scores_kernel(const ScoresArgs args, const bool aligned) {
  using Sum = TeamSum<kScoresThreads, kScoresGroup>;
  __shared__ typename Sum::Buffers buffers;
  Sum team_sum(buffers);
  const int64_t row = blockIdx.x, slots = args.programs.slots;
  const int hidden = static_cast<int>(args.hidden);
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
  const int64_t program = program_of(args.programs, row);
  const float* read = args.programs.bank + (program < 0 ? 0 : program) * 2 * slots * hidden;
  const auto* h = row_of<T>(args.h, row);

  for (int64_t first = 0; first < slots; first += kScoresGroup) {
    float sums[kScoresGroup] = {};
    if (program >= 0) {
#pragma unroll 2
      for (int at = threadIdx.x * T::kPack; at < hidden; at += kScoresThreads * T::kPack) {
        float values[T::kPack], vector[T::kPack];
        load<T>(h, at, hidden, aligned, values);
#pragma unroll
        for (int k = 0; k < kScoresGroup; k++) {
          if (first + k >= slots) break;
          load_floats<T>(read + (first + k) * hidden, at, hidden, aligned, vector);
#pragma unroll
          for (int e = 0; e < T::kPack; e++) sums[k] = fmaf(values[e], vector[e], sums[k]);
        }
      }
    }
    team_sum(sums);
    const int k = threadIdx.x;
    if (k < kScoresGroup && first + k < slots) {
      float mine = sums[0];  // no run-time index into registers
#pragma unroll
      for (int i = 1; i < kScoresGroup; i++) mine = k == i ? sums[i] : mine;
      args.out[row * slots + first + k] = mine;
    }
  }
}

}  // namespace rk::cuda
