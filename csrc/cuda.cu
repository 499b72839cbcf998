// safeopt::masked_adamw_ on CUDA: gathers tensors of the same types into launches.
//
// Nothing is read back from the device and nothing copied to it, so that a step can be captured in
// a CUDA graph: numbers that are on the device are read there, by step_kernel.
#include <torch/csrc/stable/library.h>

#include <map>

#include "cuda_launch.h"
#include "launch.h"

#include "cuda_adamw.h"

namespace safeopt {
namespace {

static_assert(sizeof(Batch) <= 4096 && sizeof(StepInputs) <= 4096);

void check_devices(const AdamwArguments& a, const Device& device) {
  const std::pair<const char*, const Tensors*> lists[] = {{"a parameter", &a.params},
                                                          {"a gradient", &a.grads},
                                                          {"exp_avg", &a.exp_avgs},
                                                          {"exp_avg_sq", &a.exp_avg_sqs},
                                                          {"bits", &a.bits},
                                                          {"max_exp_avg_sq", &a.max_exp_avg_sqs},
                                                          {"starts", &a.starts},
                                                          {"an anchor", &a.anchors},
                                                          {"shares of the pull", &a.shares}};
  for (const auto& [what, list] : lists)
    for (const Tensor& tensor : *list) device.check(tensor, what);
}

// Of a number on the CPU its value, of one on the device its place.
Number number_of(const std::optional<Tensor>& tensor, double otherwise, const char* what,
                 const Device& device) {
  if (!tensor) return {nullptr, otherwise, false};
  if (tensor->is_cpu()) return {nullptr, number_in(*tensor, what), false};
  device.check(*tensor, what);
  ScalarType type = tensor->scalar_type();
  STD_TORCH_CHECK(tensor->numel() == 1 && (type == ScalarType::Float || type == ScalarType::Double),
                  what, " must be one float32 or float64 number");
  return {tensor->data_ptr(), 0, type == ScalarType::Double};
}

template <class P, class S>
auto kernel_for(bool extra) {
  return extra ? adamw_kernel<P, S, true> : adamw_kernel<P, S, false>;
}

auto kernel_for(Dtype type, bool wide_state, bool extra) {
  switch (type) {
    case Dtype::f64:
      return kernel_for<double, double>(extra);
    case Dtype::f32:
      return kernel_for<float, float>(extra);
    case Dtype::bf16:
      return wide_state ? kernel_for<bf16, float>(extra) : kernel_for<bf16, bf16>(extra);
    default:
      return wide_state ? kernel_for<f16, float>(extra) : kernel_for<f16, f16>(extra);
  }
}

// A launch in the making: tensors that run the same kernel.
class Launch {
 public:
  Launch(const AdamwArguments& a, const Device& device, const Number& found_inf)
      : a_(a), device_(device) {
    inputs_.lr = number_of(a.lr_tensor, a.lr, "lr", device);
    inputs_.grad_scale = number_of(a.grad_scale, 1, "grad_scale", device);
    inputs_.found_inf = batch_.found_inf = found_inf;
    inputs_.beta1 = a.beta1;
    inputs_.beta2 = a.beta2;
    inputs_.weight_decay = a.weight_decay;
    inputs_.eps = a.eps;
    inputs_.strength = a.anchor_strength;
    inputs_.maximize = a.maximize;
  }

  void add(const AdamwTensor& t, const Number& count) {
    int k = batch_.count++;
    int64_t blocks = t.states == 0 ? 0 : (t.numel + kBlock - 1) / kBlock;
    batch_.tensors[k] = t;
    batch_.first_group[k + 1] = batch_.first_group[k] + (blocks + kGroup - 1) / kGroup;
    inputs_.counts[k] = count;
    inputs_.pulls[k] = t.pull;
    on_device_ = on_device_ || count.at;
    if (batch_.count == kTensors) run();
  }

  void run() {
    if (batch_.count == 0) return;
    Tensor memory = a_.params[0];
    if (on_device_ || inputs_.lr.at || inputs_.grad_scale.at) {
      constexpr int64_t numbers = kTensors * sizeof(Step<double>) / sizeof(double);
      memory = torch::stable::new_empty(memory, {numbers}, ScalarType::Double);
      inputs_.steps = static_cast<Step<double>*>(memory.data_ptr());
      inputs_.count = batch_.count;
      device_.launch("step_kernel", step_kernel, 1, kLanes, inputs_);
    } else {
      for (int k = 0; k < batch_.count; ++k)
        batch_.tensors[k].step = step_of<double>(
            inputs_.counts[k].value, inputs_.lr.value, a_.beta1, a_.beta2, a_.weight_decay, a_.eps,
            a_.maximize, inputs_.grad_scale.value, a_.anchor_strength, inputs_.pulls[k]);
    }
    batch_.steps = inputs_.steps;
    const AdamwTensor& t = batch_.tensors[0];
    bool extra = a_.amsgrad || t.pull != Pull::none;
    device_.launch("adamw_kernel", kernel_for(t.p_type, t.state_type != t.p_type, extra),
                   batch_.first_group[batch_.count], kThreads, batch_);
    batch_.count = 0;
    on_device_ = false;
    inputs_.steps = nullptr;
  }

 private:
  const AdamwArguments& a_;
  const Device& device_;
  Batch batch_ = {};
  StepInputs inputs_ = {};
  bool on_device_ = false;  // the count of a tensor
};

}  // namespace

void adamw_step(const AdamwArguments& a) {
  Device device(a.params[0]);
  check_devices(a, device);
  Number found_inf = number_of(a.found_inf, 0, "found_inf", device);
  if (found_inf.at == nullptr && found_inf.value != 0) return;
  for (const Tensor& step : a.steps)
    STD_TORCH_CHECK(!found_inf.at || !step.is_cpu(),
                    "found_inf is on the GPU, and a step count on ",
                    "the CPU, which could not follow it without waiting; use fused=True or ",
                    "capturable=True, which keep the step counts on the GPU");
  AdamwCall call(a);
  const Launch empty(a, device, found_inf);
  std::map<std::pair<Dtype, Dtype>, Launch> launches;  // by the types of weights and state
  for (size_t i = 0; i < call.tensors.size(); ++i) {
    const AdamwTensor& t = call.tensors[i];
    Number count = a.steps[i].is_cpu() ? Number{nullptr, advance(a.steps[i]), false}
                                       : number_of(a.steps[i], 0, "a step count", device);
    launches.emplace(std::pair(t.p_type, t.state_type), empty).first->second.add(t, count);
  }
  for (auto& entry : launches) entry.second.run();
  call.write_back();
}

STABLE_TORCH_LIBRARY_IMPL(safeopt, CUDA, m) {
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_<double>));
  m.impl("masked_adamw_.tensor_lr", TORCH_BOX(&masked_adamw_<Tensor>));
}

}  // namespace safeopt
