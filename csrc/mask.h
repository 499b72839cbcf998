// The bit rule: element i is ruled by bit ((i + offset) / span) % nbits, little-endian in the byte.
#pragma once

#include "number.h"

namespace safeopt {

// Elements per entry of the directory `starts`: starts[b] live elements come before element
// b * kBlock. The compact state of block b begins there.
constexpr int64_t kBlock = 1024;

struct Rule {
  const uint8_t* bits;
  int64_t span, nbits, offset;
  bool live_bit;
};

namespace {

SAFEOPT_HD bool live(const Rule& rule, int64_t i) {
  int64_t bit = ((i + rule.offset) / rule.span) % rule.nbits;
  return bool(rule.bits[bit >> 3] >> (bit & 7) & 1) == rule.live_bit;
}

SAFEOPT_HD uint64_t first_bits(int64_t n) {
  return n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1;
}

// The n <= 64 bits from `first` on, not reading beyond the byte that holds bit first + n - 1.
SAFEOPT_HD uint64_t bits_at(const uint8_t* bits, int64_t first, int n) {
  const uint8_t* from = bits + (first >> 3);
  int shift = int(first & 7), bytes = (shift + n + 7) >> 3;
  uint64_t word = 0;
#ifndef __CUDA_ARCH__
  if (bytes >= 8) {
    memcpy(&word, from, 8);  // hosts and devices torch runs on are little-endian
  } else
#endif
    for (int k = 0; k < bytes && k < 8; ++k) word |= uint64_t(from[k]) << (8 * k);
  word >>= shift;
  if (bytes == 9) word |= uint64_t(from[8]) << (64 - shift);
  return word & first_bits(n);
}

// Bit k is set where element i + k is live, for the n <= 64 elements from i on. `unit` is the unit
// of element i, if the caller knows it.
SAFEOPT_HD uint64_t live_word(const Rule& rule, int64_t i, int n, int64_t unit) {
  uint64_t word = 0;
  int64_t within = rule.span == 1 ? 0 : (i + rule.offset) % rule.span;
  int done = 0;
  while (done < n) {
    int take;
    uint64_t piece;
    if (rule.span == 1) {  // up to the end of the period
      take = int(rule.nbits - unit < n - done ? rule.nbits - unit : n - done);
      piece = bits_at(rule.bits, unit, take);
      unit += take;
    } else {  // up to the end of the unit
      take = int(rule.span - within < n - done ? rule.span - within : n - done);
      bool set = rule.bits[unit >> 3] >> (unit & 7) & 1;
      piece = set ? first_bits(take) : 0;
      within = 0;
      ++unit;
    }
    if (unit >= rule.nbits) unit = 0;
    word |= piece << done;
    done += take;
  }
  if (!rule.live_bit) word = ~word;
  return word & first_bits(n);
}

SAFEOPT_HD uint64_t live_word(const Rule& rule, int64_t i, int n) {
  return live_word(rule, i, n, (i + rule.offset) / rule.span % rule.nbits);
}

// The words of a whole block of n <= kBlock elements; divides once.
SAFEOPT_HD void live_words(const Rule& rule, int64_t i, int n, uint64_t* words) {
  int64_t at = i + rule.offset, unit = at;
  if (rule.span != 1 || at >= rule.nbits) unit = at / rule.span % rule.nbits;  // slow
  int k = 0;
  if (rule.span == 1 && unit % 8 == 0) {  // one bit per element: mostly whole words as they lie
    const uint8_t* from = rule.bits + unit / 8;
    uint64_t flip = rule.live_bit ? 0 : ~uint64_t(0);
    for (; k + 64 <= n && unit + 64 <= rule.nbits; k += 64, unit += 64, from += 8) {
      memcpy(words + k / 64, from, 8);
      words[k / 64] ^= flip;
    }
    if (unit == rule.nbits) unit = 0;
  }
  for (; k < n; k += 64) {
    words[k / 64] = live_word(rule, i + k, n - k < 64 ? n - k : 64, unit);
    if (rule.span == 1) {
      unit += 64;
      while (unit >= rule.nbits) unit -= rule.nbits;
    } else {
      unit = (at + k + 64) / rule.span % rule.nbits;
    }
  }
}

}  // namespace
}  // namespace safeopt
