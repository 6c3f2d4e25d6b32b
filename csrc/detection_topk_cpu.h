// detection_topk on CPUs, without torch.
//
// An image's logits are cut into chunks of 32. The k-th largest of the chunks' maxima is a lower
// bound of the k-th largest logit, so most chunks are never looked at again:
//
//   chunk_maxima   one vectorised pass over all logits, split over threads
//   select_image   bound, candidates above it, partial selection, sort of k; one thread an image
//
// Where chunks of 32, then 16, are fewer than 5/4 k (large k), every logit is a candidate.
#pragma once

#include <algorithm>
#include <vector>

#include "detection.h"

// One copy of a function for each generation of x86, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__) && \
    __has_attribute(target_clones)
#define CDETR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CDETR_EACH_CPU
#endif

namespace cdetr::cpu {

inline int64_t chunk_size(int64_t candidates, int64_t kept) {
  for (int64_t size : {32, 16}) {
    if (candidates / size >= kept + kept / 4) return size;
  }
  return 0;
}

// The last chunk of an image takes the remainder, up to twice the size.
inline int64_t chunk_count(int64_t candidates, int64_t size) {
  return size == 0 ? 0 : candidates / size;
}

// key_of for 64 bytes of logits at once, in the vectors of GCC and clang: left to themselves they
// do not vectorise the maximum (20 us for 300x91 in place of 5).
template <class F>
struct Vector {
  using Bits = typename F::Bits;
  typedef Bits Bytes64 __attribute__((vector_size(64)));
  static constexpr int kLanes = 64 / sizeof(Bits);

  Bytes64 best = Bytes64{} + F::kLowest;

  CDETR_BOTH void add(const Bits* logits) {
    Bytes64 bits;
    memcpy(&bits, logits, sizeof(bits));
    const Bytes64 magnitude = bits & static_cast<Bits>(~F::kLowest);
    const Bytes64 sign = bits >> (8 * sizeof(Bits) - 1);
    const Bytes64 key =
        magnitude > F::kInfinity ? Bytes64{} + F::kLowest : (magnitude ^ sign) - sign;
    best = key > best ? key : best;
  }
  CDETR_BOTH Bits max() const {
    Bits lanes[kLanes];
    memcpy(lanes, &best, sizeof(lanes));
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] = std::max(lanes[i], lanes[i + half]);
    }
    return lanes[0];
  }
};

template <class F, int kSize>
CDETR_BOTH void maxima_of_chunks(const typename F::Bits* logits, int64_t candidates, int64_t begin,
                                 int64_t end, typename F::Bits* maxima) {
  using Bits = typename F::Bits;
  constexpr int kLanes = Vector<F>::kLanes;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const Bits* p = logits + chunk * kSize;
    Bits best = F::kLowest;
    if constexpr (kSize >= kLanes) {
      Vector<F> vector;
      for (int i = 0; i < kSize; i += kLanes) vector.add(p + i);
      best = vector.max();
    } else {
      for (int i = 0; i < kSize; ++i) best = std::max(best, key_of<F>(p[i]));
    }
    maxima[chunk] = best;
  }
  const int64_t chunks = candidates / kSize;
  if (begin < end && end == chunks) {
    for (int64_t i = chunks * kSize; i < candidates; ++i) {
      maxima[chunks - 1] = std::max(maxima[chunks - 1], key_of<F>(logits[i]));
    }
  }
}

// Attributes of clones do not reach templates, so there is one function for each dtype.
#define CDETR_CHUNK_MAXIMA(F)                                                           \
  CDETR_EACH_CPU inline void chunk_maxima(F, const F::Bits* logits, int64_t candidates, \
                                          int64_t size, int64_t begin, int64_t end,     \
                                          F::Bits* maxima) {                            \
    if (size == 32) {                                                                   \
      maxima_of_chunks<F, 32>(logits, candidates, begin, end, maxima);                  \
    } else {                                                                            \
      maxima_of_chunks<F, 16>(logits, candidates, begin, end, maxima);                  \
    }                                                                                   \
  }
CDETR_CHUNK_MAXIMA(Float16)
CDETR_CHUNK_MAXIMA(BFloat16)
CDETR_CHUNK_MAXIMA(Float32)
CDETR_CHUNK_MAXIMA(Float64)
#undef CDETR_CHUNK_MAXIMA

template <class F>
struct Candidate {
  typename F::Bits key;
  int32_t index;

  bool operator<(const Candidate& other) const {  // better first
    return key != other.key ? key > other.key : index < other.index;
  }
};

// Appends the logits of [begin, end) with a key of at least `bound`.
template <class F>
int64_t collect(const typename F::Bits* logits, int64_t begin, int64_t end, typename F::Bits bound,
                std::vector<Candidate<F>>& found, int64_t count) {
  if (static_cast<int64_t>(found.size()) < count + end - begin) {
    found.resize(2 * (count + end - begin));
  }
  Candidate<F>* out = found.data();
  for (int64_t i = begin; i < end; ++i) {
    const auto key = key_of<F>(logits[i]);
    out[count] = {key, static_cast<int32_t>(i)};  // overwritten unless counted: no branch
    count += key >= bound;
  }
  return count;
}

// Writes the detections of one image. `maxima` are those of its chunks of `size`.
template <class F>
void select_image(const Detections& d, int64_t image, int64_t size,
                  const typename F::Bits* maxima) {
  using Bits = typename F::Bits;
  const Bits* logits = static_cast<const Bits*>(d.logits) + image * d.logits_batch_stride;
  const int64_t candidates = d.candidates(), chunks = chunk_count(candidates, size);
  thread_local std::vector<Candidate<F>> found;
  int64_t count = 0;
  if (chunks == 0) {
    count = collect<F>(logits, 0, candidates, F::kLowest, found, 0);
  } else {
    thread_local std::vector<Bits> order;
    order.assign(maxima, maxima + chunks);
    auto kth = order.begin() + (d.kept - 1);
    std::nth_element(order.begin(), kth, order.end(), std::greater<Bits>());
    const Bits bound = *kth;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (maxima[chunk] < bound) continue;
      const int64_t end = chunk + 1 == chunks ? candidates : (chunk + 1) * size;
      count = collect<F>(logits, chunk * size, end, bound, found, count);
    }
  }
  const auto first = found.begin(), kept = first + d.kept;
  if (count > d.kept) std::nth_element(first, kept - 1, first + count);
  std::sort(first, kept);

  double height = 1.0, width = 1.0;
  if (d.sizes != nullptr) {
    const int64_t start = image * d.sizes_strides[0];
    height = load_number(d.sizes, d.sizes_type, start);
    width = load_number(d.sizes, d.sizes_type, start + d.sizes_strides[1]);
  }
  int64_t above = 0;
  for (int32_t rank = 0; rank < d.kept; ++rank) {
    const Candidate<F>& best = found[rank];
    above += write_detection<F>(d, image, rank, best.key, best.index, height, width);
  }
  d.counts[image] = above;
}

}  // namespace cdetr::cpu
