// Live elements, from a tensor into a dense buffer of the arithmetic's type, and back.
//
// Buffers have room for kPad elements more than a block, which may be overwritten.
#pragma once

#ifdef SAFEOPT_AVX512
#include <immintrin.h>
#endif

#include "cpu.h"

namespace safeopt {
namespace {

constexpr int kPad = 16;
constexpr int64_t kAhead = 512;  // elements between what is used and what memory is asked for

// Which of some elements are live: all (both null), the set bits of `words`, or those at `places`.
struct Live {
  const uint64_t* words;
  const int32_t* places;
};

inline int shift_of(Dtype type) { return type == Dtype::f64 ? 3 : type == Dtype::f32 ? 2 : 1; }
inline int size_of(Dtype type) { return 1 << shift_of(type); }

inline const char* at(const void* data, Dtype type, int64_t i) {
  return static_cast<const char*>(data) + i * size_of(type);
}

// What to ask memory for during an update: so many bytes of p and of g with every kPad elements.
struct Ahead {
  const char *p, *g;
  int64_t bytes;
};

// Moves `ahead` on. It pays also where elements follow each other, as measured: the processor's own
// prefetchers stop at every page. (Inlined by force: to the compiler a function that only
// prefetches does nothing, and its call goes.)
template <class F>
inline __attribute__((always_inline)) void prefetch(Ahead& ahead, const F* m, const F* v) {
  for (int64_t line = 0; line < ahead.bytes; line += 64) {
    __builtin_prefetch(ahead.p + line, 1);
    __builtin_prefetch(ahead.g + line, 0);
  }
  ahead.p += ahead.bytes;
  ahead.g += ahead.bytes;
  __builtin_prefetch(m + kAhead / 2, 1);
  __builtin_prefetch(v + kAhead / 2, 1);
}

// The lines from element i on, as many as are used up meanwhile.
inline Ahead lines_at(const AdamwTensor& t, int64_t i) {
  return {at(t.p, t.p_type, i), at(t.g, t.g_type, i), kPad * size_of(t.p_type)};
}

template <class F, class T>
inline void convert(const T* __restrict from, F* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

template <class T, class F>
inline void convert_back(const F* __restrict from, T* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<T>(from[i]);
}

// Calls run(place, length) for each run of set bits.
template <class Run>
inline void for_runs(uint64_t word, Run run) {
  while (word) {
    int place = __builtin_ctzll(word);
    uint64_t rest = ~(word >> place);
    int length = rest ? __builtin_ctzll(rest) : 64;
    run(place, length);
    if (place + length >= 64) return;
    word &= ~uint64_t(0) << (place + length);
  }
}

// The places of the set bits, counted from `base`; may write kPad entries too many.
inline int32_t* list_places(uint64_t word, int32_t base, int32_t* to) {
  int32_t* end = to + __builtin_popcountll(word);
  // Two without asking: whether a sparse word has one bit or two no processor can predict.
  do {
    for (int j = 0; j < 2; ++j) {
      to[j] = base + (word ? __builtin_ctzll(word) : 0);
      word &= word - 1;
    }
    to += 2;
  } while (to < end);
  return end;
}

#ifdef SAFEOPT_AVX512
// The same for words with more bits.
inline int32_t* list_many_places(uint64_t word, int32_t base, int32_t* to) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int k = 0; k < 64; k += 16) {
    __mmask16 live = __mmask16(word >> k);
    __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(base + k));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(live, places));
    to += __builtin_popcount(live);
  }
  return to;
}

// Bit k is set where words[k] is not zero, for k < 16.
inline uint32_t filled(const uint64_t* words) {
  __m512i low = _mm512_loadu_si512(words), high = _mm512_loadu_si512(words + 8);
  return _mm512_test_epi64_mask(low, low) | uint32_t(_mm512_test_epi64_mask(high, high)) << 8;
}

inline __m512 load16(const float* from, __mmask16 live) {
  return _mm512_maskz_loadu_ps(live, from);
}
inline __m512 load16(const bf16* from, __mmask16 live) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline __m512 load16(const f16* from, __mmask16 live) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(live, from));
}
inline void store16(float* to, __mmask16 live, __m512 x) { _mm512_mask_storeu_ps(to, live, x); }
inline void store16(bf16* to, __mmask16 live, __m512 x) {
  __m512i u = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), one);
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  _mm256_mask_storeu_epi16(to, live, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void store16(f16* to, __mmask16 live, __m512 x) {
  __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(to, live, half);
}

// The dense cases of a word: 16 lanes at a time, squeezed together or spread out in a register.
template <class T>
inline int gather_word(const T* from, uint64_t word, float* to) {
  int n = 0;
  for (int k = 0; k < 64; k += 16) {
    __mmask16 live = __mmask16(word >> k);
    _mm512_storeu_ps(to + n, _mm512_maskz_compress_ps(live, load16(from + k, live)));
    n += __builtin_popcount(live);
  }
  return n;
}
inline int gather_word(const double* from, uint64_t word, double* to) {
  int n = 0;
  for (int k = 0; k < 64; k += 8) {
    __mmask8 live = __mmask8(word >> k);
    __m512d x = _mm512_maskz_loadu_pd(live, from + k);
    _mm512_storeu_pd(to + n, _mm512_maskz_compress_pd(live, x));
    n += __builtin_popcount(live);
  }
  return n;
}
template <class T>
inline int scatter_word(const float* from, uint64_t word, T* to) {
  int n = 0;
  for (int k = 0; k < 64; k += 16) {
    __mmask16 live = __mmask16(word >> k);
    store16(to + k, live, _mm512_maskz_expand_ps(live, _mm512_loadu_ps(from + n)));
    n += __builtin_popcount(live);
  }
  return n;
}
inline int scatter_word(const double* from, uint64_t word, double* to) {
  int n = 0;
  for (int k = 0; k < 64; k += 8) {
    __mmask8 live = __mmask8(word >> k);
    _mm512_mask_storeu_pd(to + k, live, _mm512_maskz_expand_pd(live, _mm512_loadu_pd(from + n)));
    n += __builtin_popcount(live);
  }
  return n;
}
constexpr bool kWide = true;
#else
constexpr bool kWide = false;
inline int32_t* list_many_places(uint64_t word, int32_t base, int32_t* to) {
  return list_places(word, base, to);
}
inline uint32_t filled(const uint64_t* words) {
  uint32_t set = 0;
  for (int k = 0; k < 16; ++k) set |= uint32_t(words[k] != 0) << k;
  return set;
}
template <class T, class F>
inline int gather_word(const T*, uint64_t, F*) {
  return 0;
}
template <class T, class F>
inline int scatter_word(const F*, uint64_t, T*) {
  return 0;
}
#endif

template <class F, class T>
constexpr bool wide() {
  return kWide && (sizeof(F) == 4 || sizeof(T) == 8);
}

template <class T, class F>
inline void gather_words(const T* from, const uint64_t* words, int n, F* to) {
  for (int k = 0; k < n; k += 64, from += 64) {
    uint64_t word = words[k / 64];
    if constexpr (wide<F, T>()) {
      to += gather_word(from, word, to);
    } else {
      for_runs(word, [&](int place, int length) {
        for (int j = 0; j < length; ++j) *to++ = widen(from[place + j]);
      });
    }
  }
}

template <class T, class F>
inline void scatter_words(const F* from, const uint64_t* words, int n, T* to) {
  for (int k = 0; k < n; k += 64, to += 64) {
    uint64_t word = words[k / 64];
    if constexpr (wide<F, T>()) {
      from += scatter_word(from, word, to);
    } else {
      for_runs(word, [&](int place, int length) {
        for (int j = 0; j < length; ++j) to[place + j] = narrow<T>(*from++);
      });
    }
  }
}

// The live ones of the n elements from `place` on (with places: at the n places counted from it),
// in F: a pointer into the tensor itself where they lie there as they are needed, else `buffer`.
template <class F, class T>
inline F* gather_as(const T* from, Live live, int64_t n, F* buffer) {
  if (live.words) {
    gather_words(from, live.words, int(n), buffer);
  } else if (live.places) {
    for (int64_t j = 0; j < n; ++j) buffer[j] = widen(from[live.places[j]]);
  } else if constexpr (sizeof(F) == sizeof(T)) {
    return const_cast<F*>(from);
  } else {
    convert(from, buffer, n);
  }
  return buffer;
}

template <class F>
inline F* gather(const void* from, Dtype type, int64_t place, Live live, int64_t n, F* buffer) {
  switch (type) {
    case Dtype::f64:
      // double into float: only an anchor of a smaller parameter
      if constexpr (sizeof(F) == 8) {
        return gather_as(static_cast<const double*>(from) + place, live, n, buffer);
      } else {
        return nullptr;  // refused by the checks in cpu.cpp
      }
    case Dtype::f32:
      return gather_as(static_cast<const float*>(from) + place, live, n, buffer);
    case Dtype::bf16:
      return gather_as(static_cast<const bf16*>(from) + place, live, n, buffer);
    default:
      return gather_as(static_cast<const f16*>(from) + place, live, n, buffer);
  }
}

template <class T, class F>
inline void scatter_as(const F* from, Live live, int64_t n, T* to) {
  if (live.words) {
    scatter_words(from, live.words, int(n), to);
  } else if (live.places) {
    for (int64_t j = 0; j < n; ++j) to[live.places[j]] = narrow<T>(from[j]);
  } else {
    convert_back(from, to, n);
  }
}

template <class F>
inline void scatter(const F* from, void* to, Dtype type, int64_t place, Live live, int64_t n) {
  switch (type) {
    case Dtype::f64:
      if constexpr (sizeof(F) == 8) scatter_as(from, live, n, static_cast<double*>(to) + place);
      return;
    case Dtype::f32:
      if constexpr (sizeof(F) == 4) scatter_as(from, live, n, static_cast<float*>(to) + place);
      return;
    case Dtype::bf16:
      if constexpr (sizeof(F) == 4) scatter_as(from, live, n, static_cast<bf16*>(to) + place);
      return;
    default:
      if constexpr (sizeof(F) == 4) scatter_as(from, live, n, static_cast<f16*>(to) + place);
  }
}

}  // namespace
}  // namespace safeopt
