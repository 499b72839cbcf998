// The step of a block with few frozen float32 elements, in AVX512 registers: the compact state is
// spread out to the lanes of its elements and squeezed together again on the way back. For a block
// with many frozen ones that would compute too many lanes for nothing; cpu_adamw.h gathers those.
#pragma once

#include "cpu_pack.h"

namespace safeopt {
namespace {

#ifdef SAFEOPT_AVX512

// Sixteen floats with the operators that the functor of adamw.h needs.
struct Lanes {
  __m512 x;
  Lanes() = default;
  Lanes(__m512 y) : x(y) {}
  explicit Lanes(double y) : x(_mm512_set1_ps(float(y))) {}
};
inline Lanes operator+(Lanes a, Lanes b) { return _mm512_add_ps(a.x, b.x); }
inline Lanes operator-(Lanes a, Lanes b) { return _mm512_sub_ps(a.x, b.x); }
inline Lanes operator*(Lanes a, Lanes b) { return _mm512_mul_ps(a.x, b.x); }
inline Lanes operator/(Lanes a, Lanes b) { return _mm512_div_ps(a.x, b.x); }
inline Lanes& operator+=(Lanes& a, Lanes b) { return a = a + b; }
inline Lanes& operator-=(Lanes& a, Lanes b) { return a = a - b; }
inline Lanes& operator*=(Lanes& a, Lanes b) { return a = a * b; }
inline Lanes root(Lanes a) { return _mm512_sqrt_ps(a.x); }
inline Lanes at_most_one(Lanes a) {
  __m512 one = _mm512_set1_ps(1);
  return _mm512_mask_mov_ps(one, _mm512_cmp_ps_mask(a.x, one, _CMP_LT_OQ), a.x);
}
inline Lanes larger(Lanes a, Lanes b) {
  __mmask16 greater = _mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ);
  __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(b.x, greater | nan, a.x);
}

// What the step needs of one tensor, from the block's first element and first state on.
struct Rows {
  float *p, *m, *v, *v_max;
  const float *g, *anchor, *share;
};

// Sixteen neighbours: which are live, their values, and where their state lies.
struct Group {
  __mmask16 live;
  int64_t rank, next;
  Lanes p, g, m, v, v_max, anchor, share;
};

template <bool AMSGRAD, Pull PULL>
inline void read(const Rows& rows, int64_t i, uint64_t word, int64_t rank, Group& group) {
  __mmask16 live = __mmask16(word >> (i & 63));
  group.live = live;
  group.rank = rank;
  group.next = rank + __builtin_popcount(live);
  group.p = _mm512_maskz_loadu_ps(live, rows.p + i);
  group.g = _mm512_maskz_loadu_ps(live, rows.g + i);
  group.m = _mm512_maskz_expandloadu_ps(live, rows.m + rank);
  group.v = _mm512_maskz_expandloadu_ps(live, rows.v + rank);
  if (AMSGRAD) group.v_max = _mm512_maskz_expandloadu_ps(live, rows.v_max + rank);
  if (PULL == Pull::none) return;
  group.anchor = _mm512_maskz_loadu_ps(live, rows.anchor + i);
  group.share = rows.share ? _mm512_maskz_loadu_ps(live, rows.share + i) : _mm512_set1_ps(1);
}

inline void squeeze(float* to, Lanes values, __mmask16 live, int count) {
  __mmask16 first = __mmask16((1u << count) - 1);
  _mm512_mask_storeu_ps(to, first, _mm512_maskz_compress_ps(live, values.x));
}

template <bool AMSGRAD, Pull PULL>
__attribute__((noinline)) void step_lanes(const Rows& rows, int64_t n, const uint64_t* words,
                                          Ahead ahead, const Step<Lanes>& s) {
  Group group, next;
  read<AMSGRAD, PULL>(rows, 0, words[0], 0, next);
  for (int64_t i = 0; i < n; i += 16) {
    group = next;
    prefetch(ahead, rows.m + group.rank, rows.v + group.rank);
    // Read before this group is written: a load that follows a masked store to neighbouring bytes
    // waits until the store has left the processor.
    if (i + 16 < n) read<AMSGRAD, PULL>(rows, i + 16, words[(i + 16) / 64], group.next, next);
    adamw<AMSGRAD, PULL>(group.p, group.g, group.m, group.v, group.v_max, group.anchor, group.share,
                         s);
    int count = int(group.next - group.rank);
    _mm512_mask_storeu_ps(rows.p + i, group.live, group.p.x);
    squeeze(rows.m + group.rank, group.m, group.live, count);
    squeeze(rows.v + group.rank, group.v, group.live, count);
    if (AMSGRAD) squeeze(rows.v_max + group.rank, group.v_max, group.live, count);
  }
}

inline bool fits_lanes(const AdamwTensor& t) {
  return t.p_type == Dtype::f32 && t.g_type == Dtype::f32 && t.state_type == Dtype::f32 &&
         t.anchor_type == Dtype::f32;
}

inline void step_lanes(const AdamwTensor& t, int64_t i, int64_t n, int64_t rank,
                       const uint64_t* words, Ahead ahead) {
  auto row = [](const void* data, int64_t place) {
    return data ? static_cast<float*>(const_cast<void*>(data)) + place : nullptr;
  };
  Rows rows = {row(t.p, i), row(t.m, rank),   row(t.v, rank), row(t.v_max, rank),
               row(t.g, i), row(t.anchor, i), row(t.share, i)};
  const Step<Lanes> s = narrowed<Lanes>(t.step);
  switch (t.pull) {
    case Pull::none:
      return (t.v_max ? step_lanes<true, Pull::none>
                      : step_lanes<false, Pull::none>)(rows, n, words, ahead, s);
    case Pull::coupled:
      return (t.v_max ? step_lanes<true, Pull::coupled>
                      : step_lanes<false, Pull::coupled>)(rows, n, words, ahead, s);
    case Pull::decoupled:
      return (t.v_max ? step_lanes<true, Pull::decoupled>
                      : step_lanes<false, Pull::decoupled>)(rows, n, words, ahead, s);
  }
}

#else
inline bool fits_lanes(const AdamwTensor&) { return false; }
inline void step_lanes(const AdamwTensor&, int64_t, int64_t, int64_t, const uint64_t*, Ahead) {}
#endif

}  // namespace
}  // namespace safeopt
