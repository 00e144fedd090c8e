// Steering of one row, shared by the plain and the fused kernel.
#pragma once

#include "simd.h"

namespace grains::cpu::GRAINS_ISA {

// The direction that steers a row; strength 0 leaves the row alone.
template <class T>
struct Direction {
  const T* vector;
  float strength;
};

template <class T>
inline Direction<T> direction_of(const SteeringArgs& steering, std::int64_t row) {
  const std::int64_t entry =
      steering.index == nullptr ? 0 : steering.index[row / steering.rows_per_index];
  if (entry < 0) return {nullptr, 0.0f};
  return {static_cast<const T*>(steering.vectors) + entry * steering.vectors_stride,
          steering.strength[entry * steering.strength_stride]};
}

// Float32 sums of squares are used only inside this range. Below it the squares that matter to
// float32 accuracy may have underflowed (1e-25 / 16384 elements / 2^23 is still a normal number);
// above it they overflow. NaN is outside as well.
inline bool in_float_range(float sum_of_squares) {
  return sum_of_squares > 1e-25f && sum_of_squares < 3e38f;
}

// |h| / |s|, or -1 where |s| is noise and the row must stay as it is.
inline float norm_ratio(float sum_hh, float sum_ss, float min_relative_norm) {
  const float norm_h = __builtin_sqrtf(sum_hh);
  const float norm_s = __builtin_sqrtf(sum_ss);
  return norm_s <= min_relative_norm * norm_h ? -1.0f : norm_h / norm_s;
}

// The same in float64, for rows outside the float range. A row with an infinite element has no
// direction: it becomes NaN, not unchanged.
inline double norm_ratio(double sum_hh, double sum_ss, float min_relative_norm) {
  const double norm_h = __builtin_sqrt(sum_hh);
  const double norm_s = __builtin_sqrt(sum_ss);
  const bool noise = norm_s <= static_cast<double>(min_relative_norm) * norm_h;
  return noise && !__builtin_isinf(norm_s) ? -1.0 : norm_h / norm_s;
}

}  // namespace grains::cpu::GRAINS_ISA
