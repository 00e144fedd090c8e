// AVX2 with FMA and F16C: registers of 8 floats. Included by simd.h only.
#pragma once

#include <immintrin.h>

namespace grains::cpu::GRAINS_ISA {

using Register = __m256;
constexpr int kLanes = 8;

inline Register fill(float value) { return _mm256_set1_ps(value); }
inline float sum(Register r) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline Register load_half(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store_half(Half* to, Register value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace grains::cpu::GRAINS_ISA
