// The kernel around steer_row: which rows a block takes, and what it loads before their turn.
#pragma once

#include "steer.cuh"

namespace rk::cuda {

// Blocks that a multiprocessor must hold at least: 1,024 threads (1,280 without the norm), each
// with two packs of every row on the way. 1 if a thread has more to hold, or ptxas would spill.
template <class T, int kPlan, Mode kMode, int kSlotsAtOnce, bool kAligned>
constexpr int kMinBlocks =
    kAligned && T::kPack == 8 && kMode != Mode::norm_adjoint && kSlotsAtOnce == 1 &&
            kPlans[kPlan].values <= 16 && kPlans[kPlan].split == 1
        ? (kMode == Mode::add ? 1280 : 1024) / kPlans[kPlan].block()
        : 1;

// Whether blocks take one row after the other. Not for float32, whose prefetched rows need more
// shared memory than every GPU has (99 KB on sm_86, 89 and 120).
template <class T, int kPlan, Mode kMode, int kSlotsAtOnce, bool kAligned>
constexpr bool kPersistent = kAligned && T::kPack == 8 && kSlotsAtOnce == 1 &&
                             kMode != Mode::norm_adjoint && is_persistent(kPlans[kPlan]);

// The rows of a persistent block, each copied into shared memory during the row before. With
// `bank_in_shared` the vectors of the one program lie there too: in L1 the vectors of such long
// rows and the weight would evict each other.
template <class T, Mode kMode, class RowSlice, class Sum>
RK_DEVICE void steer_prefetched_rows(const SteerArgs& args, const RowSlice slice, int64_t row,
                                     int64_t tokens, bool bank_in_shared, Sum& team_sum,
                                     typename RowSlice::Raw& raw_x,
                                     typename RowSlice::Raw& raw_residual) {
  auto* next_x = static_cast<uint4*>(dynamic_shared());
  auto* next_residual = next_x + RowSlice::kPacks * RowSlice::kBlock;
  const auto start_fetch = [&] {
    slice.start_fetch(args.x, row, next_x);
    if (args.residual.data) slice.start_fetch(args.residual, row, next_residual);
  };
  start_fetch();
  SteerArgs shared_args = args;
  if (bank_in_shared) {
    auto* vectors =
        args.residual.data ? next_residual + RowSlice::kPacks * RowSlice::kBlock : next_residual;
    const auto* bank = reinterpret_cast<const uint4*>(args.programs.bank);
    for (int i = threadIdx.x; i < 2 * slice.hidden / 4; i += RowSlice::kBlock)
      start_copy(vectors + i, bank + i, true);
    shared_args.programs.bank = reinterpret_cast<const float*>(vectors);
  }
  wait_for_copies();
  __syncthreads();
  while (row < tokens) {
    wait_for_copies();
    RowSlice::end_fetch(next_x, raw_x);
    if (args.residual.data) RowSlice::end_fetch(next_residual, raw_residual);
    const int64_t this_row = row;
    row += gridDim.x;
    if (row < tokens) start_fetch();
    steer_row<T, kMode, 1, false>(shared_args, slice, this_row, team_sum, raw_x, raw_residual);
  }
}

// bank_in_shared: see steer_prefetched_rows.
template <class T, int kPlan, Mode kMode, int kSlotsAtOnce, bool kAligned>
__global__ void __launch_bounds__(kPlans[kPlan].block(),
                                  (kMinBlocks<T, kPlan, kMode, kSlotsAtOnce, kAligned>))
    steer_kernel(const SteerArgs args, const int64_t tokens, const bool bank_in_shared) {
  using RowSlice = Slice<T, kPlan, kAligned>;
  constexpr int kCluster = RowSlice::plan.cluster;
  using Sum = TeamSum<typename RowSlice::Wide, RowSlice::kThreads, 4, kCluster>;
  __shared__ typename Sum::Buffers buffers;
  Sum team_sum(buffers);
  if (kCluster > 1) arrive_at_cluster<false>();
  int64_t row =
      int64_t{blockIdx.x} / kCluster * RowSlice::plan.rows + threadIdx.x / RowSlice::kThreads;
  const int lane = block_of_cluster<kCluster>() * RowSlice::kBlock + threadIdx.x;
  const RowSlice slice{lane % RowSlice::kThreads, static_cast<int>(args.hidden)};

  touch_arguments(args.x.data, args.programs.bank, args.weight.data, args.normed.data, args.h.data);
  // what the previous kernel does not write goes into L2 while that one still runs
  if (blockIdx.x == 0) {
    if (!args.programs.route)
      prefetch_bytes(args.programs.bank, 2 * args.programs.slots * args.hidden * 4, threadIdx.x,
                     RowSlice::kBlock);
    if (kMode != Mode::add)
      prefetch_bytes(args.weight.data, args.hidden * (args.weight.dtype == Dtype::f32 ? 4 : 2),
                     threadIdx.x, RowSlice::kBlock);
  }
  wait_for_previous_kernel();
  start_next_kernel();
  if (kCluster > 1) wait_for_cluster();  // shared memory exists only in blocks that have begun
  if (row >= tokens) return;             // only whole warps, and only if a team is one warp

  // two raw rows of 32 float32 values would leave no registers for anything else
  constexpr bool kDelayResidual = RowSlice::kPacks > 4;
  typename RowSlice::Raw raw_x, raw_residual;
  const auto fetch = [&](int64_t fetched_row) {
    slice.fetch(args.x, fetched_row, raw_x);
    if (!kDelayResidual && args.residual.data)
      slice.fetch(args.residual, fetched_row, raw_residual);
  };
  if constexpr (!kPersistent<T, kPlan, kMode, kSlotsAtOnce, kAligned>) {
    fetch(row);
    steer_row<T, kMode, kSlotsAtOnce, kDelayResidual>(args, slice, row, team_sum, raw_x,
                                                      raw_residual);
  } else if constexpr (!kPrefetchesNextRow) {
    for (; row < tokens; row += gridDim.x) {
      fetch(row);
      steer_row<T, kMode, kSlotsAtOnce, kDelayResidual>(args, slice, row, team_sum, raw_x,
                                                        raw_residual);
    }
  } else {
    steer_prefetched_rows<T, kMode>(args, slice, row, tokens, bank_in_shared, team_sum, raw_x,
                                    raw_residual);
  }
}

}  // namespace rk::cuda
