// From arguments to the right steering kernel.
#pragma once

#include <utility>

#include "launch.h"
#include "long.cuh"
#include "steer.cuh"
#include "steer.h"

namespace rk::cuda {

template <class T, int kPlan, Mode kMode, int kGroup>
void launch_plan(const char* op, int32_t device, const SteerArgs& args, int64_t tokens,
                 bool aligned) {
  constexpr Plan plan = kPlans[kPlan];
  if constexpr (serves(plan, kGroup == 1, kMode == Mode::through))
    launch(op, device, steer_kernel<T, kPlan, kMode, kGroup>, (tokens + plan.rows - 1) / plan.rows,
           plan.block(), 0, args, tokens, aligned);
}

template <class T, Mode kMode, int kGroup, int... kPlan>
void launch_mode(const char* op, int32_t device, const SteerArgs& args, int64_t tokens,
                 bool aligned, int plan, std::integer_sequence<int, kPlan...>) {
  ((plan == kPlan ? launch_plan<T, kPlan, kMode, kGroup>(op, device, args, tokens, aligned)
                  : void()),
   ...);
}

template <class T>
void launch_steer(const char* op, int32_t device, const SteerArgs& args, int64_t tokens) {
  const OnDevice guard(device);
  const int64_t size = sizeof(typename T::Element);
  const Mode mode = args.h.data ? Mode::through : args.normed.data ? Mode::norm : Mode::add;
  const bool one = args.programs.slots <= 1;
  const int plan = choose_plan(args.hidden, tokens, one, mode == Mode::through);
  if (plan < 0) {
    launch(op, device, steer_long_kernel<T>, tokens, kLongThreads, args.programs.slots * 4, args,
           tokens);
    return;
  }
  bool aligned = args.hidden % T::kPack == 0 && aligned_pointer(args.programs.bank) &&
                 aligned_pointer(args.weight.data);
  for (const Rows* rows : {&args.x, &args.residual, &args.out, &args.normed, &args.h})
    aligned = aligned && (!rows->data || aligned_rows(*rows, size));
  const auto all = std::make_integer_sequence<int, kPlanCount>();
  const auto with = [&](auto launch_it) {
    launch_it(op, device, args, tokens, aligned, plan, all);
  };
  const auto by_group = [&]<Mode kMode>() {
    one ? with([](auto&&... a) { launch_mode<T, kMode, 1>(a...); })
        : with([](auto&&... a) { launch_mode<T, kMode, 4>(a...); });
  };
  switch (mode) {
    case Mode::add: by_group.template operator()<Mode::add>(); break;
    case Mode::norm: by_group.template operator()<Mode::norm>(); break;
    case Mode::through: by_group.template operator()<Mode::through>(); break;
  }
}

}  // namespace rk::cuda
