// The scoring ops on CUDA.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cuda_launch.h"
#include "scoring.h"

#include "cuda_score.h"

namespace safeopt {
namespace {

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class G, int V>
void accumulate(const Device& device, const AccumulateCall& call, bool absolute) {
  // At least one block, for the values that do not fill a pack.
  int64_t blocks = std::max<int64_t>(1, parts(call.n / V, kThreads * kTurns));
  device.launch("accumulate_kernel", accumulate_kernel<G, V>, blocks, kThreads, call.total,
                static_cast<const G*>(call.gradient), call.n, call.bad, absolute);
}

template <class G>
void accumulate(const Device& device, const AccumulateCall& call, bool absolute) {
  constexpr int V = 4;  // floats in 16 bytes
  auto fits = [](const void* at, size_t unit) {
    return reinterpret_cast<uintptr_t>(at) % unit == 0;
  };
  bool packs =
      fits(call.total, alignof(Pack<float, V>)) && fits(call.gradient, alignof(Pack<G, V>));
  packs ? accumulate<G, V>(device, call, absolute) : accumulate<G, 1>(device, call, absolute);
}

void esi_accumulate_(Tensor total, Tensor gradient, Tensor bad, bool absolute) {
  Device device(total);
  AccumulateCall call(total, gradient, bad);
  if (call.n == 0) return;
  switch (call.type) {
    case Dtype::f64:
      return accumulate<double>(device, call, absolute);
    case Dtype::f32:
      return accumulate<float>(device, call, absolute);
    case Dtype::bf16:
      return accumulate<bf16>(device, call, absolute);
    case Dtype::f16:
      return accumulate<f16>(device, call, absolute);
  }
}

void key_histogram_(Tensor counts, Tensor keys, int64_t shift, int64_t prefix, bool reverse) {
  Device device(counts);
  HistogramCall call(counts, keys, shift, prefix);
  device.launch("histogram_kernel", histogram_kernel,
                std::min(kCounting, parts(call.n, kThreads * kKeys)), kThreads,
                reinterpret_cast<unsigned long long*>(call.counts), call.keys, call.n, call.shift,
                call.width, call.prefix, reverse);
}

void select_bits_(Tensor bits, Tensor keys, Tensor ties, int64_t threshold, bool reverse) {
  Device device(bits);
  SelectCall call(bits, keys, ties, threshold);
  if (call.n == 0) return;
  const int64_t chunks = parts(call.n, kChunk), blocks = parts(chunks, kWarps);
  Tensor scratch = torch::stable::new_empty(keys, {chunks}, ScalarType::Int);
  int32_t* tied = static_cast<int32_t*>(scratch.data_ptr());
  device.launch("count_ties_kernel", count_ties_kernel, blocks, kThreads, tied, call.ties,
                call.keys, call.n, call.threshold, reverse);
  device.launch("share_kernel", share_kernel, 1, kSharing, tied, chunks, call.ties);
  device.launch("select_kernel", select_kernel, blocks, kThreads, call.bits, tied, call.keys,
                call.n, call.threshold, reverse);
}

STABLE_TORCH_LIBRARY_IMPL(safeopt, CUDA, m) {
  m.impl("esi_accumulate_", TORCH_BOX(&esi_accumulate_));
  m.impl("key_histogram_", TORCH_BOX(&key_histogram_));
  m.impl("select_bits_", TORCH_BOX(&select_bits_));
}

}  // namespace
}  // namespace safeopt
