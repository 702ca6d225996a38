// The CPU backend: hands the rows of an op to torch's thread pool.
#include "../ops.h"

#include <memory>

#include "rows.h"

namespace rk {
namespace {

// Elements of a task at least: handing out less takes longer than doing it. 4 rows of 4096 take
// 8.4 us in two tasks of 8,192 and 9.4 us in one task.
constexpr int64_t kTaskElements = 8192;

struct Cpu {
  // One row is one task, so it never wakes the pool.
  template <class Body>
  static void for_tokens(int64_t tokens, int64_t per_row, const Body& body) {
    const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, per_row));
    if (tokens <= grain)
      body(0, tokens);
    else
      torch::stable::parallel_for(0, tokens, grain, body);
  }

  // A route out of range would read past the bank. The check reads four bytes a token, next to the
  // thousands of its row.
  static void check_route(const char* op, const Programs& programs, int64_t tokens) {
    for (int64_t i = 0; i < tokens; i++)
      STD_TORCH_CHECK(programs.route[i] >= -1 && programs.route[i] < programs.count, op, ": route[",
                      i, "] is ", programs.route[i], "; expected -1 (plain) to ",
                      programs.count - 1);
  }

  // Whether outputs may be written past the caches, which saves reading memory that is about to be
  // overwritten: float32 rows that would not stay in the caches take 0.7 to 1.0 of the time. Not in
  // place, since the row has just been read into the caches. Not a large 16-bit output, whose fresh
  // pages the system has just filled with zeros in the caches: it takes up to 1.15 of the time.
  static bool may_stream(Dtype dtype, const SteerArgs& args, int64_t tokens) {
    constexpr int64_t kLine = 64;
    const int64_t size = dtype == Dtype::f32 ? 4 : 2;
    const auto whole_lines = [&](const Rows& rows) {
      return reinterpret_cast<uintptr_t>(rows.data) % kLine == 0 && rows.stride * size % kLine == 0;
    };
    return args.out.data != args.residual.data && args.hidden * size % kLine == 0 &&
           (dtype == Dtype::f32 || tokens * args.hidden * size < kFreshBytes) &&
           whole_lines(args.out) && whole_lines(args.normed);
  }

  static void steer(const char*, int32_t, Dtype dtype, SteerArgs args, int64_t tokens) {
    args.may_stream = may_stream(dtype, args, tokens);
    const int64_t slots = args.programs.slots;
    const bool widened = args.weight.data && (args.h.data || args.weight.dtype != dtype);
    const int64_t floats = scratch_floats(args.hidden, slots, widened);
    const Kernels& chosen = kernels();  // here, since a task would lose the text of its exception
    for_tokens(tokens, args.hidden * std::max<int64_t>(1, slots), [&](int64_t begin, int64_t end) {
      std::unique_ptr<float[]> scratch(floats ? new float[floats] : nullptr);
      chosen.steer(dtype, args, begin, end, scratch.get());
    });
  }

  static void scores(const char*, int32_t, Dtype dtype, const ScoresArgs& args, int64_t tokens) {
    const Kernels& chosen = kernels();
    for_tokens(tokens, args.hidden * args.programs.slots,
               [&](int64_t begin, int64_t end) { chosen.scores(dtype, args, begin, end); });
  }

  static void rms_norm(const char*, int32_t, Dtype dtype, const RmsNormArgs& args, int64_t tokens) {
    const int64_t floats = scratch_floats(args.hidden, 0, args.weight.dtype != Dtype::f32);
    const Kernels& chosen = kernels();
    for_tokens(tokens, args.hidden, [&](int64_t begin, int64_t end) {
      std::unique_ptr<float[]> scratch(floats ? new float[floats] : nullptr);
      chosen.rms_norm(dtype, args, begin, end, scratch.get());
    });
  }

  static void moments(const char* op, int32_t, Dtype dtype, const MomentsArgs& args) {
    const Kernels& chosen = kernels();
    std::vector<std::vector<int64_t>> rows(args.groups * args.positions);  // by sequence, token
    for (int64_t b = 0; b < args.batch; b++) {
      STD_TORCH_CHECK(args.group[b] >= -1 && args.group[b] < args.groups, op, ": group[", b,
                      "] is ", args.group[b], "; expected -1 (skip) to ", args.groups - 1);
      for (int64_t t = 0; t < args.tokens; t++) {
        const int64_t p = args.index[b * args.tokens + t];
        STD_TORCH_CHECK(p >= -1 && p < args.positions, op, ": index[", b, ", ", t, "] is ", p,
                        "; expected -1 (not read) to ", args.positions - 1);
        if (p >= 0 && args.group[b] >= 0)
          rows[args.group[b] * args.positions + p].push_back(b * args.batch_stride +
                                                             t * args.token_stride);
      }
    }
    for (int64_t slot = 0; slot < args.groups * args.positions; slot++) {
      const int64_t n = rows[slot].size();
      if (n == 0) continue;
      const SlotArgs slot_args{args.activations,
                               rows[slot].data(),
                               n,
                               args.count[slot],
                               args.mean + slot * args.hidden,
                               args.m2 + slot * args.hidden};
      torch::stable::parallel_for(
          0, args.hidden, std::max<int64_t>(256, 32768 / n),
          [&](int64_t begin, int64_t end) { chosen.moments(dtype, slot_args, begin, end); });
      args.count[slot] += n;
    }
  }
};

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(refusal_kernels, CPU, m) {
  rk::Ops<rk::Cpu>::register_all(m);
}
