// The edits of rows: add, steer, normalise, and their adjoints. Part of rows.inl.
//
// A row is read from memory once and is still in L1/L2 when a later pass reads it again. With
// several slots the first pass keeps the float32 sum in `scratch`, so that every dot product of a
// program reads the same s.

namespace {

// phi(t) = a*t + c*clamp(t, low, high) + b. A NaN score compares false twice and stays a NaN.
RK_INLINE float phi(const float* p, float t) {
  float clamped = t;
  if (t < p[LOW]) clamped = p[LOW];
  if (clamped > p[HIGH]) clamped = p[HIGH];
  return p[A] * t + p[C] * clamped + p[B];
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

// Rows of one program that are edited together, block by block, so that the vectors and the weight
// come from L2 once for all of them: in float32, whose rows wait for L2, 0.7 to 0.9 of the time. A
// 16-bit row waits for its arithmetic, and takes 1.00 to 1.05.
template <class T>
constexpr int kGroup = T::dtype == Dtype::f32 ? 4 : 1;

// The vectors of a row's program, and what a fused norm needs to know of them, which is found
// beside the first rows' sums. A projection reads and writes one vector, so its rows read one.
struct Vectors {
  int64_t program = -1;
  int64_t slots = 0;  // without the last ones that do nothing: they only fill up a bank
  const float *read = nullptr, *write = nullptr, *params = nullptr;
  bool known = false;     // what follows was found
  bool symmetric = true;  // u and v hold the same numbers
  double length[1] = {};  // ||u||^2

  RK_INLINE void find(const rk::SteerArgs& args, int64_t of) {
    if (of == program) return;
    *this = {.program = of, .slots = args.programs.slots};
    read = args.programs.bank + program * 2 * slots * args.hidden;
    write = read + slots * args.hidden;
    params = args.programs.params + program * slots * kParams;
    const auto idle = [&](const float* p) { return p[A] == 0 && p[B] == 0 && p[C] == 0; };
    while (slots > 1 && idle(params + (slots - 1) * kParams)) slots--;
    if (args.saved) std::swap(read, write);  // the edit's adjoint is the edit, the roles exchanged
  }
  RK_INLINE void look(int64_t start, int64_t width) {
    vint differ = {};
    sum_block(start, width, length, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
      const vfloat u = load<F32>(write + j, n);
      acc[0] += u * u;
      differ |= bits<vint>(u) ^ bits<vint>(load<F32>(read + j, n));
    });
    for (int64_t lane = 0; lane < kLanes; lane++) symmetric &= differ[lane] == 0;
  }
};

// In what follows rows are [begin, begin + rows), rows a number or, for one row, the constant One;
// source_of(row)(channel, lanes) gives s of the row begin + row, and fetch_of(row) what it asks of
// memory ahead.
using One = std::integral_constant<int, 1>;

// The last pass: h = value_of(row)(channel, lanes), rounded once; with a gain the unrounded h is
// normalised too. It goes backward, so that what the pass before left in L1 is read first: 0.9 of
// the time for rows that are in L2.
template <class T, class Count, class Gain, class Values, class Fetches>
RK_INLINE void finish(const rk::SteerArgs& args, int64_t begin, Count rows, Gain gain,
                      const double* squares, Values value_of, Fetches fetch_of) {
  constexpr bool kNorm = !std::is_same_v<Gain, NoGain>;
  float scale[kGroup<T>];
  for (int row = 0; kNorm && row < rows; row++)
    scale[row] = rms_scale(squares[row], args.hidden, args.weight.eps);
  const int64_t block = std::is_same_v<Count, One> ? args.hidden : kBlock;
  for (int64_t end = args.hidden, start; end > 0; end = start) {
    start = (end - 1) / block * block;
    for (int row = 0; row < rows; row++) {
      const auto value_at = value_of(row);
      const auto fetch = fetch_of(row);
      const float by = kNorm ? scale[row] : 1.0f;
      auto* out = row_of_out<T>(args.out, begin + row);
      auto* normed = kNorm ? row_of_out<T>(args.normed, begin + row) : nullptr;
      for_row_backward(end - start, [&](int64_t offset, int64_t n) RK_LAMBDA {
        const int64_t j = start + offset;
        fetch.last(j);
        const vfloat h = value_at(j, n);
        fetch.put(out + j, h, n);
        if constexpr (kNorm) fetch.put(normed + j, h * by * gain(j, n), n);
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

// Rows of one program with one slot. For the last pass, adding again beats storing s.
template <class T, class Count, class Gain, class Sources, class Fetches>
RK_INLINE void steer_one_slot(const rk::SteerArgs& args, int64_t begin, Count rows,
                              Vectors& vectors, Gain gain, Sources source_of, Fetches fetch_of) {
  constexpr bool kNorm = !std::is_same_v<Gain, NoGain>;
  enum { kScore, kSquares, kAlong };
  const float *read = vectors.read, *write = vectors.write;
  const bool known = !kNorm || vectors.known;
  double sums[kGroup<T>][3] = {};
  const auto sum_rows = [&](auto count) RK_LAMBDA {
    constexpr int kSums = decltype(count)::value;
    for_blocks(args.hidden, [&](int64_t start, int64_t width) RK_LAMBDA {
      if (!known) vectors.look(start, width);
      for (int row = 0; row < rows; row++) {
        const auto source = source_of(row);
        const auto fetch = fetch_of(row);
        double some[kSums] = {};
        sum_block(start, width, some, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
          fetch.first(j);
          const vfloat s = source(j, n);
          acc[kScore] += s * load<F32>(read + j, n);
          if constexpr (kSums > kSquares) acc[kSquares] += s * s;
          if constexpr (kSums > kAlong) acc[kAlong] += s * load<F32>(write + j, n);
        });
        for (int i = 0; i < kSums; i++) sums[row][i] += some[i];
      }
    });
  };
  if constexpr (!kNorm) {
    sum_rows(std::integral_constant<int, 1>{});
  } else if (!known || vectors.symmetric) {
    sum_rows(std::integral_constant<int, 2>{});
    vectors.known = true;
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

  float phi[kGroup<T>];
  double squares[kGroup<T>];
  const auto h_of = [&](int row) RK_LAMBDA {
    return [source = source_of(row), phi = phi[row], write](int64_t j, int64_t n) RK_LAMBDA {
      const vfloat edit = phi * load<F32>(write + j, n);
      if constexpr (requires { source.plus(j, n, edit); })
        return source.plus(j, n, edit);
      else
        return source(j, n) + edit;
    };
  };
  for (int row = 0; row < rows; row++) {
    const double* of = sums[row];
    phi[row] =
        coefficient(args, (begin + row) * args.programs.slots, vectors.params, (float)of[kScore]);
    if constexpr (!kNorm) continue;
    squares[row] = squares_after<T>(of[kSquares], phi[row], of[kAlong], vectors.length[0]);
    if (squares[row] != squares[row]) squares[row] = squares_of(args.hidden, h_of(row));
  }
  finish<T>(args, begin, rows, gain, squares, h_of, fetch_of);
}

// Rows of one program; more than one only if it has one slot.
template <class T, class Count, class Gain, class Sources, class Fetches>
RK_INLINE void steer_group(const rk::SteerArgs& args, int64_t begin, Count rows, Vectors& vectors,
                           Gain gain, float* scratch, Sources source_of, Fetches fetch_of) {
  constexpr bool kNorm = !std::is_same_v<Gain, NoGain>;
  const int64_t hidden = args.hidden, slots = args.programs.slots;
  const auto source = source_of(0);
  const auto fetch = fetch_of(0);
  const auto sum_squares = [&](auto value_at) RK_LAMBDA {
    return !kNorm ? 0.0 : squares_of(hidden, [&](int64_t j, int64_t n) RK_LAMBDA {
      fetch.first(j);
      return value_at(j, n);
    });
  };

  const int64_t program = args.programs.route ? args.programs.route[begin] : 0;
  if (program < 0 || slots == 0) {  // the plain add, bit for bit
    if (args.scores)
      for (int64_t slot = 0; slot < slots; slot++) args.scores[begin * slots + slot] = 0.0f;
    const double squares = sum_squares(source);
    finish<T>(args, begin, One{}, gain, &squares, source_of, fetch_of);
    return;
  }
  vectors.find(args, program);
  const float *read = vectors.read, *write = vectors.write, *params = vectors.params;
  const int64_t used = vectors.slots;
  if (args.scores)
    for (int64_t slot = used; slot < slots; slot++) args.scores[begin * slots + slot] = 0.0f;
  if (used == 1) {
    steer_one_slot<T>(args, begin, rows, vectors, gain, source_of, fetch_of);
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
  phis[0] = coefficient(args, begin * slots, params, (float)first[0]);
  for (int64_t slot = 1; slot < used; slot++)
    phis[slot] = coefficient(args, begin * slots + slot, params + slot * kParams,
                             dot<F32>(scratch, read + slot * hidden, hidden));
  const auto h = [&](int64_t j, int64_t n) RK_LAMBDA {
    vfloat h = load<F32>(scratch + j, n);
    for (int64_t slot = 0; slot < used; slot++)
      h += phis[slot] * load<F32>(write + slot * hidden + j, n);
    return h;
  };
  if (!kNorm) {
    finish<T>(args, begin, One{}, gain, nullptr, [&](int) RK_LAMBDA { return h; }, fetch_of);
    return;
  }
  const double squares = sum_squares([&](int64_t j, int64_t n) RK_LAMBDA {
    const vfloat value = h(j, n);
    store<F32>(scratch + j, value, n);
    return value;
  });
  const auto kept = [&](int64_t j, int64_t n) RK_LAMBDA { return load<F32>(scratch + j, n); };
  finish<T>(args, begin, One{}, gain, &squares, [&](int) RK_LAMBDA { return kept; }, fetch_of);
}

// How many rows from i on are edited together: those of one program, if it has one slot.
template <class T>
RK_INLINE int group_at(const rk::Programs& programs, int64_t i, int64_t end) {
  const int32_t* route = programs.route;
  if (programs.slots != 1 || (route && route[i] < 0)) return 1;
  int rows = 1;
  while (rows < kGroup<T> && i + rows < end && (!route || route[i + rows] == route[i])) rows++;
  return rows;
}

// The functions below are compiled apart: in one with all that calls them, the innermost loops were
// left without registers, which cost a tenth of the time.

template <class T, bool kResidual>
RK_INLINE auto sources(const rk::SteerArgs& args, int64_t begin) {
  return [x = row_of<T>(args.x, begin), residual = row_of<T>(args.residual, begin),
          x_stride = args.x.stride, residual_stride = args.residual.stride](int row) RK_LAMBDA {
    return Sum<T, kResidual>{x + row * x_stride, residual + row * residual_stride};
  };
}

// add (and normalise), or the adjoint without a norm, of rows that lie in L2: they need no
// fetching, which took up to 0.3 us of a row's 1.4
template <class T, bool kResidual, class Gain>
RK_APART void add_near_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, Gain gain,
                            float* scratch) {
  const auto fetch_of = [](int) RK_LAMBDA { return NoFetch<T>{}; };
  Vectors vectors;
  for (int64_t i = begin; i < end;) {
    const auto source_of = sources<T, kResidual>(args, i);
    if constexpr (kGroup<T> == 1) {
      steer_group<T>(args, i, One{}, vectors, gain, scratch, source_of, fetch_of);
      i++;
    } else {
      const int rows = group_at<T>(args.programs, i, end);
      steer_group<T>(args, i, rows, vectors, gain, scratch, source_of, fetch_of);
      i += rows;
    }
  }
}

// The same of rows that wait for memory, where a group took 1.02 to 1.08 of the time of single
// rows.
template <class T, bool kResidual, class Gain>
RK_APART void add_far_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, Gain gain,
                           float* scratch, bool streams) {
  constexpr bool kNorm = !std::is_same_v<Gain, NoGain>;
  Vectors vectors;
  for (int64_t i = begin; i < end; i++) {
    const int64_t next = i + 1 < end ? i + 1 : i;
    const Fetch<T, kNorm> fetch{
        row_of<T>(args.x, next), row_of<T>(kResidual ? args.residual : args.x, next),
        row_of<T>(args.out, next), row_of<T>(kNorm ? args.normed : args.out, i), streams};
    steer_group<T>(args, i, One{}, vectors, gain, scratch, sources<T, kResidual>(args, i),
                   [fetch](int) RK_LAMBDA { return fetch; });
  }
  if (streams) end_stream();
}

template <class T, bool kResidual, class Gain>
RK_INLINE void add_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, Gain gain,
                        float* scratch) {
  const int64_t bytes = (end - begin) * args.hidden * int64_t(4 * sizeof(typename T::Element));
  if (bytes <= 1 << 20)
    add_near_rows<T, kResidual>(args, begin, end, gain, scratch);
  else
    add_far_rows<T, kResidual>(args, begin, end, gain, scratch,
                               kStreams && args.may_stream && bytes >= rk::cache_share());
}

// The adjoint of add_steer_rms_norm: first the norm's, g = scale (w d - h scale^2 mean(w d h)) +
// the gradient of h itself, where d is the gradient of the normed row; then the edit's.
template <class T, bool kResidual>
RK_APART void through_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, float* scratch) {
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
    steer_group<T>(
        args, i, One{}, vectors, NoGain{}, scratch, [&](int) RK_LAMBDA { return source; },
        [](int) RK_LAMBDA { return NoFetch<T>{}; });
  }
}

template <class T, bool kResidual>
RK_INLINE void steer_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, float* scratch) {
  const rk::Weight& weight = args.weight;
  if (args.h.data)
    through_rows<T, kResidual>(args, begin, end, scratch);
  else if (!weight.data)
    add_rows<T, kResidual>(args, begin, end, NoGain{}, scratch);
  else if (T::dtype != Dtype::f32 && weight.dtype == T::dtype)  // for f32 wide_gain does the same
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

}  // namespace
