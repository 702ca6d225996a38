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

// A tensor's metadata, asked for once: each question goes through the stable ABI's C functions,
// and a hundred of them were half the cost of a small call.
struct Info {
  explicit Info(const Tensor& t)
      : tensor(&t),
        sizes(t.sizes().data()),
        strides(t.strides().data()),
        dim(t.dim()),
        dtype(t.scalar_type()) {}

  int64_t last() const { return sizes[dim - 1]; }
  int64_t rows() const {  // all dimensions but the last
    int64_t count = 1;
    for (int64_t d = 0; d + 1 < dim; d++) count *= sizes[d];
    return count;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dim - 1; d >= 0; d--) {
      if (sizes[d] == 0) return true;
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }
  bool same_shape(const Info& other) const {
    if (dim != other.dim) return false;
    for (int64_t d = 0; d < dim; d++)
      if (sizes[d] != other.sizes[d]) return false;
    return true;
  }
  std::string shape() const {
    std::string text = "[";
    for (int64_t d = 0; d < dim; d++) text += (d ? ", " : "") + std::to_string(sizes[d]);
    return text + "]";
  }

  const Tensor* tensor;
  const int64_t *sizes, *strides;
  int64_t dim;
  ScalarType dtype;
};

inline void check_on_cpu(const char* op, const char* name, const Info& t) {
  STD_TORCH_CHECK(t.tensor->is_cpu(), op, ": ", name, " is not on the CPU, but x is");
}

inline void check_rows(const char* op, const Info& x) {
  STD_TORCH_CHECK(x.dim >= 1, op, ": x has no dimensions; expected [..., hidden]");
}

inline void check_route(const char* op, const Info& x, const Info& route) {
  check_on_cpu(op, "route", route);
  STD_TORCH_CHECK(route.dtype == ScalarType::Int, op, ": route must be int32");
  STD_TORCH_CHECK(route.dim == 1 && route.sizes[0] == x.rows() && route.contiguous(), op,
                  ": route has shape ", route.shape(), "; expected a contiguous [", x.rows(),
                  "], one program for every token of x");
}

inline void check_bank(const char* op, const Info& x, const Info& bank) {
  check_on_cpu(op, "bank", bank);
  STD_TORCH_CHECK(bank.dtype == ScalarType::Float, op,
                  ": bank must be float32, whatever the dtype of x: a direction rounded to half "
                  "precision is no longer removed exactly");
  STD_TORCH_CHECK(bank.dim == 4 && bank.sizes[0] >= 1 && bank.sizes[1] == 2 &&
                      bank.sizes[3] == x.last() && bank.contiguous(),
                  op, ": bank has shape ", bank.shape(),
                  "; expected a contiguous [programs, 2, slots, ", x.last(), "]");
}

inline void check_params(const char* op, const Info& bank, const Info& params) {
  check_on_cpu(op, "params", params);
  STD_TORCH_CHECK(params.dtype == ScalarType::Float, op, ": params must be float32");
  STD_TORCH_CHECK(params.dim == 3 && params.sizes[0] == bank.sizes[0] &&
                      params.sizes[1] == bank.sizes[2] && params.sizes[2] == kParams &&
                      params.contiguous(),
                  op, ": params has shape ", params.shape(), "; expected a contiguous [",
                  bank.sizes[0], ", ", bank.sizes[2], ", ", kParams, "] (a, c, b, low, high)");
}

inline void check_residual(const char* op, const Info& x, const Info& residual) {
  check_on_cpu(op, "residual", residual);
  STD_TORCH_CHECK(x.same_shape(residual) && x.dtype == residual.dtype, op,
                  ": residual must have the shape and dtype of x; got ", residual.shape(),
                  " for an x of ", x.shape());
}

}  // namespace rk
