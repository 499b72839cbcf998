// The CPU walker of the AdamW step: block by block, live elements gathered into dense buffers that
// stay in the first-level cache, where the functor of adamw.h runs in full vectors.
#pragma once

#include "cpu_lanes.h"
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
                                      int64_t n, Ahead ahead, const Step<F>& step) {
  constexpr bool PULLED = PULL != Pull::none;
  const Step<F> s = step;
  for (int64_t i = 0; i < n; i += kPad) {
    prefetch(ahead, m + i, v + i);
    for (int64_t j = i; j < i + kPad; ++j) {
      F none = 0;
      adamw<AMSGRAD, PULL>(p[j], g[j], m[j], v[j], AMSGRAD ? v_max[j] : none,
                           PULLED ? anchor[j] : F(0), PULLED ? share[j] : F(0), s);
    }
  }
}

template <bool AMSGRAD, class F>
inline void update(const Columns<F>& c, int64_t n, Ahead ahead, Pull pull, const Step<F>& s) {
  auto call = [&](auto* f) { f(c.p, c.g, c.m, c.v, c.v_max, c.anchor, c.share, n, ahead, s); };
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
inline void update(const Columns<F>& c, int64_t n, Ahead ahead, Pull pull, const Step<F>& s) {
  c.v_max ? update<true>(c, n, ahead, pull, s) : update<false>(c, n, ahead, pull, s);
}

// The last elements in a full vector too, on copies: one by one they would cost more than all the
// others of a sparse block.
template <class F>
inline void update_padded(const Columns<F>& c, int64_t n, Ahead ahead, Pull pull,
                          const Step<F>& s) {
  int64_t full = n / kPad * kPad, rest = n - full;
  if (full) update(c, full, ahead, pull, s);
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
         kPad, {}, pull, s);
  for (int k = 0; k < 4; ++k)
    for (int64_t j = 0; from[k] && j < rest; ++j) from[k][full + j] = tail[k][j];
}

// `count` live elements among the n from i on; their state begins at `rank`.
template <class F>
void step_piece(const AdamwTensor& t, const Step<F>& s, int64_t i, int64_t n, int64_t rank,
                int64_t count, Live live, Ahead ahead, Buffers<F>& b) {
  const Live all = {};
  Columns<F> c;
  c.p = gather(t.p, t.p_type, i, live, n, b.p);
  c.g = gather(t.g, t.g_type, i, live, n, b.g);
  c.m = gather(t.m, t.state_type, rank, all, count, b.m);
  c.v = gather(t.v, t.state_type, rank, all, count, b.v);
  c.v_max = t.v_max ? gather(t.v_max, t.state_type, rank, all, count, b.v_max) : nullptr;
  c.anchor = t.anchor ? gather(t.anchor, t.anchor_type, i, live, n, b.anchor) : nullptr;
  c.share = t.share ? gather(t.share, Dtype::f32, i, live, n, b.share) : b.share;
  update_padded(c, count, ahead, t.pull, s);
  if (c.p == b.p) scatter(b.p, t.p, t.p_type, i, live, n);
  if (c.m == b.m) scatter(b.m, t.m, t.state_type, rank, all, count);
  if (c.v == b.v) scatter(b.v, t.v, t.state_type, rank, all, count);
  if (c.v_max == b.v_max) scatter(b.v_max, t.v_max, t.state_type, rank, all, count);
}

// A block with many live elements, in pieces so short that the processor overlaps the arithmetic
// of one with the loads of the next.
template <class F>
void step_dense(const AdamwTensor& t, const Step<F>& s, int64_t i, int64_t n, int64_t rank,
                int64_t live, Ahead next, Buffers<F>& b) {
  constexpr int64_t kPiece = 256;
  constexpr int64_t kLanes = 40;  // per cent of live elements from which on lanes are not wasted
  uint64_t words[kBlock / 64];
  live_words(t.rule, i, int(n), words);
  if (fits_lanes(t) && 100 * live > kLanes * n) return step_lanes(t, i, n, rank, words, next);
  for (int64_t k = 0; k < n; k += kPiece) {
    int64_t length = n - k < kPiece ? n - k : kPiece, count = 0;
    for (int64_t j = 0; j < length; j += 64) count += __builtin_popcountll(words[(k + j) / 64]);
    Ahead ahead = {at(t.p, t.p_type, i + k + kAhead), at(t.g, t.g_type, i + k + kAhead), 0};
    if (count >= kPad) ahead.bytes = (kPiece * size_of(t.p_type) / (count / kPad) + 63) / 64 * 64;
    step_piece(t, s, i + k, length, rank, count, {words + k / 64, nullptr}, ahead, b);
    rank += count;
  }
}

// A block of rows, or of other long units: each live one where it lies.
template <class F>
void step_units(const AdamwTensor& t, const Step<F>& s, int64_t i, int64_t n, int64_t rank,
                Buffers<F>& b) {
  constexpr int kLook = 4;  // units to look ahead for the next live one
  const int64_t end = i + n;
  while (i < end) {
    int64_t at = i + t.rule.offset, left = t.rule.span - at % t.rule.span;
    int64_t length = left < end - i ? left : end - i;
    if (live(t.rule, i)) {
      int64_t next = i + length;
      for (int k = 0; k < kLook && next < t.numel && !live(t.rule, next); ++k) next += t.rule.span;
      Ahead ahead = lines_at(t, next);
      if (fits_lanes(t)) {
        uint64_t words[kBlock / 64];
        for (int64_t k = 0; k < length; k += 64) words[k / 64] = first_bits(length - k);
        step_lanes(t, i, length, rank, words, ahead);
      } else {
        step_piece(t, s, i, length, rank, length, {}, ahead, b);
      }
      rank += length;
    }
    i += length;
  }
}

// Live elements of sparse blocks, gathered over many of them, so that many loads are under way at
// once and the arithmetic runs in full vectors.
template <class F>
class Batch {
 public:
  Batch(const AdamwTensor& tensor, const Step<F>& step, Buffers<F>& buffers)
      : t_(tensor), s_(step), b_(buffers) {}

  void add(int64_t i, int64_t n, int64_t rank, int64_t count) {
    if (size_ && (size_ + count > kBlock || i - first_ > kReach)) flush();
    if (!size_) {
      first_ = i;
      rank_ = rank;
    }
    list(i, n, count);
    if (count > kFew) {
      // Where lines lie so close, the processor gets too few of them under way on its own. (In a
      // function of its own this would go: to the compiler it does nothing.)
      const char *p = at(t_.p, t_.p_type, first_), *g = at(t_.g, t_.g_type, first_);
      const int p_shift = shift_of(t_.p_type), g_shift = shift_of(t_.g_type);
      for (int64_t j = size_; j < size_ + count; ++j) {
        __builtin_prefetch(p + (int64_t(places_[j]) << p_shift), 1);
        __builtin_prefetch(g + (int64_t(places_[j]) << g_shift), 0);
      }
    }
    size_ += count;
  }

  void flush() {
    if (size_) step_piece(t_, s_, first_, size_, rank_, size_, {nullptr, places_}, {}, b_);
    size_ = 0;
  }

 private:
  void list(int64_t i, int64_t n, int64_t count) {
    uint64_t words[kBlock / 64] = {};
    live_words(t_.rule, i, int(n), words);
    int32_t *to = places_ + size_, base = int32_t(i - first_);
    if (count > kFew) {
      for (int k = 0; k < kBlock / 64; ++k) to = list_many_places(words[k], base + 64 * k, to);
    } else {
      for (uint32_t left = filled(words); left; left &= left - 1) {
        int k = __builtin_ctz(left);
        to = list_places(words[k], base + 64 * k, to);
      }
    }
  }

  static constexpr int64_t kFew = 32;         // live elements of a block with mostly empty words
  static constexpr int64_t kReach = 1 << 30;  // what an int32 place can hold

  const AdamwTensor& t_;
  const Step<F>& s_;
  Buffers<F>& b_;
  int64_t first_ = 0, rank_ = 0, size_ = 0;
  int32_t places_[kBlock + kPad];
};

constexpr int64_t kLong = 64;     // elements of a unit from which on it is worth a loop of its own
constexpr int64_t kSparse = 160;  // live elements of a block up to which they are met one by one

template <class F>
void step_blocks(const AdamwTensor& t, int64_t first, int64_t end) {
  Buffers<F> buffers;
  if (t.anchor && !t.share)
    for (F& share : buffers.share) share = 1;
  const Step<F> s = narrowed<F>(t.step);
  Batch<F> batch(t, s, buffers);
  for (int64_t k = first; k < end; ++k) {
    int64_t i = k * kBlock, n = t.numel - i < kBlock ? t.numel - i : kBlock;
    int64_t rank = t.starts[k], count = t.starts[k + 1] - rank;
    if (count == 0) continue;
    int64_t next = k + 1;
    while (next < end && t.starts[next] == t.starts[next + 1]) ++next;
    const Ahead ahead = next < end ? lines_at(t, next * kBlock) : Ahead{};
    if (count == n) {
      step_piece(t, s, i, n, rank, n, {}, ahead, buffers);
    } else if (t.rule.span >= kLong) {
      step_units(t, s, i, n, rank, buffers);
    } else if (count > kSparse) {
      step_dense(t, s, i, n, rank, count, ahead, buffers);
    } else {
      batch.add(i, n, rank, count);
      continue;
    }
    batch.flush();
  }
  batch.flush();
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
