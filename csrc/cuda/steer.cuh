// h = s + sum_j phi_j(v_j . s) u_j with s = x + residual, the norm of h, and the adjoints of both.
//
// A row is read once. Each thread keeps its part of s in registers (float32; float64 where the rows
// are float32, see Real), the dot products are one reduction over the row's threads, and the result
// is written: 3 bytes per byte of x (4 with the norm), which is what the residual add alone would
// move but for the normed row.
//
// With many rows what counts is the bytes that are asked for at once, so registers are for rows,
// and the vectors and the weight, which the rows before have left in L1, are read where they are
// needed, the write vector twice. With few rows (a split plan) what counts is how often one load
// waits for another: everything is asked for at the start.
//
// The norm needs no second reduction: with t = v.s and h = s + phi u,
//     |h|^2 = s.s + 2 phi s.u + phi^2 u.u,
// and all four dot products travel together. Where most of s is removed this cancels, so below
// kTrusted of |s|^2 the squares of h are added up after all; the whole row takes that branch.
#pragma once

#include "plans.h"
#include "reduce.cuh"

namespace rk::cuda {

enum class Mode { add, norm, through };  // see SteerArgs

// What sums and the edit are worked out in; for longer rows of float32 there are no registers.
template <class T, int kPlan>
using RealOf = std::conditional_t<kPlans[kPlan].hidden() <= 8192, Real<T>, float>;

// of |s|^2: float32 rows show more, unless the sums are doubles
template <class T, class R>
constexpr float kTrusted = sizeof(R) == 8  ? 1e-6f
                           : T::kPack == 4 ? 0.25f
                                           : 0.01f;

// What a thread holds of its row: packs of T at fixed offsets.
template <class T, int kPlan, bool kAligned>
struct Slice {
  using R = RealOf<T, kPlan>;
  static constexpr Plan kP = kPlans[kPlan];
  static constexpr int kThreads = kP.threads(), kBlock = kP.block();
  static constexpr int kPacks = kP.values / T::kPack / kP.split;
  static constexpr int kValues = kPacks * T::kPack;
  // A split adds the two halves of a thread's packs in two threads; one thread adds them apart too.
  static constexpr int kHalves = kP.split == 1 && kPacks > 1 ? 2 : 1;
  static_assert(kPacks >= 1, "less than a pack per thread");

  static constexpr bool aligned = kAligned;
  int lane, hidden;

  RK_DEVICE int at(int pack) const {
    return (((lane % kP.split) * kPacks + pack) * kP.team + lane / kP.split) * T::kPack;
  }
  // A load does not wait, its first use does: rows are fetched as raw packs, all of them before the
  // first is unpacked.
  using Raw = uint4[kPacks];
  RK_DEVICE void fetch(const Rows& rows, int64_t row, Raw& raw) const {
#pragma unroll
    for (int p = 0; p < kPacks; p++)
      raw[p] = load_pack<T>(row_of<T>(rows, row), at(p), hidden, aligned, true);
  }
  // the same by way of shared memory, where each thread has places of its own
  RK_DEVICE void ask_for(const Rows& rows, int64_t row, uint4* stage) const {
    const auto* from = row_of<T>(rows, row);
#pragma unroll
    for (int p = 0; p < kPacks; p++)
      copy_pack_async(stage + p * kBlock + threadIdx.x, from + at(p), at(p) < hidden);
  }
  static RK_DEVICE void take(const uint4* stage, Raw& raw) {
#pragma unroll
    for (int p = 0; p < kPacks; p++) raw[p] = stage[p * kBlock + threadIdx.x];
  }
  template <class V>
  static RK_DEVICE void unpack(const Raw& raw, V* v) {
#pragma unroll
    for (int p = 0; p < kPacks; p++) {
      float values[T::kPack];
      T::unpack(raw[p], values);
#pragma unroll
      for (int e = 0; e < T::kPack; e++) v[p * T::kPack + e] = values[e];
    }
  }
  template <class V>
  RK_DEVICE void write(const Rows& rows, int64_t row, const V* v) const {
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
  template <class A, class B>
  static RK_DEVICE R dot(const A* a, const B* b) {
    R halves[kHalves] = {};
#pragma unroll
    for (int i = 0; i < kValues; i++) {
      R& sum = halves[i * kHalves / kValues];
      sum = fused(R{a[i]}, R{b[i]}, sum);
    }
    return kHalves == 2 ? halves[0] + halves[kHalves - 1] : halves[0];
  }
};

// Blocks that a multiprocessor must hold at least: 1,024 threads (1,280 without the norm), each
// with two packs of every row on the way. Where a thread has more to hold 1, or ptxas would spill.
template <class T, int kPlan, Mode kMode, int kGroup, bool kAligned>
constexpr int kResident = kAligned && T::kPack == 8 && kMode != Mode::through && kGroup == 1 &&
                                  kPlans[kPlan].values <= 16 && kPlans[kPlan].split == 1
                              ? (kMode == Mode::add ? 1280 : 1024) / kPlans[kPlan].block()
                              : 1;

// A float32 row would ask for more shared memory than every GPU has (99 KB on sm_86, 89 and 120).
template <class T, int kPlan, Mode kMode, int kGroup, bool kAligned>
constexpr bool kStays =
    kAligned && T::kPack == 8 && kGroup == 1 && kMode != Mode::through && stays(kPlans[kPlan]);

// One row, of which x and the residual (unless kLate) have been fetched. kGroup slots are read per
// reduction: 1 for the usual single direction, else 4 at a time (2 of float32).
template <class T, Mode kMode, int kGroup, bool kLate, class S, class Sum>
RK_DEVICE void steer_row(const SteerArgs& args, const S slice, int64_t row, Sum& team_sum,
                         typename S::Raw& raw_x, typename S::Raw& raw_residual) {
  using R = typename S::R;
  constexpr int kValues = S::kValues;
  const int hidden = slice.hidden;
  const int64_t slots = args.programs.slots;
  typename S::Raw raw_h;
  if constexpr (kMode == Mode::through) slice.fetch(args.h, row, raw_h);
  const int64_t program = program_of(args.programs, row);
  const float* v = args.programs.bank + (program < 0 ? 0 : program) * 2 * slots * hidden;
  const float* u = v + slots * hidden;
  const float* params = args.programs.params + program * slots * kParams;
  if (args.saved) {  // the edit is its own adjoint, with the roles exchanged
    const float* swap = v;
    v = u, u = swap;
  }
  float vector[kValues], write[kValues], gain[kValues], numbers[kParams];
  constexpr bool kEarly = kGroup == 1 && kValues <= 8 && T::kPack == 8;
  if constexpr (kEarly) {
    if (program >= 0) {
      slice.read_vector(v, vector);
      slice.read_vector(u, write);
#pragma unroll
      for (int i = 0; i < kParams; i++) numbers[i] = params[i];
    }
    // last, since which type the weight has is a branch, and in it the load is waited for
    if (kMode == Mode::norm) slice.read_gain(args.weight, gain);
  }

  using V = std::conditional_t<kMode == Mode::through, float, R>;  // registers for h take those
  V s[kValues];
  S::unpack(raw_x, s);
  if constexpr (kMode == Mode::through) {
    // the norm's adjoint: g = scale (w d - h scale^2 mean(w d h)), d being the gradient of normed
    float h[kValues];
    S::unpack(raw_h, h);
    slice.read_gain(args.weight, gain);
#pragma unroll
    for (int i = 0; i < kValues; i++) s[i] *= gain[i];
    R sums[2] = {S::dot(h, h), S::dot(s, h)};
    team_sum(sums);
    const float scale = rsqrtf(static_cast<float>(sums[0] / hidden) + args.weight.eps);
    const float pull = scale * scale * static_cast<float>(sums[1] / hidden);
#pragma unroll
    for (int i = 0; i < kValues; i++) s[i] = scale * fmaf(-pull, h[i], s[i]);
  }
  if (args.residual.data) {
    if (kLate) slice.fetch(args.residual, row, raw_residual);
    float residual[kValues];
    S::unpack(raw_residual, residual);
#pragma unroll
    for (int i = 0; i < kValues; i++) s[i] += residual[i];
  }

  float* scores = args.scores && slice.lane == 0 ? args.scores + row * slots : nullptr;
  R squares = 0, trusted = 0;
  if (program < 0) {  // the plain add, bit for bit
    if (scores)
#pragma unroll 1
      for (int64_t slot = 0; slot < slots; slot++) scores[slot] = 0.0f;
  } else {
    if constexpr (kGroup == 1) {
      if (!kEarly) slice.read_vector(v, vector);
      R phi;
      const float* slot = kEarly ? numbers : params;
      if constexpr (kMode == Mode::norm) {
        if (!kEarly) slice.read_vector(u, write);
        R sums[4] = {S::dot(s, vector), S::dot(s, s), S::dot(s, write), S::dot(write, write)};
        team_sum(sums);
        if (scores) scores[0] = static_cast<float>(sums[0]);
        phi = coefficient(args, row, slot, sums[0]);
        squares = fused(phi, fused(phi, sums[3], 2 * sums[2]), sums[1]);
        trusted = kTrusted<T, R> * sums[1];
      } else {
        R sums[1] = {S::dot(s, vector)};
        team_sum(sums);
        if (scores) scores[0] = static_cast<float>(sums[0]);
        phi = coefficient(args, row, slot, sums[0]);
      }
      if (!kEarly) slice.read_vector(u, write);
#pragma unroll
      for (int i = 0; i < kValues; i++) s[i] = static_cast<V>(fused(phi, R{write[i]}, R{s[i]}));
    } else {
      R change[kValues] = {};
      for (int64_t first = 0; first < slots; first += kGroup) {
        R sums[kGroup] = {};
#pragma unroll
        for (int k = 0; k < kGroup; k++) {
          if (first + k >= slots) break;
          slice.read_vector(v + (first + k) * hidden, vector);
          sums[k] = S::dot(s, vector);
        }
        team_sum(sums);
#pragma unroll
        for (int k = 0; k < kGroup; k++) {
          const int64_t slot = first + k;
          if (slot >= slots) break;
          if (scores) scores[slot] = static_cast<float>(sums[k]);
          const R phi = coefficient(args, row * slots + slot, params + slot * kParams, sums[k]);
          slice.read_vector(u + slot * hidden, vector);
#pragma unroll
          for (int i = 0; i < kValues; i++) change[i] = fused(phi, R{vector[i]}, change[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kValues; i++) s[i] = static_cast<V>(s[i] + change[i]);
    }
  }
  if (args.out.data) slice.write(args.out, row, s);

  if constexpr (kMode == Mode::norm) {
    if (kGroup != 1 || !(squares > trusted)) {  // also where it is NaN
      R sums[1] = {S::dot(s, s)};
      team_sum(sums);
      squares = sums[0];
    }
    const float scale = rsqrtf(static_cast<float>(squares / hidden) + args.weight.eps);
#pragma unroll
    for (int i = 0; i < kValues; i++) s[i] *= scale;
    if (!kEarly) slice.read_gain(args.weight, gain);
#pragma unroll
    for (int i = 0; i < kValues; i++) s[i] *= gain[i];
    slice.write(args.normed, row, s);
  }
}

// Whether a block that stays asks for its next row; before sm_90 ptxas finds no registers for that.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kStages = false;
#else
constexpr bool kStages = true;
#endif

// `keep`: of a block that stays, the vectors of the one program are in shared memory.
template <class T, int kPlan, Mode kMode, int kGroup, bool kAligned>
__global__ void __launch_bounds__(kPlans[kPlan].block(),
                                  (kResident<T, kPlan, kMode, kGroup, kAligned>))
    steer_kernel(const SteerArgs args, const int64_t tokens, const bool keep) {
  using S = Slice<T, kPlan, kAligned>;
  constexpr int kCluster = S::kP.cluster;
  using Sum = TeamSum<typename S::R, S::kThreads, 4, kCluster>;
  __shared__ typename Sum::Buffers buffers;
  Sum team_sum(buffers);
  if (kCluster > 1) arrive_at_the_cluster<false>();
  int64_t row = int64_t{blockIdx.x} / kCluster * S::kP.rows + threadIdx.x / S::kThreads;
  const int lane = block_of_cluster<kCluster>() * S::kBlock + threadIdx.x;
  const S slice{lane % S::kThreads, static_cast<int>(args.hidden)};

  // what does not come from the kernel before is asked for while that one still runs
  ask_for_the_arguments(args);
  if (blockIdx.x == 0) {
    if (!args.programs.route)
      prefetch_bytes(args.programs.bank, 2 * args.programs.slots * args.hidden * 4, threadIdx.x,
                     S::kBlock);
    if (kMode != Mode::add)
      prefetch_bytes(args.weight.data, args.hidden * (args.weight.dtype == Dtype::f32 ? 4 : 2),
                     threadIdx.x, S::kBlock);
  }
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
  if (kCluster > 1) wait_for_the_cluster();  // blocks that have not begun have no shared memory
  if (row >= tokens) return;                 // only whole warps, and only where a team is one warp

  // two raw rows of 32 float32 values would leave no registers for anything else
  constexpr bool kLate = S::kPacks > 4;
  typename S::Raw raw_x, raw_residual;
  const auto fetch = [&](int64_t here) {
    slice.fetch(args.x, here, raw_x);
    if (!kLate && args.residual.data) slice.fetch(args.residual, here, raw_residual);
  };
  if constexpr (!kStays<T, kPlan, kMode, kGroup, kAligned>) {
    fetch(row);
    steer_row<T, kMode, kGroup, kLate>(args, slice, row, team_sum, raw_x, raw_residual);
  } else if constexpr (!kStages) {
    for (; row < tokens; row += gridDim.x) {
      fetch(row);
      steer_row<T, kMode, kGroup, kLate>(args, slice, row, team_sum, raw_x, raw_residual);
    }
  } else {
    auto* stage = static_cast<uint4*>(dynamic_shared());
    auto* stage_residual = stage + S::kPacks * S::kBlock;
    const auto ask_for_row = [&] {
      slice.ask_for(args.x, row, stage);
      if (args.residual.data) slice.ask_for(args.residual, row, stage_residual);
    };
    ask_for_row();
    // in L1 the vectors of such a row and the weight would push each other out
    SteerArgs near = args;
    if (keep) {
      auto* vectors = args.residual.data ? stage_residual + S::kPacks * S::kBlock : stage_residual;
      const auto* bank = reinterpret_cast<const uint4*>(args.programs.bank);
      for (int i = threadIdx.x; i < 2 * slice.hidden / 4; i += S::kBlock)
        copy_pack_async(vectors + i, bank + i, true);
      near.programs.bank = reinterpret_cast<const float*>(vectors);
    }
    wait_for_the_copies();
    __syncthreads();
    while (row < tokens) {
      wait_for_the_copies();
      S::take(stage, raw_x);
      if (args.residual.data) S::take(stage_residual, raw_residual);
      const int64_t here = row;
      row += gridDim.x;
      if (row < tokens) ask_for_row();
      steer_row<T, kMode, kGroup, false>(near, slice, here, team_sum, raw_x, raw_residual);
    }
  }
}

}  // namespace rk::cuda
