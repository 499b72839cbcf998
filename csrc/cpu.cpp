// safeopt::masked_adamw_ on the CPU: picks the instruction set, spreads the blocks over the
// threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "launch.h"

namespace safeopt {

namespace {

bool runs(const CpuKernels& kernels) {
#ifdef SAFEOPT_X86
  if (&kernels == &cpu_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           runs(cpu_avx2);
  if (&kernels == &cpu_avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("f16c");
#endif
  return &kernels == &cpu_base;
}

const CpuKernels* all_kernels[] = {
#ifdef SAFEOPT_X86
    &cpu_avx512, &cpu_avx2,
#endif
    &cpu_base};

const CpuKernels* best() {
  for (const CpuKernels* kernels : all_kernels)
    if (runs(*kernels)) return kernels;
  return &cpu_base;
}

const CpuKernels* chosen = best();

}  // namespace

const CpuKernels& cpu_kernels() { return *chosen; }

namespace {

struct Task {
  const AdamwTensor* tensor;
  int64_t first, end;
};

constexpr int64_t kBlocksPerTask = 64;  // 256 kB of float32: small beside a thread's share
constexpr int64_t kAlone = 1 << 14;     // live elements that are not worth waking threads for

void run(const std::vector<AdamwTensor>& tensors) {
  std::vector<Task> tasks;
  int64_t total = 0;
  for (const AdamwTensor& t : tensors) {
    int64_t blocks = (t.numel + kBlock - 1) / kBlock;
    total += t.starts[blocks];
    for (int64_t b = 0; b < blocks; b += kBlocksPerTask) {
      int64_t end = std::min(b + kBlocksPerTask, blocks);
      if (t.starts[end] > t.starts[b]) tasks.push_back({&t, b, end});
    }
  }
  auto adamw = cpu_kernels().adamw;
  std::atomic<size_t> next{0};
  // Threads fetch tasks one at a time: where the live blocks lie together, equal shares would leave
  // all the work to one of them.
  auto work = [&](int64_t, int64_t) {
    for (size_t k; (k = next.fetch_add(1)) < tasks.size();)
      adamw(*tasks[k].tensor, tasks[k].first, tasks[k].end);
  };
  int64_t threads = total < kAlone ? 1 : torch::stable::get_num_threads();
  threads = std::min(threads, int64_t(tasks.size()));
  if (threads <= 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
}

}  // namespace

void adamw_step(const AdamwArguments& a) {
  if (a.found_inf && number_in(*a.found_inf, "found_inf") != 0) return;
  AdamwCall call(a);
  double lr = a.lr_tensor ? number_in(*a.lr_tensor, "lr") : a.lr;
  double scale = a.grad_scale ? number_in(*a.grad_scale, "grad_scale") : 1;
  for (const AdamwTensor& t : call.tensors) {
    int64_t live = t.starts[(t.numel + kBlock - 1) / kBlock];
    STD_TORCH_CHECK(live == t.states, "exp_avg has ", t.states, " values for ", live,
                    " live elements");
  }
  for (const Tensor& step : a.steps) number_in(step, "a step count");  // all, before one is raised
  for (size_t i = 0; i < call.tensors.size(); ++i) {
    AdamwTensor& t = call.tensors[i];
    t.step = step_of<double>(advance(a.steps[i]), lr, a.beta1, a.beta2, a.weight_decay, a.eps,
                             a.maximize, scale, a.anchor_strength, t.pull);
  }
  run(call.tensors);
  call.write_back();
}

STABLE_TORCH_LIBRARY_IMPL(safeopt, CPU, m) {
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_<double>));
  m.impl("masked_adamw_.tensor_lr", TORCH_BOX(&masked_adamw_<Tensor>));
}

}  // namespace safeopt

#define SAFEOPT_EXPORT extern "C" __attribute__((visibility("default")))

SAFEOPT_EXPORT const char* safeopt_cpu_isa() { return safeopt::cpu_kernels().isa; }

// For tests: chooses another instruction set; false if there is none of that name on this machine.
SAFEOPT_EXPORT bool safeopt_use_cpu_isa(const char* isa) {
  for (const safeopt::CpuKernels* kernels : safeopt::all_kernels) {
    if (!safeopt::runs(*kernels) || std::string(kernels->isa) != isa) continue;
    safeopt::chosen = kernels;
    return true;
  }
  return false;
}
