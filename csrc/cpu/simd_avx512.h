// AVX-512 (F, BW, VL, DQ): registers of 16 floats. Included by simd.h only.
#pragma once

#include <immintrin.h>

namespace grains::cpu::GRAINS_ISA {

using Register = __m512;
constexpr int kLanes = 16;

inline Register fill(float value) { return _mm512_set1_ps(value); }
inline float sum(Register r) { return _mm512_reduce_add_ps(r); }

inline Register load_half(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store_half(Half* to, Register value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace grains::cpu::GRAINS_ISA
