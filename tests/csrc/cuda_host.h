// Runs CUDA kernels on the host, one thread block after the other. A thread is a fiber; it gives
// way at every operation of its warp or block, where all threads of a warp must meet.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;
inline bool trapped = false;

#define REQUIRE(condition)                                                \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                       \
    }                                                                     \
  } while (0)

namespace host {

constexpr size_t kStack = 1 << 16;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  uint32_t slot[2];  // what it last gave to its warp, and before that
  const char* operation[2];
  unsigned turns = 0;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline const std::function<void()>* body;
inline unsigned arrived = 0, generation = 0;

inline void give_way() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

// Gives a value to the warp; afterwards every lane's can be read.
inline unsigned exchange(const char* operation, uint32_t value) {
  Fiber& self = fibers[threadIdx.x];
  unsigned turn = self.turns++ & 1, base = threadIdx.x / 32 * 32;
  self.slot[turn] = value;
  self.operation[turn] = operation;
  give_way();
  for (unsigned lane = 0; lane < 32; ++lane) {
    const Fiber& other = fibers[base + lane];
    // Lanes below may be one operation ahead by now.
    REQUIRE(other.turns - self.turns <= (lane < threadIdx.x % 32));
    REQUIRE(other.operation[turn] == operation);
  }
  return turn;
}

inline uint32_t of_lane(unsigned lane, unsigned turn) {
  return fibers[threadIdx.x / 32 * 32 + lane].slot[turn];
}

inline void start() {
  (*body)();
  fibers[threadIdx.x].done = true;
  give_way();
}

inline void run_block(unsigned threads) {
  fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  for (bool running = true; running && !trapped;) {
    running = false;
    for (unsigned k = 0; k < threads && !trapped; ++k) {
      if (fibers[k].done) continue;
      running = true;
      threadIdx.x = k;
      swapcontext(&scheduler, &fibers[k].context);
    }
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads,
            const Arguments&... arguments) {
  std::function<void()> call = [&] { kernel(arguments...); };
  body = &call;
  gridDim.x = unsigned(blocks);
  trapped = false;
  for (int64_t block = 0; block < blocks && !trapped; ++block) {
    blockIdx.x = unsigned(block);
    run_block(threads);
  }
}

}  // namespace host

inline void __syncwarp() { host::exchange("syncwarp", 0); }

inline uint32_t __ballot_sync(uint32_t, bool vote) {
  unsigned turn = host::exchange("ballot", vote);
  uint32_t word = 0;
  for (unsigned lane = 0; lane < 32; ++lane) word |= host::of_lane(lane, turn) << lane;
  return word;
}

inline int __shfl_up_sync(uint32_t, int value, int distance) {
  unsigned turn = host::exchange("shfl_up", uint32_t(value)), lane = threadIdx.x % 32;
  return int(host::of_lane(lane >= unsigned(distance) ? lane - distance : lane, turn));
}

inline int64_t __shfl_sync(uint32_t, int64_t value, int from) {
  unsigned low = host::exchange("shfl, low", uint32_t(value));
  uint64_t result = host::of_lane(from, low);
  unsigned high = host::exchange("shfl, high", uint32_t(uint64_t(value) >> 32));
  return int64_t(result | uint64_t(host::of_lane(from, high)) << 32);
}

inline void __syncthreads() {
  unsigned seen = host::generation;
  if (++host::arrived == host::fibers.size()) {
    host::arrived = 0;
    ++host::generation;
  }
  do {
    host::give_way();
  } while (host::generation == seen);
}

inline void __trap() {
  trapped = true;
  host::give_way();
}

inline int __popc(uint32_t word) { return __builtin_popcount(word); }
inline int __ffs(uint32_t word) { return __builtin_ffs(int(word)); }

template <class T>
T atomicAdd(T* at, T value) {
  T before = *at;
  *at += value;
  return before;
}
