// The launchers in detection_topk.cu, for code that is not compiled by nvcc.
#pragma once

#include "detection.h"

namespace cdetr::cuda {

// What the caller allocates, on the device of the logits.
struct Workspace {
  int64_t codes;    // int64
  int64_t tickets;  // int32
};

constexpr int kMostKeptByOneLaunch = 1024;

// k up to kMostKeptByOneLaunch. Both return null, or what went wrong. `sizes_on_host`: d.sizes is
// readable here, and not on the device.
Workspace workspace_of(const Detections& d);
const char* detection_topk(const Detections& d, Number logits_type, bool sizes_on_host,
                           int64_t* codes, int32_t* tickets, void* stream);

// Larger k: writes the codes [B, Q * K], of which the caller takes the k largest of each image,
// sorted, and hands them to the second one [B, k].
const char* encode(const Detections& d, Number logits_type, int64_t* codes, void* stream);
const char* write_sorted(const Detections& d, Number logits_type, bool sizes_on_host,
                         const int64_t* codes, void* stream);

}  // namespace cdetr::cuda
