// bfloat16 and half precision in plain C++. Everything here has internal linkage, so that a copy compiled
// with one ISA's flags can never be linked into another unit; the loops over these functions vectorize.
#pragma once
#include <cstdint>
#include <cstring>

namespace gossamer {

static inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline float bf16_to_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }

// Round to nearest even; a NaN stays a (quiet) NaN.
static inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

// Both half conversions move the exponent by floating-point multiplication, which also takes care of
// subnormals, infinities and rounding (method of M. Dukhan's FP16 library).
static inline float half_to_float(uint16_t h) {
  const uint32_t w = uint32_t(h) << 16;
  const uint32_t sign = w & 0x80000000;
  const uint32_t doubled = w + w;
  const float normal = bits_float((doubled >> 4) + (0xe0u << 23)) * 0x1p-112f;
  const float subnormal = bits_float((doubled >> 17) | (126u << 23)) - 0.5f;
  return bits_float(sign | (doubled < (1u << 27) ? float_bits(subnormal) : float_bits(normal)));
}

// Round to nearest even; overflow goes to infinity.
static inline uint16_t float_to_half(float x) {
  const uint32_t w = float_bits(x);
  const uint32_t doubled = w + w;
  const uint32_t sign = (w >> 16) & 0x8000;
  uint32_t bias = doubled & 0xff000000;
  bias = bias < 0x71000000 ? 0x71000000 : bias;
  const float scaled = (bits_float(w & 0x7fffffff) * 0x1p+112f) * 0x1p-110f;
  const uint32_t bits = float_bits(bits_float((bias >> 1) + 0x07800000) + scaled);
  const uint32_t magnitude = ((bits >> 13) & 0x7c00) + (bits & 0x0fff);
  return uint16_t(sign | (doubled > 0xff000000 ? 0x7e00 : magnitude));
}

// Nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits.
static inline int32_t round_to_int(float x) {
  return int32_t(float_bits(x + 12582912.0f)) - int32_t(0x4b400000);
}

}  // namespace gossamer
