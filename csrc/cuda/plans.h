// Launch plans as data: how many threads share a row, and how much of it each keeps in registers.
#pragma once

#include <cstdint>

namespace rk::cuda {

struct Plan {
  int team;            // threads of a row, before the split
  int values;          // elements that each of them keeps, before the split
  int split;           // threads that share what one would do: more threads for few tokens
  int cluster;         // blocks that share a row, each on a multiprocessor of its own
  int rows;            // rows of a block; above 1 a team is one warp
  int64_t max_tokens;  // for calls of up to so many tokens

  constexpr int hidden() const { return team * values; }              // the longest row
  constexpr int threads() const { return team * split; }              // of a row
  constexpr int block() const { return threads() / cluster * rows; }  // of a block
};

constexpr int64_t kAnyTokens = INT64_MAX;

// The first plan that takes a row serves it. A plan and its split add up in the same order (see
// reduce.cuh), so the number of tokens never changes a row's bits.
//
// An H100 needs some 40 KB on the way per multiprocessor. 1,024 resident threads that ask for two
// packs of each row ask for 32 KB of every tensor, and 16 float32 values of s leave them 64
// registers. 32 values need 128, so there is one block, which asks for its next row in good time
// (`stays`). With fewer rows than two per multiprocessor nothing hides latency but threads, hence
// the splits. With fewer still most multiprocessors have nothing to do, and what holds one up is to
// take in a long row, the weight and two vectors of float32 alone: a cluster of blocks shares it.
// (Up to 4,096 the cluster's barrier takes as long as it saves.) What it comes to is in
// docs/gpu.md.
constexpr Plan kPlans[] = {
    {32, 8, 1, 1, 8, kAnyTokens},    // hidden to 256: a warp per row, no barrier
    {32, 32, 1, 1, 4, kAnyTokens},   // to 1,024
    {128, 16, 2, 1, 1, 264},         // to 2,048
    {128, 16, 1, 1, 1, kAnyTokens},  //
    {256, 16, 2, 1, 1, 264},         // to 4,096
    {256, 16, 1, 1, 1, kAnyTokens},  //
    {512, 16, 2, 4, 1, 33},          // to 8,192
    {512, 16, 2, 2, 1, 66},          //
    {512, 16, 2, 1, 1, 132},         //
    {512, 16, 1, 1, 1, kAnyTokens},  //
    {512, 32, 2, 4, 1, 33},          // to 16,384
    {512, 32, 2, 2, 1, 66},          //
    {512, 32, 1, 1, 1, kAnyTokens},  // (1,024 threads of one block would spill)
};
constexpr int kPlanCount = sizeof(kPlans) / sizeof(kPlans[0]);

// Whether the blocks of a plan stay and take one row after the other, and ask for the next row
// while they work on this one: where a multiprocessor has room for one block, nobody else would.
constexpr bool stays(const Plan& plan) {
  return plan.hidden() > 8192 && plan.split == 1;
}

// Whether a plan has a kernel for one slot or several, and for the norm's adjoint (`through`).
// Several slots keep the change beside s: 512 threads have no registers for 32 values of both.
constexpr bool serves(const Plan& plan, bool one_slot, bool through) {
  return (plan.split == 1 || (one_slot && !through)) && (one_slot || plan.hidden() <= 8192);
}

// Whether it has one for rows that are not aligned, an element at a time.
constexpr bool serves_unaligned(const Plan& plan) {
  return plan.split == 1 && plan.hidden() <= 8192;
}

// The plan of a call, -1 for rows that none holds in registers. `clusters`: the GPU knows them.
constexpr int choose_plan(int64_t hidden, int64_t tokens, bool one_slot, bool through,
                          bool clusters) {
  for (int i = 0; i < kPlanCount; i++)
    if (hidden <= kPlans[i].hidden() && tokens <= kPlans[i].max_tokens &&
        serves(kPlans[i], one_slot, through) && (clusters || kPlans[i].cluster == 1))
      return i;
  return -1;
}

}  // namespace rk::cuda
