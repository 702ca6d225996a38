// The part of a row that one thread holds in registers: loading, unpacking, summing, writing it.
#pragma once

#include "plans.h"
#include "reduce.cuh"

namespace rk::cuda {

// The type of sums and of the edit. For the longest float32 rows there are no registers for
// float64.
template <class T, int kPlan>
using WideOfPlan = std::conditional_t<has_spare_registers(kPlans[kPlan]), WideOf<T>, float>;

// What a thread holds of its row: kPacks packs of T at fixed offsets.
template <class T, int kPlan, bool kAligned>
struct Slice {
  using Wide = WideOfPlan<T, kPlan>;
  static constexpr Plan plan = kPlans[kPlan];
  static constexpr int kThreads = plan.threads(), kBlock = plan.block();
  static constexpr int kPacks = plan.values / T::kPack / plan.split;
  static constexpr int kValues = kPacks * T::kPack;
  // With a split, two threads add up the halves of what one thread adds up otherwise. One thread
  // therefore adds up its halves apart, so that the order of additions is the same.
  static constexpr int kHalves = plan.split == 1 && kPacks > 1 ? 2 : 1;
  static_assert(kPacks >= 1, "less than a pack per thread");

  static constexpr bool aligned = kAligned;
  int lane, hidden;

  RK_DEVICE int at(int pack) const {
    return (((lane % plan.split) * kPacks + pack) * plan.team + lane / plan.split) * T::kPack;
  }
  // A load does not wait, but its first use does: rows are fetched as raw packs, and only when all
  // loads are under way is the first pack unpacked.
  using Raw = uint4[kPacks];
  RK_DEVICE void fetch(const Rows& rows, int64_t row, Raw& raw) const {
#pragma unroll
    for (int p = 0; p < kPacks; p++)
      raw[p] = load_pack<T>(row_of<T>(rows, row), at(p), hidden, aligned, true);
  }
  // The same in two steps, by way of places in shared memory that only this thread uses.
  RK_DEVICE void start_fetch(const Rows& rows, int64_t row, uint4* stage) const {
    const auto* from = row_of<T>(rows, row);
#pragma unroll
    for (int p = 0; p < kPacks; p++)
      start_copy(stage + p * kBlock + threadIdx.x, from + at(p), at(p) < hidden);
  }
  static RK_DEVICE void end_fetch(const uint4* stage, Raw& raw) {
#pragma unroll
    for (int p = 0; p < kPacks; p++) raw[p] = stage[p * kBlock + threadIdx.x];
  }
  template <class Values>
  static RK_DEVICE void unpack(const Raw& raw, Values* v) {
#pragma unroll
    for (int p = 0; p < kPacks; p++) {
      float values[T::kPack];
      T::unpack(raw[p], values);
#pragma unroll
      for (int e = 0; e < T::kPack; e++) v[p * T::kPack + e] = values[e];
    }
  }
  template <class Values>
  RK_DEVICE void write(const Rows& rows, int64_t row, const Values* v) const {
#pragma unroll
    for (int p = 0; p < kPacks; p++) {
      float rounded[T::kPack];
#pragma unroll
      for (int e = 0; e < T::kPack; e++) rounded[e] = static_cast<float>(v[p * T::kPack + e]);
      store_pack<T>(row_of<T>(rows, row), at(p), hidden, aligned, T::pack(rounded));
    }
  }
  RK_DEVICE void read_vector(const float* vector, float* v) const {
#pragma unroll
    for (int p = 0; p < kPacks; p++)
      load_floats<T>(vector, at(p), hidden, aligned, v + p * T::kPack);
  }
  RK_DEVICE void read_gain(const Weight& weight, float* v) const {
#pragma unroll
    for (int p = 0; p < kPacks; p++) load_gain<T>(weight, at(p), hidden, aligned, v + p * T::kPack);
  }
  template <class Left, class Right>
  static RK_DEVICE Wide dot(const Left* a, const Right* b) {
    Wide halves[kHalves] = {};
#pragma unroll
    for (int i = 0; i < kValues; i++) {
      Wide& sum = halves[i * kHalves / kValues];
      sum = multiply_add(Wide{a[i]}, Wide{b[i]}, sum);
    }
    return kHalves == 2 ? halves[0] + halves[kHalves - 1] : halves[0];
  }
};

}  // namespace rk::cuda
