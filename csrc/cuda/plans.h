// Launch plans as data: how many threads share a row, and how much of it each keeps in registers.
#pragma once

#include <cstdint>

namespace rk::cuda {

struct Plan {
  int team;            // threads of a row, before the split
  int values;          // elements that each of them keeps, before the split
  int split;           // threads that share the work of one: more threads for few tokens
  int cluster;         // blocks that share a row, each on a multiprocessor of its own
  int rows;            // rows of a block; above 1 a team is one warp
  int64_t max_tokens;  // for calls of up to this many tokens

  constexpr int hidden() const { return team * values; }              // the longest row
  constexpr int threads() const { return team * split; }              // of a row
  constexpr int block() const { return threads() / cluster * rows; }  // of a block
};

constexpr int64_t kAnyTokens = INT64_MAX;

// The first plan that takes a row serves it. A plan and its split add up in the same order (see
// reduce.cuh), so the number of tokens never changes a row's bits.
//
// How the numbers were chosen:
// - Many tokens: an H100 needs about 40 KB on the way per multiprocessor. 1,024 resident threads
//   that load two packs of each row load 32 KB of every tensor, and 16 float32 values of s leave
//   them 64 registers. 32 values need 128 registers, so there is one block per multiprocessor,
//   which prefetches its next row (see is_persistent).
// - Fewer rows than two per multiprocessor (264 on an H100): only more threads hide latency, hence
//   the splits.
// - Fewer rows than one for every two or four multiprocessors (66, 33): most of the GPU is idle,
//   and one multiprocessor alone loads a long row, the weight and two float32 vectors slowly. A
//   cluster of blocks shares the row.
//
// The measurement beside each plan is add_steer_rms_norm with one slot in bfloat16 on an H100 80GB:
// tokens x hidden, microseconds in a CUDA graph over buffers larger than L2, and the speed as a
// share of a copy's (benchmarks/results/ops-cuda.jsonl). The limits between plans have no recorded
// measurement.
constexpr Plan kPlans[] = {
    // hidden to 256, a warp per row without a barrier: not measured
    {32, 8, 1, 1, 8, kAnyTokens},
    // to 1,024: not measured
    {32, 32, 1, 1, 4, kAnyTokens},
    // to 2,048
    {128, 16, 2, 1, 1, 264},         // 64 x 2048: 2.11 us, 0.99 of a copy; unsplit not measured
    {128, 16, 1, 1, 1, kAnyTokens},  // 4096 x 2048: 26.6 us, 0.92 of a copy
    // to 4,096
    {256, 16, 2, 1, 1, 264},         // 1 x 4096: 2.18 us, 64 x 4096: 2.68 us; unsplit not measured
    {256, 16, 1, 1, 1, kAnyTokens},  // 4096 x 4096: 49.1 us, 0.96 of a copy
    // to 8,192
    {512, 16, 2, 4, 1, 33},          // no recorded measurement
    {512, 16, 2, 2, 1, 66},          // 64 x 8192: 4.09 us, 0.81 of a copy
    {512, 16, 2, 1, 1, 132},         // not measured between 67 and 132 tokens
    {512, 16, 1, 1, 1, kAnyTokens},  // 4096 x 8192: 96.5 us, 0.95 of a copy
    // to 16,384
    {512, 32, 2, 4, 1, 33},          // no recorded measurement
    {512, 32, 2, 2, 1, 66},          // 64 x 16384: 7.03 us, 0.68 of a copy
    {512, 32, 1, 1, 1, kAnyTokens},  // 4096 x 16384: 193 us, 0.94 of a copy; 1,024 threads spill
};
constexpr int kPlanCount = sizeof(kPlans) / sizeof(kPlans[0]);

// The longest row of 512 threads with 16 values each. A thread of a longer row keeps 32 float32
// values of s and has at most 128 registers, which leaves none for more: no float64, no change of
// several slots beside s, no rows that are assembled an element at a time.
constexpr int kMaxHiddenWithSpareRegisters = 8192;
constexpr bool has_spare_registers(const Plan& plan) {
  return plan.hidden() <= kMaxHiddenWithSpareRegisters;
}

// Whether the blocks of a plan are persistent: there is one for each multiprocessor, which takes
// one row after the other and prefetches the next. A multiprocessor has room for one such block
// only, so no other could hide its latency.
constexpr bool is_persistent(const Plan& plan) {
  return !has_spare_registers(plan) && plan.split == 1;
}

// Whether a plan has a kernel for one slot or for several, and for the norm's adjoint.
constexpr bool serves(const Plan& plan, bool one_slot, bool norm_adjoint) {
  return (plan.split == 1 || (one_slot && !norm_adjoint)) &&
         (one_slot || has_spare_registers(plan));
}

// Whether it has a kernel for rows that are not aligned.
constexpr bool serves_unaligned(const Plan& plan) {
  return plan.split == 1 && has_spare_registers(plan);
}

// The plan of a call, -1 for rows that none holds in registers. `clusters`: the GPU has them.
constexpr int choose_plan(int64_t hidden, int64_t tokens, bool one_slot, bool norm_adjoint,
                          bool clusters) {
  for (int i = 0; i < kPlanCount; i++)
    if (hidden <= kPlans[i].hidden() && tokens <= kPlans[i].max_tokens &&
        serves(kPlans[i], one_slot, norm_adjoint) && (clusters || kPlans[i].cluster == 1))
      return i;
  return -1;
}

}  // namespace rk::cuda
