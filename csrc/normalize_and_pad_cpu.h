// normalize_and_pad on CPUs, without torch: rescale, normalise, pad and mask in one pass.
//
//   values[b, c, y, x] = (image[c, y, x] - shift[c]) / divisor[c], or image[c, y, x] * factor
//
// A division, not a product with the reciprocal: the values are torchvision's to the last bit.
#pragma once

#include <algorithm>

#include "detection_topk_cpu.h"

namespace cdetr::cpu {

struct Picture {
  const void* pixels;  // [C, h, w]
  bool is_float;       // fp32, otherwise uint8
  int64_t strides[3];
  int64_t height, width;
};

struct Normalization {
  const float* shift;    // [C]; null multiplies by `factor`
  const float* divisor;  // [C]
  float factor;
};

template <class Pixel>
CDETR_BOTH void normalize_row(const Pixel* in, int64_t stride, int64_t width, const float* shift,
                              const float* divisor, float factor, float* out) {
  if (shift == nullptr) {
    for (int64_t x = 0; x < width; ++x) out[x] = static_cast<float>(in[x * stride]) * factor;
  } else {
    const float s = *shift, d = *divisor;
    for (int64_t x = 0; x < width; ++x) out[x] = (static_cast<float>(in[x * stride]) - s) / d;
  }
}

// Planar and interleaved pixels have constant strides, for which loops become vectors.
template <class Pixel>
CDETR_BOTH void normalize_any(const Pixel* in, int64_t stride, int64_t width, const float* shift,
                              const float* divisor, float factor, float* out) {
  if (stride == 1) {
    normalize_row(in, 1, width, shift, divisor, factor, out);
  } else if (stride == 3) {
    normalize_row(in, 3, width, shift, divisor, factor, out);
  } else {
    normalize_row(in, stride, width, shift, divisor, factor, out);
  }
}

CDETR_EACH_CPU inline void normalize(const uint8_t* in, int64_t stride, int64_t width,
                                     const float* shift, const float* divisor, float factor,
                                     float* out) {
  normalize_any(in, stride, width, shift, divisor, factor, out);
}

CDETR_EACH_CPU inline void normalize(const float* in, int64_t stride, int64_t width,
                                     const float* shift, const float* divisor, float factor,
                                     float* out) {
  normalize_any(in, stride, width, shift, divisor, factor, out);
}

// Writes row y of an image's values [C, H, W] and mask [H, W].
inline void normalize_and_pad_row(const Picture& image, const Normalization& n, int64_t channels,
                                  int64_t y, int64_t batch_height, int64_t batch_width,
                                  float* values, int64_t* mask) {
  const int64_t width = y < image.height ? image.width : 0;
  for (int64_t c = 0; c < channels; ++c) {
    float* row = values + (c * batch_height + y) * batch_width;
    if (width > 0) {
      const int64_t start = c * image.strides[0] + y * image.strides[1];
      const float* shift = n.shift == nullptr ? nullptr : n.shift + c;
      const float* divisor = n.divisor == nullptr ? nullptr : n.divisor + c;
      if (image.is_float) {
        normalize(static_cast<const float*>(image.pixels) + start, image.strides[2], width, shift,
                  divisor, n.factor, row);
      } else {
        normalize(static_cast<const uint8_t*>(image.pixels) + start, image.strides[2], width, shift,
                  divisor, n.factor, row);
      }
    }
    std::fill(row + width, row + batch_width, 0.0f);
  }
  std::fill(mask + y * batch_width, mask + y * batch_width + width, int64_t{1});
  std::fill(mask + y * batch_width + width, mask + (y + 1) * batch_width, int64_t{0});
}

}  // namespace cdetr::cpu
