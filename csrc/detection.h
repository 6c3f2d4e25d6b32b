// What both implementations of detection_topk share: the arguments, and one detection's output.
//
//   rank(q, c) = position of logits[q, c] in descending order; equal ones by q * K + c; NaN last
//
// Dimensions: B images, Q queries, K classes, k kept.
#pragma once

#include <cmath>

#include "numbers.h"

namespace cdetr {

struct Detections {
  const void* logits;  // [B, Q, K]; an image's own Q * K lie in a row
  int64_t logits_batch_stride;
  const void* boxes;  // [B, Q, 4] centre x, y, width, height
  Number boxes_type;
  int64_t boxes_strides[3];
  const void* sizes;  // [B, 2] height, width; null leaves boxes as they are
  Number sizes_type;
  int64_t sizes_strides[2];
  int64_t batch;
  int32_t queries;
  int32_t classes;
  int32_t kept;
  double threshold;
  bool is_double;  // of scores and boxes_xyxy; otherwise they are fp32

  void* scores;          // [B, k]
  int64_t* labels;       // [B, k]
  void* boxes_xyxy;      // [B, k, 4]
  int64_t* query_index;  // [B, k]
  int64_t* counts;       // [B]

  CDETR_BOTH int64_t candidates() const { return static_cast<int64_t>(queries) * classes; }
};

// Centre and size to corners in pixels, in the arithmetic of the reference.
template <class Real>
CDETR_BOTH void write_box(const Detections& d, int64_t image, int64_t query, Real height,
                          Real width, int64_t row) {
  const int64_t start = image * d.boxes_strides[0] + query * d.boxes_strides[1];
  Real box[4];
  for (int i = 0; i < 4; ++i) {
    box[i] = static_cast<Real>(load_number(d.boxes, d.boxes_type, start + i * d.boxes_strides[2]));
  }
  Real* out = static_cast<Real*>(d.boxes_xyxy) + 4 * row;
  const Real half_width = Real(0.5) * box[2], half_height = Real(0.5) * box[3];
  out[0] = (box[0] - half_width) * width;
  out[1] = (box[1] - half_height) * height;
  out[2] = (box[0] + half_width) * width;
  out[3] = (box[1] + half_height) * height;
}

// Writes detection `rank` of an image; tells whether it counts as above the threshold.
//
// The sigmoid is in double precision, once for each detection kept: rounded to fp32 it is exact
// to the last bit and never rises where logits fall, which no fp32 exponential promises.
template <class F>
CDETR_BOTH bool write_detection(const Detections& d, int64_t image, int32_t rank,
                                typename F::Bits key, int64_t index, double height, double width) {
  const int64_t row = image * d.kept + rank;
  const int64_t query = index / d.classes;
  const bool is_number = key != F::kLowest;
  double score = is_number ? 1.0 / (1.0 + exp(-value_of_key<F>(key))) : 0.0;
  double threshold = d.threshold;
  if (d.is_double) {
    static_cast<double*>(d.scores)[row] = score;
    write_box<double>(d, image, query, height, width, row);
  } else {
    static_cast<float*>(d.scores)[row] = static_cast<float>(score);
    write_box<float>(d, image, query, static_cast<float>(height), static_cast<float>(width), row);
    score = static_cast<float>(score);
    threshold = static_cast<float>(threshold);
  }
  d.labels[row] = index - query * d.classes;
  d.query_index[row] = query;
  return is_number && score > threshold;
}

}  // namespace cdetr
