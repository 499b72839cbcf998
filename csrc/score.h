// One element of scoring, for the CPU walkers and the CUDA walkers.
#pragma once

#include "number.h"

namespace safeopt {
namespace {

constexpr int32_t kLargest = 0x7f7fffff;  // the bits of the largest finite float
constexpr int kKeyBits = 31;
constexpr int kMaxCounts = 2048;  // of a histogram

// Adds a gradient, or its absolute value, to a sum; 1 if it is NaN or infinite as a float, else 0.
template <bool ABSOLUTE, class G>
SAFEOPT_HD uint32_t accumulate(float& total, G gradient) {
  float g = float(widen(gradient));
  uint32_t size = bits_of(g) & 0x7fffffff;
  total += ABSOLUTE ? from_bits(size) : g;
  return size >= 0x7f800000;
}

// What selection orders by, from the bits of a score: non-negative floats order like their bits.
// Without the sign bit -0.0 is 0.0. Negative for NaN and infinity reversed.
template <bool REVERSE>
SAFEOPT_HD int32_t key_of(int32_t bits) {
  int32_t key = bits & 0x7fffffff;
  return REVERSE ? kLargest - key : key;
}

}  // namespace
}  // namespace safeopt
