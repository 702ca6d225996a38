// Streaming moments in two launches: partial moments of stretches of rows, then their merge.
//
//   partial   mean = shift + sum(d) / n,  m2 = sum(d^2) - sum(d)^2 / n,  where d = row - shift
//   merge     with delta = mean' - mean and n' new rows after n (Chan):
//             mean += delta n' / (n + n'),  m2 += m2' + delta^2 n n' / (n + n')
//
// A stretch is a range of the batch's rows, the same whatever the device. A block takes one slot
// (group and position), one stretch and kChannels channels. It lists the rows of its stretch that
// feed its slot, in order, and its warps take them in turns. Sums are float32 over at most
// kTile / kWarps rows of one warp and float64 beyond. The shift is the stretch's first row, so the
// sum of squares does not cancel. Rows that feed no slot are not read.
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

// Lists the rows of a tile that feed a slot: their offsets in the activations, in order. Returns
// how many there are.
RK_DEVICE int list_rows(const MomentsArgs& args, int64_t row, int64_t end, int group, int position,
                        int64_t (&offsets)[kTile], int32_t (&rows_of_warp)[kWarps]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t sequence = row / args.tokens;
  const bool feeds = row < end && args.index[row] == position && args.group[sequence] == group;
  const uint32_t votes = __ballot_sync(0xffffffffu, feeds);
  if (lane == 0) rows_of_warp[warp] = __popc(votes);
  __syncthreads();
  int count = 0, place = __popc(votes & ((1u << lane) - 1));
  for (int w = 0; w < kWarps; w++) {
    if (w < warp) place += rows_of_warp[w];
    count += rows_of_warp[w];
  }
  if (feeds)
    offsets[place] =
        sequence * args.batch_stride + (row - sequence * args.tokens) * args.token_stride;
  __syncthreads();
  return count;
}

// Sums of d and d^2 over every kWarps-th of `count` rows, for the channels of this lane's pack.
template <class T>
RK_DEVICE void sum_tile_rows(const typename T::Element* data, const int64_t (&offsets)[kTile],
                             int count, uint4 shift, int channel, int hidden, bool aligned,
                             float* first, float* second) {
  for (int i = threadIdx.x / 32; i < count; i += kWarps * kUnroll) {
    uint4 raw[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; k++)
      if (i + k * kWarps < count)
        raw[k] = load_pack<T>(data + offsets[i + k * kWarps], channel, hidden, aligned, true);
    float from[T::kPack];
    T::unpack(shift, from);
#pragma unroll
    for (int k = 0; k < kUnroll; k++) {
      if (i + k * kWarps >= count) break;
      float values[T::kPack];
      T::unpack(raw[k], values);
#pragma unroll
      for (int e = 0; e < T::kPack; e++) {
        const float d = values[e] - from[e];
        first[e] += d;
        second[e] = fmaf(d, d, second[e]);
      }
    }
  }
}

// Four blocks of a multiprocessor: 1,024 threads, each with kUnroll packs on the way.
template <class T>
__global__ void __launch_bounds__(kTile, 4)
    moments_partial_kernel(const MomentsArgs args, const Partial partial, const bool aligned) {
  constexpr int kPack = T::kPack;
  __shared__ int64_t offsets[kTile];  // of the tile's rows that feed the slot
  __shared__ int32_t rows_of_warp[kWarps];
  // A tile's sums, of channel kPack * lane + e at [e][lane]. A thread then adds up those of one
  // channel in float64.
  __shared__ float tile_sums[2][kWarps][kPack][32];
  __shared__ double totals[2][kTile];  // in shared memory, since there are no registers to spare

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int hidden = static_cast<int>(args.hidden);
  const int blocks = (hidden + kChannels<T> - 1) / kChannels<T>;
  const int channel_block = blockIdx.x % blocks;
  const int at = blockIdx.x / blocks;  // of the slot's stretch among all
  const int slot = at / static_cast<int>(partial.stretches);
  const int stretch = at % static_cast<int>(partial.stretches);
  const int group = slot / static_cast<int>(args.positions);
  const int position = slot % static_cast<int>(args.positions);
  const int channel = channel_block * kChannels<T> + lane * kPack;
  const int summed_channel = warp < kPack ? channel + warp : hidden;  // in this thread's totals
  const int64_t all = args.batch * args.tokens;
  const int64_t begin = partial.stretch * stretch;
  const int64_t end = begin + partial.stretch < all ? begin + partial.stretch : all;
  start_next_kernel();
  wait_for_previous_kernel();

  const auto* data = static_cast<const typename T::Element*>(args.activations);
  int64_t n = 0;
  uint4 shift = {0, 0, 0, 0};
  totals[0][threadIdx.x] = totals[1][threadIdx.x] = 0.0;
  for (int64_t base = begin; base < end; base += kTile) {
    const int count =
        list_rows(args, base + threadIdx.x, end, group, position, offsets, rows_of_warp);
    if (count > 0) {
      if (n == 0) shift = load_pack<T>(data + offsets[0], channel, hidden, aligned);
      n += count;
      float first[kPack] = {}, second[kPack] = {};
      sum_tile_rows<T>(data, offsets, count, shift, channel, hidden, aligned, first, second);
#pragma unroll
      for (int e = 0; e < kPack; e++) {
        tile_sums[0][warp][e][lane] = first[e];
        tile_sums[1][warp][e][lane] = second[e];
      }
    }
    __syncthreads();  // also, the list is read before the next tile's is written
    if (count > 0 && warp < kPack)
#pragma unroll
      for (int w = 0; w < kWarps; w++) {
        totals[0][threadIdx.x] += static_cast<double>(tile_sums[0][w][warp][lane]);
        totals[1][threadIdx.x] += static_cast<double>(tile_sums[1][w][warp][lane]);
      }
  }

  if (channel_block == 0 && threadIdx.x == 0) {
    partial.n[at] = n;
    if (stretch == 0) partial.before[slot] = args.count[slot];
  }
  if (n == 0 || summed_channel >= hidden) return;
  const double first = totals[0][threadIdx.x], second = totals[1][threadIdx.x];
  float from[kPack];
  T::unpack(shift, from);
  float own_shift = from[0];  // registers cannot be indexed at run time
#pragma unroll
  for (int e = 1; e < kPack; e++) own_shift = warp == e ? from[e] : own_shift;
  const int64_t place = int64_t{at} * hidden + summed_channel;
  partial.mean[place] = static_cast<double>(own_shift) + first / n;
  partial.m2[place] = second - first * first / n;
}

constexpr int kMerge = 32;  // threads of a block, and stretches that are merged at a time

// Chan's merge of the stretches, in order, into the running state: a thread per channel. The weight
// of a stretch is the same for all channels, so each thread of the block computes one for all,
// after the loads of what is to be merged are under way.
static __global__ void __launch_bounds__(kMerge)
    moments_merge_kernel(const MomentsArgs args, const Partial partial) {
  __shared__ double share[kMerge], weight[kMerge];
  __shared__ int64_t rows[kMerge];
  const int64_t blocks = (args.hidden + kMerge - 1) / kMerge;
  const int64_t slot = blockIdx.x / blocks;
  const int64_t channel = blockIdx.x % blocks * kMerge + threadIdx.x;
  wait_for_previous_kernel();
  const bool inside = channel < args.hidden;
  const int64_t state = slot * args.hidden + channel, hidden = args.hidden;
  double mean = inside ? args.mean[state] : 0.0, m2 = inside ? args.m2[state] : 0.0;
  const int64_t first = slot * partial.stretches;
  const double* means = partial.mean + first * hidden + channel;
  const double* m2s = partial.m2 + first * hidden + channel;
  int64_t count = partial.before[slot];
  for (int64_t base = 0; base < partial.stretches; base += kMerge) {
    const int64_t left = partial.stretches - base;
    const int here = static_cast<int>(left < kMerge ? left : kMerge);
    double new_mean[kMerge], new_m2[kMerge];
#pragma unroll
    for (int k = 0; k < kMerge; k++)
      if (inside && k < here) {
        new_mean[k] = means[(base + k) * hidden];
        new_m2[k] = m2s[(base + k) * hidden];
      }
    __syncthreads();  // the previous numbers have been used
    rows[threadIdx.x] = threadIdx.x < here ? partial.n[first + base + threadIdx.x] : 0;
    __syncthreads();
    int64_t before = count;
    for (int k = 0; k < here; k++) {
      before += k < static_cast<int>(threadIdx.x) ? rows[k] : 0;
      count += rows[k];
    }
    const double n = static_cast<double>(rows[threadIdx.x]), n0 = static_cast<double>(before);
    share[threadIdx.x] = n > 0 ? n / (n0 + n) : 0.0;
    weight[threadIdx.x] = n0 * share[threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kMerge; k++)
      if (rows[k] > 0) {  // else nothing was written there
        const double delta = new_mean[k] - mean;
        mean += delta * share[k];
        m2 += new_m2[k] + delta * delta * weight[k];
      }
  }
  if (inside) args.mean[state] = mean, args.m2[state] = m2;
  if (blockIdx.x % blocks == 0 && threadIdx.x == 0) args.count[slot] = count;
}

}  // namespace rk::cuda
