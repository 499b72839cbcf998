// The CPU walkers of scoring: plain loops that the compiler turns into vectors.
#pragma once

#include "cpu.h"
#include "score.h"

namespace safeopt {
namespace {

// Not inlined: the compiler forgets __restrict when it inlines, and then tests for overlap.
template <bool ABSOLUTE, class G>
__attribute__((noinline)) bool accumulate_as(float* __restrict total, const G* __restrict gradient,
                                             int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= accumulate<ABSOLUTE>(total[i], gradient[i]);
  return bad;
}

template <bool ABSOLUTE>
bool accumulate_any(float* total, const void* gradient, Dtype type, int64_t n) {
  switch (type) {
    case Dtype::f64:
      return accumulate_as<ABSOLUTE>(total, static_cast<const double*>(gradient), n);
    case Dtype::f32:
      return accumulate_as<ABSOLUTE>(total, static_cast<const float*>(gradient), n);
    case Dtype::bf16:
      return accumulate_as<ABSOLUTE>(total, static_cast<const bf16*>(gradient), n);
    default:
      return accumulate_as<ABSOLUTE>(total, static_cast<const f16*>(gradient), n);
  }
}

// Whether any of the n values is NaN or infinite; adds them to `total`.
bool accumulate_values(float* total, const void* gradient, Dtype type, bool absolute, int64_t n) {
  return absolute ? accumulate_any<true>(total, gradient, type, n)
                  : accumulate_any<false>(total, gradient, type, n);
}

constexpr int kWord = 64;  // keys in hand

// Four tables in turn: equal keys in a row would wait for each other's sums in one. The last place
// of each takes the keys that do not count, so that the loop has no branch to guess.
struct Tables {
  uint32_t counts[4][kMaxCounts + 1];
};

template <bool REVERSE>
void count_all(Tables& tables, const int32_t* keys, int64_t n, int shift, uint32_t low) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k)
      ++tables.counts[k][uint32_t(key_of<REVERSE>(keys[i + k])) >> shift & low];
  for (; i < n; ++i) ++tables.counts[0][uint32_t(key_of<REVERSE>(keys[i])) >> shift & low];
}

template <bool REVERSE>
void count_some(Tables& tables, const int32_t* keys, int64_t n, int shift, int width,
                int32_t prefix) {
  const uint32_t low = (1u << width) - 1;
  const int above = shift + width;
  for (int64_t i = 0; i < n; i += kWord) {
    const int length = n - i < kWord ? int(n - i) : kWord;
    const int32_t* at = keys + i;
    uint32_t found = 0;
    if (length == kWord) {
      for (int k = 0; k < kWord; ++k) found |= key_of<REVERSE>(at[k]) >> above == prefix;
      if (!found) continue;
    }
    for (int k = 0; k < length; ++k) {
      int32_t key = key_of<REVERSE>(at[k]);
      bool counts = key >> above == prefix;
      ++tables.counts[k & 3][counts ? uint32_t(key) >> shift & low : uint32_t(kMaxCounts)];
    }
  }
}

// Adds to the 2^width counts how often (key >> shift) % 2^width has each value, among keys whose
// bits above those are `prefix`.
template <bool REVERSE>
void count_keys(int64_t* counts, const int32_t* keys, int64_t n, int shift, int width,
                int32_t prefix) {
  constexpr int64_t most = int64_t(1) << 31;  // in a table of uint32
  for (int64_t i = 0; i < n; i += most) {
    int64_t length = n - i < most ? n - i : most;
    Tables tables;
    memset(&tables, 0, sizeof(tables));
    if (shift + width == kKeyBits) {
      count_all<REVERSE>(tables, keys + i, length, shift, (1u << width) - 1);
    } else {
      count_some<REVERSE>(tables, keys + i, length, shift, width, prefix);
    }
    for (int bin = 0; bin < 1 << width; ++bin)
      for (int k = 0; k < 4; ++k) counts[bin] += tables.counts[k][bin];
  }
}

void histogram(int64_t* counts, const int32_t* keys, int64_t n, int shift, int width,
               int32_t prefix, bool reverse) {
  reverse ? count_keys<true>(counts, keys, n, shift, width, prefix)
          : count_keys<false>(counts, keys, n, shift, width, prefix);
}

// Eight bytes of 0 or 1 to the bits of a byte: the product brings bit 8j to bit 56 + j.
inline uint8_t pack8(const uint8_t* flags) {
  uint64_t x;
  memcpy(&x, flags, 8);
  return uint8_t(x * 0x0102040810204080u >> 56);
}

template <bool REVERSE>
int64_t select_as(uint8_t* __restrict bits, const int32_t* __restrict keys, int64_t n,
                  int32_t threshold) {
  alignas(kWord) uint8_t flags[kWord];
  int64_t ties = 0;
  for (int64_t i = 0; i < n; i += kWord) {
    int32_t equal = 0;
    if (n - i >= kWord) {
      for (int k = 0; k < kWord; ++k) {
        int32_t key = key_of<REVERSE>(keys[i + k]);
        flags[k] = key > threshold;
        equal += key == threshold;
      }
      for (int k = 0; k < 8; ++k) bits[i / 8 + k] = pack8(flags + 8 * k);
    } else {
      memset(flags, 0, kWord);
      for (int k = 0; k < n - i; ++k) {
        int32_t key = key_of<REVERSE>(keys[i + k]);
        flags[k] = key > threshold;
        equal += key == threshold;
      }
      for (int k = 0; 8 * k < n - i; ++k) bits[i / 8 + k] = pack8(flags + 8 * k);
    }
    ties += equal;
  }
  return ties;
}

// Writes the bits of the keys above the threshold; the number of keys equal to it.
int64_t select_above(uint8_t* bits, const int32_t* keys, int64_t n, int32_t threshold,
                     bool reverse) {
  return reverse ? select_as<true>(bits, keys, n, threshold)
                 : select_as<false>(bits, keys, n, threshold);
}

// Sets the bits of the first `ties` keys equal to the threshold.
void select_ties(uint8_t* bits, const int32_t* keys, int64_t n, int32_t threshold, bool reverse,
                 int64_t ties) {
  const int32_t wanted = reverse ? kLargest - threshold : threshold;
  for (int64_t i = 0; i < n && ties > 0; i += kWord) {
    const int length = n - i < kWord ? int(n - i) : kWord;
    uint32_t found = 0;
    if (length == kWord) {
      for (int k = 0; k < kWord; ++k) found |= key_of<false>(keys[i + k]) == wanted;
      if (!found) continue;
    }
    for (int k = 0; k < length && ties > 0; ++k) {
      bool equal = key_of<false>(keys[i + k]) == wanted;
      bits[(i + k) / 8] |= uint8_t(uint32_t(equal) << ((i + k) & 7));
      ties -= equal;
    }
  }
}

}  // namespace
}  // namespace safeopt
