#include <cuda_runtime.h>

#include "grains/cuda.h"

namespace grains::cuda {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace grains::cuda
