// The CUDA walker of the AdamW step, for one lane of a warp: which elements of a block it takes,
// where their state lies, and their step. A warp steps one block at a time.
#pragma once

#include "adamw.h"
#include "cpu.h"
#include "cuda_warp.h"
#include "mask.h"

namespace safeopt {
namespace {

constexpr int kRounds = kBlock / kLanes;  // of a warp that takes an element per lane

// Live elements of a block up to which lanes go from one to the next, leaving out the frozen ones.
// Above it they look at every element, which costs less than finding the next.
constexpr int kSparse = kBlock / 2;

// The live elements of a block: words[k] has a bit for each of the 32 from 32 k on, and before[k]
// of them come before those.
struct Table {
  uint32_t words[kRounds];
  int32_t before[kRounds];
};

// Place of the set bit that has `rank` set bits below it.
__device__ inline int place_of(uint32_t word, int rank) {
  int place = 0;
  SAFEOPT_UNROLL
  for (int width = 16; width; width /= 2) {
    int below = ones(word & ((1u << width) - 1));
    if (rank < below) continue;
    rank -= below;
    word >>= width;
    place += width;
  }
  return place;
}

// A word of the table: the elements from i on, of which the block has n more.
__device__ inline uint32_t word_at(const Rule& rule, int64_t i, int n) {
  if (n <= 0) return 0;
  int64_t bit = i + rule.offset;
  const uint8_t* from = rule.bits + (bit >> 3);
  bool plain = rule.span == 1 && n >= kLanes && bit + kLanes <= rule.nbits && (bit & 7) == 0;
  if (plain && uintptr_t(from) % sizeof(uint32_t) == 0) {  // a mask by weight: no division
    uint32_t word = *reinterpret_cast<const uint32_t*>(from);
    return rule.live_bit ? word : ~word;
  }
  return uint32_t(live_word(rule, i, n < kLanes ? n : kLanes));
}

// What a lane takes in a round: V elements of its block from `place` on, whose state lies from
// `rank` on in that of the block.
struct Spot {
  int place, rank;
  bool live;
};

// Of a block that is live throughout.
template <int V>
struct Whole {
  int lane;
  __device__ Spot operator()(int round) const {
    int place = (round * kLanes + lane) * V;
    return {place, place, true};
  }
};

// Lanes take consecutive elements; those that are not live are left out.
struct ByPlace {
  const Table* table;
  int lane;
  __device__ Spot operator()(int round) const {
    uint32_t word = table->words[round];
    int below = ones(word & ((1u << lane) - 1));
    return {round * kLanes + lane, table->before[round] + below, bool(word >> lane & 1)};
  }
};

// Lanes take consecutive live elements.
struct ByRank {
  const Table* table;
  int lane, count;
  __device__ Spot operator()(int round) const {
    int rank = round * kLanes + lane, k = 0;
    if (rank >= count) return {0, 0, false};
    SAFEOPT_UNROLL
    for (int step = kRounds / 2; step; step /= 2)
      if (table->before[k + step] <= rank) k += step;
    return {k * kLanes + place_of(table->words[k], rank - table->before[k]), rank, true};
  }
};

__device__ inline bool aligned(const void* base, int64_t place, int size, int v) {
  int unit = size * v > 16 ? 16 : size * v;  // a power of two
  return ((uintptr_t(base) + uintptr_t(place) * size) & (unit - 1)) == 0;
}

__device__ inline int bytes_of(Dtype type) {
  return type == Dtype::f64 ? 8 : type == Dtype::f32 ? 4 : 2;
}

// V values of a type known at run time, converted only when they are used: so all of a lane's loads
// are under way before it waits for the first.
template <class F, int V>
struct Later {
  uint32_t words[V * sizeof(F) / 4];

  template <class T>
  __device__ void copy(const void* base, int64_t place) {
    Pack<T, V> pack = pack_at<T, V>(static_cast<const T*>(base), place);
    memcpy(words, &pack, sizeof(pack));
  }

  __device__ void load(const void* base, Dtype type, int64_t place) {
    int size = bytes_of(type);
    if (size == 2) {
      copy<uint16_t>(base, place);
    } else if (size == 4) {
      copy<uint32_t>(base, place);
    } else if constexpr (sizeof(F) == 8) {
      copy<uint64_t>(base, place);
    }
  }

  __device__ F value(Dtype type, int k) const {
    if constexpr (sizeof(F) == 8) {
      if (type == Dtype::f64) {
        double x;
        memcpy(&x, words + 2 * k, 8);
        return x;
      }
    }
    if (type == Dtype::f32) return from_bits(words[k]);
    uint16_t half = uint16_t(words[k / 2] >> 16 * (k % 2));
    return type == Dtype::bf16 ? widen(bf16{half}) : widen(f16{half});
  }
};

// The step with AMSGrad or a pull: the same branches in all lanes.
template <class F>
__device__ inline void adamw_any(bool amsgrad, Pull pull, F& p, F g, F& m, F& v, F& v_max, F anchor,
                                 F share, const Step<F>& s) {
  if (pull == Pull::none) {
    if (amsgrad) adamw<true, Pull::none>(p, g, m, v, v_max, anchor, share, s);
  } else if (pull == Pull::coupled) {
    amsgrad ? adamw<true, Pull::coupled>(p, g, m, v, v_max, anchor, share, s)
            : adamw<false, Pull::coupled>(p, g, m, v, v_max, anchor, share, s);
  } else {
    amsgrad ? adamw<true, Pull::decoupled>(p, g, m, v, v_max, anchor, share, s)
            : adamw<false, Pull::decoupled>(p, g, m, v, v_max, anchor, share, s);
  }
}

// Elements that a lane has in hand at once: 16 bytes of what the arithmetic is done in.
template <class P>
constexpr int kWide = 16 / sizeof(typename Math<P>::type);

// V elements in a lane's hands. P: type of the weights; S: of their state; EXTRA: with AMSGrad, a
// pull, or both.
template <class P, class S, bool EXTRA, int V>
struct Hand {
  using F = typename Math<P>::type;
  Pack<P, V> p;
  Later<F, V> g, anchor;
  Pack<S, V> m, v, v_max;
  Pack<float, V> share;

  __device__ void load(const AdamwTensor& t, int64_t place, int64_t rank) {
    p = pack_at<P, V>(static_cast<P*>(t.p), place);
    g.load(t.g, t.g_type, place);
    m = pack_at<S, V>(static_cast<S*>(t.m), rank);
    v = pack_at<S, V>(static_cast<S*>(t.v), rank);
    if constexpr (EXTRA) {
      if (t.v_max) v_max = pack_at<S, V>(static_cast<S*>(t.v_max), rank);
      if (t.anchor) anchor.load(t.anchor, t.anchor_type, place);
      if (t.share) share = pack_at<float, V>(t.share, place);
    }
  }

  __device__ void step(const AdamwTensor& t, const Step<F>& s) {
    SAFEOPT_UNROLL
    for (int k = 0; k < V; ++k) {
      F x = widen(p.at[k]), first = widen(m.at[k]), second = widen(v.at[k]), top = 0;
      F gradient = g.value(t.g_type, k);
      if constexpr (EXTRA) {
        if (t.v_max) top = widen(v_max.at[k]);
        F center = t.anchor ? anchor.value(t.anchor_type, k) : F(0);
        F part = t.share ? F(share.at[k]) : F(1);
        adamw_any(t.v_max != nullptr, t.pull, x, gradient, first, second, top, center, part, s);
        if (t.v_max) v_max.at[k] = narrow<S>(top);
      } else {
        adamw<false, Pull::none>(x, gradient, first, second, top, F(0), F(0), s);
      }
      p.at[k] = narrow<P>(x);
      m.at[k] = narrow<S>(first);
      v.at[k] = narrow<S>(second);
    }
  }

  __device__ void store(const AdamwTensor& t, int64_t place, int64_t rank) const {
    put(static_cast<P*>(t.p), place, p);
    put(static_cast<S*>(t.m), rank, m);
    put(static_cast<S*>(t.v), rank, v);
    if constexpr (EXTRA) {
      if (t.v_max) put(static_cast<S*>(t.v_max), rank, v_max);
    }
  }
};

// The rounds of one lane in the block from element i on, whose state begins at `first`. Several are
// under way at once, to hide the memory's latency.
template <class P, class S, bool EXTRA, int V, class Spots>
__device__ inline void walk(const AdamwTensor& t, const Step<typename Math<P>::type>& s, int64_t i,
                            int64_t first, int rounds, const Spots& spot_of) {
  constexpr int U = kWide<P> / V;
  for (int round = 0; round < rounds; round += U) {
    Spot spot[U];
    Hand<P, S, EXTRA, V> hand[U];
    SAFEOPT_UNROLL
    for (int u = 0; u < U; ++u) {
      spot[u] = spot_of(round + u);
      if (spot[u].live) hand[u].load(t, i + spot[u].place, first + spot[u].rank);
    }
    SAFEOPT_UNROLL
    for (int u = 0; u < U; ++u) {
      if (!spot[u].live) continue;
      hand[u].step(t, s);
      hand[u].store(t, i + spot[u].place, first + spot[u].rank);
    }
  }
}

// Whether lanes may take kWide<P> elements at once; if so, no table is needed.
template <class P, class S>
__device__ inline bool in_packs(const AdamwTensor& t, int64_t i, int64_t first, int count) {
  constexpr int V = kWide<P>;
  return count == kBlock && aligned(t.p, i, sizeof(P), V) &&
         aligned(t.g, i, bytes_of(t.g_type), V) && aligned(t.m, first, sizeof(S), V) &&
         aligned(t.v, first, sizeof(S), V) && aligned(t.v_max, first, sizeof(S), V) &&
         aligned(t.anchor, i, bytes_of(t.anchor_type), V) && aligned(t.share, i, 4, V);
}

// One lane's part in a block with `count` live elements.
template <class P, class S, bool EXTRA>
__device__ inline void step_lane(const AdamwTensor& t, const Step<typename Math<P>::type>& s,
                                 int64_t i, int64_t first, int count, int lane, bool packs,
                                 const Table* table) {
  if (packs) {
    walk<P, S, EXTRA, kWide<P>>(t, s, i, first, kRounds / kWide<P>, Whole<kWide<P>>{lane});
  } else if (count > kSparse) {
    walk<P, S, EXTRA, 1>(t, s, i, first, kRounds, ByPlace{table, lane});
  } else {
    int rounds = (count + kLanes - 1) / kLanes;
    walk<P, S, EXTRA, 1>(t, s, i, first, rounds, ByRank{table, lane, count});
  }
}

}  // namespace
}  // namespace safeopt
