// torch's tensors as the kernels' arguments, on torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "detection.h"

namespace cdetr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Number number(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Number::kFloat16;
    case ScalarType::BFloat16:
      return Number::kBFloat16;
    case ScalarType::Float:
      return Number::kFloat32;
    case ScalarType::Double:
      return Number::kFloat64;
    case ScalarType::Int:
      return Number::kInt32;
    case ScalarType::Long:
      return Number::kInt64;
    case ScalarType::Byte:
      return Number::kUInt8;
    default:
      STD_TORCH_CHECK(false, name, ": this dtype is not supported");
  }
}

// Images whose logits [Q, K] lie in a row: a copy if they do not.
inline Tensor with_flat_images(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 3, "logits: expected [B, Q, K]");
  const bool flat = logits.stride(2) == 1 && logits.stride(1) == logits.size(2);
  return flat ? logits : torch::stable::contiguous(logits);
}

using DetectionOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Checks what would read or write out of bounds; the rest is checked in Python. `logits` comes from
// with_flat_images.
inline Detections describe(const Tensor& logits, const Tensor& boxes,
                           const std::optional<Tensor>& sizes, int64_t k, double threshold) {
  const int64_t batch = logits.size(0), queries = logits.size(1), classes = logits.size(2);
  STD_TORCH_CHECK(
      boxes.dim() == 3 && boxes.size(0) == batch && boxes.size(1) == queries && boxes.size(2) == 4,
      "boxes_cxcywh: expected [B, Q, 4]");
  STD_TORCH_CHECK(
      boxes.get_device_index() == logits.get_device_index() && boxes.is_cuda() == logits.is_cuda(),
      "boxes_cxcywh: expected the device of logits");
  STD_TORCH_CHECK(queries * classes <= INT32_MAX, "logits: expected Q*K below 2^31");
  STD_TORCH_CHECK(k >= 1 && k <= queries * classes, "k: expected 1 to Q*K");
  Detections d{};
  d.logits = logits.data_ptr();
  d.logits_batch_stride = logits.stride(0);
  d.boxes = boxes.data_ptr();
  d.boxes_type = number("boxes_cxcywh", boxes);
  if (sizes.has_value()) {
    STD_TORCH_CHECK(sizes->dim() == 2 && sizes->size(0) == batch && sizes->size(1) == 2,
                    "sizes_hw: expected [B, 2]");
    d.sizes = sizes->data_ptr();
    d.sizes_type = number("sizes_hw", *sizes);
    for (int i = 0; i < 2; ++i) d.sizes_strides[i] = sizes->stride(i);
  }
  for (int i = 0; i < 3; ++i) d.boxes_strides[i] = boxes.stride(i);
  d.batch = batch;
  d.queries = static_cast<int32_t>(queries);
  d.classes = static_cast<int32_t>(classes);
  d.kept = static_cast<int32_t>(k);
  d.threshold = threshold;
  d.is_double =
      logits.scalar_type() == ScalarType::Double || boxes.scalar_type() == ScalarType::Double;
  return d;
}

inline DetectionOutputs allocate(Detections& d, const Tensor& logits) {
  const int64_t batch = d.batch, k = d.kept;
  const auto real = d.is_double ? ScalarType::Double : ScalarType::Float;
  DetectionOutputs outputs{torch::stable::new_empty(logits, {batch, k}, real),
                           torch::stable::new_empty(logits, {batch, k}, ScalarType::Long),
                           torch::stable::new_empty(logits, {batch, k, 4}, real),
                           torch::stable::new_empty(logits, {batch, k}, ScalarType::Long),
                           torch::stable::new_empty(logits, {batch}, ScalarType::Long)};
  d.scores = std::get<0>(outputs).data_ptr();
  d.labels = static_cast<int64_t*>(std::get<1>(outputs).data_ptr());
  d.boxes_xyxy = std::get<2>(outputs).data_ptr();
  d.query_index = static_cast<int64_t*>(std::get<3>(outputs).data_ptr());
  d.counts = static_cast<int64_t*>(std::get<4>(outputs).data_ptr());
  return outputs;
}

}  // namespace cdetr
