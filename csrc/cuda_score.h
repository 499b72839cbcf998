// The CUDA kernels of scoring. Includes nothing of CUDA or torch: tests/csrc compiles it for the
// host.
#pragma once

#include "cuda_warp.h"
#include "score.h"

namespace safeopt {
namespace {

constexpr int kTurns = 4;        // of a thread in accumulate_kernel, under way at once
constexpr int kKeys = 8;         // keys that a lane has in hand
constexpr int kChunk = 1 << 13;  // keys for one warp of select; in scratch memory, 4 bytes for each
constexpr int kSharing = 1024;   // threads of share_kernel

// Adds n values, V at once; a thread block takes kThreads * kTurns * V. Any thread may set `bad`:
// all write the same.
template <class G, int V>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(float* total, const G* gradient, int64_t n, int32_t* bad, bool absolute) {
  uint32_t spoiled = 0;
  auto add = [&](float& sum, G value) {
    spoiled |= absolute ? accumulate<true>(sum, value) : accumulate<false>(sum, value);
  };
  const int64_t packs = n / V;
  const int64_t first = int64_t(blockIdx.x) * kTurns * kThreads + threadIdx.x;
  Pack<float, V> sums[kTurns];
  Pack<G, V> values[kTurns];
  SAFEOPT_UNROLL
  for (int u = 0; u < kTurns; ++u) {
    int64_t at = first + u * kThreads;
    if (at >= packs) continue;
    sums[u] = pack_at<float, V>(total, at * V);
    values[u] = pack_at<G, V>(gradient, at * V);
  }
  SAFEOPT_UNROLL
  for (int u = 0; u < kTurns; ++u) {
    int64_t at = first + u * kThreads;
    if (at >= packs) continue;
    SAFEOPT_UNROLL
    for (int k = 0; k < V; ++k) add(sums[u].at[k], values[u].at[k]);
    pack_at<float, V>(total, at * V) = sums[u];
  }
  if (first < n - packs * V) add(total[packs * V + first], gradient[packs * V + first]);
  if (spoiled) *bad = 1;
}

__device__ inline int32_t key_at(int32_t bits, bool reverse) {
  return reverse ? key_of<true>(bits) : key_of<false>(bits);
}

// See key_histogram_ in safeopt/ops/scoring.py. A thread block counts in its own table, in 32 bits:
// enough for the keys that one of kCounting blocks meets, unless there are 2^42.
constexpr int64_t kCounting = 1024;

__global__ void __launch_bounds__(kThreads)
    histogram_kernel(unsigned long long* counts, const int32_t* keys, int64_t n, int shift,
                     int width, int32_t prefix, bool reverse) {
  __shared__ uint32_t bins[kMaxCounts];
  const int size = 1 << width, above = shift + width;
  for (int bin = threadIdx.x; bin < size; bin += kThreads) bins[bin] = 0;
  __syncthreads();
  constexpr int64_t tile = int64_t(kThreads) * kKeys;
  for (int64_t base = blockIdx.x * tile; base < n; base += gridDim.x * tile) {
    int32_t in_hand[kKeys];
    SAFEOPT_UNROLL
    for (int u = 0; u < kKeys; ++u) {
      int64_t at = base + u * kThreads + threadIdx.x;
      in_hand[u] = at < n ? keys[at] : 0;
    }
    SAFEOPT_UNROLL
    for (int u = 0; u < kKeys; ++u) {
      int32_t key = key_at(in_hand[u], reverse);
      bool inside = base + u * kThreads + threadIdx.x < n;
      if (inside && (above == kKeyBits || key >> above == prefix))
        atomicAdd(&bins[uint32_t(key) >> shift & uint32_t(size - 1)], 1u);
    }
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < size; bin += kThreads)
    if (bins[bin]) atomicAdd(&counts[bin], static_cast<unsigned long long>(bins[bin]));
}

// Calls each(round, key, inside) for the rounds of 32 keys of this warp's chunk, in their order.
template <class Each>
__device__ void for_rounds(const int32_t* keys, int64_t n, int64_t chunk, int lane, bool reverse,
                           const Each& each) {
  const int64_t end = (chunk + 1) * kChunk < n ? (chunk + 1) * kChunk : n;
  for (int64_t base = chunk * kChunk; base < end; base += kKeys * kLanes) {
    int32_t in_hand[kKeys];
    SAFEOPT_UNROLL
    for (int u = 0; u < kKeys; ++u) {
      int64_t at = base + u * kLanes + lane;
      in_hand[u] = at < end ? keys[at] : 0;
    }
    SAFEOPT_UNROLL
    for (int u = 0; u < kKeys; ++u) {
      int64_t round = base + u * kLanes;
      each(round, key_at(in_hand[u], reverse), round + lane < end);
    }
  }
}

// The three kernels of select_bits_, see safeopt/ops/scoring.py. First, how many keys of each chunk
// are equal to the threshold; not needed where no tie may be taken.
__global__ void __launch_bounds__(kThreads)
    count_ties_kernel(int32_t* tied, const int64_t* ties, const int32_t* keys, int64_t n,
                      int32_t threshold, bool reverse) {
  const int64_t chunk = int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  if (*ties <= 0 || chunk * kChunk >= n) return;
  int count = 0;
  for_rounds(keys, n, chunk, lane, reverse, [&](int64_t, int32_t key, bool inside) {
    count += ones(__ballot_sync(kAll, inside && key == threshold));
  });
  if (lane == 0) tied[chunk] = count;
}

// Second, in one thread block: from how many ties there are to how many are taken, in order.
__global__ void __launch_bounds__(kSharing)
    share_kernel(int32_t* tied, int64_t chunks, int64_t* ties) {
  __shared__ int totals[kSharing / kLanes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const bool none = *ties <= 0;
  int64_t left = none ? 0 : *ties;
  for (int64_t base = 0; base < chunks; base += kSharing) {
    const int64_t chunk = base + threadIdx.x;
    const int count = none || chunk >= chunks ? 0 : tied[chunk];
    const int upto = sum_upto(count, lane);
    __syncthreads();  // all have read the last totals
    if (lane == kLanes - 1) totals[warp] = upto;
    __syncthreads();
    int64_t before = upto - count, all = 0;
    for (int k = 0; k < kSharing / kLanes; ++k) {
      if (k < warp) before += totals[k];
      all += totals[k];
    }
    const int64_t room = left < before ? 0 : left - before;
    if (chunk < chunks) tied[chunk] = room < count ? int(room) : count;
    left = left < all ? 0 : left - all;
  }
  if (threadIdx.x == 0 && !none) *ties = left;
}

// Third, the bits.
__global__ void __launch_bounds__(kThreads)
    select_kernel(uint8_t* bits, const int32_t* taken, const int32_t* keys, int64_t n,
                  int32_t threshold, bool reverse) {
  const int64_t chunk = int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  if (chunk * kChunk >= n) return;
  int left = taken[chunk];
  for_rounds(keys, n, chunk, lane, reverse, [&](int64_t round, int32_t key, bool inside) {
    const bool tie = inside && key == threshold;
    const uint32_t tied = __ballot_sync(kAll, tie);
    const bool taken = tie && ones(tied & ((1u << lane) - 1)) < left;
    const uint32_t word = __ballot_sync(kAll, taken || (inside && key > threshold));
    left -= ones(tied) < left ? ones(tied) : left;
    // By bytes: the bits may begin anywhere.
    if (lane < 4 && round + 8 * lane < n) bits[round / 8 + lane] = uint8_t(word >> 8 * lane);
  });
}

}  // namespace
}  // namespace safeopt
