// Number types and their conversions, for host and device. No torch header, no library call.
//
// Everything in mask.h, number.h, adamw.h and score.h lives in an unnamed namespace: cpu_*.cpp
// compile these headers once per instruction set, and the copies must not be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SAFEOPT_HD __host__ __device__ __forceinline__
#else
#define SAFEOPT_HD inline __attribute__((always_inline))
#endif

namespace safeopt {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type the arithmetic is done in: double for double, float for all others.
template <class T>
struct Math {
  using type = float;
};
template <>
struct Math<double> {
  using type = double;
};

SAFEOPT_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

SAFEOPT_HD float from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

SAFEOPT_HD double widen(double x) { return x; }
SAFEOPT_HD float widen(float x) { return x; }
SAFEOPT_HD float widen(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }

SAFEOPT_HD float widen(f16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // Exponent and mantissa sit 13 bits to the left in a float; the multiplication moves the bias
  // from 15 to 127 and normalises subnormals. Infinity and NaN need the largest exponent put back.
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  uint32_t rest = x.bits & 0x7fff;
  float value = from_bits(rest << 13) * from_bits(uint32_t(254 - 15) << 23);
  uint32_t special = rest >= 0x7c00 ? 0x7f800000u | (rest << 13) : bits_of(value);
  return from_bits(special | sign);
#endif
}

// narrow<T>(x): rounds to nearest, ties to even; NaN stays NaN, overflow becomes infinity.
template <class T>
struct Narrow;

template <>
struct Narrow<double> {
  SAFEOPT_HD static double from(double x) { return x; }
};
template <>
struct Narrow<float> {
  SAFEOPT_HD static float from(double x) { return float(x); }
  SAFEOPT_HD static float from(float x) { return x; }
};
template <>
struct Narrow<bf16> {
  SAFEOPT_HD static bf16 from(float x) {
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    uint32_t quiet = (u >> 16) | 0x40;
    return {uint16_t((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded)};
#endif
  }
};
template <>
struct Narrow<f16> {
  SAFEOPT_HD static f16 from(float x) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(x))};
#else
    uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, size = u & 0x7fffffff;
    // Adding half of the last kept place (and the lowest kept bit) rounds a normal number.
    uint32_t normal = (size + 0xfff + ((size >> 13) & 1) - (uint32_t(127 - 15) << 23)) >> 13;
    // Adding 0.5 lets the float unit round a subnormal one at the right place, 2^-24.
    uint32_t subnormal = bits_of(from_bits(size) + 0.5f) - bits_of(0.5f);
    uint32_t half = size < (uint32_t(127 - 14) << 23) ? subnormal : normal;
    half = size >= 0x477ff000 ? 0x7c00 : half;
    half = size > 0x7f800000 ? 0x7e00 : half;
    return {uint16_t(sign | half)};
#endif
  }
};

template <class T, class F>
SAFEOPT_HD T narrow(F x) {
  return Narrow<T>::from(x);
}

}  // namespace
}  // namespace safeopt
