// From the arguments of safeopt::masked_adamw_ to what the walkers read, checked, for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <utility>
#include <vector>

#include "cpu.h"

namespace safeopt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

struct AdamwArguments {
  Tensors params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps;
  Tensors bits, starts;
  Integers spans, nbits, offsets;
  Tensors anchors, shares;
  bool live_bit;
  double lr;
  std::optional<Tensor> lr_tensor;  // takes the place of lr
  double beta1, beta2, weight_decay, eps;
  bool amsgrad, maximize;
  double anchor_strength;
  bool anchor_decoupled;
  std::optional<Tensor> grad_scale, found_inf;
};

// What a device must offer: one step of all the tensors.
void adamw_step(const AdamwArguments& arguments);

inline Dtype dtype_of(const Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, what, " has dtype ", toString(tensor.scalar_type()),
                      "; it must be float32, float64, bfloat16 or float16");
  }
  return Dtype::f32;
}

inline double number_in(const Tensor& tensor, const char* what) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == 1, what,
                  " must be one number on the CPU for parameters on the CPU");
  if (tensor.scalar_type() == ScalarType::Double) return *static_cast<double*>(tensor.data_ptr());
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, what, " must be float32 or float64");
  return *static_cast<float*>(tensor.data_ptr());
}

// Counts a step on the CPU in place and returns its number.
inline double advance(const Tensor& step) {
  double t = number_in(step, "a step count") + 1;
  if (step.scalar_type() == ScalarType::Double) {
    *static_cast<double*>(step.data_ptr()) = t;
  } else {
    *static_cast<float*>(step.data_ptr()) = float(t);
  }
  return t;
}

// A tensor's elements in row-major order: its own memory where it lies so, else a copy, which
// `write_back` returns to its place.
class RowMajor {
 public:
  explicit RowMajor(const Tensor& tensor)
      : own_(tensor), flat_(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor)) {}
  void* data() const { return flat_.data_ptr(); }
  void write_back() {
    if (!own_.is_contiguous()) torch::stable::copy_(own_, flat_);
  }

 private:
  Tensor own_, flat_;
};

// The tensors of a call as the walkers read them. `steps` and hyper-parameters are the device's.
class AdamwCall {
 public:
  explicit AdamwCall(const AdamwArguments& a) : a_(a) {
    size_t n = a.params.size();
    check_lengths(n);
    tensors.resize(n);
    for (size_t i = 0; i < n; ++i) fill(i);
  }

  void write_back() {
    for (RowMajor& tensor : written_) tensor.write_back();
  }

  std::vector<AdamwTensor> tensors;

 private:
  void check_lengths(size_t n) const {
    for (const Tensors* list :
         {&a_.grads, &a_.exp_avgs, &a_.exp_avg_sqs, &a_.steps, &a_.bits, &a_.starts})
      STD_TORCH_CHECK(list->size() == n, "one entry per parameter is needed: ", list->size(),
                      " for ", n, " parameters");
    for (const Integers* list : {&a_.spans, &a_.nbits, &a_.offsets})
      STD_TORCH_CHECK(list->size() == n, "one entry per parameter is needed: ", list->size(),
                      " for ", n, " parameters");
    for (const Tensors* list : {&a_.max_exp_avg_sqs, &a_.anchors, &a_.shares})
      STD_TORCH_CHECK(list->empty() || list->size() == n, "one entry per parameter, or none, is ",
                      "needed: ", list->size(), " for ", n, " parameters");
    STD_TORCH_CHECK(!a_.amsgrad || a_.max_exp_avg_sqs.size() == n,
                    "amsgrad needs max_exp_avg_sqs for every parameter");
    STD_TORCH_CHECK(a_.shares.empty() || !a_.anchors.empty(), "shares need anchors");
  }

  void* written(const Tensor& tensor) {
    written_.emplace_back(tensor);
    return written_.back().data();
  }

  const void* read(const Tensor& tensor) {
    read_.emplace_back(tensor);
    return read_.back().data();
  }

  void* moment(const Tensor& tensor, const AdamwTensor& t, const char* what) {
    Dtype type = dtype_of(tensor, what);
    bool allowed = type == t.p_type || (type == Dtype::f32 && t.p_type != Dtype::f64);
    STD_TORCH_CHECK(allowed && type == t.state_type, what,
                    " must have the parameter's dtype or float32, the same for all moments");
    STD_TORCH_CHECK(tensor.numel() == t.states, what,
                    " must hold one value per live element: it has ", tensor.numel(),
                    ", the first moment ", t.states);
    return written(tensor);
  }

  void fill(size_t i) {
    AdamwTensor& t = tensors[i];
    const Tensor& p = a_.params[i];
    t.p_type = dtype_of(p, "a parameter");
    t.g_type = dtype_of(a_.grads[i], "a gradient");
    t.state_type = dtype_of(a_.exp_avgs[i], "exp_avg");
    t.numel = p.numel();
    narrow_enough(t.g_type, t, "a gradient");
    STD_TORCH_CHECK(a_.grads[i].numel() == t.numel, "a gradient has ", a_.grads[i].numel(),
                    " elements, its parameter ", t.numel);
    t.p = written(p);
    t.g = read(a_.grads[i]);
    t.states = a_.exp_avgs[i].numel();
    t.m = moment(a_.exp_avgs[i], t, "exp_avg");
    t.v = moment(a_.exp_avg_sqs[i], t, "exp_avg_sq");
    t.v_max = a_.amsgrad ? moment(a_.max_exp_avg_sqs[i], t, "max_exp_avg_sq") : nullptr;
    fill_rule(i, t);
    fill_anchor(i, t);
  }

  static void narrow_enough(Dtype type, const AdamwTensor& t, const char* what) {
    STD_TORCH_CHECK(type != Dtype::f64 || t.p_type == Dtype::f64, what,
                    " is float64 and its parameter is not; convert it to the parameter's dtype");
  }

  void fill_rule(size_t i, AdamwTensor& t) {
    int64_t blocks = (t.numel + kBlock - 1) / kBlock;
    const Tensor &bits = a_.bits[i], &starts = a_.starts[i];
    STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.is_contiguous() &&
                        a_.spans[i] > 0 && a_.nbits[i] > 0 && a_.offsets[i] >= 0 &&
                        bits.numel() * 8 >= a_.nbits[i],
                    "bits must be contiguous uint8 with room for nbits ", a_.nbits[i],
                    ", with span >= 1 and offset >= 0");
    STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Long && starts.is_contiguous() &&
                        starts.numel() == blocks + 1,
                    "starts must be contiguous int64 with ", blocks + 1, " entries (live_starts)");
    t.rule = {static_cast<const uint8_t*>(bits.data_ptr()), a_.spans[i], a_.nbits[i], a_.offsets[i],
              a_.live_bit};
    t.starts = static_cast<const int64_t*>(starts.data_ptr());
  }

  void fill_anchor(size_t i, AdamwTensor& t) {
    t.anchor = nullptr;
    t.share = nullptr;
    t.anchor_type = t.p_type;
    t.pull = Pull::none;
    if (a_.anchors.empty() || a_.anchor_strength == 0) return;
    t.pull = a_.anchor_decoupled ? Pull::decoupled : Pull::coupled;
    t.anchor_type = dtype_of(a_.anchors[i], "an anchor");
    narrow_enough(t.anchor_type, t, "an anchor");
    STD_TORCH_CHECK(a_.anchors[i].numel() == t.numel, "an anchor has ", a_.anchors[i].numel(),
                    " elements, its parameter ", t.numel);
    t.anchor = read(a_.anchors[i]);
    if (a_.shares.empty()) return;
    STD_TORCH_CHECK(
        a_.shares[i].scalar_type() == ScalarType::Float && a_.shares[i].numel() == t.numel,
        "shares must be float32, one per element of the parameter");
    t.share = static_cast<const float*>(read(a_.shares[i]));
  }

  const AdamwArguments& a_;
  std::vector<RowMajor> written_, read_;
};

// The op itself, both overloads: Lr is double or Tensor. The order is that of the schema in
// safeopt/ops/adamw.py; foreach, capturable and fused choose among torch's own kernels only.
template <class Lr>
void masked_adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                   Tensors max_exp_avg_sqs, Tensors steps, Tensors bits, Tensors starts,
                   Integers spans, Integers nbits, Integers offsets, Tensors anchors,
                   Tensors shares, bool live_bit, Lr lr, double beta1, double beta2,
                   double weight_decay, double eps, bool amsgrad, bool maximize,
                   double anchor_strength, bool anchor_decoupled, std::optional<bool> /*foreach*/,
                   bool /*capturable*/, std::optional<bool> /*fused*/,
                   std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  if (params.empty()) return;
  double number = 0;
  std::optional<Tensor> tensor;
  if constexpr (std::is_same_v<Lr, double>) {
    number = lr;
  } else {
    tensor = lr;
  }
  adamw_step({std::move(params),
              std::move(grads),
              std::move(exp_avgs),
              std::move(exp_avg_sqs),
              std::move(max_exp_avg_sqs),
              std::move(steps),
              std::move(bits),
              std::move(starts),
              std::move(spans),
              std::move(nbits),
              std::move(offsets),
              std::move(anchors),
              std::move(shares),
              live_bit,
              number,
              tensor,
              beta1,
              beta2,
              weight_decay,
              eps,
              amsgrad,
              maximize,
              anchor_strength,
              anchor_decoupled,
              grad_scale,
              found_inf});
}

}  // namespace safeopt
