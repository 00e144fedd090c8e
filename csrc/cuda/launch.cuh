// Host side: from run-time types and plans to kernel instances, and the launch itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "grains/launch_plan.h"
#include "grains/types.h"
#include "launch_limits.h"
#include "steered_row.cuh"

namespace grains::cuda {

// At the start of every kernel: with a programmatic launch it may run before the kernel ahead of it
// has finished, and must not touch memory until then. Kernels behind it may start to start.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <typename... Params>
int launch(void (*kernel)(Params...), dim3 grid, int threads, bool programmatic_launch,
           void* stream, Params... params) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = programmatic_launch ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params...);
  // The caller is told of the error; left behind, the host framework would find it a second time.
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

inline cudaError_t device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(value, attribute, device) : error;
}

// Whether a device runs what was compiled for its own major version, whatever else there is.
constexpr bool compiled_for(std::int32_t capability) {
  for (const int architecture : {__CUDA_ARCH_LIST__}) {  // 100 * major + 10 * minor
    if (architecture / 100 == capability / 10 && architecture / 10 <= capability) return true;
  }
  return false;
}

// 10 * major + minor of the current device; 0 where it runs what was compiled for an older one, and
// may lack what its own has (the wait of a programmatic launch).
inline cudaError_t compute_capability(std::int32_t* capability) {
  int major = 0, minor = 0;
  cudaError_t error = device_attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (error == cudaSuccess) error = device_attribute(cudaDevAttrComputeCapabilityMinor, &minor);
  const std::int32_t found = 10 * major + minor;
  *capability = compiled_for(found) ? found : 0;
  return error;
}

// Where all rows have one direction, blocks may stay. `blocks`: those of kMaxRowThreads that the
// launch bounds of the staying kernel let a multiprocessor hold.
inline cudaError_t let_stay(LaunchPlan* plan, const SteeringArgs& steering, std::int64_t rows,
                            int blocks) {
  if (steering.index != nullptr) return cudaSuccess;
  int multiprocessors = 0;
  const cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  const std::int64_t threads = std::int64_t{kMaxRowThreads} * blocks * multiprocessors;
  if (error == cudaSuccess) *plan = plan_staying(*plan, rows, threads, chosen_stay());
  return error;
}

inline bool pointers_aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes != 0) return false;
  }
  return true;
}

inline bool strides_aligned(DType dtype, std::initializer_list<std::int64_t> strides) {
  const std::int64_t elements = kVectorBytes / (dtype == DType::kFloat32 ? 4 : 2);
  for (std::int64_t stride : strides) {
    if (stride % elements != 0) return false;
  }
  return true;
}

template <typename T>
struct TypeTag {
  using type = T;
};

template <typename Body>
int with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(TypeTag<float>{});
    case DType::kFloat16:
      return body(TypeTag<__half>{});
    case DType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

template <typename T>
constexpr int kVectorOf = kVectorBytes / static_cast<int>(sizeof(T));

// The shapes that plan() may choose.
template <typename T, typename Body>
int with_shape(const LaunchPlan& plan, Body body) {
  if (plan.vector_elements == 1) return body(RowShape<1, kScalarTile, false>{});
  if (plan.elements_per_thread == 0) {
    return body(RowShape<kVectorOf<T>, kTileVectors, false>{});
  }
  if (plan.stays) return body(RowShape<kVectorOf<T>, kKeptElements / kVectorOf<T>, true, true>{});
  return body(RowShape<kVectorOf<T>, kKeptElements / kVectorOf<T>, true>{});
}

}  // namespace grains::cuda
