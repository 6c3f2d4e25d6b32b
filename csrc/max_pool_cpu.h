// Max-pooling of 8-bit codes on CPUs, without torch, in channels-last memory: torch has none for
// plain tensors. Codes order as the numbers that they stand for.
#pragma once

#include <algorithm>
#include <cstring>

#include "detection_topk_cpu.h"

namespace cdetr::cpu {

struct Window {
  int64_t kernel, stride, padding, dilation;

  int64_t count(int64_t size) const {
    const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  }
};

struct CodePool {
  const uint8_t* input;  // [B, H, W, C]
  int64_t batch_stride, row_stride, column_stride;
  uint8_t* output;  // [B, height, width, C]
  int64_t channels, input_height, input_width, height, width;
  Window vertical, horizontal;
};

CDETR_EACH_CPU inline void raise_to(uint8_t* best, const uint8_t* x, int64_t count) {
  for (int64_t c = 0; c < count; ++c) best[c] = std::max(best[c], x[c]);
}

// Writes row y of an image's result.
inline void max_pool_row(const CodePool& p, int64_t image, int64_t y) {
  uint8_t* out = p.output + (image * p.height + y) * p.width * p.channels;
  for (int64_t x = 0; x < p.width; ++x, out += p.channels) {
    std::memset(out, 0, p.channels);  // the lowest code
    for (int64_t i = 0; i < p.vertical.kernel; ++i) {
      const int64_t row = y * p.vertical.stride - p.vertical.padding + i * p.vertical.dilation;
      if (row < 0 || row >= p.input_height) continue;
      for (int64_t j = 0; j < p.horizontal.kernel; ++j) {
        const int64_t column =
            x * p.horizontal.stride - p.horizontal.padding + j * p.horizontal.dilation;
        if (column < 0 || column >= p.input_width) continue;
        raise_to(out,
                 p.input + image * p.batch_stride + row * p.row_stride + column * p.column_stride,
                 p.channels);
      }
    }
  }
}

}  // namespace cdetr::cpu
