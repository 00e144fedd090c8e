#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half value) {
  const int exponent = (value.bits >> 10) & 0x1f, mantissa = value.bits & 0x3ff;
  float magnitude;
  if (exponent == 0x1f) {
    magnitude = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = ldexpf(static_cast<float>(mantissa), -24);
  } else {
    magnitude = ldexpf(static_cast<float>(mantissa + 0x400), exponent - 25);
  }
  return (value.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float value) {
  if (value != value) return {0x7fff};
  const std::uint16_t sign = signbit(value) ? 0x8000 : 0;
  const float magnitude = fabsf(value);
  if (magnitude >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
  // In units of the spacing of halves at this magnitude; nearbyint rounds ties to even. A mantissa
  // that rounds up to 0x800 carries into the exponent, as it should.
  const int exponent = magnitude < 0x1p-14f ? -14 : ilogbf(magnitude);
  const int units = static_cast<int>(nearbyintf(ldexpf(magnitude, 10 - exponent)));
  const int biased = magnitude < 0x1p-14f ? 0 : exponent + 14;
  return {static_cast<std::uint16_t>(sign | ((biased << 10) + units))};
}
