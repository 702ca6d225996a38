// The row kernels, written once and compiled once per instruction set (rows_*.cpp).
//
// Each row is read from memory once and is still in L1/L2 when a later pass reads it again. With
// several slots the first pass keeps the float32 sum in `scratch`, so that every dot product of a
// program reads the same s.
#include "vec.h"

namespace {

using rk::Dtype;

enum Param { A, C, B, LOW, HIGH, kParams };

// phi(t) = a*t + c*clamp(t, low, high) + b. A NaN score compares false twice and stays a NaN.
RK_INLINE float phi(const float* p, float t) {
  float clamped = t;
  if (t < p[LOW]) clamped = p[LOW];
  if (clamped > p[HIGH]) clamped = p[HIGH];
  return p[A] * t + p[C] * clamped + p[B];
}

template <class T>
RK_INLINE const typename T::Element* row_of(const rk::Rows& rows, int64_t i) {
  return static_cast<const typename T::Element*>(rows.data) + i * rows.stride;
}
template <class T>
RK_INLINE typename T::Element* row_of_out(const rk::Rows& rows, int64_t i) {
  return static_cast<typename T::Element*>(rows.data) + i * rows.stride;
}

RK_INLINE float total(const vfloat (&acc)[4]) {
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <class T>
RK_INLINE float dot(const typename T::Element* a, const float* v, int64_t hidden) {
  vfloat acc[4] = {};
  for_row(hidden, [&](int64_t j, int64_t n, int k)
                      RK_LAMBDA { acc[k] += load<T>(a + j, n) * load<F32>(v + j, n); });
  return total(acc);
}

RK_INLINE float rms_scale(float squares, int64_t hidden, float eps) {
  return 1.0f / __builtin_sqrtf(squares / (float)hidden + eps);
}

template <class T, bool kResidual, bool kNorm>
RK_INLINE void steer_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, float* scratch) {
  using E = typename T::Element;
  const int64_t hidden = args.hidden, slots = args.programs.slots;
  for (int64_t i = begin; i < end; i++) {
    const E* x = row_of<T>(args.x, i);
    const E* residual = kResidual ? row_of<T>(args.residual, i) : nullptr;
    E* out = row_of_out<T>(args.out, i);
    auto sum_at = [&](int64_t j, int64_t n) RK_LAMBDA {
      return kResidual ? load<T>(x + j, n) + load<T>(residual + j, n) : load<T>(x + j, n);
    };

    // the next row is fetched while this one is written: two passes would otherwise leave the
    // memory idle during the second (float32, 4096 x 4096: 1.13 x torch.add without, 1.04 with)
    const int64_t next = i + 1 < end ? 1 : 0;
    const E* next_x = x + next * args.x.stride;
    const E* next_residual = kResidual ? residual + next * args.residual.stride : next_x;

    // The last pass: h = value_at(...), rounded once; with kNorm the unrounded h is normalised too.
    auto finish = [&](auto value_at) RK_LAMBDA {
      vfloat squares[4] = {};
      for_row(hidden, [&](int64_t j, int64_t n, int k) RK_LAMBDA {
        __builtin_prefetch(next_x + j);
        if (kResidual) __builtin_prefetch(next_residual + j);
        const vfloat h = value_at(j, n);
        store<T>(out + j, h, n);
        if (kNorm) {
          store<F32>(scratch + j, h, n);
          squares[k] += h * h;
        }
      });
      if (!kNorm) return;
      E* normed = row_of_out<T>(args.normed, i);
      const float scale = rms_scale(total(squares), hidden, args.eps);
      for_row(hidden, [&](int64_t j, int64_t n, int) RK_LAMBDA {
        store<T>(normed + j, load<F32>(scratch + j, n) * scale * load<F32>(args.gain + j, n), n);
      });
    };

    const int64_t program = args.programs.route ? args.programs.route[i] : 0;
    if (program < 0 || slots == 0) {  // the plain add, bit for bit
      finish(sum_at);
      continue;
    }
    const float* read = args.programs.bank + program * 2 * slots * hidden;
    const float* write = read + slots * hidden;
    const float* params = args.programs.params + program * slots * kParams;
    vfloat acc[4] = {};
    if (slots == 1) {  // the row is still in L1 for the second pass: adding again beats storing s
      for_row(hidden, [&](int64_t j, int64_t n, int k)
                          RK_LAMBDA { acc[k] += sum_at(j, n) * load<F32>(read + j, n); });
      const float coefficient = phi(params, total(acc));
      finish([&](int64_t j, int64_t n)
                 RK_LAMBDA { return sum_at(j, n) + coefficient * load<F32>(write + j, n); });
      continue;
    }

    for_row(hidden, [&](int64_t j, int64_t n, int k) RK_LAMBDA {
      const vfloat s = sum_at(j, n);
      store<F32>(scratch + j, s, n);
      acc[k] += s * load<F32>(read + j, n);
    });
    float* phis = scratch + hidden;  // [slots]
    phis[0] = phi(params, total(acc));
    for (int64_t slot = 1; slot < slots; slot++)
      phis[slot] = phi(params + slot * kParams, dot<F32>(scratch, read + slot * hidden, hidden));
    finish([&](int64_t j, int64_t n) RK_LAMBDA {
      vfloat h = load<F32>(scratch + j, n);
      for (int64_t slot = 0; slot < slots; slot++)
        h += phis[slot] * load<F32>(write + slot * hidden + j, n);
      return h;
    });
  }
}

template <class T>
void steer(const rk::SteerArgs& args, int64_t begin, int64_t end, float* scratch) {
  const bool residual = args.residual.data, norm = args.normed.data;
  if (residual && norm)
    steer_rows<T, true, true>(args, begin, end, scratch);
  else if (residual)
    steer_rows<T, true, false>(args, begin, end, scratch);
  else if (norm)
    steer_rows<T, false, true>(args, begin, end, scratch);
  else
    steer_rows<T, false, false>(args, begin, end, scratch);
}

template <class T>
void scores(const rk::ScoresArgs& args, int64_t begin, int64_t end) {
  const int64_t hidden = args.hidden, slots = args.programs.slots;
  for (int64_t i = begin; i < end; i++) {
    const int64_t program = args.programs.route ? args.programs.route[i] : 0;
    const float* read = args.programs.bank + program * 2 * slots * hidden;
    for (int64_t slot = 0; slot < slots; slot++)
      args.out[i * slots + slot] =
          program < 0 ? 0.0f : dot<T>(row_of<T>(args.h, i), read + slot * hidden, hidden);
  }
}

template <class T>
void rms_norm(const rk::RmsNormArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const auto* x = row_of<T>(args.x, i);
    auto* out = row_of_out<T>(args.out, i);
    vfloat acc[4] = {};
    for_row(args.hidden, [&](int64_t j, int64_t n, int k) RK_LAMBDA {
      const vfloat v = load<T>(x + j, n);
      acc[k] += v * v;
    });
    const float scale = rms_scale(total(acc), args.hidden, args.eps);
    for_row(args.hidden, [&](int64_t j, int64_t n, int) RK_LAMBDA {
      store<T>(out + j, load<T>(x + j, n) * scale * load<F32>(args.gain + j, n), n);
    });
  }
}

// Float64 throughout, shifted by the slot's first row so that sum of squares does not cancel; then
// Chan's merge into the running state. The rows come in a fixed order and the channels do not mix,
// so neither the number of threads nor the split of the channels changes a bit.
template <class T>
void moments(const rk::MomentsArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 256;
  const auto* activations = static_cast<const typename T::Element*>(args.activations);
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t width = end - start < kBlock ? end - start : kBlock;
    float row[kBlock];
    double shift[kBlock], first[kBlock], second[kBlock];
    for (int64_t k = 0; k < args.n; k++) {
      const auto* p = activations + args.rows[k] + start;
      for_row(width, [&](int64_t j, int64_t n, int)
                         RK_LAMBDA { store<F32>(row + j, load<T>(p + j, n), n); });
      if (k == 0) {
        for (int64_t j = 0; j < width; j++) shift[j] = row[j], first[j] = 0.0, second[j] = 0.0;
        continue;
      }
      for (int64_t j = 0; j < width; j++) {
        const double d = (double)row[j] - shift[j];
        first[j] += d;
        second[j] += d * d;
      }
    }
    const double n = (double)args.n, before = (double)args.count, after = before + n;
    for (int64_t j = 0; j < width; j++) {
      const double mean = shift[j] + first[j] / n;
      const double m2 = second[j] - first[j] * first[j] / n;
      const double delta = mean - args.mean[start + j];
      args.mean[start + j] += delta * (n / after);
      args.m2[start + j] += m2 + delta * delta * (before * n / after);
    }
  }
}

template <class T>
void to_float(const void* from, float* to, int64_t n) {
  const auto* p = static_cast<const typename T::Element*>(from);
  for_row(n, [&](int64_t j, int64_t lanes, int)
                 RK_LAMBDA { store<F32>(to + j, load<T>(p + j, lanes), lanes); });
}

#define RK_BY_DTYPE(function)                           \
  [](Dtype dtype, auto&&... args) {                     \
    switch (dtype) {                                    \
      case Dtype::f32: return function<F32>(args...);   \
      case Dtype::bf16: return function<BF16>(args...); \
      case Dtype::f16: return function<F16>(args...);   \
    }                                                   \
  }

}  // namespace

namespace rk {
extern const Kernels RK_TABLE;
const Kernels RK_TABLE = {
    RK_NAME,
    [](Dtype d, const SteerArgs& a, int64_t b, int64_t e, float* s) {
      RK_BY_DTYPE(steer)(d, a, b, e, s);
    },
    [](Dtype d, const ScoresArgs& a, int64_t b, int64_t e) { RK_BY_DTYPE(scores)(d, a, b, e); },
    [](Dtype d, const RmsNormArgs& a, int64_t b, int64_t e) { RK_BY_DTYPE(rms_norm)(d, a, b, e); },
    [](Dtype d, const MomentsArgs& a, int64_t b, int64_t e) { RK_BY_DTYPE(moments)(d, a, b, e); },
    [](Dtype d, const void* f, float* t, int64_t n) { RK_BY_DTYPE(to_float)(d, f, t, n); },
};
}  // namespace rk
