// The CUDA backend: launches every op and never waits for the device.
#include "../ops.h"

#include "launch.h"
#include "moments.cuh"
#include "scores.cuh"
#include "steer.h"

namespace rk::cuda {
namespace {

template <class Body>
void by_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32: body(F32{}); break;
    case Dtype::bf16: body(BF16{}); break;
    case Dtype::f16: body(F16{}); break;
  }
}

struct Cuda {
  static void check_route(const char*, const Programs&, int64_t) {}  // reading it would wait

  static void steer(const char* op, int32_t device, Dtype dtype, const SteerArgs& args,
                    int64_t tokens) {
    by_dtype(dtype, [&](auto t) { launch_steer<decltype(t)>(op, device, args, tokens); });
  }

  // A steering kernel that steers nothing and writes the normed row only.
  static void rms_norm(const char* op, int32_t device, Dtype dtype, const RmsNormArgs& args,
                       int64_t tokens) {
    SteerArgs steering{};
    steering.x = args.x;
    steering.hidden = args.hidden;
    steering.weight = args.weight;
    steering.normed = args.out;
    steer(op, device, dtype, steering, tokens);
  }

  static void scores(const char* op, int32_t device, Dtype dtype, const ScoresArgs& args,
                     int64_t tokens) {
    const OnDevice guard(device);
    by_dtype(dtype, [&](auto t) {
      using T = decltype(t);
      const bool aligned = args.hidden % T::kPack == 0 && aligned_pointer(args.programs.bank) &&
                           aligned_rows(args.h, sizeof(typename T::Element));
      const auto kernel = args.programs.slots <= 1 ? scores_kernel<T, 1> : scores_kernel<T, 4>;
      launch(op, device, kernel, Grid{tokens, kScoresThreads}, args, aligned);
    });
  }

  static void moments(const char* op, int32_t device, Dtype dtype, const MomentsArgs& args) {
    const OnDevice guard(device);
    by_dtype(dtype, [&](auto t) {
      using T = decltype(t);
      const int64_t slots = args.groups * args.positions, rows = args.batch * args.tokens;
      const int64_t blocks = (args.hidden + kChannels<T> - 1) / kChannels<T>;
      // About 512 blocks, which an H100 holds at once. The number depends on the shape alone, so
      // results do not differ between GPUs.
      const int64_t tiles = (rows + kTile - 1) / kTile;
      const int64_t wanted =
          std::clamp<int64_t>(512 / std::max<int64_t>(1, slots * blocks), 1, tiles);
      const int64_t stretch = (tiles + wanted - 1) / wanted * kTile;
      const int64_t stretches = (rows + stretch - 1) / stretch;
      const int64_t state[] = {2, slots, stretches, args.hidden}, counts[] = {slots, stretches + 1};
      Tensor moments = empty(state, 4, ScalarType::Double, device);
      Tensor seen = empty(counts, 2, ScalarType::Long, device);
      auto* mean = static_cast<double*>(moments.mutable_data_ptr());
      auto* n = static_cast<int64_t*>(seen.mutable_data_ptr());
      const Partial partial{mean,      mean + slots * stretches * args.hidden,
                            n,         n + slots * stretches,
                            stretches, stretch};
      const bool aligned = args.hidden % T::kPack == 0 && aligned_pointer(args.activations) &&
                           args.batch_stride % T::kPack == 0 && args.token_stride % T::kPack == 0;
      launch(op, device, moments_partial_kernel<T>, Grid{slots * stretches * blocks, kTile}, args,
             partial, aligned);
      const int64_t merges = slots * ((args.hidden + kMerge - 1) / kMerge);
      launch(op, device, moments_merge_kernel, Grid{merges, kMerge}, args, partial);
    });
  }
};

}  // namespace
}  // namespace rk::cuda

STABLE_TORCH_LIBRARY_IMPL(RK_CUDA_NAMESPACE, RK_CUDA_DISPATCH_KEY, m) {
  rk::Ops<rk::cuda::Cuda>::register_all(m);
}
