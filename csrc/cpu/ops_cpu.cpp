// The CPU backend: tensors to rows, rows to torch's own thread pool.
#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../checks.h"
#include "rows.h"

namespace rk {
namespace {

Dtype dtype_of(const char* op, const Info& x) {
  switch (x.dtype) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, op,
                      ": the cpu backend takes float32, bfloat16 and float16; for float64 use "
                      "use_backend(\"reference\")");
  }
}

// True where the leading dimensions collapse into one: the rows then lie a fixed stride apart.
bool as_rows(const Info& t, int64_t* stride) {
  const int64_t last = t.dim - 1;
  if (t.sizes[last] > 1 && t.strides[last] != 1) return false;
  *stride = t.sizes[last];
  bool found = false;
  int64_t expected = 0;
  for (int64_t d = last - 1; d >= 0; d--) {
    if (t.sizes[d] == 1) continue;
    if (!found) {
      *stride = t.strides[d];
      found = true;
    } else if (t.strides[d] != expected) {
      return false;
    }
    expected = t.strides[d] * t.sizes[d];
  }
  return true;
}

// Rows of a tensor that is only read; anything that does not collapse is copied once, into `keep`.
Rows rows_of(const Info& t, std::optional<Tensor>* keep) {
  Rows rows;
  if (as_rows(t, &rows.stride)) {
    rows.data = const_cast<void*>(t.tensor->const_data_ptr());
  } else {
    *keep = torch::stable::contiguous(*t.tensor);
    rows = {const_cast<void*>((*keep)->const_data_ptr()), t.last()};
  }
  return rows;
}

// at::empty_strided without the dispatcher: half a microsecond less than torch::stable::new_empty.
Tensor empty_contiguous(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  std::vector<int64_t> strides(dim, 1);
  for (int64_t d = dim; d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_like(const Info& x) {
  return empty_contiguous(x.sizes, x.dim, x.dtype);
}

// Tasks below about 32k elements cost more to hand out than to do: one row never wakes the pool.
template <class Body>
void for_tokens(int64_t tokens, int64_t per_row, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, per_row));
  if (tokens <= grain) {
    if (tokens > 0) body(0, tokens);
  } else {
    torch::stable::parallel_for(0, tokens, grain, body);
  }
}

// The programs of a call, checked. Out of range, a route would read past the bank: looking costs
// four bytes a token, beside the row's thousands.
Programs programs_of(const char* op, const Info& x, const Info& bank, const float* params,
                     const std::optional<Tensor>& route) {
  Programs programs{static_cast<const float*>(bank.tensor->const_data_ptr()), params, nullptr,
                    bank.sizes[2]};
  if (!route) return programs;
  check_route(op, x, Info(*route));
  programs.route = static_cast<const int32_t*>(route->const_data_ptr());
  for (int64_t i = 0, tokens = x.rows(); i < tokens; i++)
    STD_TORCH_CHECK(programs.route[i] >= -1 && programs.route[i] < bank.sizes[0], op, ": route[", i,
                    "] is ", programs.route[i], "; expected -1 (plain) to ", bank.sizes[0] - 1);
  return programs;
}

// weight + weight_offset in float32, once per call
std::unique_ptr<float[]> gain_of(const char* op, const Info& x, const Tensor& weight,
                                 double weight_offset) {
  const Info info(weight);
  const int64_t hidden = x.last();
  check_on_cpu(op, "weight", info);
  STD_TORCH_CHECK(info.dim == 1 && info.sizes[0] == hidden, op, ": weight has shape ", info.shape(),
                  "; expected [", hidden, "]");
  const Tensor keep = torch::stable::contiguous(weight);
  std::unique_ptr<float[]> gain(new float[hidden]);
  kernels().to_float(dtype_of(op, info), keep.const_data_ptr(), gain.get(), hidden);
  for (int64_t j = 0; j < hidden; j++) gain[j] += static_cast<float>(weight_offset);
  return gain;
}

struct Norm {
  Rows out;
  const float* gain;
  double eps;
};

void steer(const char* op, const Info& x, const Info* residual, Rows out, const Tensor& bank_,
           const Tensor& params_, const std::optional<Tensor>& route, const Norm& norm = {}) {
  const Info bank(bank_), params(params_);
  if (residual) check_residual(op, x, *residual);
  check_bank(op, x, bank);
  check_params(op, bank, params);
  const Dtype dtype = dtype_of(op, x);
  const int64_t hidden = x.last(), slots = bank.sizes[2];
  std::optional<Tensor> keep_x, keep_residual;
  SteerArgs args{
      rows_of(x, &keep_x),
      residual ? rows_of(*residual, &keep_residual) : Rows{},
      out,
      programs_of(op, x, bank, static_cast<const float*>(params_.const_data_ptr()), route),
      hidden,
      norm.out,
      norm.gain,
      static_cast<float>(norm.eps)};
  if (hidden == 0) return;
  for_tokens(x.rows(), hidden * std::max<int64_t>(1, slots), [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> scratch(new float[hidden + slots]);
    kernels().steer(dtype, args, begin, end, scratch.get());
  });
}

Tensor add_steer(const Tensor& x_, std::optional<Tensor> residual_, const Tensor& bank,
                 const Tensor& params, std::optional<Tensor> route) {
  const char* op = "add_steer";
  const Info x(x_);
  check_rows(op, x);
  std::optional<Info> residual;
  if (residual_) residual.emplace(*residual_);
  Tensor h = empty_like(x);
  steer(op, x, residual ? &*residual : nullptr, {h.mutable_data_ptr(), x.last()}, bank, params,
        route);
  return h;
}

std::tuple<Tensor, Tensor> add_steer_rms_norm(const Tensor& x_, std::optional<Tensor> residual_,
                                              const Tensor& weight, double eps, const Tensor& bank,
                                              const Tensor& params, std::optional<Tensor> route,
                                              double weight_offset) {
  const char* op = "add_steer_rms_norm";
  const Info x(x_);
  check_rows(op, x);
  std::optional<Info> residual;
  if (residual_) residual.emplace(*residual_);
  const auto gain = gain_of(op, x, weight, weight_offset);
  Tensor normed = empty_like(x), h = empty_like(x);
  steer(op, x, residual ? &*residual : nullptr, {h.mutable_data_ptr(), x.last()}, bank, params,
        route, {{normed.mutable_data_ptr(), x.last()}, gain.get(), eps});
  return {normed, h};
}

void add_steer_(const Tensor& x_, Tensor residual_, const Tensor& bank, const Tensor& params,
                std::optional<Tensor> route) {
  const char* op = "add_steer_";
  const Info x(x_), residual(residual_);
  check_rows(op, x);
  check_residual(op, x, residual);
  for (int64_t d = 0; d < residual.dim; d++)
    STD_TORCH_CHECK(residual.strides[d] != 0 || residual.sizes[d] <= 1, op,
                    ": residual is expanded (several rows share memory), so it can not be written");
  Rows out;
  if (as_rows(residual, &out.stride)) {
    out.data = residual_.mutable_data_ptr();
    steer(op, x, &residual, out, bank, params, route);
  } else {  // strides that no row walk covers: compute aside, then copy back
    torch::stable::copy_(residual_, add_steer(x_, residual_, bank, params, route));
  }
}

Tensor scores(const Tensor& h_, const Tensor& bank_, std::optional<Tensor> route) {
  const char* op = "scores";
  const Info h(h_), bank(bank_);
  check_rows(op, h);
  check_bank(op, h, bank);
  const Dtype dtype = dtype_of(op, h);
  const int64_t shape[] = {h.rows(), bank.sizes[2]};
  Tensor out = empty_contiguous(shape, 2, ScalarType::Float);
  std::optional<Tensor> keep;
  const ScoresArgs args{rows_of(h, &keep), programs_of(op, h, bank, nullptr, route),
                        static_cast<float*>(out.mutable_data_ptr()), h.last()};
  for_tokens(shape[0], h.last() * std::max<int64_t>(1, shape[1]),
             [&](int64_t begin, int64_t end) { kernels().scores(dtype, args, begin, end); });
  return out;
}

Tensor rms_norm(const Tensor& x_, const Tensor& weight, double eps, double weight_offset) {
  const char* op = "rms_norm";
  const Info x(x_);
  check_rows(op, x);
  const Dtype dtype = dtype_of(op, x);
  const auto gain = gain_of(op, x, weight, weight_offset);
  Tensor out = empty_like(x);
  std::optional<Tensor> keep;
  const RmsNormArgs args{rows_of(x, &keep),
                         {out.mutable_data_ptr(), x.last()},
                         gain.get(),
                         static_cast<float>(eps),
                         x.last()};
  if (x.last() == 0) return out;
  for_tokens(x.rows(), x.last(),
             [&](int64_t begin, int64_t end) { kernels().rms_norm(dtype, args, begin, end); });
  return out;
}

void moments_(Tensor count, Tensor mean, Tensor m2, const Tensor& activations, const Tensor& index,
              const Tensor& group) {
  const char* op = "moments_";
  STD_TORCH_CHECK(activations.dim() == 3, op, ": activations has shape ", Info(activations).shape(),
                  "; expected [batch, tokens, hidden]");
  const int64_t batch = activations.size(0), tokens = activations.size(1),
                hidden = activations.size(2);
  const Dtype dtype = dtype_of(op, Info(activations));
  STD_TORCH_CHECK(
      count.scalar_type() == ScalarType::Long && count.dim() == 2 && count.is_contiguous(), op,
      ": count must be a contiguous int64 [groups, positions]");
  const int64_t groups = count.size(0), positions = count.size(1);
  for (const Tensor* state : {&mean, &m2})
    STD_TORCH_CHECK(state->scalar_type() == ScalarType::Double && state->dim() == 3 &&
                        state->size(0) == groups && state->size(1) == positions &&
                        state->size(2) == hidden && state->is_contiguous(),
                    op, ": mean and m2 must be contiguous float64 [", groups, ", ", positions, ", ",
                    hidden, "]; got ", Info(*state).shape());
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.dim() == 2 &&
                      index.size(0) == batch && index.size(1) == tokens && index.is_contiguous(),
                  op, ": index must be a contiguous int32 [", batch, ", ", tokens, "]; got ",
                  Info(index).shape());
  STD_TORCH_CHECK(group.scalar_type() == ScalarType::Int && group.dim() == 1 &&
                      group.size(0) == batch && group.is_contiguous(),
                  op, ": group must be a contiguous int32 [", batch, "]; got ",
                  Info(group).shape());

  const Tensor source = activations.stride(2) == 1 || hidden <= 1
                            ? activations
                            : torch::stable::contiguous(activations);
  const auto* position = static_cast<const int32_t*>(index.const_data_ptr());
  const auto* group_of = static_cast<const int32_t*>(group.const_data_ptr());
  std::vector<std::vector<int64_t>> rows(groups * positions);  // in order of sequence, then token
  for (int64_t b = 0; b < batch; b++) {
    STD_TORCH_CHECK(group_of[b] >= -1 && group_of[b] < groups, op, ": group[", b, "] is ",
                    group_of[b], "; expected -1 (skip) to ", groups - 1);
    for (int64_t t = 0; t < tokens; t++) {
      const int64_t p = position[b * tokens + t];
      STD_TORCH_CHECK(p >= -1 && p < positions, op, ": index[", b, ", ", t, "] is ", p,
                      "; expected -1 (not read) to ", positions - 1);
      if (p >= 0 && group_of[b] >= 0)
        rows[group_of[b] * positions + p].push_back(b * source.stride(0) + t * source.stride(1));
    }
  }

  auto* counts = static_cast<int64_t*>(count.mutable_data_ptr());
  auto* means = static_cast<double*>(mean.mutable_data_ptr());
  auto* m2s = static_cast<double*>(m2.mutable_data_ptr());
  for (int64_t slot = 0; slot < groups * positions; slot++) {
    const int64_t n = rows[slot].size();
    if (n == 0) continue;
    const MomentsArgs args{source.const_data_ptr(), rows[slot].data(),  n, counts[slot],
                           means + slot * hidden,   m2s + slot * hidden};
    torch::stable::parallel_for(
        0, hidden, std::max<int64_t>(256, 32768 / n),
        [&](int64_t begin, int64_t end) { kernels().moments(dtype, args, begin, end); });
    counts[slot] += n;
  }
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels, CPU, m) {
  m.impl("add_steer", TORCH_BOX(&rk::add_steer));
  m.impl("add_steer_inference", TORCH_BOX(&rk::add_steer));
  m.impl("add_steer_", TORCH_BOX(&rk::add_steer_));
  m.impl("add_steer_rms_norm", TORCH_BOX(&rk::add_steer_rms_norm));
  m.impl("add_steer_rms_norm_inference", TORCH_BOX(&rk::add_steer_rms_norm));
  m.impl("scores", TORCH_BOX(&rk::scores));
  m.impl("rms_norm", TORCH_BOX(&rk::rms_norm));
  m.impl("moments_", TORCH_BOX(&rk::moments_));
}
