// The CUDA kernels of the AdamW step. Includes nothing of CUDA or torch: tests/csrc compiles it for
// the host, where it runs lane by lane.
#pragma once

#include "cuda_walk.h"

namespace safeopt {
namespace {

constexpr int kTensors = 16;  // per launch: what 4 KB of kernel parameters hold
constexpr int64_t kGroup =
    32;  // blocks of a tensor for one thread block: a warp reads one start each

// A number that a kernel needs: at `at` on the device, as float or double, or known to the host.
struct Number {
  void* at;
  double value;
  bool wide;

  __device__ double get() const {
    if (at == nullptr) return value;
    return wide ? *static_cast<const double*>(at) : double(*static_cast<const float*>(at));
  }

  __device__ void set(double x) const {
    if (wide) {
      *static_cast<double*>(at) = x;
    } else {
      *static_cast<float*>(at) = float(x);
    }
  }
};

// The tensors of a launch, all of the same types.
struct Batch {
  AdamwTensor tensors[kTensors];
  int64_t first_group[kTensors + 1];
  int count;
  Number found_inf;           // other than zero: nothing happens
  const Step<double>* steps;  // null: tensors[k].step
};

// What the numbers of a step come from, where one of them is on the device.
struct StepInputs {
  Number counts[kTensors];  // of steps; those on the device are raised here
  Pull pulls[kTensors];
  int count;
  Number lr, grad_scale, found_inf;
  double beta1, beta2, weight_decay, eps, strength;
  bool maximize;
  Step<double>* steps;
};

__global__ void __launch_bounds__(kLanes) step_kernel(const __grid_constant__ StepInputs in) {
  int k = threadIdx.x;
  if (k >= in.count) return;
  const Number& count = in.counts[k];
  double t = count.get();
  if (count.at) {
    t += 1;
    if (in.found_inf.get() == 0) count.set(t);
  }
  in.steps[k] = step_of<double>(t, in.lr.get(), in.beta1, in.beta2, in.weight_decay, in.eps,
                                in.maximize, in.grad_scale.get(), in.strength, in.pulls[k]);
}

// Fills a warp's table for the block from element i on; returns how many of its n are live.
__device__ inline int fill(Table& table, const Rule& rule, int64_t i, int n, int lane) {
  __syncwarp();  // all lanes are done with the last block's
  uint32_t word = word_at(rule, i + lane * kLanes, n - lane * kLanes);
  int upto = sum_upto(ones(word), lane);
  table.words[lane] = word;
  table.before[lane] = upto - ones(word);
  __syncwarp();
  return __shfl_sync(kAll, upto, kLanes - 1);
}

// A thread block takes a group of blocks of one tensor, each of its warps in turn a block that has
// live elements. State outside its tensor is never touched: a directory that does not belong to the
// mask, or to this state, stops the kernel.
template <class P, class S, bool EXTRA>
__global__ void __launch_bounds__(kThreads, EXTRA ? 2 : 3)
    adamw_kernel(const __grid_constant__ Batch batch) {
  __shared__ Table tables[kWarps];
  if (batch.found_inf.get() != 0) return;
  int which = 0;
  while (which + 1 < batch.count && batch.first_group[which + 1] <= blockIdx.x) ++which;
  const AdamwTensor& t = batch.tensors[which];
  const auto s = narrowed<typename Math<P>::type>(batch.steps ? batch.steps[which] : t.step);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t group = (blockIdx.x - batch.first_group[which]) * kGroup;
  const int64_t blocks = (t.numel + kBlock - 1) / kBlock;
  const bool inside = group + lane < blocks;
  const int64_t start = inside ? t.starts[group + lane] : 0;
  const int64_t end = inside ? t.starts[group + lane + 1] : 0;
  uint32_t todo = __ballot_sync(kAll, start != end);
  for (int turn = 0; todo; ++turn, todo &= todo - 1) {
    if (turn % kWarps != warp) continue;
    int k = __ffs(todo) - 1;
    const int64_t i = (group + k) * kBlock, first = __shfl_sync(kAll, start, k);
    const int64_t live = __shfl_sync(kAll, end, k) - first;
    const int n = t.numel - i < kBlock ? int(t.numel - i) : int(kBlock);
    if (first < 0 || live < 0 || live > n || first + live > t.states) __trap();
    bool packs = in_packs<P, S>(t, i, first, int(live));
    if (!packs && fill(tables[warp], t.rule, i, n, lane) != live) __trap();
    step_lane<P, S, EXTRA>(t, s, i, first, int(live), lane, packs, &tables[warp]);
  }
}

}  // namespace
}  // namespace safeopt
