// What the CPU walkers offer: one set of kernels per instruction set, the same source each.
#pragma once

#include <cstdint>

#include "adamw.h"
#include "mask.h"

namespace safeopt {

enum class Dtype : int32_t { f32, f64, bf16, f16 };

// One tensor of a step. The moments are compact: one value per live element, in order.
struct AdamwTensor {
  void* p;
  const void* g;
  void *m, *v, *v_max;  // v_max: null unless amsgrad
  const void* anchor;   // null unless there is a pull
  const float* share;   // strength of the pull per element; null: 1 everywhere
  Dtype p_type, g_type, state_type, anchor_type;
  int64_t numel, states;  // states: values in m
  const int64_t* starts;
  Rule rule;
  Step<double> step;
  Pull pull;
};

struct CpuKernels {
  const char* isa;
  // The step of the blocks first .. end - 1 (kBlock elements each).
  void (*adamw)(const AdamwTensor& tensor, int64_t first, int64_t end);
  // Scoring: see cpu_score.h.
  bool (*accumulate)(float* total, const void* gradient, Dtype type, bool absolute, int64_t n);
  void (*histogram)(int64_t* counts, const int32_t* keys, int64_t n, int shift, int width,
                    int32_t prefix, bool reverse);
  int64_t (*select_above)(uint8_t* bits, const int32_t* keys, int64_t n, int32_t threshold,
                          bool reverse);
  void (*select_ties)(uint8_t* bits, const int32_t* keys, int64_t n, int32_t threshold,
                      bool reverse, int64_t ties);
};

extern const CpuKernels cpu_base, cpu_avx2, cpu_avx512;

const CpuKernels& cpu_kernels();  // the best set for this machine

}  // namespace safeopt
