// From the arguments of the scoring ops to what the walkers read, checked, for CPU and CUDA. The
// arguments and their order are those of the schemas in safeopt/ops/scoring.py.
#pragma once

#include "launch.h"
#include "score.h"

namespace safeopt {

inline void expect(const char* name, const Tensor& tensor, ScalarType type, const Tensor& beside) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous(), name,
                  " must be a contiguous ", toString(type), " tensor, got ",
                  toString(tensor.scalar_type()), tensor.is_contiguous() ? "" : ", not contiguous");
  bool together = tensor.is_cpu()
                      ? beside.is_cpu()
                      : !beside.is_cpu() && tensor.get_device_index() == beside.get_device_index();
  STD_TORCH_CHECK(together, name, " must be on the device of the other arguments");
}

inline void expect_numel(const char* name, const Tensor& tensor, int64_t numel) {
  STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " elements, got ",
                  tensor.numel());
}

struct AccumulateCall {
  AccumulateCall(const Tensor& sum, const Tensor& added, const Tensor& flag)
      : type(dtype_of(added, "esi_accumulate_: gradient")), n(sum.numel()), rows(added) {
    expect("total", sum, ScalarType::Float, added);
    expect("bad", flag, ScalarType::Int, added);
    expect_numel("bad", flag, 1);
    bool equal = sum.dim() == added.dim();
    for (int64_t d = 0; equal && d < sum.dim(); ++d) equal = sum.size(d) == added.size(d);
    STD_TORCH_CHECK(equal, "esi_accumulate_: gradient and total must have equal shapes, got ",
                    added.numel(), " elements in ", added.dim(), " dimensions for ", n, " in ",
                    sum.dim());
    total = static_cast<float*>(sum.data_ptr());
    gradient = rows.data();
    bad = static_cast<int32_t*>(flag.data_ptr());
  }

  float* total;
  const void* gradient;
  Dtype type;
  int32_t* bad;
  int64_t n;

 private:
  RowMajor rows;  // keeps the copy of a gradient that is not contiguous
};

struct HistogramCall {
  HistogramCall(const Tensor& table, const Tensor& keyed, int64_t shift, int64_t prefix)
      : n(keyed.numel()), size(table.numel()), shift(int(shift)), prefix(int32_t(prefix)) {
    expect("counts", table, ScalarType::Long, keyed);
    expect("keys", keyed, ScalarType::Int, keyed);
    STD_TORCH_CHECK(2 <= size && size <= kMaxCounts && (size & (size - 1)) == 0,
                    "key_histogram_: counts has ", size,
                    " entries; give a power of two from 2 to 2048");
    while (int64_t(1) << width < size) ++width;
    STD_TORCH_CHECK(0 <= shift && shift <= kKeyBits - width, "key_histogram_: shift is ", shift,
                    "; for ", size, " counts it must be 0 to ", kKeyBits - width);
    counts = static_cast<int64_t*>(table.data_ptr());
    keys = static_cast<const int32_t*>(keyed.data_ptr());
  }

  int64_t* counts;
  const int32_t* keys;
  int64_t n, size;
  int shift, width = 0;
  int32_t prefix;
};

struct SelectCall {
  SelectCall(const Tensor& mask, const Tensor& keyed, const Tensor& left, int64_t threshold)
      : n(keyed.numel()), threshold(int32_t(threshold)) {
    expect("keys", keyed, ScalarType::Int, keyed);
    expect("bits", mask, ScalarType::Byte, keyed);
    expect_numel("bits", mask, (n + 7) / 8);
    expect("ties", left, ScalarType::Long, keyed);
    expect_numel("ties", left, 1);
    STD_TORCH_CHECK(0 <= threshold && threshold <= kLargest, "select_bits_: threshold is ",
                    threshold, "; it must be a key, 0 to ", kLargest);
    bits = static_cast<uint8_t*>(mask.data_ptr());
    keys = static_cast<const int32_t*>(keyed.data_ptr());
    ties = static_cast<int64_t*>(left.data_ptr());
  }

  uint8_t* bits;
  const int32_t* keys;
  int64_t* ties;
  int64_t n;
  int32_t threshold;
};

}  // namespace safeopt
