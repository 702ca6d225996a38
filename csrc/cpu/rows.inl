// The row kernels, written once and compiled once per instruction set (rows_*.cpp).
//
// Each row is read from memory once and is still in L1/L2 when a later pass reads it again. With
// several slots the first pass keeps the float32 sum in `scratch`, so that every dot product of a
// program reads the same s.
#include "vec.h"

namespace {

using rk::A, rk::B, rk::C, rk::LOW, rk::HIGH, rk::kParams;
using rk::Dtype;

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

// What a dot product does to its slot: phi of it, or, in the adjoint, the slope of phi at the saved
// score times it.
RK_INLINE float coefficient(const rk::SteerArgs& args, int64_t at, const float* p, float dot) {
  if (args.saved) {
    const float t = args.saved[at];
    return (t < p[LOW] || t > p[HIGH] ? p[A] : p[A] + p[C]) * dot;
  }
  if (args.scores) args.scores[at] = dot;
  return phi(p, dot);
}

// weight + offset in float32
RK_INLINE const float* gain_of(const rk::Weight& weight, float* gain, int64_t hidden) {
  if (weight.dtype == Dtype::f32 && weight.offset == 0.0f)
    return static_cast<const float*>(weight.data);
  const auto widen = [&](auto type) {
    using W = decltype(type);
    const auto* w = static_cast<const typename W::Element*>(weight.data);
    for_row(hidden, [&](int64_t j, int64_t n, int)
                        RK_LAMBDA { store<F32>(gain + j, load<W>(w + j, n) + weight.offset, n); });
  };
  switch (weight.dtype) {
    case Dtype::f32: widen(F32{}); break;
    case Dtype::bf16: widen(BF16{}); break;
    case Dtype::f16: widen(F16{}); break;
  }
  return gain;
}

// One row: edit(s), where source(j, lanes) gives s, and with kNorm its norm. `fetch` asks for a
// piece of the next row.
template <class T, bool kNorm, class Source, class Fetch>
RK_INLINE void steer_row(const rk::SteerArgs& args, int64_t i, const float* gain, float* scratch,
                         Source source, Fetch fetch) {
  using E = typename T::Element;
  const int64_t hidden = args.hidden, slots = args.programs.slots;
  E* out = row_of_out<T>(args.out, i);

  // The last pass: h = value_at(...), rounded once; with kNorm the unrounded h is normalised too.
  auto finish = [&](auto value_at) RK_LAMBDA {
    vfloat squares[4] = {};
    for_row(hidden, [&](int64_t j, int64_t n, int k) RK_LAMBDA {
      fetch(j);
      const vfloat h = value_at(j, n);
      store<T>(out + j, h, n);
      if (kNorm) {
        store<F32>(scratch + j, h, n);
        squares[k] += h * h;
      }
    });
    if (!kNorm) return;
    E* normed = row_of_out<T>(args.normed, i);
    const float scale = rms_scale(total(squares), hidden, args.weight.eps);
    for_row(hidden, [&](int64_t j, int64_t n, int) RK_LAMBDA {
      store<T>(normed + j, load<F32>(scratch + j, n) * scale * load<F32>(gain + j, n), n);
    });
  };

  const int64_t program = args.programs.route ? args.programs.route[i] : 0;
  if (program < 0 || slots == 0) {  // the plain add, bit for bit
    if (args.scores)
      for (int64_t slot = 0; slot < slots; slot++) args.scores[i * slots + slot] = 0.0f;
    finish(source);
    return;
  }
  const float* read = args.programs.bank + program * 2 * slots * hidden;
  const float* write = read + slots * hidden;
  if (args.saved) {  // the edit is its own adjoint, with the roles exchanged
    const float* u = write;
    write = read;
    read = u;
  }
  const float* params = args.programs.params + program * slots * kParams;
  vfloat acc[4] = {};
  if (slots == 1) {  // the row is still in L1 for the second pass: adding again beats storing s
    for_row(hidden, [&](int64_t j, int64_t n, int k)
                        RK_LAMBDA { acc[k] += source(j, n) * load<F32>(read + j, n); });
    const float phi = coefficient(args, i, params, total(acc));
    finish([&](int64_t j, int64_t n)
               RK_LAMBDA { return source(j, n) + phi * load<F32>(write + j, n); });
    return;
  }

  for_row(hidden, [&](int64_t j, int64_t n, int k) RK_LAMBDA {
    const vfloat s = source(j, n);
    store<F32>(scratch + j, s, n);
    acc[k] += s * load<F32>(read + j, n);
  });
  float* phis = scratch + 2 * hidden;  // [slots]
  phis[0] = coefficient(args, i * slots, params, total(acc));
  for (int64_t slot = 1; slot < slots; slot++)
    phis[slot] = coefficient(args, i * slots + slot, params + slot * kParams,
                             dot<F32>(scratch, read + slot * hidden, hidden));
  finish([&](int64_t j, int64_t n) RK_LAMBDA {
    vfloat h = load<F32>(scratch + j, n);
    for (int64_t slot = 0; slot < slots; slot++)
      h += phis[slot] * load<F32>(write + slot * hidden + j, n);
    return h;
  });
}

// add (and normalise), or the adjoint without a norm
template <class T, bool kResidual, bool kNorm>
RK_INLINE void add_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, float* scratch) {
  using E = typename T::Element;
  const float* gain = kNorm ? gain_of(args.weight, scratch + args.hidden, args.hidden) : nullptr;
  for (int64_t i = begin; i < end; i++) {
    const E* x = row_of<T>(args.x, i);
    const E* residual = kResidual ? row_of<T>(args.residual, i) : nullptr;
    const auto source = [&](int64_t j, int64_t n) RK_LAMBDA {
      return kResidual ? load<T>(x + j, n) + load<T>(residual + j, n) : load<T>(x + j, n);
    };
    // the next row is fetched while this one is written: two passes would otherwise leave the
    // memory idle during the second (float32, 4096 x 4096: 1.13 x torch.add without, 1.04 with)
    const int64_t next = i + 1 < end ? 1 : 0;
    const E* next_x = x + next * args.x.stride;
    const E* next_residual = kResidual ? residual + next * args.residual.stride : next_x;
    steer_row<T, kNorm>(args, i, gain, scratch, source, [&](int64_t j) RK_LAMBDA {
      __builtin_prefetch(next_x + j);
      if (kResidual) __builtin_prefetch(next_residual + j);
    });
  }
}

// The adjoint of add_steer_rms_norm: first the norm's, g = scale (w d - h scale^2 mean(w d h)) +
// the gradient of h itself, where d is the gradient of the normed row; then the edit's.
template <class T, bool kResidual>
RK_INLINE void through_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, float* scratch) {
  using E = typename T::Element;
  const int64_t hidden = args.hidden;
  const float* gain = gain_of(args.weight, scratch + hidden, hidden);
  for (int64_t i = begin; i < end; i++) {
    const E* grad = row_of<T>(args.x, i);
    const E* grad_h = kResidual ? row_of<T>(args.residual, i) : nullptr;
    const E* h = row_of<T>(args.h, i);
    vfloat squares[4] = {}, products[4] = {};
    for_row(hidden, [&](int64_t j, int64_t n, int k) RK_LAMBDA {
      const vfloat v = load<T>(h + j, n);
      squares[k] += v * v;
      products[k] += load<T>(grad + j, n) * load<F32>(gain + j, n) * v;
    });
    const float scale = rms_scale(total(squares), hidden, args.weight.eps);
    const float pull = scale * scale * (total(products) / (float)hidden);
    const auto source = [&](int64_t j, int64_t n) RK_LAMBDA {
      const vfloat g =
          scale * (load<T>(grad + j, n) * load<F32>(gain + j, n) - load<T>(h + j, n) * pull);
      return kResidual ? load<T>(grad_h + j, n) + g : g;
    };
    steer_row<T, false>(args, i, nullptr, scratch, source, [](int64_t) RK_LAMBDA {});
  }
}

template <class T>
void steer(const rk::SteerArgs& args, int64_t begin, int64_t end, float* scratch) {
  const bool residual = args.residual.data, norm = args.normed.data;
  if (args.h.data)
    residual ? through_rows<T, true>(args, begin, end, scratch)
             : through_rows<T, false>(args, begin, end, scratch);
  else if (norm)
    residual ? add_rows<T, true, true>(args, begin, end, scratch)
             : add_rows<T, false, true>(args, begin, end, scratch);
  else
    residual ? add_rows<T, true, false>(args, begin, end, scratch)
             : add_rows<T, false, false>(args, begin, end, scratch);
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
void rms_norm(const rk::RmsNormArgs& args, int64_t begin, int64_t end, float* scratch) {
  const float* gain = gain_of(args.weight, scratch, args.hidden);
  for (int64_t i = begin; i < end; i++) {
    const auto* x = row_of<T>(args.x, i);
    auto* out = row_of_out<T>(args.out, i);
    vfloat acc[4] = {};
    for_row(args.hidden, [&](int64_t j, int64_t n, int k) RK_LAMBDA {
      const vfloat v = load<T>(x + j, n);
      acc[k] += v * v;
    });
    const float scale = rms_scale(total(acc), args.hidden, args.weight.eps);
    for_row(args.hidden, [&](int64_t j, int64_t n, int) RK_LAMBDA {
      store<T>(out + j, load<T>(x + j, n) * scale * load<F32>(gain + j, n), n);
    });
  }
}

// Float64 throughout, shifted by the slot's first row so that sum of squares does not cancel; then
// Chan's merge into the running state. The rows come in a fixed order and the channels do not mix,
// so neither the number of threads nor the split of the channels changes a bit.
template <class T>
void moments(const rk::SlotArgs& args, int64_t begin, int64_t end) {
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
    [](Dtype d, const RmsNormArgs& a, int64_t b, int64_t e, float* s) {
      RK_BY_DTYPE(rms_norm)(d, a, b, e, s);
    },
    [](Dtype d, const SlotArgs& a, int64_t b, int64_t e) { RK_BY_DTYPE(moments)(d, a, b, e); },
};
}  // namespace rk
