// scores[i, j] = v_j . h_i for every token i and slot j of its program; h is read once for up to
// four slots.
#pragma once

#include "program.cuh"
#include "reduce.cuh"

namespace rk::cuda {

constexpr int kScoresThreads = 128;

// kSlotsAtOnce slots share a reduction: 1 for the usual single direction, else 4.
template <class T, int kSlotsAtOnce>
__global__ void __launch_bounds__(kScoresThreads, kSlotsAtOnce == 1 ? 8 : 1)
    scores_kernel(const ScoresArgs args, const bool aligned) {
  using Sum = TeamSum<float, kScoresThreads, kSlotsAtOnce>;
  __shared__ typename Sum::Buffers buffers;
  Sum team_sum(buffers);
  const int64_t row = blockIdx.x, slots = args.programs.slots;
  const int hidden = static_cast<int>(args.hidden);
  start_next_kernel();
  wait_for_previous_kernel();
  const int64_t program = program_of(args.programs, row);
  const float* read = args.programs.bank + (program < 0 ? 0 : program) * 2 * slots * hidden;
  const auto* h = row_of<T>(args.h, row);

  for (int64_t first = 0; first < slots; first += kSlotsAtOnce) {
    float sums[kSlotsAtOnce] = {};
    if (program >= 0) {
#pragma unroll(kSlotsAtOnce == 1 ? 4 : 2)
      for (int at = threadIdx.x * T::kPack; at < hidden; at += kScoresThreads * T::kPack) {
        float values[T::kPack], vector[T::kPack];
        load<T>(h, at, hidden, aligned, values);
#pragma unroll
        for (int k = 0; k < kSlotsAtOnce; k++) {
          if (first + k >= slots) break;
          load_floats<T>(read + (first + k) * hidden, at, hidden, aligned, vector);
#pragma unroll
          for (int e = 0; e < T::kPack; e++) sums[k] = fmaf(values[e], vector[e], sums[k]);
        }
      }
    }
    team_sum(sums);
    const int k = threadIdx.x;
    if (k < kSlotsAtOnce && first + k < slots) {
      float score = sums[0];  // registers cannot be indexed at run time
#pragma unroll
      for (int i = 1; i < kSlotsAtOnce; i++) score = k == i ? sums[i] : score;
      args.out[row * slots + first + k] = score;
    }
  }
}

}  // namespace rk::cuda
