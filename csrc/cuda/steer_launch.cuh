// Chooses and launches the steering kernel for the arguments of a call.
#pragma once

#include <algorithm>
#include <utility>

#include "launch.h"
#include "long.cuh"
#include "steer.h"
#include "steer_kernel.cuh"

namespace rk::cuda {

template <class T, int kPlan, Mode kMode, int kSlotsAtOnce, bool kAligned>
void launch_plan(const char* op, int32_t device, const SteerArgs& args, int64_t tokens) {
  constexpr Plan plan = kPlans[kPlan];
  if constexpr (serves(plan, kSlotsAtOnce == 1, kMode == Mode::norm_adjoint) &&
                (kAligned || serves_unaligned(plan))) {
    const auto kernel = steer_kernel<T, kPlan, kMode, kSlotsAtOnce, kAligned>;
    Grid grid{(tokens + plan.rows - 1) / plan.rows * plan.cluster, plan.block(), 0, plan.cluster};
    bool bank_in_shared = false;
    if constexpr (kPersistent<T, kPlan, kMode, kSlotsAtOnce, kAligned>) {
      grid.blocks =
          std::min<int64_t>(grid.blocks, device_number(op, device, cudaDevAttrMultiProcessorCount));
      grid.shared_bytes = int64_t{plan.team} * plan.values * sizeof(typename T::Element) *
                          (args.residual.data ? 2 : 1);
      const int64_t vectors = 2 * args.hidden * sizeof(float);
      const int64_t room = device_number(op, device, cudaDevAttrMaxSharedMemoryPerBlockOptin) -
                           1024 - grid.shared_bytes;  // a little is for the sums
      bank_in_shared =
          args.programs.slots && args.programs.count && !args.programs.route && vectors <= room;
      if (bank_in_shared) grid.shared_bytes += vectors;
      allow_shared(op, kernel, grid.shared_bytes);
    }
    launch(op, device, kernel, grid, args, tokens, bank_in_shared);
  }
}

template <class T, Mode kMode, int kSlotsAtOnce, bool kAligned, int... kPlan>
void launch_mode(const char* op, int32_t device, const SteerArgs& args, int64_t tokens, int plan,
                 std::integer_sequence<int, kPlan...>) {
  ((plan == kPlan ? launch_plan<T, kPlan, kMode, kSlotsAtOnce, kAligned>(op, device, args, tokens)
                  : void()),
   ...);
}

template <class T>
void launch_steer(const char* op, int32_t device, const SteerArgs& args, int64_t tokens) {
  const OnDevice guard(device);
  const int64_t size = sizeof(typename T::Element);
  const Mode mode = args.h.data ? Mode::norm_adjoint : args.normed.data ? Mode::norm : Mode::add;
  const bool one = args.programs.slots <= 1;
  bool aligned =
      args.hidden % T::kPack == 0 && aligned_pointer(args.programs.bank) &&
      aligned_pointer(args.weight.data) &&
      (!args.weight.data || args.weight.dtype == T::kDtype || args.weight.dtype == Dtype::f32);
  for (const Rows* rows : {&args.x, &args.residual, &args.out, &args.normed, &args.h})
    aligned = aligned && (!rows->data || aligned_rows(*rows, size));
  // a row has the same bits with a split plan, so rows that are not aligned do without
  const int plan = choose_plan(args.hidden, aligned ? tokens : kAnyTokens, one,
                               mode == Mode::norm_adjoint, has_clusters(op, device));
  if (plan < 0 || (!aligned && !serves_unaligned(kPlans[plan]))) {
    // in fours, as the compiler reads them
    const int64_t shared = (args.programs.slots + 3) / 4 * 4 * sizeof(WideOf<T>);
    launch(op, device, steer_long_kernel<T>, Grid{tokens, kLongThreads, shared}, args, tokens);
    return;
  }
  const auto all = std::make_integer_sequence<int, kPlanCount>();
  const auto with = [&](auto launch_it) { launch_it(op, device, args, tokens, plan, all); };
  constexpr int kSlots = T::kPack == 4 ? 2 : 4;  // read at a time; doubles take two registers
  const auto by_group = [&]<Mode kMode, bool kAligned>() {
    one ? with([](auto&&... a) { launch_mode<T, kMode, 1, kAligned>(a...); })
        : with([](auto&&... a) { launch_mode<T, kMode, kSlots, kAligned>(a...); });
  };
  const auto by_alignment = [&]<Mode kMode>() {
    aligned ? by_group.template operator()<kMode, true>()
            : by_group.template operator()<kMode, false>();
  };
  switch (mode) {
    case Mode::add: by_alignment.template operator()<Mode::add>(); break;
    case Mode::norm: by_alignment.template operator()<Mode::norm>(); break;
    case Mode::norm_adjoint: by_alignment.template operator()<Mode::norm_adjoint>(); break;
  }
}

}  // namespace rk::cuda
