// CUDA launchers: asynchronous on `stream` (a cudaStream_t), no allocation, no synchronisation,
// safe under CUDA-graph capture. Each returns 0 (cudaSuccess) or a cudaError_t as int; say it with
// error_string(). Declared without CUDA headers, so that a CPU-only build can include it.
#pragma once

#include "grains/types.h"

namespace grains::cuda {

int ig_interpolate(const InterpolateArgs& args, void* stream);
int ig_accumulate(const AccumulateArgs& args, void* stream);
int steer_add_normalize(const SteerArgs& args, void* stream);
int skip_steer_rms_norm(const SkipNormArgs& args, void* stream);
int skip_steer_layer_norm(const SkipNormArgs& args, void* stream);

const char* error_string(int error);

}  // namespace grains::cuda
