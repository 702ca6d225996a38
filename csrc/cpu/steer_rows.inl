// The rows of a call, one after the other or a few together: part of rows.inl.
//
// The modes are those of rk::SteerArgs. Which function serves depends on the mode, on whether the
// rows lie in a cache, and on the types of the row and of the weight.

namespace {

// How many rows from i on are edited together: rows of one program, if it has one slot.
template <class T>
RK_INLINE int rows_at_once(const rk::Programs& programs, int64_t i, int64_t end) {
  const int32_t* route = programs.route;
  if (programs.slots != 1 || (route && route[i] < 0)) return 1;
  int rows = 1;
  while (rows < kRowsAtOnce<T> && i + rows < end && (!route || route[i + rows] == route[i])) rows++;
  return rows;
}

// s of the rows from `begin` on.
template <class T, bool kResidual>
RK_INLINE auto sources(const rk::SteerArgs& args, int64_t begin) {
  return [x = row_of<T>(args.x, begin), residual = row_of<T>(args.residual, begin),
          x_stride = args.x.stride, residual_stride = args.residual.stride](int row) RK_LAMBDA {
    return RowSum<T, kResidual>{x + row * x_stride, residual + row * residual_stride};
  };
}

// Rows that lie in L2 are not prefetched: that would take up to 0.3 us of a row's 1.4.
template <class T, bool kResidual, class Gain>
RK_NOINLINE void steer_cached_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, Gain gain,
                                   float* scratch) {
  const auto prefetch_of = [](int) RK_LAMBDA { return NoPrefetch<T>{}; };
  Vectors vectors;
  for (int64_t i = begin; i < end;) {
    const auto source_of = sources<T, kResidual>(args, i);
    if constexpr (kRowsAtOnce<T> == 1) {
      steer_group<T>(args, i, OneRow{}, vectors, gain, scratch, source_of, prefetch_of);
      i++;
    } else {
      const int rows = rows_at_once<T>(args.programs, i, end);
      steer_group<T>(args, i, rows, vectors, gain, scratch, source_of, prefetch_of);
      i += rows;
    }
  }
}

// Rows that wait for memory are prefetched one by one: in groups they would take 1.02 to 1.08 of
// the time.
template <class T, bool kResidual, class Gain>
RK_NOINLINE void steer_rows_from_memory(const rk::SteerArgs& args, int64_t begin, int64_t end,
                                        Gain gain, float* scratch, bool streams) {
  constexpr bool kNorm = !std::is_same_v<Gain, NoGain>;
  Vectors vectors;
  for (int64_t i = begin; i < end; i++) {
    const int64_t next = i + 1 < end ? i + 1 : i;
    const Prefetch<T, kNorm> prefetch{
        row_of<T>(args.x, next), row_of<T>(kResidual ? args.residual : args.x, next),
        row_of<T>(args.out, next), row_of<T>(kNorm ? args.normed : args.out, i), streams};
    steer_group<T>(args, i, OneRow{}, vectors, gain, scratch, sources<T, kResidual>(args, i),
                   [prefetch](int) RK_LAMBDA { return prefetch; });
  }
  if (streams) end_stream();
}

// Rows whose inputs and outputs are together at most this size are taken to lie in L2.
constexpr int64_t kCachedBytes = 1 << 20;

template <class T, bool kResidual, class Gain>
RK_INLINE void steer_added_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, Gain gain,
                                float* scratch) {
  const int64_t bytes = (end - begin) * args.hidden * int64_t(4 * sizeof(typename T::Element));
  if (bytes <= kCachedBytes)
    steer_cached_rows<T, kResidual>(args, begin, end, gain, scratch);
  else
    steer_rows_from_memory<T, kResidual>(
        args, begin, end, gain, scratch,
        kCanStream && args.may_stream && bytes >= rk::cache_share());
}

// The adjoint of add_steer_rms_norm. With d the gradient of the normed row and w = weight + offset,
// the norm's adjoint is
//     g = scale (w d - h scale^2 mean(w d h)) + the gradient of h itself,
// where scale = 1 / sqrt(mean(h^2) + eps); g then goes through the adjoint of the edit.
template <class T, bool kResidual>
RK_NOINLINE void norm_adjoint_rows(const rk::SteerArgs& args, int64_t begin, int64_t end,
                                   float* scratch) {
  using Element = typename T::Element;
  const int64_t hidden = args.hidden;
  const auto gain = wide_gain(args.weight, scratch + hidden, hidden);
  Vectors vectors;
  for (int64_t i = begin; i < end; i++) {
    const Element* grad = row_of<T>(args.x, i);
    const Element* grad_h = kResidual ? row_of<T>(args.residual, i) : nullptr;
    const Element* h = row_of<T>(args.h, i);
    double sums[2];
    sum_row(hidden, sums, [&](int64_t j, int64_t n, vfloat* acc) RK_LAMBDA {
      const vfloat v = load<T>(h + j, n);
      acc[0] += v * v;
      acc[1] += load<T>(grad + j, n) * gain(j, n) * v;
    });
    const float scale = rms_scale(sums[0], hidden, args.weight.eps);
    const float share_of_h = scale * scale * (float)(sums[1] / (double)hidden);
    const auto source = [=](int64_t j, int64_t n) RK_LAMBDA {
      const vfloat g = scale * (load<T>(grad + j, n) * gain(j, n) - load<T>(h + j, n) * share_of_h);
      return kResidual ? load<T>(grad_h + j, n) + g : g;
    };
    steer_group<T>(
        args, i, OneRow{}, vectors, NoGain{}, scratch, [=](int) RK_LAMBDA { return source; },
        [](int) RK_LAMBDA { return NoPrefetch<T>{}; });
  }
}

// A weight of the row's type is read in place (float32 by wide_gain), another is widened first.
template <class T, bool kResidual>
RK_INLINE void steer_rows(const rk::SteerArgs& args, int64_t begin, int64_t end, float* scratch) {
  const rk::Weight& weight = args.weight;
  if (args.h.data)
    norm_adjoint_rows<T, kResidual>(args, begin, end, scratch);
  else if (!weight.data)
    steer_added_rows<T, kResidual>(args, begin, end, NoGain{}, scratch);
  else if (T::dtype != Dtype::f32 && weight.dtype == T::dtype)
    steer_added_rows<T, kResidual>(args, begin, end, Gain<T>{weight.data, weight.offset}, scratch);
  else
    steer_added_rows<T, kResidual>(args, begin, end,
                                   wide_gain(weight, scratch + args.hidden, args.hidden), scratch);
}

template <class T>
void steer(const rk::SteerArgs& args, int64_t begin, int64_t end, float* scratch) {
  args.residual.data ? steer_rows<T, true>(args, begin, end, scratch)
                     : steer_rows<T, false>(args, begin, end, scratch);
}

}  // namespace
