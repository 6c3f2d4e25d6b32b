// Numbers as bits, for CPUs and GPUs: reading any dtype, and integers that order as floats do.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CDETR_BOTH __host__ __device__ __forceinline__
#else
#define CDETR_BOTH inline __attribute__((always_inline))
#endif

namespace cdetr {

// The dtypes that a kernel may be handed. The bindings translate from torch's.
enum class Number : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64, kInt32, kInt64, kUInt8 };

template <class To, class From>
CDETR_BOTH To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Of each floating dtype: an integer that holds its bits, and those bits of +inf.
struct Float16 {
  using Bits = int16_t;
  static constexpr Bits kInfinity = 0x7c00;
  static constexpr Bits kLowest = INT16_MIN;
};
struct BFloat16 {
  using Bits = int16_t;
  static constexpr Bits kInfinity = 0x7f80;
  static constexpr Bits kLowest = INT16_MIN;
};
struct Float32 {
  using Bits = int32_t;
  static constexpr Bits kInfinity = 0x7f800000;
  static constexpr Bits kLowest = INT32_MIN;
};
struct Float64 {
  using Bits = int64_t;
  static constexpr Bits kInfinity = 0x7ff0000000000000;
  static constexpr Bits kLowest = INT64_MIN;
};

CDETR_BOTH double value_of(Float64, int64_t bits) { return bits_as<double>(bits); }
CDETR_BOTH double value_of(Float32, int32_t bits) { return bits_as<float>(bits); }
CDETR_BOTH double value_of(BFloat16, int16_t bits) {
  return bits_as<float>(static_cast<uint32_t>(static_cast<uint16_t>(bits)) << 16);
}
CDETR_BOTH double value_of(Float16, int16_t bits) {
  const uint32_t exponent_and_mantissa = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const float sign = bits < 0 ? -1.0f : 1.0f;
  if ((bits & 0x7c00) == 0x7c00) {  // infinity or NaN
    return sign * bits_as<float>(exponent_and_mantissa | 0x7f800000u);
  }
  // The bias is 15 instead of 127: a product moves it, and makes subnormal numbers normal.
  return sign * bits_as<float>(exponent_and_mantissa) * 0x1p112f;
}

// An integer that orders as the value does: its magnitude with its sign, so that both zeros are 0.
// NaN is the lowest, below -inf.
template <class F>
CDETR_BOTH typename F::Bits key_of(typename F::Bits bits) {
  using Bits = typename F::Bits;
  const Bits magnitude = bits & static_cast<Bits>(~F::kLowest);
  const Bits sign = static_cast<Bits>(bits >> (8 * sizeof(Bits) - 1));  // 0 or -1
  const Bits key = static_cast<Bits>((magnitude ^ sign) - sign);
  return magnitude > F::kInfinity ? F::kLowest : key;
}

// The value of a key that is not NaN's.
template <class F>
CDETR_BOTH double value_of_key(typename F::Bits key) {
  using Bits = typename F::Bits;
  const Bits bits = key < 0 ? static_cast<Bits>(F::kLowest | static_cast<Bits>(-key)) : key;
  return value_of(F{}, bits);
}

CDETR_BOTH double load_number(const void* data, Number type, int64_t i) {
  switch (type) {
    case Number::kFloat16:
      return value_of(Float16{}, static_cast<const int16_t*>(data)[i]);
    case Number::kBFloat16:
      return value_of(BFloat16{}, static_cast<const int16_t*>(data)[i]);
    case Number::kFloat32:
      return static_cast<const float*>(data)[i];
    case Number::kFloat64:
      return static_cast<const double*>(data)[i];
    case Number::kInt32:
      return static_cast<const int32_t*>(data)[i];
    case Number::kInt64:
      return static_cast<double>(static_cast<const int64_t*>(data)[i]);
    case Number::kUInt8:
      return static_cast<const uint8_t*>(data)[i];
  }
  return 0.0;
}

}  // namespace cdetr
