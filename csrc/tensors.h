// Tensors as the kernels take them: metadata read once, rows, fresh outputs, and the checks that
// every op makes of its arguments before anything is computed.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "args.h"

namespace rk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor's metadata. Every question to a tensor is a call of the stable ABI's C functions, which
// add up to half the cost of a small call, so each is asked once.
struct Info {
  explicit Info(const Tensor& t)
      : tensor(&t),
        sizes(t.sizes().data()),
        strides(t.strides().data()),
        dim(t.dim()),
        dtype(t.scalar_type()),
        device(t.is_cpu() ? -1 : t.get_device_index()) {}

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
  int32_t device;  // the GPU's index, -1 for the CPU
};

// --- checks --------------------------------------------------------------------------------------

inline Dtype dtype_of(const char* op, const Info& x) {
  switch (x.dtype) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, op,
                      ": the compiled kernels take float32, bfloat16 and float16; for float64 use "
                      "use_backend(\"reference\")");
  }
}

inline void check_rows(const char* op, const Info& x) {
  STD_TORCH_CHECK(x.dim >= 1, op, ": x has no dimensions; expected [..., hidden]");
}

inline void check_device(const char* op, const Info& x, const char* name, const Info& t) {
  if (t.device == x.device) return;
  const auto where = [](int32_t d) { return d < 0 ? "the CPU" : "GPU " + std::to_string(d); };
  STD_TORCH_CHECK(false, op, ": ", name, " is on ", where(t.device), ", but x is on ",
                  where(x.device));
}

inline void check_same(const char* op, const Info& x, const char* name, const Info& t) {
  check_device(op, x, name, t);
  STD_TORCH_CHECK(x.same_shape(t) && x.dtype == t.dtype, op, ": ", name,
                  " must have the shape and dtype of x; got ", t.shape(), " for an x of ",
                  x.shape());
}

inline void check_route(const char* op, const Info& x, const Info& route) {
  check_device(op, x, "route", route);
  STD_TORCH_CHECK(route.dtype == ScalarType::Int, op, ": route must be int32");
  STD_TORCH_CHECK(route.dim == 1 && route.sizes[0] == x.rows() && route.contiguous(), op,
                  ": route has shape ", route.shape(), "; expected a contiguous [", x.rows(),
                  "], one program for every token of x");
}

inline void check_bank(const char* op, const Info& x, const Info& bank) {
  check_device(op, x, "bank", bank);
  STD_TORCH_CHECK(bank.dtype == ScalarType::Float, op,
                  ": bank must be float32, whatever the dtype of x: a direction rounded to half "
                  "precision is no longer removed exactly");
  STD_TORCH_CHECK(bank.dim == 4 && bank.sizes[0] >= 1 && bank.sizes[1] == 2 &&
                      bank.sizes[3] == x.last() && bank.contiguous(),
                  op, ": bank has shape ", bank.shape(),
                  "; expected a contiguous [programs, 2, slots, ", x.last(), "]");
}

inline void check_params(const char* op, const Info& x, const Info& bank, const Info& params) {
  check_device(op, x, "params", params);
  STD_TORCH_CHECK(params.dtype == ScalarType::Float, op, ": params must be float32");
  STD_TORCH_CHECK(params.dim == 3 && params.sizes[0] == bank.sizes[0] &&
                      params.sizes[1] == bank.sizes[2] && params.sizes[2] == kPhiNumbers &&
                      params.contiguous(),
                  op, ": params has shape ", params.shape(), "; expected a contiguous [",
                  bank.sizes[0], ", ", bank.sizes[2], ", ", kPhiNumbers, "] (a, c, b, low, high)");
}

inline void check_scores(const char* op, const Info& x, const Info& bank, const Info& scores) {
  check_device(op, x, "scores", scores);
  STD_TORCH_CHECK(scores.dtype == ScalarType::Float && scores.dim == 2 &&
                      scores.sizes[0] == x.rows() && scores.sizes[1] == bank.sizes[2] &&
                      scores.contiguous(),
                  op, ": scores has shape ", scores.shape(), "; expected a contiguous float32 [",
                  x.rows(), ", ", bank.sizes[2], "], as the forward pass returned it");
}

// --- rows ----------------------------------------------------------------------------------------

// True where the leading dimensions collapse into one: the rows then lie a fixed stride apart.
inline bool as_rows(const Info& t, int64_t* stride) {
  const int64_t last = t.dim - 1;
  if (t.sizes[last] > 1 && t.strides[last] != 1) return false;
  *stride = t.sizes[last];
  bool has_stride = false;
  int64_t expected = 0;
  for (int64_t d = last - 1; d >= 0; d--) {
    if (t.sizes[d] == 1) continue;
    if (!has_stride) {
      *stride = t.strides[d];
      has_stride = true;
    } else if (t.strides[d] != expected) {
      return false;
    }
    expected = t.strides[d] * t.sizes[d];
  }
  return true;
}

// Rows of a tensor that is only read. If its dimensions do not collapse, it is copied into `copy`.
inline Rows rows_of(const Info& t, std::optional<Tensor>* copy) {
  Rows rows;
  if (as_rows(t, &rows.stride)) {
    rows.data = const_cast<void*>(t.tensor->const_data_ptr());
  } else {
    *copy = torch::stable::contiguous(*t.tensor);
    rows = {const_cast<void*>((*copy)->const_data_ptr()), t.last()};
  }
  return rows;
}

// An output of this size or more mostly lies in fresh pages: glibc reuses only smaller blocks.
constexpr int64_t kFreshBytes = 32 << 20;

// Asks Linux for 2 MB pages: a fresh output of 64 MB is otherwise 16,384 page faults, which cost
// more than the kernel that writes it. PyTorch's own allocator does this with
// THP_MEM_ALLOC_ENABLE=1. Smaller outputs lie in reused memory, where the request costs time. A
// refusal changes nothing.
inline void advise_huge_pages([[maybe_unused]] Tensor& t, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  if (bytes < kFreshBytes) return;
  constexpr uintptr_t kPage = 4096;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t begin = data / kPage * kPage, end = (data + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// at::empty_strided without the dispatcher: half a microsecond less than torch::stable::new_empty.
inline Tensor empty(const int64_t* sizes, int64_t dim, ScalarType dtype, int32_t device) {
  std::array<int64_t, 8> few;
  std::vector<int64_t> many(dim > 8 ? dim : 0);  // only here it takes an allocation
  int64_t* strides = dim > 8 ? many.data() : few.data();
  int64_t elements = 1, step = 1;
  for (int64_t d = dim; d-- > 0;) {
    strides[d] = step;
    step *= std::max<int64_t>(1, sizes[d]);
    elements *= sizes[d];
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device < 0 ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(),
      std::max(device, 0), &handle));
  Tensor fresh(handle);
  if (device < 0) advise_huge_pages(fresh, elements * (dtype == ScalarType::Float ? 4 : 2));
  return fresh;
}

inline Tensor empty_like(const Info& x) {
  return empty(x.sizes, x.dim, x.dtype, x.device);
}

inline Tensor empty_scores(const Info& x, const Info& bank) {
  const int64_t shape[] = {x.rows(), bank.dim == 4 ? bank.sizes[2] : 0};
  Tensor scores = empty(shape, 2, ScalarType::Float, x.device);
  if (x.last() == 0) torch::stable::zero_(scores);  // no kernel runs, and sums of nothing are zero
  return scores;
}

}  // namespace rk
