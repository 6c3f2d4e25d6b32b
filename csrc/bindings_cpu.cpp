// torch.ops.cdetr_fast on CPUs. Schemas are in kernels/cdetr_kernels/ops/*/native.py.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings.h"
#include "detection_topk_cpu.h"
#include "normalize_and_pad_cpu.h"

namespace cdetr {
namespace {

// A thread is worth waking for this many logits or pixels.
constexpr int64_t kGrain = 32768;

template <class F>
void detection_topk_of(const Detections& d) {
  using Bits = typename F::Bits;
  const int64_t candidates = d.candidates();
  const int64_t size = cpu::chunk_size(candidates, d.kept);
  const int64_t chunks = cpu::chunk_count(candidates, size);
  std::vector<Bits> maxima(d.batch * chunks);
  if (chunks > 0) {
    const int64_t grain = std::max<int64_t>(1, kGrain / size);
    torch::stable::parallel_for(0, d.batch * chunks, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t image = begin / chunks;
        const int64_t stop = std::min(end, (image + 1) * chunks);
        const Bits* logits = static_cast<const Bits*>(d.logits) + image * d.logits_batch_stride;
        cpu::chunk_maxima(F{}, logits, candidates, size, begin - image * chunks,
                          stop - image * chunks, maxima.data() + image * chunks);
        begin = stop;
      }
    });
  }
  const int64_t grain = chunks > 0 ? 2 : std::max<int64_t>(1, kGrain / candidates);
  torch::stable::parallel_for(0, d.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      cpu::select_image<F>(d, image, size, maxima.data() + image * chunks);
    }
  });
}

DetectionOutputs detection_topk(Tensor logits, Tensor boxes, std::optional<Tensor> sizes, int64_t k,
                                double threshold) {
  STD_TORCH_CHECK(!sizes.has_value() || sizes->is_cpu(), "sizes_hw: expected them on the CPU");
  logits = with_flat_images(logits);
  Detections d = describe(logits, boxes, sizes, k, threshold);
  DetectionOutputs outputs = allocate(d, logits);
  switch (number("logits", logits)) {
    case Number::kFloat16:
      detection_topk_of<Float16>(d);
      break;
    case Number::kBFloat16:
      detection_topk_of<BFloat16>(d);
      break;
    case Number::kFloat32:
      detection_topk_of<Float32>(d);
      break;
    case Number::kFloat64:
      detection_topk_of<Float64>(d);
      break;
    default:
      STD_TORCH_CHECK(false, "logits: expected a floating point tensor");
  }
  return outputs;
}

// Asks for pages of 2 MB under a large new tensor. The first touch of each page costs the kernel
// a trap, and with 4 KB that is more than half of the time that writing a batch takes.
Tensor on_huge_pages(Tensor tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = begin + tensor.numel() * tensor.element_size();
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

std::tuple<Tensor, Tensor> normalize_and_pad(std::vector<Tensor> images, std::vector<double> shift,
                                             std::vector<double> divisor, double factor,
                                             int64_t height, int64_t width) {
  STD_TORCH_CHECK(!images.empty(), "images: expected at least one");
  STD_TORCH_CHECK(images[0].dim() == 3, "images[0]: expected [C, h, w]");
  const int64_t batch = images.size(), channels = images[0].size(0);
  STD_TORCH_CHECK(shift.size() == divisor.size() &&
                      (shift.empty() || static_cast<int64_t>(shift.size()) == channels),
                  "shift, divisor: expected one value a channel");
  std::vector<cpu::Picture> pictures;
  for (const Tensor& image : images) {
    STD_TORCH_CHECK(image.is_cpu() && image.dim() == 3 && image.size(0) == channels &&
                        image.size(1) <= height && image.size(2) <= width,
                    "images: expected [C, h, w] on the CPU, no larger than the batch");
    const Number type = number("images", image);
    STD_TORCH_CHECK(type == Number::kFloat32 || type == Number::kUInt8,
                    "images: expected uint8 or float32");
    pictures.push_back({image.data_ptr(),
                        type == Number::kFloat32,
                        {image.stride(0), image.stride(1), image.stride(2)},
                        image.size(1),
                        image.size(2)});
  }
  const std::vector<float> shifts(shift.begin(), shift.end());
  const std::vector<float> divisors(divisor.begin(), divisor.end());
  const bool normalized = !shifts.empty();
  const cpu::Normalization n{normalized ? shifts.data() : nullptr,
                             normalized ? divisors.data() : nullptr, static_cast<float>(factor)};

  Tensor values = on_huge_pages(
      torch::stable::new_empty(images[0], {batch, channels, height, width}, ScalarType::Float));
  Tensor mask =
      on_huge_pages(torch::stable::new_empty(images[0], {batch, height, width}, ScalarType::Long));
  float* values_data = static_cast<float*>(values.data_ptr());
  int64_t* mask_data = static_cast<int64_t*>(mask.data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width * channels));
  torch::stable::parallel_for(0, batch * height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / height;
      cpu::normalize_and_pad_row(pictures[image], n, channels, i - image * height, height, width,
                                 values_data + image * channels * height * width,
                                 mask_data + image * height * width);
    }
  });
  return {values, mask};
}

}  // namespace
}  // namespace cdetr

STABLE_TORCH_LIBRARY_IMPL(cdetr_fast, CPU, m) {
  m.impl("detection_topk", TORCH_BOX(&cdetr::detection_topk));
  m.impl("normalize_and_pad", TORCH_BOX(&cdetr::normalize_and_pad));
}
