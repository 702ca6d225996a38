// The row kernels, written once and compiled once per instruction set (rows_*.cpp): sums over rows,
// scores, norm and moments here, the edits in steer.inl and steer_rows.inl.
#include "vec.h"

namespace {

using rk::Dtype, rk::Phi;

template <class T>
RK_INLINE const typename T::Element* row_of(const rk::Rows& rows, int64_t i) {
  return static_cast<const typename T::Element*>(rows.data) + i * rows.stride;
}
template <class T>
RK_INLINE typename T::Element* row_of_out(const rk::Rows& rows, int64_t i) {
  return static_cast<typename T::Element*>(rows.data) + i * rows.stride;
}

// Rows are walked in blocks of this many channels. After each block its sum is added to a double,
// so that one massive channel spoils the low bits of 16 additions, not of a quarter of the row.
// What several rows share is in L1 for all of them but the first.
constexpr int64_t kBlock = 64 * kLanes;

// body(first channel, channels) for every block of a row
template <class Body>
RK_INLINE void for_blocks(int64_t hidden, Body body) {
  for (int64_t start = 0; start < hidden; start += kBlock)
    body(start, hidden - start < kBlock ? hidden - start : kBlock);
}

// Adds kSums sums over a block to `sums`. body(channel, lanes, acc) adds to acc[sum], one of four
// accumulators that hide the latency of the FMA.
template <int kSums, class Body>
RK_INLINE void sum_block(int64_t start, int64_t width, double (&sums)[kSums], Body body) {
  vfloat acc[4][kSums] = {};
  for_row(width, [&](int64_t j, int64_t n, int k) RK_LAMBDA { body(start + j, n, acc[k]); });
  for (int i = 0; i < kSums; i++)
    sums[i] += (double)sum((acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]));
}

template <int kSums, class Body>
RK_INLINE void sum_row(int64_t hidden, double (&sums)[kSums], Body body) {
  for (int i = 0; i < kSums; i++) sums[i] = 0.0;
  for_blocks(hidden,
             [&](int64_t start, int64_t width) RK_LAMBDA { sum_block(start, width, sums, body); });
}

template <class T>
RK_INLINE float dot(const typename T::Element* a, const float* v, int64_t hidden) {
  double sums[1];
  sum_row(hidden, sums, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
    acc[0] += load<T>(a + j, n) * load<F32>(v + j, n);
  });
  return (float)sums[0];
}

// In double: rounded once instead of four times.
RK_INLINE float rms_scale(double squares, int64_t hidden, float eps) {
  return (float)(1.0 / __builtin_sqrt(squares / (double)hidden + eps));
}

// weight + offset in float32, from a weight of any type, read in place
template <class WeightType>
struct Gain {
  const void* weight;
  float offset;
  RK_INLINE vfloat operator()(int64_t j, int64_t n) const {
    return load<WeightType>(static_cast<const typename WeightType::Element*>(weight) + j, n) +
           offset;
  }
};

// The same as a float32 row: in place, or widened into scratch.
RK_INLINE Gain<F32> wide_gain(const rk::Weight& weight, float* scratch, int64_t hidden) {
  if (weight.dtype == Dtype::f32) return {weight.data, weight.offset};
  const auto widen = [&](auto gain) RK_LAMBDA {
    for_row(hidden,
            [&](int64_t j, int64_t n, int) RK_LAMBDA { store<F32>(scratch + j, gain(j, n), n); });
  };
  weight.dtype == Dtype::bf16 ? widen(Gain<BF16>{weight.data, weight.offset})
                              : widen(Gain<F16>{weight.data, weight.offset});
  return {scratch, 0.0f};
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
  const auto gain = wide_gain(args.weight, scratch, args.hidden);
  for (int64_t i = begin; i < end; i++) {
    const auto* x = row_of<T>(args.x, i);
    auto* out = row_of_out<T>(args.out, i);
    double sums[1];
    sum_row(args.hidden, sums, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
      const vfloat v = load<T>(x + j, n);
      acc[0] += v * v;
    });
    const float scale = rms_scale(sums[0], args.hidden, args.weight.eps);
    for_row(args.hidden, [&](int64_t j, int64_t n, int) RK_LAMBDA {
      store<T>(out + j, load<T>(x + j, n) * scale * gain(j, n), n);
    });
  }
}

// Sums in float64, shifted by the slot's first row so that the sum of squares does not cancel; then
// Chan's merge into the running state. The rows come in a fixed order and channels do not mix, so
// neither the number of threads nor the split of the channels changes a bit.
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

}  // namespace

#include "steer.inl"
#include "steer_rows.inl"

namespace {

// function<the dtype's type>(...), where bfloat16 is a Bfloat
#define RK_BY_DTYPE(function)                             \
  [](Dtype dtype, auto&&... args) {                       \
    switch (dtype) {                                      \
      case Dtype::f32: function<F32>(args...); break;     \
      case Dtype::bf16: function<Bfloat>(args...); break; \
      case Dtype::f16: function<F16>(args...); break;     \
    }                                                     \
    release_registers();                                  \
  }

template <class Bfloat>
constexpr rk::Kernels table(const char* name) {
  return {
      name,
      [](Dtype d, const rk::SteerArgs& a, int64_t b, int64_t e, float* s) {
        RK_BY_DTYPE(steer)(d, a, b, e, s);
      },
      [](Dtype d, const rk::ScoresArgs& a, int64_t b, int64_t e) {
        RK_BY_DTYPE(scores)(d, a, b, e);
      },
      [](Dtype d, const rk::RmsNormArgs& a, int64_t b, int64_t e, float* s) {
        RK_BY_DTYPE(rms_norm)(d, a, b, e, s);
      },
      [](Dtype d, const rk::SlotArgs& a, int64_t b, int64_t e) {
        RK_BY_DTYPE(moments)(d, a, b, e);
      },
  };
}

}  // namespace

namespace rk {
extern const Kernels RK_TABLE;
const Kernels RK_TABLE = table<BF16>(RK_NAME);
#ifdef RK_BF16_TABLE
extern const Kernels RK_BF16_TABLE;
const Kernels RK_BF16_TABLE = table<FastBF16>(RK_NAME "_bf16");
#endif
}  // namespace rk
