// The ops, written once for every device: they check arguments, make outputs and hand rows to the
// backend.
//
// A Backend has: steer(op, device, dtype, args, tokens), scores(...), rms_norm(...), moments(...),
// and check_route(op, programs, tokens), which may do nothing where reading a route means waiting.
#pragma once

#include <tuple>

#include "tensors.h"

namespace rk {

template <class Backend>
struct Ops {
  using MaybeTensor = std::optional<Tensor>;

  static Programs programs_of(const char* op, const Info& x, const Info& bank, const void* params,
                              const MaybeTensor& route) {
    Programs programs{static_cast<const float*>(bank.tensor->const_data_ptr()),
                      static_cast<const Phi*>(params), nullptr, bank.sizes[0], bank.sizes[2]};
    if (route) {
      check_route(op, x, Info(*route));
      programs.route = static_cast<const int32_t*>(route->const_data_ptr());
      Backend::check_route(op, programs, x.rows());
    }
    return programs;
  }

  static Weight weight_of(const char* op, const Info& x, const Tensor& weight, double eps,
                          double offset, MaybeTensor* keep) {
    const Info info(weight);
    check_device(op, x, "weight", info);
    STD_TORCH_CHECK(info.dim == 1 && info.sizes[0] == x.last(), op, ": weight has shape ",
                    info.shape(), "; expected [", x.last(), "]");
    const void* data = weight.const_data_ptr();
    if (!info.contiguous()) {
      *keep = torch::stable::contiguous(weight);
      data = (*keep)->const_data_ptr();
    }
    return {data, dtype_of(op, info), static_cast<float>(offset), static_cast<float>(eps)};
  }

  // What add and adjoint share; `args` already holds what is theirs alone.
  static void steer(const char* op, SteerArgs args, const Info& x, const MaybeTensor& residual_,
                    const Tensor& bank_, const Tensor& params_, const MaybeTensor& route) {
    const Info bank(bank_), params(params_);
    std::optional<Info> residual;
    if (residual_) check_same(op, x, "residual", residual.emplace(*residual_));
    check_bank(op, x, bank);
    check_params(op, x, bank, params);
    const Dtype dtype = dtype_of(op, x);
    MaybeTensor keep_x, keep_residual;
    args.x = rows_of(x, &keep_x);
    if (residual) args.residual = rows_of(*residual, &keep_residual);
    args.programs = programs_of(op, x, bank, params_.const_data_ptr(), route);
    args.hidden = x.last();
    if (args.hidden > 0 && x.rows() > 0) Backend::steer(op, x.device, dtype, args, x.rows());
  }

  static Rows rows_out(Tensor& t, const Info& x) { return {t.mutable_data_ptr(), x.last()}; }

  static Tensor add_steer(const Tensor& x_, MaybeTensor residual, const Tensor& bank,
                          const Tensor& params, MaybeTensor route) {
    const Info x(x_);
    check_rows("add_steer", x);
    Tensor h = empty_like(x);
    SteerArgs args{};
    args.out = rows_out(h, x);
    steer("add_steer", args, x, residual, bank, params, route);
    return h;
  }

  static std::tuple<Tensor, Tensor> add_steer_scores(const Tensor& x_, MaybeTensor residual,
                                                     const Tensor& bank, const Tensor& params,
                                                     MaybeTensor route) {
    const Info x(x_);
    check_rows("add_steer_scores", x);
    Tensor h = empty_like(x), scores = empty_scores(x, Info(bank));
    SteerArgs args{};
    args.out = rows_out(h, x);
    args.scores = static_cast<float*>(scores.mutable_data_ptr());
    steer("add_steer_scores", args, x, residual, bank, params, route);
    return {h, scores};
  }

  static void add_steer_(const Tensor& x_, Tensor residual_, const Tensor& bank,
                         const Tensor& params, MaybeTensor route) {
    const char* op = "add_steer_";
    const Info x(x_), residual(residual_);
    check_rows(op, x);
    check_same(op, x, "residual", residual);
    for (int64_t d = 0; d < residual.dim; d++)
      STD_TORCH_CHECK(residual.strides[d] != 0 || residual.sizes[d] <= 1, op,
                      ": residual is expanded (several rows share memory), so it can not be "
                      "written");
    SteerArgs args{};
    if (as_rows(residual, &args.out.stride)) {
      args.out.data = residual_.mutable_data_ptr();
      steer(op, args, x, residual_, bank, params, route);
    } else {  // strides that no row walk covers: compute aside, then copy back
      torch::stable::copy_(residual_, add_steer(x_, residual_, bank, params, route));
    }
  }

  static std::tuple<Tensor, Tensor> add_steer_rms_norm(const Tensor& x_, MaybeTensor residual,
                                                       const Tensor& weight, double eps,
                                                       const Tensor& bank, const Tensor& params,
                                                       MaybeTensor route, double weight_offset) {
    const char* op = "add_steer_rms_norm";
    const Info x(x_);
    check_rows(op, x);
    MaybeTensor keep;
    SteerArgs args{};
    args.weight = weight_of(op, x, weight, eps, weight_offset, &keep);
    Tensor normed = empty_like(x), h = empty_like(x);
    args.out = rows_out(h, x);
    args.normed = rows_out(normed, x);
    steer(op, args, x, residual, bank, params, route);
    return {normed, h};
  }

  static std::tuple<Tensor, Tensor, Tensor> add_steer_rms_norm_scores(
      const Tensor& x_, MaybeTensor residual, const Tensor& weight, double eps, const Tensor& bank,
      const Tensor& params, MaybeTensor route, double weight_offset) {
    const char* op = "add_steer_rms_norm_scores";
    const Info x(x_);
    check_rows(op, x);
    MaybeTensor keep;
    SteerArgs args{};
    args.weight = weight_of(op, x, weight, eps, weight_offset, &keep);
    Tensor normed = empty_like(x), h = empty_like(x), scores = empty_scores(x, Info(bank));
    args.out = rows_out(h, x);
    args.normed = rows_out(normed, x);
    args.scores = static_cast<float*>(scores.mutable_data_ptr());
    steer(op, args, x, residual, bank, params, route);
    return {normed, h, scores};
  }

  static Tensor add_steer_backward(const Tensor& grad_, const Tensor& scores, const Tensor& bank,
                                   const Tensor& params, MaybeTensor route) {
    const char* op = "add_steer_backward";
    const Info grad(grad_);
    check_rows(op, grad);
    check_bank(op, grad, Info(bank));
    check_scores(op, grad, Info(bank), Info(scores));
    Tensor out = empty_like(grad);
    SteerArgs args{};
    args.out = rows_out(out, grad);
    args.saved = static_cast<const float*>(scores.const_data_ptr());
    steer(op, args, grad, std::nullopt, bank, params, route);
    return out;
  }

  static Tensor add_steer_rms_norm_backward(const Tensor& grad_normed, MaybeTensor grad_h,
                                            const Tensor& h_, const Tensor& scores,
                                            const Tensor& weight, double eps, const Tensor& bank,
                                            const Tensor& params, MaybeTensor route,
                                            double weight_offset) {
    const char* op = "add_steer_rms_norm_backward";
    const Info grad(grad_normed), h(h_);
    check_rows(op, grad);
    check_same(op, grad, "h", h);
    check_bank(op, grad, Info(bank));
    check_scores(op, grad, Info(bank), Info(scores));
    MaybeTensor keep, keep_h;
    SteerArgs args{};
    args.weight = weight_of(op, grad, weight, eps, weight_offset, &keep);
    Tensor out = empty_like(grad);
    args.out = rows_out(out, grad);
    args.h = rows_of(h, &keep_h);
    args.saved = static_cast<const float*>(scores.const_data_ptr());
    steer(op, args, grad, grad_h, bank, params, route);
    return out;
  }

  static Tensor scores(const Tensor& h_, const Tensor& bank_, MaybeTensor route) {
    const char* op = "scores";
    const Info h(h_), bank(bank_);
    check_rows(op, h);
    check_bank(op, h, bank);
    const Dtype dtype = dtype_of(op, h);
    Tensor out = empty_scores(h, bank);
    MaybeTensor keep;
    const ScoresArgs args{rows_of(h, &keep), programs_of(op, h, bank, nullptr, route),
                          static_cast<float*>(out.mutable_data_ptr()), h.last()};
    if (h.rows() > 0 && args.hidden > 0 && args.programs.slots > 0)
      Backend::scores(op, h.device, dtype, args, h.rows());
    return out;
  }

  static Tensor rms_norm(const Tensor& x_, const Tensor& weight, double eps, double weight_offset) {
    const char* op = "rms_norm";
    const Info x(x_);
    check_rows(op, x);
    const Dtype dtype = dtype_of(op, x);
    MaybeTensor keep, keep_weight;
    const Weight w = weight_of(op, x, weight, eps, weight_offset, &keep_weight);
    Tensor out = empty_like(x);
    const RmsNormArgs args{rows_of(x, &keep), rows_out(out, x), w, x.last()};
    if (args.hidden > 0 && x.rows() > 0) Backend::rms_norm(op, x.device, dtype, args, x.rows());
    return out;
  }

  static void moments_(Tensor count, Tensor mean, Tensor m2, const Tensor& activations,
                       const Tensor& index, const Tensor& group) {
    const char* op = "moments_";
    const Info x(activations), counts(count), means(mean), m2s(m2), slots(index), groups(group);
    for (auto [name, info] : {std::pair{"count", &counts},
                              {"mean", &means},
                              {"m2", &m2s},
                              {"index", &slots},
                              {"group", &groups}})
      check_device(op, x, name, *info);
    const Dtype dtype = dtype_of(op, x);
    STD_TORCH_CHECK(
        means.dtype == ScalarType::Double && means.dim == 3 && means.contiguous() &&
            m2s.dtype == ScalarType::Double && m2s.same_shape(means) && m2s.contiguous(),
        op, ": mean and m2 must be contiguous float64 [groups, positions, hidden]; got ",
        means.shape(), " and ", m2s.shape());
    const int64_t hidden = means.sizes[2];
    STD_TORCH_CHECK(counts.dtype == ScalarType::Long && counts.dim == 2 && counts.contiguous() &&
                        counts.sizes[0] == means.sizes[0] && counts.sizes[1] == means.sizes[1],
                    op, ": count must be a contiguous int64 [", means.sizes[0], ", ",
                    means.sizes[1], "]; got ", counts.shape());
    STD_TORCH_CHECK(x.dim == 3 && x.sizes[2] == hidden, op, ": activations has shape ", x.shape(),
                    "; expected [batch, tokens, ", hidden, "]");
    STD_TORCH_CHECK(slots.dtype == ScalarType::Int && slots.dim == 2 && slots.contiguous() &&
                        slots.sizes[0] == x.sizes[0] && slots.sizes[1] == x.sizes[1],
                    op, ": index must be a contiguous int32 [", x.sizes[0], ", ", x.sizes[1],
                    "]; got ", slots.shape());
    STD_TORCH_CHECK(groups.dtype == ScalarType::Int && groups.dim == 1 && groups.contiguous() &&
                        groups.sizes[0] == x.sizes[0],
                    op, ": group must be a contiguous int32 [", x.sizes[0], "]; got ",
                    groups.shape());
    if (x.sizes[0] == 0 || x.sizes[1] == 0 || hidden == 0) return;

    MaybeTensor keep;
    int64_t batch_stride = x.strides[0], token_stride = x.strides[1];
    const void* data = activations.const_data_ptr();
    if (x.strides[2] != 1 && hidden > 1) {
      keep = torch::stable::contiguous(activations);
      data = keep->const_data_ptr();
      batch_stride = x.sizes[1] * hidden;
      token_stride = hidden;
    }
    Backend::moments(
        op, x.device, dtype,
        {static_cast<int64_t*>(count.mutable_data_ptr()),
         static_cast<double*>(mean.mutable_data_ptr()), static_cast<double*>(m2.mutable_data_ptr()),
         data, batch_stride, token_stride, static_cast<const int32_t*>(index.const_data_ptr()),
         static_cast<const int32_t*>(group.const_data_ptr()), means.sizes[0], means.sizes[1],
         x.sizes[0], x.sizes[1], hidden});
  }

  // Serve every op of a library with this backend.
  template <class Library>
  static void register_all(Library& m) {
    m.impl("add_steer", TORCH_BOX(&add_steer));
    m.impl("add_steer_inference", TORCH_BOX(&add_steer));
    m.impl("add_steer_scores", TORCH_BOX(&add_steer_scores));
    m.impl("add_steer_", TORCH_BOX(&add_steer_));
    m.impl("add_steer_backward", TORCH_BOX(&add_steer_backward));
    m.impl("add_steer_rms_norm", TORCH_BOX(&add_steer_rms_norm));
    m.impl("add_steer_rms_norm_inference", TORCH_BOX(&add_steer_rms_norm));
    m.impl("add_steer_rms_norm_scores", TORCH_BOX(&add_steer_rms_norm_scores));
    m.impl("add_steer_rms_norm_backward", TORCH_BOX(&add_steer_rms_norm_backward));
    m.impl("scores", TORCH_BOX(&scores));
    m.impl("rms_norm", TORCH_BOX(&rms_norm));
    m.impl("moments_", TORCH_BOX(&moments_));
  }
};

}  // namespace rk
