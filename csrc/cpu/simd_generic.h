// Any processor: registers of 4 floats, the compiler's own (SSE2, NEON, or scalar code where there
// is neither). Included by simd.h only.
#pragma once

namespace grains::cpu::GRAINS_ISA {

typedef float Register __attribute__((vector_size(16)));
constexpr int kLanes = 4;

inline Register fill(float value) { return Register{value, value, value, value}; }
inline float sum(Register r) { return (r[0] + r[2]) + (r[1] + r[3]); }

// Comparisons of these give 0 or -1 per lane.
typedef std::int32_t Signed __attribute__((vector_size(16)));
typedef std::uint16_t Halves __attribute__((vector_size(8)));

inline Signed select(Signed mask, Signed yes, Signed no) { return (mask & yes) | (~mask & no); }

// Move exponent and mantissa into place and correct the exponent's bias (15 -> 127). A subnormal
// gets an implicit leading one that a float subtraction takes away again, which normalises it.
inline Register load_half(const Half* from) {
  const Signed half = __builtin_convertvector(read_as<Halves>(from), Signed);
  const Signed magnitude = (half & 0x7fff) << 13;
  const Signed exponent = magnitude & (0x7c00 << 13);
  const Signed infinite = exponent == (0x7c00 << 13);
  const Signed normal = magnitude + ((127 - 15) << 23) + (infinite & ((128 - 16) << 23));
  const Signed lifted = normal + (1 << 23);
  const Register settled = read_as<Register>(&lifted) - 0x1p-14f;
  const Signed result =
      select(exponent == 0, read_as<Signed>(&settled), normal) | ((half & 0x8000) << 16);
  return read_as<Register>(&result);
}

// Round to nearest even. A value that is subnormal in float16 is rounded by adding a float whose
// last mantissa bit has the weight of the smallest subnormal.
inline void store_half(Half* to, Register value) {
  const Signed bits = read_as<Signed>(&value);
  const Signed magnitude = bits & 0x7fffffff;
  const Signed odd = (magnitude >> 13) & 1;
  const Signed normal = (magnitude - ((127 - 15) << 23) + 0xfff + odd) >> 13;
  const Register shifted = read_as<Register>(&magnitude) + 0.5f;
  const Signed subnormal = read_as<Signed>(&shifted) - 0x3f000000;
  const Signed overflow = 0x7c00 | ((magnitude > 0x7f800000) & 0x0200);  // infinity or NaN
  const Signed finite = select(magnitude < (113 << 23), subnormal, normal);
  const Signed result =
      select(magnitude >= ((127 + 16) << 23), overflow, finite) | ((bits >> 16) & 0x8000);
  const Halves halves = __builtin_convertvector(result, Halves);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

}  // namespace grains::cpu::GRAINS_ISA
