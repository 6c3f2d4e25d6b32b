// detection_topk on GPUs, without torch: the kernels and the plan of their launch.
//
// Each logit becomes one integer, its code: the order-preserving image of its value, then its flat
// index, reversed. Codes are distinct, and the k largest are the answer, ties and all.
//
//   code = (key(logit) - key(NaN)) << index_bits | (2^index_bits - 1 - index)
//
// k up to 1024: one launch. A block keeps the k best codes of a tile by radix select, 11 bits at a
// time from the top, in shared memory; as soon as all of a bin is wanted it stops, after two or
// three passes as a rule. Passes read the tile again, from the L1. The last block of an image to
// finish (a ticket, no grid-wide wait) selects among what all of them kept, sorts by counting for
// each code those above it, and writes the detections. Tiles are such that both steps read about
// the same: sqrt(Q K k). An image of one tile needs neither workspace nor ticket.
//
// Larger k: codes to memory, a library's top-k of them, and a launch that writes the detections.
//
// Dimensions: B images, Q queries, K classes, k kept, n = Q * K candidates of an image.
#pragma once

#include "detection.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define CDETR_SHARED(type, name) __shared__ type name
#else  // the tests run this file on a CPU, with blocks and threads of their own
#include "emulated_cuda.h"
#endif

namespace cdetr::cuda {

constexpr int kThreads = 512;
constexpr int kMostKept = 1024;  // by one launch
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kHostSizes = 128;

// Sizes that lie on the host are arguments of the launch: no copy, so nothing waits.
struct HostSizes {
  double height_width[kHostSizes][2];
};

struct Plan {
  int32_t tile;        // candidates of a block
  int32_t tiles;       // blocks of an image
  int32_t index_bits;  // of a code
  int64_t first_image;
  bool host_sizes;
  uint64_t* codes;    // [B, tiles, k] kept by each block, if there are several
  uint32_t* tickets;  // [B] zeros, likewise
};

inline Plan plan_of(const Detections& d) {
  const int64_t candidates = d.candidates();
  Plan plan{};
  plan.index_bits = 1;
  while ((int64_t{1} << plan.index_bits) < candidates) ++plan.index_bits;
  int64_t tile = 2048;
  while (tile * tile < candidates * d.kept) tile *= 2;  // at least k, as n is
  if (candidates <= 2 * tile) tile = candidates;
  plan.tile = static_cast<int32_t>(tile);
  plan.tiles = static_cast<int32_t>((candidates + tile - 1) / tile);
  return plan;
}

struct Scratch {
  uint64_t kept[kMostKept];
  int32_t histogram[kBins];
  int32_t warp_totals[32];
  int32_t digit, above, in_bin;  // found by find_digit
  int32_t count;
  bool is_last;
};

template <class F>
struct Code {
  using Bits = typename F::Bits;
  static constexpr int kKeyBits = 8 * sizeof(Bits);

  static __device__ uint64_t of(Bits bits, int64_t index, int index_bits) {
    const int64_t key = int64_t{key_of<F>(bits)} - F::kLowest;
    const int64_t last = (int64_t{1} << index_bits) - 1;
    return static_cast<uint64_t>(key) << index_bits | static_cast<uint64_t>(last - index);
  }
  static __device__ Bits key(uint64_t code, int index_bits) {
    return static_cast<Bits>(static_cast<int64_t>(code >> index_bits) + F::kLowest);
  }
  static __device__ int64_t index(uint64_t code, int index_bits) {
    const uint64_t last = (uint64_t{1} << index_bits) - 1;
    return static_cast<int64_t>(last - (code & last));
  }
};

template <class F>
struct CodesOfLogits {
  const typename F::Bits* logits;  // of the tile
  int64_t first;                   // flat index of the tile
  int index_bits;

  __device__ uint64_t operator()(int i) const {
    return Code<F>::of(logits[i], first + i, index_bits);
  }
};

struct CodesOfBlocks {
  const uint64_t* codes;

  __device__ uint64_t operator()(int i) const { return __ldcg(codes + i); }  // not this L1's
};

// Finds the bin, counted from the highest, that holds the `wanted`-th code.
template <int kBlock>
__device__ void find_digit(int wanted, Scratch& s) {
  constexpr int kEach = kBins / kBlock;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  int own = 0;
  for (int j = 0; j < kEach; ++j) own += s.histogram[first - j];
  int sum = own;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) s.warp_totals[warp] = sum;
  __syncthreads();
  int before = sum - own;
  for (int w = 0; w < warp; ++w) before += s.warp_totals[w];
  for (int j = 0; j < kEach; ++j) {
    const int count = s.histogram[first - j];
    if (before < wanted && wanted <= before + count) {  // true once in the block
      s.digit = first - j;
      s.above = before;
      s.in_bin = count;
    }
    before += count;
  }
  __syncthreads();
}

// Puts the `wanted` largest of `count` codes of `bits` bits into s.kept, in any order.
template <int kBlock, class Codes>
__device__ void select(Codes codes, int count, int wanted, int bits, Scratch& s) {
  uint64_t prefix = 0;
  int shift = bits, missing = wanted, in_bin = count;
  while (in_bin != missing) {
    const int from = shift;
    shift = shift > kDigitBits ? shift - kDigitBits : 0;
    const int digits = (1 << (from - shift)) - 1;
    for (int i = threadIdx.x; i < kBins; i += kBlock) s.histogram[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kBlock) {
      const uint64_t code = codes(i);
      if (code >> from == prefix) {
        atomicAdd(&s.histogram[static_cast<int>(code >> shift) & digits], 1);
      }
    }
    __syncthreads();
    find_digit<kBlock>(missing, s);
    prefix = prefix << (from - shift) | static_cast<uint64_t>(s.digit);
    missing -= s.above;
    in_bin = s.in_bin;
  }
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kBlock) {
    const uint64_t code = codes(i);
    if (code >> shift >= prefix) s.kept[atomicAdd(&s.count, 1)] = code;
  }
  __syncthreads();
}

template <class F>
__device__ bool write_code(const Detections& d, const Plan& plan, const HostSizes& sizes,
                           int64_t image, int rank, uint64_t code) {
  double height = 1.0, width = 1.0;
  if (plan.host_sizes) {
    height = sizes.height_width[image - plan.first_image][0];
    width = sizes.height_width[image - plan.first_image][1];
  } else if (d.sizes != nullptr) {
    const int64_t start = image * d.sizes_strides[0];
    height = load_number(d.sizes, d.sizes_type, start);
    width = load_number(d.sizes, d.sizes_type, start + d.sizes_strides[1]);
  }
  return write_detection<F>(d, image, rank, Code<F>::key(code, plan.index_bits),
                            Code<F>::index(code, plan.index_bits), height, width);
}

// k up to kMostKept. Grid: tiles x images.
template <class F, int kBlock>
__global__ void __launch_bounds__(kBlock)
    topk_kernel(const __grid_constant__ Detections d, const __grid_constant__ Plan plan,
                const __grid_constant__ HostSizes sizes) {
  CDETR_SHARED(Scratch, s);
  const int64_t image = plan.first_image + blockIdx.y;
  const int bits = Code<F>::kKeyBits + plan.index_bits;
  {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * plan.tile;
    const int64_t rest = d.candidates() - first;
    const int count = static_cast<int>(rest < plan.tile ? rest : plan.tile);
    const auto* logits =
        static_cast<const typename F::Bits*>(d.logits) + image * d.logits_batch_stride + first;
    const int wanted = d.kept < count ? d.kept : count;
    select<kBlock>(CodesOfLogits<F>{logits, first, plan.index_bits}, count, wanted, bits, s);
    if (plan.tiles > 1) {
      uint64_t* out = plan.codes + (image * plan.tiles + blockIdx.x) * d.kept;
      for (int i = threadIdx.x; i < wanted; i += kBlock) out[i] = s.kept[i];
      __threadfence();  // the codes before the ticket
    }
  }
  if (plan.tiles > 1) {
    __syncthreads();
    if (threadIdx.x == 0) {
      s.is_last = atomicAdd(&plan.tickets[image], 1u) + 1 == static_cast<uint32_t>(plan.tiles);
    }
    __syncthreads();
    if (!s.is_last) return;
    __threadfence();
    // All tiles but the last one are full, and no smaller than k.
    const int64_t rest = d.candidates() - static_cast<int64_t>(plan.tiles - 1) * plan.tile;
    const int count = (plan.tiles - 1) * d.kept + static_cast<int>(rest < d.kept ? rest : d.kept);
    const CodesOfBlocks codes{plan.codes + image * plan.tiles * d.kept};
    select<kBlock>(codes, count, d.kept, bits, s);
  }
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < d.kept; i += kBlock) {
    const uint64_t code = s.kept[i];
    int rank = 0;
#pragma unroll 8
    for (int j = 0; j < d.kept; ++j) rank += s.kept[j] > code;
    if (write_code<F>(d, plan, sizes, image, rank, code)) atomicAdd(&s.count, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) d.counts[image] = s.count;
}

// Larger k, before the library's top-k: codes [B, n]. Grid: any x images.
template <class F, int kBlock>
__global__ void __launch_bounds__(kBlock)
    encode_kernel(const __grid_constant__ Detections d, const __grid_constant__ Plan plan) {
  const int64_t image = plan.first_image + blockIdx.y, candidates = d.candidates();
  const auto* logits =
      static_cast<const typename F::Bits*>(d.logits) + image * d.logits_batch_stride;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < candidates;
       i += step) {
    plan.codes[image * candidates + i] = Code<F>::of(logits[i], i, plan.index_bits);
  }
}

// And after it: detections of the sorted codes [B, k]; counts start at 0. Grid: any x images.
template <class F, int kBlock>
__global__ void __launch_bounds__(kBlock)
    write_kernel(const __grid_constant__ Detections d, const __grid_constant__ Plan plan,
                 const __grid_constant__ HostSizes sizes) {
  const int64_t image = plan.first_image + blockIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < d.kept; i += step) {
    const uint64_t code = plan.codes[image * d.kept + i];
    if (write_code<F>(d, plan, sizes, image, static_cast<int>(i), code)) {
      atomicAdd(reinterpret_cast<unsigned long long*>(d.counts + image), 1ull);
    }
  }
}

}  // namespace cdetr::cuda
