// The same for rows that no plan holds in registers (hidden above 16,384, or above 8,192 with
// several slots): every pass reads the row again, mostly from L2. One kernel for all modes and
// slots.
#pragma once

#include "reduce.cuh"

namespace rk::cuda {

constexpr int kLongThreads = 512;

template <class T>
RK_DEVICE float element(const typename T::Element* row, int64_t j) {
  if constexpr (T::kPack == 4) {
    return __uint_as_float(row[j]);
  } else {
    float v[T::kPack];
    T::unpack({row[j], 0, 0, 0}, v);
    return v[0];
  }
}

template <class T>
RK_DEVICE void put(typename T::Element* row, int64_t j, float value) {
  float v[T::kPack] = {value};
  row[j] = static_cast<typename T::Element>(T::pack(v).x);
}

RK_DEVICE float gain_at(const Weight& weight, int64_t j) {
  float w;
  switch (weight.dtype) {
    case Dtype::f32: w = static_cast<const float*>(weight.data)[j]; break;
    case Dtype::bf16: w = element<BF16>(static_cast<const uint16_t*>(weight.data), j); break;
    default: w = element<F16>(static_cast<const uint16_t*>(weight.data), j);
  }
  return w + weight.offset;
}

// dynamic shared memory: a number for every slot
template <class T>
__global__ void __launch_bounds__(kLongThreads, 1)
    steer_long_kernel(const SteerArgs args, const int64_t tokens) {
  using R = Real<T>;
  using Sum = TeamSum<R, kLongThreads, 2>;
  __shared__ typename Sum::Buffers buffers;
  Sum team_sum(buffers);
  wait_for_the_kernel_before();
  const int64_t row = blockIdx.x, hidden = args.hidden, slots = args.programs.slots;
  const auto* x = row_of<T>(args.x, row);
  const auto* residual = args.residual.data ? row_of<T>(args.residual, row) : nullptr;
  const auto* h = args.h.data ? row_of<T>(args.h, row) : nullptr;
  auto* out = args.out.data ? row_of<T>(args.out, row) : nullptr;
  auto* phis = static_cast<R*>(dynamic_shared());

  const auto sum_over_row = [&](auto term) {
    R sums[1] = {0};
    for (int64_t j = threadIdx.x; j < hidden; j += kLongThreads) sums[0] += R{term(j)};
    team_sum(sums);
    return sums[0];
  };
  float scale = 0.0f, pull = 0.0f;  // of the norm's adjoint
  if (h) {
    const R squares = sum_over_row([&](int64_t j) {
      const R v = element<T>(h, j);
      return v * v;
    });
    scale = rsqrtf(static_cast<float>(squares / hidden) + args.weight.eps);
    const R products = sum_over_row([&](int64_t j) {
      return element<T>(x, j) * gain_at(args.weight, j) * R{element<T>(h, j)};
    });
    pull = scale * scale * static_cast<float>(products / hidden);
  }
  const auto s_at = [&](int64_t j) {
    float s = element<T>(x, j);
    if (h) s = scale * fmaf(-pull, element<T>(h, j), s * gain_at(args.weight, j));
    return residual ? s + element<T>(residual, j) : s;
  };

  const int64_t program = program_of(args.programs, row);
  const int64_t active = program < 0 ? 0 : slots;
  const float* read = args.programs.bank + (program < 0 ? 0 : program) * 2 * slots * hidden;
  const float* write = read + slots * hidden;
  if (args.saved) {
    const float* swap = read;
    read = write, write = swap;
  }
  for (int64_t slot = 0; slot < slots; slot++) {
    R dot = 0;
    if (program >= 0)
      dot = sum_over_row([&](int64_t j) { return R{s_at(j)} * read[slot * hidden + j]; });
    if (threadIdx.x == 0) {
      const int64_t at = row * slots + slot;
      if (args.scores) args.scores[at] = static_cast<float>(dot);
      if (program >= 0)
        phis[slot] =
            coefficient(args, at, args.programs.params + (program * slots + slot) * kParams, dot);
    }
  }
  __syncthreads();
  const auto h_at = [&](int64_t j) {
    R value = s_at(j);
    for (int64_t slot = 0; slot < active; slot++)
      value = fused(phis[slot], R{write[slot * hidden + j]}, value);
    return static_cast<float>(value);
  };

  // each thread reads only what it writes itself, so out may be x or residual
  if (!args.normed.data) {
    for (int64_t j = threadIdx.x; j < hidden; j += kLongThreads) put<T>(out, j, h_at(j));
    return;
  }
  const R squares = sum_over_row([&](int64_t j) {
    const R v = h_at(j);
    return v * v;
  });
  const float norm = rsqrtf(static_cast<float>(squares / hidden) + args.weight.eps);
  auto* normed = row_of<T>(args.normed, row);
  for (int64_t j = threadIdx.x; j < hidden; j += kLongThreads) {
    const float v = h_at(j);
    if (out) put<T>(out, j, v);
    put<T>(normed, j, v * norm * gain_at(args.weight, j));
  }
}

}  // namespace rk::cuda
