// conditional_attention on CPUs, without torch.
//
//   score[i, j] = scale * (q_content[i] . k_content[j] + q_spatial[i] . k_spatial[j])
//   output[i]   = sum_j softmax_j(score[i])[j] * value[j]
//
// A task is some queries of one head. Keys and values are packed a block at a time, content and
// spatial keys below one another, so that a block stays in the second-level cache while all
// queries pass over it; maxima, sums and outputs are corrected from block to block. Both products
// are made of one tile, kRows x 2 vectors of sums in registers:
//
//   scores   tile(queries [kRows, D], packed keys [D, panel])
//   output   tile(weights [kRows, keys], packed values [keys, panel])
//
// A factor is a word of 32 bits: one fp32 number, or two of bf16, whose products are added in one
// instruction (AVX512_BF16). Sums, softmax and output are in fp32 in either case.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "numbers.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define CDETR_HAS_CPU_ATTENTION 1

namespace cdetr::cpu {

// Rows of heads, [B|1, rows, N, D]; channels are adjacent. Strides are in elements.
struct Heads {
  const void* data = nullptr;  // null: absent
  int64_t batch = 0, row = 0, head = 0;
};

struct Attention {
  Heads q_content, q_spatial, k_content, k_rows, k_columns, value;
  void* output;             // [B, Q, N, Dv]
  const uint8_t* key_mask;  // [B, S], 0 is masked; null masks nothing
  int64_t mask_batch, mask_row;
  int64_t batch, queries, keys, heads, size, value_size;
  int64_t columns;  // the spatial key of j is k_rows[j / columns] + k_columns[j % columns]
  float scale;
};

// The queries [begin, end) of one head of one image.
struct AttentionTask {
  int64_t image, head, begin, end;
};

// Instructions of one generation: the vector, and the rows of a tile for which there are registers.
struct Avx2 {
  static constexpr int kLanes = 8, kRows = 6;
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Words __attribute__((vector_size(32)));
};
struct Avx512 {
  static constexpr int kLanes = 16, kRows = 12;
  typedef float Floats __attribute__((vector_size(64)));
  typedef int32_t Words __attribute__((vector_size(64)));
};

// Products of fp32 words.
template <class Isa>
struct SingleWords {
  using Floats = typename Isa::Floats;
  static constexpr int kNumbers = 1;
  CDETR_BOTH static void multiply_add(Floats& sum, int32_t a, const int32_t* b) {
    typename Isa::Floats factors;
    memcpy(&factors, b, sizeof(factors));
    const Floats factor = Floats{} + bits_as<float>(a);
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(factor), "v"(factors));
  }
  // Weights of 2 vectors of keys.
  CDETR_BOTH static void store(int32_t* out, Floats low, Floats high) {
    memcpy(out, &low, sizeof(low));
    memcpy(out + Isa::kLanes, &high, sizeof(high));
  }
};

// Products of pairs of bf16. Inline assembly, as intrinsics do not compile in functions for all
// CPUs, even if these are only ever inlined where the instructions are there.
struct BFloat16Pairs {
  using Floats = Avx512::Floats;
  static constexpr int kNumbers = 2;
  CDETR_BOTH static void multiply_add(Floats& sum, int32_t a, const int32_t* b) {
    const Avx512::Words factor = Avx512::Words{} + a;
    Avx512::Words factors;
    memcpy(&factors, b, sizeof(factors));
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(factor), "v"(factors));
  }
  CDETR_BOTH static void store(int32_t* out, Floats low, Floats high) {
    Avx512::Words pairs;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs) : "v"(low), "v"(high));
    memcpy(out, &pairs, sizeof(pairs));
  }
};

CDETR_BOTH float single(float x) { return x; }
CDETR_BOTH float single(int16_t bits) { return static_cast<float>(value_of(BFloat16{}, bits)); }

CDETR_BOTH int16_t bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return static_cast<int16_t>(bits >> 16 | 0x40);
  return static_cast<int16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
CDETR_BOTH void store_number(float* out, float x) { *out = x; }
CDETR_BOTH void store_number(int16_t* out, float x) { *out = bfloat16(x); }

// Memory of a thread that stays for the next call: new pages would take longer than to fill them.
class Scratch {
 public:
  int32_t* words(int64_t count) {
    if (count > size_) {
      memory_.reset();
      memory_.reset(static_cast<int32_t*>(::operator new(4 * count, std::align_val_t{64})));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  struct Delete {
    void operator()(int32_t* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<int32_t, Delete> memory_;
  int64_t size_ = 0;
};

template <class Isa, class Words, class Number>
struct AttentionKernel {
  using Floats = typename Isa::Floats;
  using Integers = typename Isa::Words;
  static constexpr int kRows = Isa::kRows, kLanes = Isa::kLanes, kPanel = 2 * kLanes;
  static constexpr int kNumbers = Words::kNumbers;
  static constexpr int64_t kBlock = 512;  // keys that are packed at a time

  static constexpr int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

  // c [kRows, panel] (+)= a [kRows, steps] b [steps, panel]
  template <bool kAdd>
  CDETR_BOTH static void tile(const int32_t* a, int64_t a_row, const int32_t* b, int64_t steps,
                              float* c, int64_t c_row) {
    Floats sums[kRows][2];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      if (kAdd) {
        memcpy(&sums[r][0], c + r * c_row, sizeof(Floats));
        memcpy(&sums[r][1], c + r * c_row + kLanes, sizeof(Floats));
      } else {
        sums[r][0] = sums[r][1] = Floats{};
      }
    }
    for (int64_t k = 0; k < steps; ++k, b += kPanel) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const int32_t factor = a[r * a_row + k];
        Words::multiply_add(sums[r][0], factor, b);
        Words::multiply_add(sums[r][1], factor, b + kLanes);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      memcpy(c + r * c_row, &sums[r][0], sizeof(Floats));
      memcpy(c + r * c_row + kLanes, &sums[r][1], sizeof(Floats));
    }
  }

  // 2^x for x <= 0, to 2 units in the last place; 0 below 2^-126. NaN stays NaN.
  CDETR_BOTH static Floats exp2(Floats x) {
    const Floats lowest = Floats{} - 126.0f;
    const Floats clamped = x < lowest ? lowest : x;
    const Floats shifted = clamped + 12582912.0f;  // the nearest integer is in the last bits
    const Floats f = clamped - (shifted - 12582912.0f);
    Floats y = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    y = y * f + 9.618437357674640e-3f;
    y = y * f + 5.550332471162809e-2f;
    y = y * f + 2.402264791363012e-1f;
    y = y * f + 6.931472028550421e-1f;
    y = y * f + 1.0f;
    Integers bits, exponent;
    memcpy(&bits, &y, sizeof(y));
    memcpy(&exponent, &shifted, sizeof(shifted));
    bits += exponent << 23;
    memcpy(&y, &bits, sizeof(y));
    return x < lowest ? Floats{} : y;
  }

  CDETR_BOTH static float largest(Floats x) {
    float best = x[0];
    for (int i = 1; i < kLanes; ++i) best = std::max(best, x[i]);
    return best;
  }
  CDETR_BOTH static float total(Floats x) {
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += x[i];
    return sum;
  }

  CDETR_BOTH static const Number* row_of(const Heads& heads, int64_t image, int64_t row,
                                         int64_t head) {
    return static_cast<const Number*>(heads.data) + image * heads.batch + row * heads.row +
           head * heads.head;
  }

  // The words of a row of numbers: `a`, or the sum of `a` and `b`; out[k * step].
  CDETR_BOTH static void pack_row(const Number* a, const Number* b, int64_t size, int32_t* out,
                                  int64_t step) {
    if constexpr (kNumbers == 1) {
      if (b == nullptr) {
        for (int64_t k = 0; k < size; ++k) out[k * step] = bits_as<uint32_t>(single(a[k]));
      } else {
        for (int64_t k = 0; k < size; ++k) {
          out[k * step] = bits_as<uint32_t>(single(a[k]) + single(b[k]));
        }
      }
    } else {
      const int64_t pairs = size / 2;
      for (int64_t k = 0; k < pairs; ++k) {
        out[k * step] = b == nullptr ? pair(a[2 * k], a[2 * k + 1])
                                     : pair(bfloat16(single(a[2 * k]) + single(b[2 * k])),
                                            bfloat16(single(a[2 * k + 1]) + single(b[2 * k + 1])));
      }
      if (size % 2 != 0) {
        const Number last =
            b == nullptr ? a[size - 1] : bfloat16(single(a[size - 1]) + single(b[size - 1]));
        out[pairs * step] = pair(last, 0);
      }
    }
  }
  CDETR_BOTH static uint32_t pair(Number low, Number high) {
    return static_cast<uint16_t>(low) | static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16;
  }

  CDETR_BOTH static void run(const Attention& x, const AttentionTask& task, Scratch& scratch) {
    const int64_t size_words = up(x.size, kNumbers) / kNumbers;
    const bool spatial = x.q_spatial.data != nullptr;
    const int64_t steps = size_words * (spatial ? 2 : 1);
    const int64_t queries = task.end - task.begin, rows = up(queries, kRows);
    const int64_t width = up(x.value_size, kPanel), block = std::min(up(x.keys, kPanel), kBlock);
    const int64_t block_words = block / kNumbers;

    int32_t* packed_queries =
        scratch.words(rows * steps + block * steps + block_words * width +
                      kRows * (block + block_words) + rows * width + 2 * rows + block);
    int32_t* packed_keys = packed_queries + rows * steps;    // [panels, steps, panel]
    int32_t* packed_values = packed_keys + block * steps;    // [panels of width, keys, panel]
    int32_t* weights = packed_values + block_words * width;  // [kRows, block]
    float* scores = reinterpret_cast<float*>(weights + kRows * block_words);  // [kRows, block]
    float* output = scores + kRows * block;                                   // [rows, width]
    float* maxima = output + rows * width;
    float* sums = maxima + rows;
    float* bias = sums + rows;  // 0, or -inf where a key is masked or past the last

    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const float scale = x.scale * 1.44269504088896341f;
    for (int64_t i = 0; i < rows; ++i) {
      int32_t* out = packed_queries + i * steps;
      maxima[i] = -kInfinity;
      sums[i] = 0.0f;
      if (i >= queries) {
        std::fill(out, out + steps, 0);
        continue;
      }
      const int64_t row = task.begin + i;
      pack_row(row_of(x.q_content, task.image, row, task.head), nullptr, x.size, out, 1);
      if (spatial) {
        pack_row(row_of(x.q_spatial, task.image, row, task.head), nullptr, x.size, out + size_words,
                 1);
      }
    }

    for (int64_t first = 0; first < x.keys; first += kBlock) {
      const int64_t keys = std::min(x.keys - first, kBlock), padded = up(keys, kPanel);
      const bool biased = pack_block(x, task, first, keys, padded, size_words, steps, width,
                                     packed_keys, packed_values, bias);
      for (int64_t i = 0; i < rows; i += kRows) {
        for (int64_t j = 0; j < padded; j += kPanel) {
          tile<false>(packed_queries + i * steps, steps, packed_keys + j * steps, steps, scores + j,
                      block);
        }
        for (int r = 0; r < kRows; ++r) {
          const float correction = weigh(scores + r * block, padded, biased ? bias : nullptr, scale,
                                         weights + r * block_words, maxima[i + r], sums[i + r]);
          float* row = output + (i + r) * width;
          if (first == 0) {
            std::fill(row, row + width, 0.0f);
          } else if (correction != 1.0f) {
            for (int64_t c = 0; c < width; ++c) row[c] *= correction;
          }
        }
        const int64_t word_count = padded / kNumbers;
        for (int64_t c = 0; c < width; c += kPanel) {
          tile<true>(weights, block_words, packed_values + c * word_count, word_count,
                     output + i * width + c, width);
        }
      }
    }

    Number* result = static_cast<Number*>(x.output) +
                     ((task.image * x.queries + task.begin) * x.heads + task.head) * x.value_size;
    for (int64_t i = 0; i < queries; ++i, result += x.heads * x.value_size) {
      const float factor = sums[i] == 0.0f ? 0.0f : 1.0f / sums[i];  // 0: all keys are masked
      for (int64_t c = 0; c < x.value_size; ++c) {
        store_number(result + c, output[i * width + c] * factor);
      }
    }
  }

  // Packs keys and values [first, first + keys); returns whether `bias` is not all 0.
  CDETR_BOTH static bool pack_block(const Attention& x, const AttentionTask& task, int64_t first,
                                    int64_t keys, int64_t padded, int64_t size_words, int64_t steps,
                                    int64_t width, int32_t* packed_keys, int32_t* packed_values,
                                    float* bias) {
    bool biased = keys < padded;
    for (int64_t j = 0; j < padded; ++j) {
      int32_t* out = packed_keys + j / kPanel * steps * kPanel + j % kPanel;
      bool attended = j < keys;
      if (attended && x.key_mask != nullptr) {
        attended = x.key_mask[task.image * x.mask_batch + (first + j) * x.mask_row] != 0;
      }
      bias[j] = attended ? 0.0f : -std::numeric_limits<float>::infinity();
      biased |= !attended;
      if (j >= keys) {
        for (int64_t k = 0; k < steps; ++k) out[k * kPanel] = 0;
        continue;
      }
      const int64_t key = first + j;
      pack_row(row_of(x.k_content, task.image, key, task.head), nullptr, x.size, out, kPanel);
      if (x.q_spatial.data != nullptr) {
        const Number* row = row_of(x.k_rows, task.image, key / x.columns, task.head);
        const Number* column = x.k_columns.data == nullptr
                                   ? nullptr
                                   : row_of(x.k_columns, task.image, key % x.columns, task.head);
        pack_row(row, column, x.size, out + size_words * kPanel, kPanel);
      }
    }
    // A masked value counts 0 times, which is 0 for finite ones alone; those past the last are 0.
    const int64_t word_count = padded / kNumbers;
    for (int64_t j = 0; j < padded; j += kNumbers) {
      const Number* values[kNumbers];
      for (int i = 0; i < kNumbers; ++i) {
        values[i] = j + i < keys ? row_of(x.value, task.image, first + j + i, task.head) : nullptr;
      }
      for (int64_t c = 0; c < width; c += kPanel) {
        int32_t* out = packed_values + (c * word_count + j / kNumbers * kPanel);
        const int64_t count = std::min<int64_t>(kPanel, x.value_size - c);
        pack_values(values, c, count, out);
      }
    }
    return biased;
  }

  // A panel of words of one or two rows of values, of which those that are null are 0.
  CDETR_BOTH static void pack_values(const Number* const* values, int64_t first, int64_t count,
                                     int32_t* out) {
    if (values[0] == nullptr) count = 0;
    const Number* low = values[0] + first;
    if constexpr (kNumbers == 1) {
      for (int64_t c = 0; c < count; ++c) out[c] = bits_as<int32_t>(single(low[c]));
    } else if (values[1] == nullptr) {
      for (int64_t c = 0; c < count; ++c) out[c] = pair(low[c], 0);
    } else {
      const Number* high = values[1] + first;
      for (int64_t c = 0; c < count; ++c) out[c] = pair(low[c], high[c]);
    }
    std::fill(out + count, out + kPanel, 0);
  }

  // Turns a row of scores into weights 2^(scale * score - maximum), with the maximum and the sum
  // of the row; returns by how much sums of earlier blocks are to be multiplied.
  CDETR_BOTH static float weigh(float* scores, int64_t keys, const float* bias, float scale,
                                int32_t* weights, float& maximum, float& sum) {
    Floats best = Floats{} - std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < keys; j += kLanes) {
      Floats score;
      memcpy(&score, scores + j, sizeof(score));
      if (bias != nullptr) {
        Floats shift;
        memcpy(&shift, bias + j, sizeof(shift));
        score += shift;
        memcpy(scores + j, &score, sizeof(score));
      }
      best = score > best ? score : best;  // not NaN, which the sum has anyway
    }
    const float before = maximum;
    maximum = std::max(maximum, largest(best) * scale);
    const float origin = maximum == -std::numeric_limits<float>::infinity() ? 0.0f : maximum;
    Floats sum_of_block = Floats{};
    for (int64_t j = 0; j < keys; j += kPanel) {
      Floats low, high;
      memcpy(&low, scores + j, sizeof(low));
      memcpy(&high, scores + j + kLanes, sizeof(high));
      low = exp2(low * scale - origin);
      high = exp2(high * scale - origin);
      sum_of_block += low + high;
      Words::store(weights + j / kNumbers, low, high);
    }
    const float correction = before == maximum ? 1.0f : std::exp2(before - origin);
    sum = sum * correction + total(sum_of_block);
    return correction;
  }
};

enum class CpuLevel : int { kNone, kAvx2, kAvx512, kAvx512BFloat16 };

// The best level of this CPU that torch's ATEN_CPU_CAPABILITY allows; "avx512" is without bf16.
inline CpuLevel cpu_level() {
  static const CpuLevel level = [] {
    const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
    const bool all = limit == nullptr || *limit == '\0';
    const bool avx512 = all || std::strcmp(limit, "avx512") == 0;
    const bool avx2 = avx512 || std::strcmp(limit, "avx2") == 0;
    if (avx512 && __builtin_cpu_supports("x86-64-v4")) {
      const bool has_bfloat16 = all && __builtin_cpu_supports("avx512bf16");
      return has_bfloat16 ? CpuLevel::kAvx512BFloat16 : CpuLevel::kAvx512;
    }
    return avx2 && __builtin_cpu_supports("x86-64-v3") ? CpuLevel::kAvx2 : CpuLevel::kNone;
  }();
  return level;
}

#define CDETR_ATTEND(name, isa, Isa, Words, Number)                                            \
  __attribute__((target(isa))) inline void name(const Attention& x, const AttentionTask& task, \
                                                Scratch& scratch) {                            \
    AttentionKernel<Isa, Words, Number>::run(x, task, scratch);                                \
  }
CDETR_ATTEND(attend_avx2_single, "arch=x86-64-v3", Avx2, SingleWords<Avx2>, float)
CDETR_ATTEND(attend_avx2_bfloat16, "arch=x86-64-v3", Avx2, SingleWords<Avx2>, int16_t)
CDETR_ATTEND(attend_avx512_single, "arch=x86-64-v4", Avx512, SingleWords<Avx512>, float)
CDETR_ATTEND(attend_avx512_bfloat16, "arch=x86-64-v4", Avx512, SingleWords<Avx512>, int16_t)
CDETR_ATTEND(attend_bfloat16_pairs, "arch=x86-64-v4,avx512bf16", Avx512, BFloat16Pairs, int16_t)
#undef CDETR_ATTEND

inline void attend(const Attention& x, bool bfloat16_numbers, const AttentionTask& task) {
  thread_local Scratch scratch;
  switch (cpu_level()) {
    case CpuLevel::kAvx512BFloat16:
      return bfloat16_numbers ? attend_bfloat16_pairs(x, task, scratch)
                              : attend_avx512_single(x, task, scratch);
    case CpuLevel::kAvx512:
      return bfloat16_numbers ? attend_avx512_bfloat16(x, task, scratch)
                              : attend_avx512_single(x, task, scratch);
    default:
      return bfloat16_numbers ? attend_avx2_bfloat16(x, task, scratch)
                              : attend_avx2_single(x, task, scratch);
  }
}

// Into how many parts the queries of a head are cut, so that the threads have equal work.
inline int64_t query_parts(int64_t heads, int64_t queries, int64_t threads) {
  const int64_t most = std::max<int64_t>(1, queries / 48);  // each part packs the keys again
  for (int64_t parts = std::max<int64_t>(1, (queries + 1023) / 1024); parts < most; ++parts) {
    const int64_t tasks = heads * parts, rounds = (tasks + threads - 1) / threads;
    if (10 * tasks >= 9 * rounds * threads) return parts;
  }
  return most;
}

}  // namespace cdetr::cpu

#endif  // x86-64
