// The scoring ops on the CPU: spreads blocks over the threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "scoring.h"

namespace safeopt {
namespace {

constexpr int64_t kShare = 1 << 16;  // elements: fewer are not worth waking a thread for

// Calls work(first, length) for shares of n elements, on all threads.
template <class Work>
void for_shares(int64_t n, const Work& work) {
  torch::stable::parallel_for(0, (n + kShare - 1) / kShare, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) work(k * kShare, std::min(kShare, n - k * kShare));
  });
}

void esi_accumulate_(Tensor total, Tensor gradient, Tensor bad, bool absolute) {
  AccumulateCall call(total, gradient, bad);
  auto accumulate = cpu_kernels().accumulate;
  const int64_t size = int64_t(gradient.element_size());
  std::atomic<bool> spoiled{false};
  for_shares(call.n, [&](int64_t first, int64_t length) {
    auto from = static_cast<const char*>(call.gradient) + first * size;
    if (accumulate(call.total + first, from, call.type, absolute, length)) spoiled = true;
  });
  if (spoiled) *call.bad = 1;
}

void key_histogram_(Tensor counts, Tensor keys, int64_t shift, int64_t prefix, bool reverse) {
  HistogramCall call(counts, keys, shift, prefix);
  auto histogram = cpu_kernels().histogram;
  int64_t threads = torch::stable::get_num_threads();
  int64_t parts = std::max<int64_t>(1, std::min(threads, call.n / kShare));
  std::vector<int64_t> tables(parts * call.size);  // one each, so that threads do not meet
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      int64_t first = call.n / parts * k, last = k + 1 == parts ? call.n : call.n / parts * (k + 1);
      histogram(tables.data() + k * call.size, call.keys + first, last - first, call.shift,
                call.width, call.prefix, reverse);
    }
  });
  for (int64_t k = 0; k < parts; ++k)
    for (int64_t bin = 0; bin < call.size; ++bin) call.counts[bin] += tables[k * call.size + bin];
}

void select_bits_(Tensor bits, Tensor keys, Tensor ties, int64_t threshold, bool reverse) {
  SelectCall call(bits, keys, ties, threshold);
  const CpuKernels& kernels = cpu_kernels();
  std::vector<int64_t> tied((call.n + kShare - 1) / kShare);
  for_shares(call.n, [&](int64_t first, int64_t length) {
    tied[first / kShare] = kernels.select_above(call.bits + first / 8, call.keys + first, length,
                                                call.threshold, reverse);
  });
  if (*call.ties <= 0) return;
  for (int64_t& count : tied) {  // from how many there are to how many are taken
    count = std::min(count, *call.ties);
    *call.ties -= count;
  }
  for_shares(call.n, [&](int64_t first, int64_t length) {
    if (int64_t take = tied[first / kShare])
      kernels.select_ties(call.bits + first / 8, call.keys + first, length, call.threshold, reverse,
                          take);
  });
}

STABLE_TORCH_LIBRARY_IMPL(safeopt, CPU, m) {
  m.impl("esi_accumulate_", TORCH_BOX(&esi_accumulate_));
  m.impl("key_histogram_", TORCH_BOX(&key_histogram_));
  m.impl("select_bits_", TORCH_BOX(&select_bits_));
}

}  // namespace
}  // namespace safeopt
