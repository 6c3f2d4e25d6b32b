// torch.ops.cdetr_fast on CPUs. Schemas are in kernels/cdetr_kernels/ops/*/native.py.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings.h"
#include "conditional_attention_cpu.h"
#include "detection_topk_cpu.h"
#include "max_pool_cpu.h"
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

Tensor max_pool_codes(Tensor codes, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  STD_TORCH_CHECK(codes.is_cpu() && codes.scalar_type() == ScalarType::Byte && codes.dim() == 4,
                  "codes: expected uint8 [B, C, H, W] on the CPU");
  STD_TORCH_CHECK(codes.stride(1) == 1 || codes.size(1) == 1,
                  "codes: expected channels-last memory");
  cpu::CodePool p{};
  for (const auto* sides : {&kernel, &stride, &padding, &dilation}) {
    STD_TORCH_CHECK(sides->size() == 2, "expected two sizes of each kind");
  }
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0 &&
                        2 * padding[i] <= kernel[i],
                    "expected positive sizes, and at most half a kernel of padding");
  }
  p.vertical = {kernel[0], stride[0], padding[0], dilation[0]};
  p.horizontal = {kernel[1], stride[1], padding[1], dilation[1]};
  const int64_t batch = codes.size(0);
  p.channels = codes.size(1), p.input_height = codes.size(2), p.input_width = codes.size(3);
  p.height = p.vertical.count(p.input_height), p.width = p.horizontal.count(p.input_width);
  STD_TORCH_CHECK(p.height > 0 && p.width > 0, "codes: expected a map as large as a window");
  p.input = static_cast<const uint8_t*>(codes.data_ptr());
  p.batch_stride = codes.stride(0), p.row_stride = codes.stride(2);
  p.column_stride = codes.stride(3);
  Tensor output =
      torch::stable::new_empty(codes, {batch, p.height, p.width, p.channels}, ScalarType::Byte);
  p.output = static_cast<uint8_t*>(output.data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.width * p.channels));
  torch::stable::parallel_for(0, batch * p.height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) cpu::max_pool_row(p, i / p.height, i % p.height);
  });
  return output;
}

#ifdef CDETR_HAS_CPU_ATTENTION
// A tensor [B|1, rows, N, D] whose channels are adjacent.
cpu::Heads heads_of(const char* name, const Tensor& tensor, ScalarType type, int64_t batch,
                    int64_t rows, int64_t heads, int64_t size) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == type, name,
                  ": expected the device and the dtype of q_content");
  STD_TORCH_CHECK(tensor.dim() == 4 && (tensor.size(0) == batch || tensor.size(0) == 1) &&
                      tensor.size(1) == rows && tensor.size(2) == heads && tensor.size(3) == size &&
                      (tensor.stride(3) == 1 || size == 1),
                  name, ": expected [B, rows, N, D] with adjacent channels");
  const int64_t batch_stride = tensor.size(0) == 1 ? 0 : tensor.stride(0);
  return {tensor.data_ptr(), batch_stride, tensor.stride(1), tensor.stride(2)};
}

Tensor conditional_attention(Tensor q_content, std::optional<Tensor> q_spatial, Tensor k_content,
                             std::optional<Tensor> k_rows, std::optional<Tensor> k_columns,
                             Tensor value, std::optional<Tensor> key_mask, double scale) {
  STD_TORCH_CHECK(q_content.dim() == 4 && value.dim() == 4, "expected [B, rows, N, D]");
  const ScalarType type = q_content.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "q_content: expected float32 or bfloat16");
  STD_TORCH_CHECK(scale > 0.0, "scale: expected a positive number");
  STD_TORCH_CHECK(cpu::cpu_level() != cpu::CpuLevel::kNone, "this CPU has no AVX2");
  cpu::Attention x{};
  x.batch = q_content.size(0), x.queries = q_content.size(1), x.heads = q_content.size(2);
  x.size = q_content.size(3), x.keys = value.size(1), x.value_size = value.size(3);
  x.scale = static_cast<float>(scale);
  x.columns = k_columns.has_value() ? k_columns->size(1) : 1;
  x.q_content = heads_of("q_content", q_content, type, x.batch, x.queries, x.heads, x.size);
  x.k_content = heads_of("k_content", k_content, type, x.batch, x.keys, x.heads, x.size);
  x.value = heads_of("value", value, type, x.batch, x.keys, x.heads, x.value_size);
  if (q_spatial.has_value()) {
    STD_TORCH_CHECK(k_rows.has_value() && x.columns > 0 && x.keys % x.columns == 0,
                    "k_rows: expected a key for each row");
    x.q_spatial = heads_of("q_spatial", *q_spatial, type, x.batch, x.queries, x.heads, x.size);
    x.k_rows = heads_of("k_rows", *k_rows, type, x.batch, x.keys / x.columns, x.heads, x.size);
    if (k_columns.has_value()) {
      x.k_columns = heads_of("k_columns", *k_columns, type, x.batch, x.columns, x.heads, x.size);
    }
  }
  if (key_mask.has_value()) {
    STD_TORCH_CHECK(key_mask->is_cpu() && key_mask->scalar_type() == ScalarType::Bool &&
                        key_mask->dim() == 2 && key_mask->size(0) == x.batch &&
                        key_mask->size(1) == x.keys,
                    "key_mask: expected bool [B, S]");
    x.key_mask = static_cast<const uint8_t*>(key_mask->data_ptr());
    x.mask_batch = key_mask->stride(0), x.mask_row = key_mask->stride(1);
  }
  Tensor output =
      torch::stable::new_empty(q_content, {x.batch, x.queries, x.heads, x.value_size}, type);
  x.output = output.data_ptr();
  const int64_t images_heads = x.batch * x.heads;
  if (images_heads == 0 || x.queries == 0) return output;
  const int64_t parts = cpu::query_parts(images_heads, x.queries, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, images_heads * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts, head = i / parts % x.heads, image = i / parts / x.heads;
      const int64_t first = x.queries * part / parts, last = x.queries * (part + 1) / parts;
      cpu::attend(x, type == ScalarType::BFloat16, {image, head, first, last});
    }
  });
  return output;
}
#endif

}  // namespace
}  // namespace cdetr

STABLE_TORCH_LIBRARY_IMPL(cdetr_fast, CPU, m) {
  m.impl("detection_topk", TORCH_BOX(&cdetr::detection_topk));
  m.impl("normalize_and_pad", TORCH_BOX(&cdetr::normalize_and_pad));
  m.impl("max_pool_codes", TORCH_BOX(&cdetr::max_pool_codes));
#ifdef CDETR_HAS_CPU_ATTENTION
  m.impl("conditional_attention_cpu", TORCH_BOX(&cdetr::conditional_attention));
#endif
}
