// The edit of a row, or of a few rows of one program: part of rows.inl, used by steer_rows.inl.
//
//   h = s + sum_j phi_j(v_j . s) u_j,  normed = h gain / sqrt(mean(h^2) + eps)
//
// where `source` gives s. A first pass over the row takes the dot products, a last pass writes the
// results. The row is read from memory once: it is still in L1 or L2 when the last pass reads it
// again. With several slots the first pass keeps s as float32 in `scratch`, so that every dot
// product of a program reads the same s.

namespace {

// phi(t), see Phi. A NaN score compares false twice and stays a NaN.
RK_INLINE float phi_of(const Phi& phi, float t) {
  float clamped = t;
  if (t < phi.low) clamped = phi.low;
  if (clamped > phi.high) clamped = phi.high;
  return phi.slope * t + phi.clamped_slope * clamped + phi.constant;
}

// How much of its write vector a slot adds for the dot product `dot` of its read vector: phi(dot),
// or, in the adjoint, dot times the slope of phi at the score saved at `at`.
RK_INLINE float coefficient(const rk::SteerArgs& args, int64_t at, const Phi& phi, float dot) {
  if (args.saved) {
    const float t = args.saved[at];
    return (t < phi.low || t > phi.high ? phi.slope : phi.slope + phi.clamped_slope) * dot;
  }
  if (args.scores) args.scores[at] = dot;
  return phi_of(phi, dot);
}

struct NoGain {};  // for a row that is not normalized

// Prefetches the next row into L2; otherwise memory idles during the two passes over L1. Each pass
// prefetches one line to read and one to write: the first pass x of the next row and this row's
// last output, the last pass the next row's residual and, with a norm, its h. With both inputs in
// one pass and both outputs in the other, 512 x 4096 took 1.09 times as long, 4096 x 4096 1.17.
template <class T, bool kNorm>
struct Prefetch {
  using Element = typename T::Element;
  const Element *next_x, *next_residual, *next_h;
  const Element* last_output;  // of this row: the normed row, or h if there is none
  bool streams;                // outputs go past the caches: not prefetched, in whole vectors only
  static RK_INLINE void line(const Element* p) { __builtin_prefetch(p, 0, 2); }
  RK_INLINE void in_first_pass(int64_t j) const {
    line(next_x + j);
    if (!streams) line(last_output + j);
  }
  RK_INLINE void in_last_pass(int64_t j) const {
    line(next_residual + j);
    if (kNorm && !streams) line(next_h + j);
  }
  RK_INLINE void write(Element* p, vfloat v, int64_t n) const {
    streams ? stream<T>(p, v) : store<T>(p, v, n);
  }
};
template <class T>
struct NoPrefetch {
  RK_INLINE void in_first_pass(int64_t) const {}
  RK_INLINE void in_last_pass(int64_t) const {}
  RK_INLINE void write(typename T::Element* p, vfloat v, int64_t n) const { store<T>(p, v, n); }
};

// ||s + phi u||^2 derived from sums over s, or a NaN if the terms cancel (see cancellation.h): then
// the squares of h must be summed.
template <class T>
RK_INLINE double derived_squares(double squares, double phi, double along, double length) {
  constexpr double kTrustedShare =
      T::dtype == Dtype::f32 ? rk::cancellation::kFloatRowsCpu : rk::cancellation::kSixteenBitRows;
  const double after = squares + phi * (2.0 * along + phi * length);
  return after >= kTrustedShare * squares ? after : __builtin_nan("");
}

// s = x + residual of a row, or x alone.
template <class T, bool kResidual>
struct RowSum {
  const typename T::Element *x, *residual;
  RK_INLINE vfloat operator()(int64_t j, int64_t n) const {
    return kResidual ? load<T>(x + j, n) + load<T>(residual + j, n) : load<T>(x + j, n);
  }
  // s + edit without rounding s in between. The float32 sum of x and residual has lost up to half a
  // unit, which Knuth's TwoSum recovers (The Art of Computer Programming, 4.2.2) and adds to the
  // edit. If the edit is zero the result has the bits of s. A float32 sum of 16-bit numbers loses
  // nothing that their result would show.
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

// Rows of one program are edited together, block by block, so that the vectors and the weight come
// from L2 once for all of them. float32 rows wait for L2: together they take 0.7 to 0.9 of the
// time. 16-bit rows wait for arithmetic and would take 1.00 to 1.05, so they are edited alone.
template <class T>
constexpr int kRowsAtOnce = T::dtype == Dtype::f32 ? 4 : 1;

// The vectors of a row's program, and what a fused norm must know of them, which is measured during
// the first pass of the first rows. A projection reads and writes the same vector, which is then
// read once.
struct Vectors {
  int64_t program = -1;
  int64_t slots = 0;  // without the idle ones at the end, which only fill up a bank
  const float *read = nullptr, *write = nullptr;
  const Phi* phis = nullptr;
  bool measured = false;          // the two members below are valid
  bool symmetric = true;          // u and v hold the same numbers
  double squared_length[1] = {};  // ||u||^2

  RK_INLINE void select(const rk::SteerArgs& args, int64_t wanted) {
    if (wanted == program) return;
    *this = {.program = wanted, .slots = args.programs.slots};
    read = args.programs.bank + program * 2 * slots * args.hidden;
    write = read + slots * args.hidden;
    phis = args.programs.phis + program * slots;
    const auto is_idle = [](const Phi& phi) {
      return phi.slope == 0 && phi.constant == 0 && phi.clamped_slope == 0;
    };
    while (slots > 1 && is_idle(phis[slots - 1])) slots--;
    if (args.saved) std::swap(read, write);  // which makes an edit its adjoint
  }
  RK_INLINE void measure_block(int64_t start, int64_t width) {
    vint differ = {};
    sum_block(start, width, squared_length, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
      const vfloat u = load<F32>(write + j, n);
      acc[0] += u * u;
      differ |= bits<vint>(u) ^ bits<vint>(load<F32>(read + j, n));
    });
    for (int64_t lane = 0; lane < kLanes; lane++) symmetric &= differ[lane] == 0;
  }
};

// In what follows, rows are [begin, begin + rows); `rows` is a number or, for one row, the constant
// OneRow. source_of(row)(channel, lanes) gives s of the row begin + row, and prefetch_of(row) its
// Prefetch.
using OneRow = std::integral_constant<int, 1>;

// The last pass: writes h = value_of(row)(channel, lanes), rounded once, and with a gain also the
// normed row, from the unrounded h. It goes backward, so that it begins with what the pass before
// left in L1: 0.9 of the time for rows in L2.
template <class T, class Count, class Gain, class Values, class Prefetches>
RK_INLINE void write_rows(const rk::SteerArgs& args, int64_t begin, Count rows, Gain gain,
                          const double* squares, Values value_of, Prefetches prefetch_of) {
  constexpr bool kNorm = !std::is_same_v<Gain, NoGain>;
  float scale[kRowsAtOnce<T>];
  for (int row = 0; kNorm && row < rows; row++)
    scale[row] = rms_scale(squares[row], args.hidden, args.weight.eps);
  const int64_t block = std::is_same_v<Count, OneRow> ? args.hidden : kBlock;
  for (int64_t end = args.hidden, start; end > 0; end = start) {
    start = (end - 1) / block * block;
    for (int row = 0; row < rows; row++) {
      const auto value_at = value_of(row);
      const auto prefetch = prefetch_of(row);
      const float by = kNorm ? scale[row] : 1.0f;
      auto* out = row_of_out<T>(args.out, begin + row);
      auto* normed = kNorm ? row_of_out<T>(args.normed, begin + row) : nullptr;
      for_row_backward(end - start, [&](int64_t offset, int64_t n) RK_LAMBDA {
        const int64_t j = start + offset;
        prefetch.in_last_pass(j);
        const vfloat h = value_at(j, n);
        prefetch.write(out + j, h, n);
        if constexpr (kNorm) prefetch.write(normed + j, h * by * gain(j, n), n);
      });
    }
  }
}

template <class Values>
RK_INLINE double squares_of(int64_t hidden, Values value_at) {
  double sums[1];
  sum_row(hidden, sums, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
    const vfloat h = value_at(j, n);
    acc[0] += h * h;
  });
  return sums[0];
}

// h of rows with one slot, as value_of for write_rows. It adds x and residual again, which takes
// less time than storing s.
template <class Sources>
RK_INLINE auto one_slot_values(Sources source_of, const float* phi, const float* write) {
  return [=](int row) RK_LAMBDA {
    return [source = source_of(row), phi = phi[row], write](int64_t j, int64_t n) RK_LAMBDA {
      const vfloat edit = phi * load<F32>(write + j, n);
      if constexpr (requires { source.plus(j, n, edit); })
        return source.plus(j, n, edit);
      else
        return source(j, n) + edit;
    };
  };
}

// The first pass over rows of one program with one slot: phi(v . s) of each row and, with a norm,
// ||h||^2.
template <class T, bool kNorm, class Count, class Sources, class Prefetches>
RK_INLINE void sum_one_slot(const rk::SteerArgs& args, int64_t begin, Count rows, Vectors& vectors,
                            Sources source_of, Prefetches prefetch_of, float* phi,
                            double* squares) {
  enum { kScore, kSquares, kAlong };
  const float *read = vectors.read, *write = vectors.write;
  const bool measured = !kNorm || vectors.measured;
  double sums[kRowsAtOnce<T>][3] = {};
  const auto sum_rows = [&](auto count) RK_LAMBDA {
    constexpr int kSums = decltype(count)::value;
    for_blocks(args.hidden, [&](int64_t start, int64_t width) RK_LAMBDA {
      if (!measured) vectors.measure_block(start, width);
      for (int row = 0; row < rows; row++) {
        const auto source = source_of(row);
        const auto prefetch = prefetch_of(row);
        double of_block[kSums] = {};
        sum_block(start, width, of_block, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
          prefetch.in_first_pass(j);
          const vfloat s = source(j, n);
          acc[kScore] += s * load<F32>(read + j, n);
          if constexpr (kSums > kSquares) acc[kSquares] += s * s;
          if constexpr (kSums > kAlong) acc[kAlong] += s * load<F32>(write + j, n);
        });
        for (int i = 0; i < kSums; i++) sums[row][i] += of_block[i];
      }
    });
  };
  if constexpr (!kNorm) {
    sum_rows(std::integral_constant<int, 1>{});
  } else if (!measured || vectors.symmetric) {
    sum_rows(std::integral_constant<int, 2>{});
    vectors.measured = true;
    if (vectors.symmetric) write = vectors.write = read;
    for (int row = 0; row < rows; row++) {
      double along[1] = {sums[row][kScore]};
      const auto source = source_of(row);
      if (!vectors.symmetric)
        sum_row(args.hidden, along, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
          acc[0] += source(j, n) * load<F32>(write + j, n);
        });
      sums[row][kAlong] = along[0];
    }
  } else {
    sum_rows(std::integral_constant<int, 3>{});
  }

  for (int row = 0; row < rows; row++) {
    const double* row_sums = sums[row];
    phi[row] = coefficient(args, (begin + row) * args.programs.slots, vectors.phis[0],
                           (float)row_sums[kScore]);
    if constexpr (!kNorm) continue;
    squares[row] = derived_squares<T>(row_sums[kSquares], phi[row], row_sums[kAlong],
                                      vectors.squared_length[0]);
    if (squares[row] != squares[row])
      squares[row] = squares_of(args.hidden, one_slot_values(source_of, phi, write)(row));
  }
}

// The same, compiled apart for rows in a cache, where every type of weight can share it. Rows from
// memory take 1.01 (bfloat16) to 1.08 (float16) of the time with it.
template <class T, class Count, class Sources, class Prefetches>
RK_NOINLINE void sum_one_slot_apart(const rk::SteerArgs& args, int64_t begin, Count rows,
                                    Vectors& vectors, Sources source_of, Prefetches prefetch_of,
                                    float* phi, double* squares) {
  sum_one_slot<T, true>(args, begin, rows, vectors, source_of, prefetch_of, phi, squares);
}

// A row with several slots, once `scratch` holds s and the first slot's dot product is known. It is
// compiled apart, since it is the same for every source of s.
template <class T, class Gain, class RowPrefetch>
RK_NOINLINE void steer_several_slots(const rk::SteerArgs& args, int64_t row, const Vectors& vectors,
                                     Gain gain, float* scratch, float first_dot,
                                     RowPrefetch prefetch) {
  constexpr bool kNorm = !std::is_same_v<Gain, NoGain>;
  const int64_t hidden = args.hidden, used = vectors.slots, at = row * args.programs.slots;
  const float *read = vectors.read, *write = vectors.write;
  float* coefficients = scratch + 2 * hidden;  // [slots]
  coefficients[0] = coefficient(args, at, vectors.phis[0], first_dot);
  for (int64_t slot = 1; slot < used; slot++)
    coefficients[slot] = coefficient(args, at + slot, vectors.phis[slot],
                                     dot<F32>(scratch, read + slot * hidden, hidden));
  const auto h = [&](int64_t j, int64_t n) RK_LAMBDA {
    vfloat h = load<F32>(scratch + j, n);
    for (int64_t slot = 0; slot < used; slot++)
      h += coefficients[slot] * load<F32>(write + slot * hidden + j, n);
    return h;
  };
  const auto prefetch_of = [&](int) RK_LAMBDA { return prefetch; };
  if constexpr (kNorm) {
    const double squares = squares_of(hidden, [&](int64_t j, int64_t n) RK_LAMBDA {
      prefetch.in_first_pass(j);
      const vfloat value = h(j, n);
      store<F32>(scratch + j, value, n);
      return value;
    });
    const auto kept = [&](int64_t j, int64_t n) RK_LAMBDA { return load<F32>(scratch + j, n); };
    const auto value_of = [&](int) RK_LAMBDA { return kept; };
    write_rows<T>(args, row, OneRow{}, gain, &squares, value_of, prefetch_of);
  } else {
    const auto value_of = [&](int) RK_LAMBDA { return h; };
    write_rows<T>(args, row, OneRow{}, gain, nullptr, value_of, prefetch_of);
  }
}

// Rows of one program; more than one only if it has one slot.
template <class T, class Count, class Gain, class Sources, class Prefetches>
RK_INLINE void steer_group(const rk::SteerArgs& args, int64_t begin, Count rows, Vectors& vectors,
                           Gain gain, float* scratch, Sources source_of, Prefetches prefetch_of) {
  constexpr bool kNorm = !std::is_same_v<Gain, NoGain>;
  const int64_t hidden = args.hidden, slots = args.programs.slots;
  const auto source = source_of(0);
  const auto prefetch = prefetch_of(0);
  float* scores = args.scores ? args.scores + begin * slots : nullptr;
  const auto clear_scores_from = [&](int64_t slot) RK_LAMBDA {
    for (; scores && slot < slots; slot++) scores[slot] = 0.0f;
  };

  const int64_t program = args.programs.route ? args.programs.route[begin] : 0;
  if (program < 0 || slots == 0) {  // the plain add, bit for bit
    clear_scores_from(0);
    double squares = 0.0;
    if constexpr (kNorm)
      squares = squares_of(hidden, [&](int64_t j, int64_t n) RK_LAMBDA {
        prefetch.in_first_pass(j);
        return source(j, n);
      });
    write_rows<T>(args, begin, OneRow{}, gain, &squares, source_of, prefetch_of);
    return;
  }
  vectors.select(args, program);
  clear_scores_from(vectors.slots);
  if (vectors.slots == 1) {
    float phi[kRowsAtOnce<T>];
    double squares[kRowsAtOnce<T>];
    if constexpr (kNorm && std::is_same_v<decltype(prefetch), const NoPrefetch<T>>)
      sum_one_slot_apart<T>(args, begin, rows, vectors, source_of, prefetch_of, phi, squares);
    else
      sum_one_slot<T, kNorm>(args, begin, rows, vectors, source_of, prefetch_of, phi, squares);
    const auto value_of = one_slot_values(source_of, phi, vectors.write);
    write_rows<T>(args, begin, rows, gain, squares, value_of, prefetch_of);
    return;
  }
  double first[1];
  sum_row(hidden, first, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
    prefetch.in_first_pass(j);
    const vfloat s = source(j, n);
    store<F32>(scratch + j, s, n);
    acc[0] += s * load<F32>(vectors.read + j, n);
  });
  steer_several_slots<T>(args, begin, vectors, gain, scratch, (float)first[0], prefetch);
}

}  // namespace
