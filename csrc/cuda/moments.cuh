// Streaming moments in two launches: partial moments of stretches of rows, then their merge.
//
// A stretch is a range of the batch's rows, the same whatever the device. A block takes one slot
// (group and position), one stretch and kChannels channels: it lists the rows of its stretch that
// feed its slot, in order, and its warps take them in turns. Sums are float32 over at most
// kTile / kWarps rows of one warp and float64 beyond, shifted by the stretch's first row so that
// the sum of squares does not cancel. Rows that are not named are not read.
#pragma once

#include "packed.cuh"

namespace rk::cuda {

constexpr int kWarps = 8, kTile = 32 * kWarps, kUnroll = 4;

template <class T>
constexpr int kChannels = 32 * T::kPack;  // of a block: one pack per lane

struct Partial {
  double *mean, *m2;           // [slots, stretches, hidden]
  int64_t* n;                  // [slots, stretches]
  int64_t* before;             // [slots]: count as it was
  int64_t stretches, stretch;  // how many, and rows of each: a multiple of kTile
};

template <class T>
__global__ void __launch_bounds__(kTile)
    moments_partial_kernel(const MomentsArgs args, const Partial partial, const bool aligned) {
  constexpr int kPack = T::kPack;
  __shared__ int64_t offsets[kTile];  // of the tile's rows that feed the slot
  __shared__ int32_t found[kWarps];
  // float64 sums, of channels kPack * lane + e at [e][lane]: in registers they would halve the
  // number of resident blocks
  __shared__ double gathered[2][kWarps][kPack][32];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int hidden = static_cast<int>(args.hidden);
  const int64_t blocks = (hidden + kChannels<T> - 1) / kChannels<T>;
  const int64_t channel_block = blockIdx.x % blocks;
  const int64_t stretch = blockIdx.x / blocks % partial.stretches;
  const int64_t slot = blockIdx.x / blocks / partial.stretches;
  const int32_t group = static_cast<int32_t>(slot / args.positions);
  const int32_t position = static_cast<int32_t>(slot % args.positions);
  const int channel = static_cast<int>(channel_block) * kChannels<T> + lane * kPack;
  const int64_t all = args.batch * args.tokens;
  const int64_t begin = stretch * partial.stretch;
  const int64_t end = begin + partial.stretch < all ? begin + partial.stretch : all;
  wait_for_the_kernel_before();

  const auto* data = static_cast<const typename T::Element*>(args.activations);
  int64_t n = 0;
  float shift[kPack] = {};
#pragma unroll
  for (int e = 0; e < kPack; e++) gathered[0][warp][e][lane] = gathered[1][warp][e][lane] = 0.0;
  for (int64_t base = begin; base < end; base += kTile) {
    const int64_t mine = base + threadIdx.x, sequence = mine / args.tokens;
    const bool named = mine < end && args.index[mine] == position && args.group[sequence] == group;
    const uint32_t votes = __ballot_sync(0xffffffffu, named);
    if (lane == 0) found[warp] = __popc(votes);
    __syncthreads();
    int count = 0, place = __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; w++) {
      if (w < warp) place += found[w];
      count += found[w];
    }
    if (named)
      offsets[place] =
          sequence * args.batch_stride + (mine - sequence * args.tokens) * args.token_stride;
    __syncthreads();
    if (count > 0) {
      if (n == 0) load<T>(data + offsets[0], channel, hidden, aligned, shift);
      n += count;
      float tile_first[kPack] = {}, tile_second[kPack] = {};
      for (int i = warp; i < count; i += kWarps * kUnroll) {
        uint4 raw[kUnroll];
#pragma unroll
        for (int k = 0; k < kUnroll; k++)
          if (i + k * kWarps < count)
            raw[k] = load_pack<T>(data + offsets[i + k * kWarps], channel, hidden, aligned, true);
#pragma unroll
        for (int k = 0; k < kUnroll; k++) {
          if (i + k * kWarps >= count) break;
          float values[kPack];
          T::unpack(raw[k], values);
#pragma unroll
          for (int e = 0; e < kPack; e++) {
            const float d = values[e] - shift[e];
            tile_first[e] += d;
            tile_second[e] = fmaf(d, d, tile_second[e]);
          }
        }
      }
#pragma unroll
      for (int e = 0; e < kPack; e++) {
        gathered[0][warp][e][lane] += static_cast<double>(tile_first[e]);
        gathered[1][warp][e][lane] += static_cast<double>(tile_second[e]);
      }
    }
    __syncthreads();  // the list is read before the next tile's is written
  }

  const int64_t at = slot * partial.stretches + stretch;
  if (channel_block == 0 && threadIdx.x == 0) {
    partial.n[at] = n;
    if (stretch == 0) partial.before[slot] = args.count[slot];
  }
  if (n == 0 || warp != 0) return;  // the last barrier of the loop has passed
#pragma unroll
  for (int e = 0; e < kPack; e++) {
    if (channel + e >= hidden) break;
    double a = 0.0, b = 0.0;
    for (int w = 0; w < kWarps; w++) {
      a += gathered[0][w][e][lane];
      b += gathered[1][w][e][lane];
    }
    partial.mean[at * hidden + channel + e] = static_cast<double>(shift[e]) + a / n;
    partial.m2[at * hidden + channel + e] = b - a * a / n;
  }
}

// Chan's merge of the stretches, in order, into the running state: a thread per channel.
static __global__ void __launch_bounds__(256, 1)
    moments_merge_kernel(const MomentsArgs args, const Partial partial) {
  const int64_t blocks = (args.hidden + 255) / 256;
  const int64_t slot = blockIdx.x / blocks;
  const int64_t channel = blockIdx.x % blocks * 256 + threadIdx.x;
  wait_for_the_kernel_before();
  int64_t count = partial.before[slot];
  const int64_t* n = partial.n + slot * partial.stretches;
  if (blockIdx.x % blocks == 0 && threadIdx.x == 0) {
    int64_t after = count;
    for (int64_t k = 0; k < partial.stretches; k++) after += n[k];
    args.count[slot] = after;
  }
  if (channel >= args.hidden) return;
  const int64_t state = slot * args.hidden + channel;
  double mean = args.mean[state], m2 = args.m2[state];
  const double* means = partial.mean + slot * partial.stretches * args.hidden + channel;
  const double* m2s = partial.m2 + slot * partial.stretches * args.hidden + channel;
#pragma unroll 8
  for (int64_t k = 0; k < partial.stretches; k++) {
    const double rows = static_cast<double>(n[k]), before = static_cast<double>(count);
    const double new_mean = means[k * args.hidden], new_m2 = m2s[k * args.hidden];
    if (n[k] == 0) continue;  // nothing was written there
    const double share = rows / (before + rows), delta = new_mean - mean;
    mean += delta * share;
    m2 += new_m2 + delta * delta * before * share;
    count += n[k];
  }
  args.mean[state] = mean;
  args.m2[state] = m2;
}

}  // namespace rk::cuda
