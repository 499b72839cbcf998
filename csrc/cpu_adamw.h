// The CPU walker of the AdamW step: block by block, live elements gathered into dense buffers that
// stay in the first-level cache, where the functor of adamw.h runs in full vectors.
#pragma once

#include "cpu_pack.h"

namespace safeopt {
namespace {

template <class F>
struct Columns {
  F *p, *m, *v, *v_max;
  const F *g, *anchor, *share;
};

template <class F>
struct Buffers {
  alignas(64) F p[kBlock + kPad], g[kBlock + kPad], m[kBlock + kPad], v[kBlock + kPad];
  alignas(64) F v_max[kBlock + kPad], anchor[kBlock + kPad], share[kBlock + kPad];
};

// Not inlined: the compiler forgets __restrict when it inlines, and then tests for overlap.
template <bool AMSGRAD, Pull PULL, class F>
__attribute__((noinline)) void update(F* __restrict p, const F* __restrict g, F* __restrict m,
                                      F* __restrict v, F* __restrict v_max,
                                      const F* __restrict anchor, const F* __restrict share,
                                      int64_t n, const Step<F>& step) {
  constexpr bool PULLED = PULL != Pull::none;
  const Step<F> s = step;
  for (int64_t i = 0; i < n; ++i) {
    F none = 0;
    adamw<AMSGRAD, PULL>(p[i], g[i], m[i], v[i], AMSGRAD ? v_max[i] : none,
                         PULLED ? anchor[i] : F(0), PULLED ? share[i] : F(0), s);
  }
}

template <bool AMSGRAD, class F>
inline void update(const Columns<F>& c, int64_t n, Pull pull, const Step<F>& s) {
  auto call = [&](auto* f) { f(c.p, c.g, c.m, c.v, c.v_max, c.anchor, c.share, n, s); };
  switch (pull) {
    case Pull::none:
      return call(update<AMSGRAD, Pull::none, F>);
    case Pull::coupled:
      return call(update<AMSGRAD, Pull::coupled, F>);
    case Pull::decoupled:
      return call(update<AMSGRAD, Pull::decoupled, F>);
  }
}

template <class F>
inline void update(const Columns<F>& c, int64_t n, Pull pull, const Step<F>& s) {
  c.v_max ? update<true>(c, n, pull, s) : update<false>(c, n, pull, s);
}

// The last elements in a full vector too, on copies: one by one they would cost more than all the
// others of a sparse block.
template <class F>
inline void update_padded(const Columns<F>& c, int64_t n, Pull pull, const Step<F>& s) {
  int64_t full = n / kPad * kPad, rest = n - full;
  if (full) update(c, full, pull, s);
  if (!rest) return;
  alignas(64) F tail[7][kPad] = {};
  F* from[4] = {c.p, c.m, c.v, c.v_max};
  const F* fixed[3] = {c.g, c.anchor, c.share};
  for (int k = 0; k < 4; ++k)
    for (int64_t j = 0; from[k] && j < rest; ++j) tail[k][j] = from[k][full + j];
  for (int k = 0; k < 3; ++k)
    for (int64_t j = 0; fixed[k] && j < rest; ++j) tail[4 + k][j] = fixed[k][full + j];
  update(Columns<F>{tail[0], tail[1], tail[2], c.v_max ? tail[3] : nullptr, tail[4],
                    c.anchor ? tail[5] : nullptr, tail[6]},
         kPad, pull, s);
  for (int k = 0; k < 4; ++k)
    for (int64_t j = 0; from[k] && j < rest; ++j) from[k][full + j] = tail[k][j];
}

// One block: `count` of its n elements from i on are live, and their state begins at `rank`.
// `words` is null where all are.
template <class F>
void step_block(const AdamwTensor& t, const Step<F>& s, int64_t i, int64_t n, int64_t rank,
                int64_t count, const uint64_t* words, Buffers<F>& b) {
  Columns<F> c;
  c.p = gather(t.p, t.p_type, i, words, n, b.p);
  c.g = gather(t.g, t.g_type, i, words, n, b.g);
  c.m = gather(t.m, t.state_type, rank, nullptr, count, b.m);
  c.v = gather(t.v, t.state_type, rank, nullptr, count, b.v);
  c.v_max = t.v_max ? gather(t.v_max, t.state_type, rank, nullptr, count, b.v_max) : nullptr;
  c.anchor = t.anchor ? gather(t.anchor, t.anchor_type, i, words, n, b.anchor) : nullptr;
  c.share = t.share ? gather(t.share, Dtype::f32, i, words, n, b.share) : b.share;
  update_padded(c, count, t.pull, s);
  if (c.p == b.p) scatter(b.p, t.p, t.p_type, i, words, n);
  if (c.m == b.m) scatter(b.m, t.m, t.state_type, rank, nullptr, count);
  if (c.v == b.v) scatter(b.v, t.v, t.state_type, rank, nullptr, count);
  if (c.v_max == b.v_max) scatter(b.v_max, t.v_max, t.state_type, rank, nullptr, count);
}

inline int size_of(Dtype type) { return type == Dtype::f64 ? 8 : type == Dtype::f32 ? 4 : 2; }

// Asks for the lines of a sparse block's live elements, which no hardware prefetcher foresees.
inline void prefetch(const AdamwTensor& t, int64_t i, int64_t n, const uint64_t* words) {
  int p_size = size_of(t.p_type), g_size = size_of(t.g_type);
  const char *p = static_cast<const char*>(t.p) + i * p_size,
             *g = static_cast<const char*>(t.g) + i * g_size;
  for (int64_t k = 0; k < n; k += 64) {
    for (uint64_t word = words[k / 64]; word; word &= word - 1) {
      int64_t at = k + __builtin_ctzll(word);
      __builtin_prefetch(p + at * p_size, 1);
      __builtin_prefetch(g + at * g_size, 0);
    }
  }
}

constexpr int kAhead = 4;             // blocks between a prefetch and its use
constexpr int64_t kPrefetched = 256;  // live elements of a block up to which it is prefetched

struct Block {
  int64_t i, n, rank, count;
  bool whole;
  uint64_t words[kBlock / 64];
};

template <class F>
void step_blocks(const AdamwTensor& t, int64_t first, int64_t end) {
  Buffers<F> buffers;
  if (t.anchor && !t.share)
    for (F& share : buffers.share) share = 1;
  const Step<F> s = narrowed<F>(t.step);
  Block ring[kAhead];
  int64_t entered = 0, done = 0;
  auto finish = [&] {
    const Block& b = ring[done++ % kAhead];
    step_block(t, s, b.i, b.n, b.rank, b.count, b.whole ? nullptr : b.words, buffers);
  };
  for (int64_t k = first; k < end; ++k) {
    int64_t rank = t.starts[k], count = t.starts[k + 1] - rank;
    if (count == 0) continue;
    if (entered - done == kAhead) finish();
    Block& b = ring[entered++ % kAhead];
    b.i = k * kBlock;
    b.n = t.numel - b.i < kBlock ? t.numel - b.i : kBlock;
    b.rank = rank;
    b.count = count;
    b.whole = count == b.n;
    if (b.whole) continue;
    live_words(t.rule, b.i, int(b.n), b.words);
    if (count <= kPrefetched) prefetch(t, b.i, b.n, b.words);
  }
  while (done < entered) finish();
}

inline void adamw_blocks(const AdamwTensor& tensor, int64_t first, int64_t end) {
  if (tensor.p_type == Dtype::f64) {
    step_blocks<double>(tensor, first, end);
  } else {
    step_blocks<float>(tensor, first, end);
  }
}

}  // namespace
}  // namespace safeopt
