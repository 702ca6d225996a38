// A CUDA runtime on the CPU, for tests: the part of it that this package's kernels use.
//
// Every thread of a block is a fiber with a stack of its own; blocks run one after the other. A
// fiber runs until it waits for its warp (a shuffle, a ballot) or its block (__syncthreads). The
// order of the fibers changes from block to block, so that a missing barrier shows. If some threads
// never reach what the others wait for, a GPU would hang; here the program aborts with a message.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10;

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  bool started, done;
  int64_t shuffles, barriers;  // how many this thread has reached
};

struct Machine {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  Fiber* current = nullptr;
  jmp_buf scheduler;
  dim3 block;
  int64_t warp_arrivals[kMaxThreads / kWarp], block_arrivals;
  uint32_t exchanged[2][kMaxThreads];  // used in turns, so one wait per shuffle is enough
  std::vector<float> dynamic_shared;
  std::function<void()> body;
};
inline Machine machine;

inline int linear(const Fiber& f) {
  return static_cast<int>(f.thread.x);
}

inline void yield() {
  if (!_setjmp(machine.current->resume)) _longjmp(machine.scheduler, 1);
}

inline void run_fiber() {
  machine.body();
  machine.current->done = true;
  _longjmp(machine.scheduler, 1);
}

inline bool ready(const Fiber& f, int threads) {
  const int warp = linear(f) / kWarp;
  const int lanes = std::min(kWarp, threads - warp * kWarp);
  return machine.warp_arrivals[warp] >= f.shuffles * lanes &&
         machine.block_arrivals >= f.barriers * threads;
}

inline void run_block(int threads, uint64_t seed) {
  std::memset(machine.warp_arrivals, 0, sizeof(machine.warp_arrivals));
  machine.block_arrivals = 0;
  for (int i = 0; i < threads; i++) {
    Fiber& f = machine.fibers[i];
    if (!f.stack) f.stack.reset(new char[kStack]);
    f.thread = dim3(i, 0, 0);
    f.started = f.done = false;
    f.shuffles = f.barriers = 0;
  }
  int left = threads;
  while (left > 0) {
    bool moved = false;
    const int first = static_cast<int>(seed % threads);
    for (int k = 0; k < threads; k++) {
      const int i = seed & 64 ? (first + k) % threads : (first + threads - k) % threads;
      Fiber& f = machine.fibers[i];
      if (f.done || !ready(f, threads)) continue;
      moved = true;
      machine.current = &f;
      if (!_setjmp(machine.scheduler)) {
        if (f.started) _longjmp(f.resume, 1);
        f.started = true;
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = f.stack.get();
        f.start.uc_stack.ss_size = kStack;
        makecontext(&f.start, run_fiber, 0);
        setcontext(&f.start);
      }
      left -= machine.current->done;
    }
    if (!moved) {
      std::fprintf(stderr, "emulated CUDA: some threads wait for others that never come\n");
      std::abort();
    }
    seed = seed * 6364136223846793005u + 1442695040888963407u;
  }
}

// Gives one value, waits for the other lanes of the warp, and returns the values of all threads.
inline const uint32_t* exchange(uint32_t mine) {
  Fiber& f = *machine.current;
  uint32_t* given = machine.exchanged[f.shuffles++ % 2];
  given[linear(f)] = mine;
  machine.warp_arrivals[linear(f) / kWarp]++;
  yield();
  return given;
}

}  // namespace emulator

#define threadIdx (::emulator::machine.current->thread)
#define blockIdx (::emulator::machine.block)
// a plain name, because a launch configuration has a member called gridDim
#define gridDim emulated_grid
inline dim3 emulated_grid;

inline void* emulated_dynamic_shared() {
  return emulator::machine.dynamic_shared.data();
}

inline void __syncthreads() {
  emulator::machine.current->barriers++;
  emulator::machine.block_arrivals++;
  emulator::yield();
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float __shfl_sync(uint32_t, float value, int lane) {
  const uint32_t* given = emulator::exchange(__float_as_uint(value));
  return __uint_as_float(given[emulator::linear(*emulator::machine.current) / 32 * 32 + lane]);
}
inline float __shfl_xor_sync(uint32_t mask, float value, int step) {
  return __shfl_sync(mask, value, emulator::linear(*emulator::machine.current) % 32 ^ step);
}
inline double __shfl_sync(uint32_t mask, double value, int lane) {
  float halves[2];
  std::memcpy(halves, &value, 8);
  for (float& half : halves) half = __shfl_sync(mask, half, lane);
  std::memcpy(&value, halves, 8);
  return value;
}
inline double __shfl_xor_sync(uint32_t mask, double value, int step) {
  return __shfl_sync(mask, value, emulator::linear(*emulator::machine.current) % 32 ^ step);
}

inline uint32_t __ballot_sync(uint32_t, bool vote) {
  const uint32_t* given = emulator::exchange(vote);
  const int warp = emulator::linear(*emulator::machine.current) / 32 * 32;
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; lane++) votes |= given[warp + lane] << lane;
  return votes;
}

inline int __popc(uint32_t bits) {
  return __builtin_popcount(bits);
}
inline uint4 __ldcs(const uint4* p) {
  return *p;
}
inline float rsqrtf(float v) {
  return 1.0f / std::sqrt(v);
}

// --- the host's side -----------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {  // as on an H100, but with two multiprocessors
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 2; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
  }
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  auto& machine = emulator::machine;
  machine.dynamic_shared.assign(config->dynamicSmemBytes / sizeof(float) + 1, NAN);
  const dim3 grid = gridDim = config->gridDim;
  machine.body = [&] { kernel(arguments...); };
  for (unsigned block = 0; block < grid.x; block++) {
    machine.block = dim3(block, 0, 0);
    emulator::run_block(static_cast<int>(config->blockDim.x), block * 2654435761u + 12345);
  }
  return cudaSuccess;
}
