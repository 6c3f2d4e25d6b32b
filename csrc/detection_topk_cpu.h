// detection_topk on CPUs, without torch.
//
// An image's logits are cut into chunks of 32. The k-th largest of the chunks' maxima is a lower
// bound of the k-th largest logit, so most chunks are never looked at again:
//
//   chunk_maxima   one vectorised pass over all logits, split over threads
//   select_image   bound, candidates above it, partial selection, sort of k; one thread per image
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

// 64 bytes of logits at once, in the vectors of GCC and clang: left to themselves they vectorise
// neither the maximum (20 us for 300x91 instead of 5) nor the search.
template <class F>
struct Vector {
  using Bits = typename F::Bits;
  typedef Bits Bytes64 __attribute__((vector_size(64)));
  static constexpr int kLanes = 64 / sizeof(Bits);
  typedef int8_t Hits __attribute__((vector_size(kLanes)));

  Bytes64 best = Bytes64{} + F::kLowest;

  CDETR_BOTH static Bytes64 keys(const Bits* logits) {  // key_of
    Bytes64 bits;
    memcpy(&bits, logits, sizeof(bits));
    const Bytes64 magnitude = bits & static_cast<Bits>(~F::kLowest);
    const Bytes64 sign = bits >> (8 * sizeof(Bits) - 1);
    return magnitude > F::kInfinity ? Bytes64{} + F::kLowest : (magnitude ^ sign) - sign;
  }
  CDETR_BOTH void add(const Bits* logits) {
    const Bytes64 key = keys(logits);
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
  // Calls found(lane) for each key of at least `bound`, in order.
  template <class Found>
  CDETR_BOTH static void search(const Bits* logits, Bits bound, const Found& found) {
    const Hits hits = __builtin_convertvector(keys(logits) >= bound, Hits);  // a byte: 0 or 255
    uint64_t eights[kLanes / 8];  // the first lane in the lowest byte: little-endian
    memcpy(eights, &hits, sizeof(hits));
    for (int i = 0; i < kLanes / 8; ++i) {
      while (eights[i] != 0) {
        const int byte = __builtin_ctzll(eights[i]) / 8;
        found(8 * i + byte);
        eights[i] &= ~(uint64_t{255} << (8 * byte));
      }
    }
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

// Writes the logits of [begin, end) with a key of at least `bound` to `out`; returns how many.
template <class F>
CDETR_BOTH int64_t collect_of(const typename F::Bits* logits, int64_t begin, int64_t end,
                              typename F::Bits bound, Candidate<F>* out) {
  constexpr int kLanes = Vector<F>::kLanes;
  const Candidate<F>* const first = out;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    Vector<F>::search(logits + i, bound, [&](int lane) {
      *out++ = {key_of<F>(logits[i + lane]), static_cast<int32_t>(i + lane)};
    });
  }
  for (; i < end; ++i) {
    const auto key = key_of<F>(logits[i]);
    if (key >= bound) *out++ = {key, static_cast<int32_t>(i)};
  }
  return out - first;
}

#define CDETR_COLLECT(F)                                                                      \
  CDETR_EACH_CPU inline int64_t collect(F, const F::Bits* logits, int64_t begin, int64_t end, \
                                        F::Bits bound, Candidate<F>* out) {                   \
    return collect_of<F>(logits, begin, end, bound, out);                                     \
  }
CDETR_COLLECT(Float16)
CDETR_COLLECT(BFloat16)
CDETR_COLLECT(Float32)
CDETR_COLLECT(Float64)
#undef CDETR_COLLECT

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
    found.resize(std::max<size_t>(found.size(), candidates));
    count = collect(F{}, logits, 0, candidates, F::kLowest, found.data());
  } else {
    thread_local std::vector<Bits> order;
    order.assign(maxima, maxima + chunks);
    auto kth = order.begin() + (d.kept - 1);
    std::nth_element(order.begin(), kth, order.end(), std::greater<Bits>());
    const Bits bound = *kth;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (maxima[chunk] < bound) continue;
      const int64_t end = chunk + 1 == chunks ? candidates : (chunk + 1) * size;
      const int64_t begin = chunk * size, most = count + end - begin;
      if (static_cast<int64_t>(found.size()) < most) found.resize(2 * most);
      count += collect(F{}, logits, begin, end, bound, found.data() + count);
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
