// What the CUDA kernels share: warps, and the values that a lane moves at once.
#pragma once

#include "number.h"

// Without it, arrays indexed by the loop could end up in memory instead of registers.
#ifdef __CUDA_ARCH__
#define SAFEOPT_UNROLL _Pragma("unroll")
#else
#define SAFEOPT_UNROLL
#endif

namespace safeopt {
namespace {

constexpr int kLanes = 32;
constexpr uint32_t kAll = 0xffffffffu;  // lanes of a warp
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;

__device__ inline int ones(uint32_t word) { return __popc(word); }

// The sum of the values of this lane and those below it.
__device__ inline int sum_upto(int value, int lane) {
  for (int d = 1; d < kLanes; d *= 2) {
    int other = __shfl_up_sync(kAll, value, d);
    if (lane >= d) value += other;
  }
  return value;
}

template <class T, int V>
struct alignas(sizeof(T) * V > 16 ? 16 : sizeof(T) * V) Pack {
  T at[V];
};

template <class T, int V>
__device__ inline Pack<T, V>& pack_at(T* base, int64_t place) {
  return *reinterpret_cast<Pack<T, V>*>(base + place);
}

template <class T, int V>
__device__ inline const Pack<T, V>& pack_at(const T* base, int64_t place) {
  return *reinterpret_cast<const Pack<T, V>*>(base + place);
}

// Written out, since the compiler makes one store per value of a pack put together in branches.
template <class T, int V>
__device__ inline void put(T* base, int64_t place, const Pack<T, V>& pack) {
#ifdef __CUDA_ARCH__
  uint32_t words[4];
  if constexpr (sizeof(pack) == 16) {
    memcpy(words, &pack, 16);
    asm volatile(
        "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(base + place)),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
        : "memory");
    return;
  } else if constexpr (sizeof(pack) == 8 && V > 1) {
    memcpy(words, &pack, 8);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(base + place)),
                 "r"(words[0]), "r"(words[1])
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, V>*>(base + place) = pack;
}

}  // namespace
}  // namespace safeopt
