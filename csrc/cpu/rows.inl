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

// kSums sums over a row: body(offset, lanes, acc) adds to acc[sum], which is one of four
// accumulators that hide the latency of the FMA. They are emptied into a double every 64 vectors:
// one massive channel then spoils the low bits of 16 additions, not of a quarter of the row.
template <int kSums, class Body>
RK_INLINE void sum_row(int64_t hidden, double (&sums)[kSums], Body body) {
  constexpr int64_t kBlock = 64 * kLanes;
  for (int i = 0; i < kSums; i++) sums[i] = 0.0;
  for (int64_t start = 0; start < hidden; start += kBlock) {
    vfloat acc[4][kSums] = {};
    const int64_t width = hidden - start < kBlock ? hidden - start : kBlock;
    for_row(width, [&](int64_t j, int64_t n, int k) RK_LAMBDA { body(start + j, n, acc[k]); });
    for (int i = 0; i < kSums; i++)
      sums[i] += (double)sum((acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]));
  }
}

template <class T>
RK_INLINE float dot(const typename T::Element* a, const float* v, int64_t hidden) {
  double sums[1];
  sum_row(hidden, sums, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
    acc[0] += load<T>(a + j, n) * load<F32>(v + j, n);
  });
  return (float)sums[0];
}

// in double, for one rounding instead of four
RK_INLINE float rms_scale(double squares, int64_t hidden, float eps) {
  return (float)(1.0 / __builtin_sqrt(squares / (double)hidden + eps));
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

// weight + offset in float32, from a weight of any dtype where it lies
template <class W>
struct Gain {
  const void* weight;
  float offset;
  RK_INLINE vfloat operator()(int64_t j, int64_t n) const {
    return load<W>(static_cast<const typename W::Element*>(weight) + j, n) + offset;
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

struct NoGain {};  // for a row that is not normalised

// What a row asks of memory ahead of its use, into L2, as two passes over L1 would otherwise leave
// the memory idle. Each pass asks for one line to read and one to write: the first for x of the
// next row and a row of this one's output, the last for the residual and, with a norm, the next
// row's h. Asking for both inputs in one pass and both outputs in the other took 1.09 times as long
// at 512 x 4096, 1.17 at 4096 x 4096.
template <class T, bool kNorm>
struct Fetch {
  using E = typename T::Element;
  const E *x, *residual, *next;  // of the next row; next is its h
  const E* out;                  // of this row: the normed row, or h where there is none
  bool streams;                  // outputs go past the caches: nothing is asked for, n is kLanes
  static RK_INLINE void line(const E* p) { __builtin_prefetch(p, 0, 2); }
  RK_INLINE void first(int64_t j) const {
    line(x + j);
    if (!streams) line(out + j);
  }
  RK_INLINE void last(int64_t j) const {
    line(residual + j);
    if (kNorm && !streams) line(next + j);
  }
  RK_INLINE void put(E* p, vfloat v, int64_t n) const {
    streams ? stream<T>(p, v) : store<T>(p, v, n);
  }
};
template <class T>
struct NoFetch {
  RK_INLINE void first(int64_t) const {}
  RK_INLINE void last(int64_t) const {}
  RK_INLINE void put(typename T::Element* p, vfloat v, int64_t n) const { store<T>(p, v, n); }
};

// ||s + phi u||^2 from sums over s, or a NaN where most of s lies along u and the terms cancel:
// then the squares of h must be summed. The shares of ||s||^2 that are left to trust the sums keep
// the error of a float32 row and of a 16-bit row at or below that of eager PyTorch.
template <class T>
RK_INLINE double squares_after(double squares, double phi, double along, double length) {
  constexpr double kShare = T::dtype == Dtype::f32 ? 0.5 : 0.01;
  const double after = squares + phi * (2.0 * along + phi * length);
  return after >= kShare * squares ? after : __builtin_nan("");
}

// s = x + residual of a row, or x alone.
template <class T, bool kResidual>
struct Sum {
  const typename T::Element *x, *residual;
  RK_INLINE vfloat operator()(int64_t j, int64_t n) const {
    return kResidual ? load<T>(x + j, n) + load<T>(residual + j, n) : load<T>(x + j, n);
  }
  // s + edit, where s is not rounded in between: a float32 sum has lost up to half a unit, which
  // Knuth's TwoSum finds (The Art of Computer Programming, 4.2.2), and which then goes with the
  // edit. For an edit of zero the bits are those of s. The 16-bit types' sum is not rounded anyway.
  RK_INLINE vfloat plus(int64_t j, int64_t n, vfloat edit) const {
    if constexpr (T::dtype != Dtype::f32) {
      return (*this)(j, n) + edit;
    } else {
      const vfloat a = load<T>(x + j, n), b = kResidual ? load<T>(residual + j, n) : vfloat{};
      const vfloat s = a + b;
      const vfloat of_b = s - a;
      return s + (((a - (s - of_b)) + (b - of_b)) + edit);
    }
  }
};

// The vectors of a row's program, and what a fused norm needs to know of them: found once for a run
// of rows with the same program. A projection reads and writes one vector, so its rows read one.
struct Vectors {
  int64_t program = -1;
  int64_t slots = 0;  // without the last ones that do nothing: they only fill up a bank
  const float *read = nullptr, *write = nullptr, *params = nullptr;
  double length = 0.0;     // ||u||^2
  bool symmetric = false;  // u and v hold the same numbers

  RK_INLINE void find(const rk::SteerArgs& args, int64_t of, bool norm) {
    if (of == program) return;
    program = of;
    const int64_t hidden = args.hidden;
    slots = args.programs.slots;
    read = args.programs.bank + program * 2 * slots * hidden;
    write = read + slots * hidden;
    params = args.programs.params + program * slots * kParams;
    const auto idle = [&](const float* p) { return p[A] == 0 && p[B] == 0 && p[C] == 0; };
    while (slots > 1 && idle(params + (slots - 1) * kParams)) slots--;
    if (args.saved) std::swap(read, write);  // the edit's adjoint is the edit, the roles exchanged
    if (slots != 1 || !norm) return;
    double sums[1];
    vint differ = {};
    sum_row(hidden, sums, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
      const vfloat u = load<F32>(write + j, n);
      acc[0] += u * u;
      differ |= bits<vint>(u) ^ bits<vint>(load<F32>(read + j, n));
    });
    length = sums[0];
    symmetric = true;
    for (int64_t lane = 0; lane < kLanes; lane++) symmetric &= differ[lane] == 0;
    if (symmetric) write = read;
  }
};

// One row: edit(s), where source(j, lanes) gives s, and unless Gain is NoGain its norm. `fetch`
// asks for a piece of the next row.
template <class T, class Gain, class Source, class Fetch>
RK_INLINE void steer_row(const rk::SteerArgs& args, int64_t i, Vectors& vectors, Gain gain,
                         float* scratch, Source source, Fetch fetch) {
  using E = typename T::Element;
  constexpr bool kNorm = !std::is_same_v<Gain, NoGain>;
  const int64_t hidden = args.hidden, slots = args.programs.slots;
  E* out = row_of_out<T>(args.out, i);

  // The last pass: h = value_at(...), rounded once; with kNorm the unrounded h is normalised too.
  // It goes backward, so that what the pass before left in L1 is read first: 0.9 of the time for
  // rows that are in L2.
  const auto finish = [&](auto value_at, double squares) RK_LAMBDA {
    E* normed = kNorm ? row_of_out<T>(args.normed, i) : nullptr;
    const float scale = kNorm ? rms_scale(squares, hidden, args.weight.eps) : 1.0f;
    for_row_backward(hidden, [&](int64_t j, int64_t n) RK_LAMBDA {
      fetch.last(j);
      const vfloat h = value_at(j, n);
      fetch.put(out + j, h, n);
      if constexpr (kNorm) fetch.put(normed + j, h * scale * gain(j, n), n);
    });
  };
  const auto squares_of = [&](auto value_at) RK_LAMBDA {
    if (!kNorm) return 0.0;
    double sums[1];
    sum_row(hidden, sums, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
      fetch.first(j);
      const vfloat h = value_at(j, n);
      acc[0] += h * h;
    });
    return sums[0];
  };

  const int64_t program = args.programs.route ? args.programs.route[i] : 0;
  if (program < 0 || slots == 0) {  // the plain add, bit for bit
    if (args.scores)
      for (int64_t slot = 0; slot < slots; slot++) args.scores[i * slots + slot] = 0.0f;
    finish(source, squares_of(source));
    return;
  }
  vectors.find(args, program, kNorm);
  const float *read = vectors.read, *write = vectors.write, *params = vectors.params;
  const int64_t used = vectors.slots;
  if (args.scores)
    for (int64_t slot = used; slot < slots; slot++) args.scores[i * slots + slot] = 0.0f;
  if (used == 1) {  // the row is still in L1 for the second pass: adding again beats storing s
    enum { kScore, kSquares, kAlong };
    double sums[3] = {};
    const auto read_row = [&](auto& some, bool along) RK_LAMBDA {
      sum_row(hidden, some, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
        fetch.first(j);
        const vfloat s = source(j, n);
        acc[kScore] += s * load<F32>(read + j, n);
        if constexpr (kNorm) acc[kSquares] += s * s;
        if (along) acc[kAlong] += s * load<F32>(write + j, n);
      });
    };
    double short_sums[kNorm ? 2 : 1];
    if (!kNorm || vectors.symmetric) {
      read_row(short_sums, false);
      sums[kScore] = sums[kAlong] = short_sums[kScore];
      if (kNorm) sums[kSquares] = short_sums[kNorm ? kSquares : 0];
    } else {
      read_row(sums, true);
    }
    const float phi = coefficient(args, i * slots, params, (float)sums[kScore]);
    const auto h = [&](int64_t j, int64_t n) RK_LAMBDA {
      const vfloat edit = phi * load<F32>(write + j, n);
      if constexpr (requires { source.plus(j, n, edit); })
        return source.plus(j, n, edit);
      else
        return source(j, n) + edit;
    };
    double after = 0.0;
    if constexpr (kNorm) {
      after = squares_after<T>(sums[kSquares], phi, sums[kAlong], vectors.length);
      if (after != after) after = squares_of(h);
    }
    finish(h, after);
    return;
  }

  double first[1];
  sum_row(hidden, first, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
    fetch.first(j);
    const vfloat s = source(j, n);
    store<F32>(scratch + j, s, n);
    acc[0] += s * load<F32>(read + j, n);
  });
  float* phis = scratch + 2 * hidden;  // [slots]
  phis[0] = coefficient(args, i * slots, params, (float)first[0]);
  for (int64_t slot = 1; slot < used; slot++)
    phis[slot] = coefficient(args, i * slots + slot, params + slot * kParams,
                             dot<F32>(scratch, read + slot * hidden, hidden));
  const auto h = [&](int64_t j, int64_t n) RK_LAMBDA {
    vfloat h = load<F32>(scratch + j, n);
    for (int64_t slot = 0; slot < used; slot++)
      h += phis[slot] * load<F32>(write + slot * hidden + j, n);
    return h;
  };
  if (!kNorm) {
    finish(h, 0.0);
    return;
  }
  const double squares = squares_of([&](int64_t j, int64_t n) RK_LAMBDA {
    const vfloat value = h(j, n);
    store<F32>(scratch + j, value, n);
    return value;
  });
  finish([&](int64_t j, int64_t n) RK_LAMBDA { return load<F32>(scratch + j, n); }, squares);
}

// add (and normalise), or the adjoint without a norm
template <class T, bool kResidual, class Gain>
RK_INLINE void add_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, Gain gain,
                        float* scratch) {
  using E = typename T::Element;
  constexpr bool kNorm = !std::is_same_v<Gain, NoGain>;
  const int64_t bytes = (end - begin) * args.hidden * int64_t(4 * sizeof(E));
  // What lies in L2 needs no fetching: there it took up to 0.3 us of a row's 1.4.
  const bool fits = bytes <= 1 << 20;
  const bool streams = kStreams && args.may_stream && bytes >= rk::cache_share();
  Vectors vectors;
  for (int64_t i = begin; i < end; i++) {
    const E* x = row_of<T>(args.x, i);
    const E* residual = kResidual ? row_of<T>(args.residual, i) : nullptr;
    const Sum<T, kResidual> source{x, residual};
    if (fits) {
      steer_row<T>(args, i, vectors, gain, scratch, source, NoFetch<T>{});
      continue;
    }
    const int64_t next = i + 1 < end ? 1 : 0;
    const E *next_x = x + next * args.x.stride, *out = row_of<T>(args.out, i);
    const Fetch<T, kNorm> fetch{next_x, kResidual ? residual + next * args.residual.stride : next_x,
                                out + next * args.out.stride,
                                kNorm ? row_of<T>(args.normed, i) : out, streams};
    steer_row<T>(args, i, vectors, gain, scratch, source, fetch);
  }
  if (streams) end_stream();
}

// The adjoint of add_steer_rms_norm: first the norm's, g = scale (w d - h scale^2 mean(w d h)) +
// the gradient of h itself, where d is the gradient of the normed row; then the edit's.
template <class T, bool kResidual>
RK_INLINE void through_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, float* scratch) {
  using E = typename T::Element;
  const int64_t hidden = args.hidden;
  const auto gain = wide_gain(args.weight, scratch + hidden, hidden);
  Vectors vectors;
  for (int64_t i = begin; i < end; i++) {
    const E* grad = row_of<T>(args.x, i);
    const E* grad_h = kResidual ? row_of<T>(args.residual, i) : nullptr;
    const E* h = row_of<T>(args.h, i);
    double sums[2];
    sum_row(hidden, sums, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
      const vfloat v = load<T>(h + j, n);
      acc[0] += v * v;
      acc[1] += load<T>(grad + j, n) * gain(j, n) * v;
    });
    const float scale = rms_scale(sums[0], hidden, args.weight.eps);
    const float pull = scale * scale * (float)(sums[1] / (double)hidden);
    const auto source = [&](int64_t j, int64_t n) RK_LAMBDA {
      const vfloat g = scale * (load<T>(grad + j, n) * gain(j, n) - load<T>(h + j, n) * pull);
      return kResidual ? load<T>(grad_h + j, n) + g : g;
    };
    steer_row<T>(args, i, vectors, NoGain{}, scratch, source, NoFetch<T>{});
  }
}

template <class T, bool kResidual>
RK_INLINE void steer_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, float* scratch) {
  const rk::Weight& weight = args.weight;
  if (args.h.data)
    through_rows<T, kResidual>(args, begin, end, scratch);
  else if (!weight.data)
    add_rows<T, kResidual>(args, begin, end, NoGain{}, scratch);
  else if (weight.dtype == T::dtype)
    add_rows<T, kResidual>(args, begin, end, Gain<T>{weight.data, weight.offset}, scratch);
  else
    add_rows<T, kResidual>(args, begin, end, wide_gain(weight, scratch + args.hidden, args.hidden),
                           scratch);
}

template <class T>
void steer(const rk::SteerArgs& args, int64_t begin, int64_t end, float* scratch) {
  args.residual.data ? steer_rows<T, true>(args, begin, end, scratch)
                     : steer_rows<T, false>(args, begin, end, scratch);
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
      case Dtype::f32: function<F32>(args...); break;   \
      case Dtype::bf16: function<BF16>(args...); break; \
      case Dtype::f16: function<F16>(args...); break;   \
    }                                                   \
    release_registers();                                \
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
