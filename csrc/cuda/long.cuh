// Steering for rows that no plan holds in registers: hidden above 16,384, or above 8,192 with
// several slots or without alignment. The maths is that of steer.cuh. Every pass reads the row
// again, mostly from L2, an element at a time. One kernel serves all modes and numbers of slots.
#pragma once

#include "program.cuh"
#include "reduce.cuh"

namespace rk::cuda {

constexpr int kLongThreads = 512;

template <class T>
RK_DEVICE float load_element(const typename T::Element* row, int64_t j) {
  if constexpr (T::kPack == 4) {
    return __uint_as_float(row[j]);
  } else {
    float v[T::kPack];
    T::unpack({row[j], 0, 0, 0}, v);
    return v[0];
  }
}

template <class T>
RK_DEVICE void store_element(typename T::Element* row, int64_t j, float value) {
  float v[T::kPack] = {value};
  row[j] = static_cast<typename T::Element>(T::pack(v).x);
}

RK_DEVICE float gain_at(const Weight& weight, int64_t j) {
  float w;
  switch (weight.dtype) {
    case Dtype::f32: w = static_cast<const float*>(weight.data)[j]; break;
    case Dtype::bf16: w = load_element<BF16>(static_cast<const uint16_t*>(weight.data), j); break;
    default: w = load_element<F16>(static_cast<const uint16_t*>(weight.data), j);
  }
  return w + weight.offset;
}

// dynamic shared memory: a coefficient for every slot
template <class T>
__global__ void __launch_bounds__(kLongThreads, 1)
    steer_long_kernel(const SteerArgs args, const int64_t tokens) {
  using Wide = WideOf<T>;
  using Sum = TeamSum<Wide, kLongThreads, 2>;
  __shared__ typename Sum::Buffers buffers;
  Sum team_sum(buffers);
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x, hidden = args.hidden, slots = args.programs.slots;
  const auto* x = row_of<T>(args.x, row);
  const auto* residual = args.residual.data ? row_of<T>(args.residual, row) : nullptr;
  const auto* h = args.h.data ? row_of<T>(args.h, row) : nullptr;
  auto* out = args.out.data ? row_of<T>(args.out, row) : nullptr;
  auto* coefficients = static_cast<Wide*>(dynamic_shared());

  const auto sum_over_row = [&](auto term) {
    Wide sums[1] = {0};
    for (int64_t j = threadIdx.x; j < hidden; j += kLongThreads) sums[0] += Wide{term(j)};
    team_sum(sums);
    return sums[0];
  };
  float scale = 0.0f, share_of_h = 0.0f;  // of the norm's adjoint, see steer.cuh
  if (h) {
    const Wide squares = sum_over_row([&](int64_t j) {
      const Wide v = load_element<T>(h, j);
      return v * v;
    });
    scale = rsqrtf(static_cast<float>(squares / hidden) + args.weight.eps);
    const Wide products = sum_over_row([&](int64_t j) {
      return load_element<T>(x, j) * gain_at(args.weight, j) * Wide{load_element<T>(h, j)};
    });
    share_of_h = scale * scale * static_cast<float>(products / hidden);
  }
  const auto s_at = [&](int64_t j) {
    float s = load_element<T>(x, j);
    if (h) s = scale * fmaf(-share_of_h, load_element<T>(h, j), s * gain_at(args.weight, j));
    return residual ? s + load_element<T>(residual, j) : s;
  };

  const int64_t program = program_of(args.programs, row);
  const int64_t active = program < 0 ? 0 : slots;
  // as in row_program, a call of which changes the registers of this kernel
  const float* read = args.programs.bank + (program < 0 ? 0 : program) * 2 * slots * hidden;
  const float* write = read + slots * hidden;
  if (args.saved) {
    const float* swap = read;
    read = write, write = swap;
  }
  for (int64_t slot = 0; slot < slots; slot++) {
    Wide dot = 0;
    if (program >= 0)
      dot = sum_over_row([&](int64_t j) { return Wide{s_at(j)} * read[slot * hidden + j]; });
    if (threadIdx.x == 0) {
      const int64_t at = row * slots + slot;
      if (args.scores) args.scores[at] = static_cast<float>(dot);
      if (program >= 0)
        coefficients[slot] = coefficient(args, at, args.programs.phis[program * slots + slot], dot);
    }
  }
  __syncthreads();
  const auto h_at = [&](int64_t j) {
    Wide value = s_at(j);
    for (int64_t slot = 0; slot < active; slot++)
      value = multiply_add(coefficients[slot], Wide{write[slot * hidden + j]}, value);
    return static_cast<float>(value);
  };

  // a thread reads only elements that it writes itself, so out may be x or residual
  if (!args.normed.data) {
    for (int64_t j = threadIdx.x; j < hidden; j += kLongThreads) store_element<T>(out, j, h_at(j));
    return;
  }
  const Wide squares = sum_over_row([&](int64_t j) {
    const Wide v = h_at(j);
    return v * v;
  });
  const float norm_scale = rsqrtf(static_cast<float>(squares / hidden) + args.weight.eps);
  auto* normed = row_of<T>(args.normed, row);
  for (int64_t j = threadIdx.x; j < hidden; j += kLongThreads) {
    const float v = h_at(j);
    if (out) store_element<T>(out, j, v);
    store_element<T>(normed, j, v * norm_scale * gain_at(args.weight, j));
  }
}

}  // namespace rk::cuda
