// What every backend demands of its arguments, checked before anything is computed.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

namespace rk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kParams = 5;  // a, c, b, low, high

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); d++) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); d++)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cpu() == x.is_cpu() && t.is_cuda() == x.is_cuda() &&
                      t.get_device_index() == x.get_device_index(),
                  op, ": ", name, " is on another device than x");
}

inline int64_t hidden_of(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x has no dimensions; expected [..., hidden]");
  return x.size(x.dim() - 1);
}

inline int64_t tokens_of(const Tensor& x) {
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < x.dim(); d++) tokens *= x.size(d);
  return tokens;
}

inline void check_route(const char* op, const Tensor& x, const std::optional<Tensor>& route) {
  if (!route) return;
  check_same_device(op, "route", *route, x);
  STD_TORCH_CHECK(route->scalar_type() == ScalarType::Int, op, ": route must be int32");
  STD_TORCH_CHECK(route->dim() == 1 && route->size(0) == tokens_of(x) && route->is_contiguous(), op,
                  ": route has shape ", shape_of(*route), "; expected a contiguous [", tokens_of(x),
                  "], one program for every token of x");
}

inline void check_bank(const char* op, const Tensor& x, const Tensor& bank) {
  check_same_device(op, "bank", bank, x);
  STD_TORCH_CHECK(bank.scalar_type() == ScalarType::Float, op,
                  ": bank must be float32, whatever the dtype of x: a direction rounded to half "
                  "precision is no longer removed exactly");
  STD_TORCH_CHECK(bank.dim() == 4 && bank.size(0) >= 1 && bank.size(1) == 2 &&
                      bank.size(3) == hidden_of(op, x) && bank.is_contiguous(),
                  op, ": bank has shape ", shape_of(bank),
                  "; expected a contiguous [programs, 2, slots, ", hidden_of(op, x), "]");
}

inline void check_params(const char* op, const Tensor& bank, const Tensor& params) {
  check_same_device(op, "params", params, bank);
  STD_TORCH_CHECK(params.scalar_type() == ScalarType::Float, op, ": params must be float32");
  STD_TORCH_CHECK(params.dim() == 3 && params.size(0) == bank.size(0) &&
                      params.size(1) == bank.size(2) && params.size(2) == kParams &&
                      params.is_contiguous(),
                  op, ": params has shape ", shape_of(params), "; expected a contiguous [",
                  bank.size(0), ", ", bank.size(2), ", ", kParams, "] (a, c, b, low, high)");
}

inline void check_residual(const char* op, const Tensor& x, const Tensor& residual) {
  check_same_device(op, "residual", residual, x);
  STD_TORCH_CHECK(same_shape(x, residual) && x.scalar_type() == residual.scalar_type(), op,
                  ": residual must have the shape and dtype of x; got ", shape_of(residual),
                  " for an x of ", shape_of(x));
}

}  // namespace rk
