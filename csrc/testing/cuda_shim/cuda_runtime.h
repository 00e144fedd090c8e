// Stands in for the CUDA runtime, so that the .cu files run on a CPU, unmodified, compiled by the
// host compiler. One fiber per thread; blocks run one after another. Only what the kernels use is
// here. Misuse that a GPU answers with a hang or with garbage (a barrier that not every thread
// reaches, a shuffle whose mask names a lane that is not there) fails the launch with a message.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another
#define __CUDA_ARCH_LIST__ 750, 800, 900

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_shim {

void barrier(int line);
// Leaves in `received` what the lane at this lane's number ^ lane_xor has in `sent`.
void exchange(int line, unsigned mask, int lane_xor, const void* sent, void* received,
              std::size_t size);
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

template <typename T>
T shuffle_xor(int line, unsigned mask, T value, int lane_xor) {
  T received;
  exchange(line, mask, lane_xor, &value, &received, sizeof(T));
  return received;
}

// The capability that the one device reports.
void set_compute_capability(int capability);
// And how many multiprocessors it has.
void set_multiprocessors(int count);
// At most this many blocks along x, to see a grid that is smaller than its work; 0: no limit.
void set_max_grid(unsigned blocks);
// Whether the last launch could start before the kernel ahead of it had finished.
bool was_programmatic();
const char* failure();

}  // namespace cuda_shim

// Of the thread that runs now.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
#define __syncthreads() cuda_shim::barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lane_xor) \
  cuda_shim::shuffle_xor(__LINE__, mask, value, lane_xor)

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  return cuda_shim::run(*config, [&] { kernel(args...); });
}
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

inline float rsqrt(float value) { return 1.0f / sqrtf(value); }
inline double rsqrt(double value) { return 1.0 / sqrt(value); }
