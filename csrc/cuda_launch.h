// How the CUDA kernels are launched: on the device of a tensor, in the current stream, checked.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <climits>

namespace safeopt {

class Device {
 public:
  // Makes the tensor's device the current one, for as long as this lives.
  explicit Device(const torch::stable::Tensor& tensor)
      : index_(int32_t(tensor.get_device_index())), guard_(index_) {
    STD_TORCH_CHECK(tensor.is_cuda(), "the arguments of a safeopt op must be on one device");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, int threads,
              const Arguments&... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= INT_MAX, what, " would need ", blocks, " thread blocks, of at most ",
                    INT_MAX, "; give fewer elements at a time");
    kernel<<<unsigned(blocks), unsigned(threads), 0, stream_>>>(arguments...);
    cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "the launch of ", what,
                    " failed: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
  }

  void check(const torch::stable::Tensor& tensor, const char* what) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == index_, what,
                    " must be on the parameters' device, GPU ", index_);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace safeopt
