// residual = x + skip and its RMSNorm as onnxruntime's own SkipSimplifiedLayerNormalization
// computes them on a CPU, bit for bit: a graph whose steering is off gives what it gave before.
#pragma once

#include "grains/types.h"

namespace grains::ort {

// The element type and the attributes that onnxruntime's operator has.
inline bool has_plain_norm(const SkipNormArgs& args) {
  return args.dtype == DType::kFloat32 && args.weight_offset == 0.0f;
}

// All rows, unsteered; a cpu launcher like those of grains/cpu.h. Only where has_plain_norm().
void plain_skip_rms_norm(const SkipNormArgs& args, const Parallel& parallel);

// Whether row entry `i` of args.steering.index, or every row where there is no index, is left
// alone.
inline bool is_unsteered(const SteeringArgs& steering, std::int64_t entry) {
  const std::int64_t member = steering.index == nullptr ? 0 : steering.index[entry];
  return member < 0 || steering.strength[member * steering.strength_stride] == 0.0f;
}

}  // namespace grains::ort
