// torch.ops.cdetr_fast on CUDA devices. Schemas are in kernels/cdetr_kernels/ops/*/native.py.
#define USE_CUDA  // declares aoti_torch_get_current_cuda_stream
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>

#include "bindings.h"
#include "launch.h"

// torch 2.11 has it only under the name of libtorch itself.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace cdetr {
namespace {

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "detection_topk: ", error); }

// The k largest of each row, sorted.
Tensor sorted_topk(const Tensor& codes, int64_t k) {
  std::array<StableIValue, 5> stack{
      torch::stable::detail::from(codes), torch::stable::detail::from(k),
      torch::stable::detail::from(int64_t{1}), torch::stable::detail::from(true),
      torch::stable::detail::from(true)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::topk", "", stack.data(), TORCH_ABI_VERSION));
  Tensor indices = torch::stable::detail::to<Tensor>(stack[1]);  // owned, and let go
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

DetectionOutputs detection_topk(Tensor logits, Tensor boxes, std::optional<Tensor> sizes, int64_t k,
                                double threshold) {
  const bool sizes_on_host = sizes.has_value() && sizes->is_cpu();
  STD_TORCH_CHECK(
      !sizes.has_value() || sizes_on_host || sizes->get_device_index() == logits.get_device_index(),
      "sizes_hw: expected them on the CPU or on the device of logits");
  logits = with_flat_images(logits);
  Detections d = describe(logits, boxes, sizes, k, threshold);
  const Number type = number("logits", logits);
  STD_TORCH_CHECK(type <= Number::kFloat32, "logits: expected float16, bfloat16 or float32");
  STD_TORCH_CHECK(logits.is_cuda(), "logits: expected them on a CUDA device");

  const int32_t device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  DetectionOutputs outputs = allocate(d, logits);
  if (d.batch == 0) return outputs;
  if (k <= cuda::kMostKeptByOneLaunch) {
    const cuda::Workspace needed = cuda::workspace_of(d);
    Tensor codes = torch::stable::new_empty(logits, {needed.codes}, ScalarType::Long);
    Tensor tickets = torch::stable::new_empty(logits, {needed.tickets}, ScalarType::Int);
    check(cuda::detection_topk(d, type, sizes_on_host, static_cast<int64_t*>(codes.data_ptr()),
                               static_cast<int32_t*>(tickets.data_ptr()), stream));
  } else {
    Tensor codes = torch::stable::new_empty(logits, {d.batch, d.candidates()}, ScalarType::Long);
    check(cuda::encode(d, type, static_cast<int64_t*>(codes.data_ptr()), stream));
    Tensor sorted = sorted_topk(codes, k);
    check(cuda::write_sorted(d, type, sizes_on_host, static_cast<int64_t*>(sorted.data_ptr()),
                             stream));
  }
  return outputs;
}

}  // namespace
}  // namespace cdetr

STABLE_TORCH_LIBRARY_IMPL(cdetr_fast, CUDA, m) {
  m.impl("detection_topk", TORCH_BOX(&cdetr::detection_topk));
}
