// The CUDA launchers and the launch plan over a C ABI, for tests that load them with ctypes.
#include <cuda_runtime.h>

#include <cstddef>

#include "grains/cuda.h"
#include "grains/launch_plan.h"

#define GRAINS_TEST_API extern "C" __attribute__((visibility("default")))

GRAINS_TEST_API int ig_interpolate(const grains::InterpolateArgs* args) {
  return grains::cuda::ig_interpolate(*args, nullptr);
}
GRAINS_TEST_API int ig_accumulate(const grains::AccumulateArgs* args) {
  return grains::cuda::ig_accumulate(*args, nullptr);
}
GRAINS_TEST_API int steer_add_normalize(const grains::SteerArgs* args) {
  return grains::cuda::steer_add_normalize(*args, nullptr);
}
GRAINS_TEST_API int skip_steer_rms_norm(const grains::SkipNormArgs* args) {
  return grains::cuda::skip_steer_rms_norm(*args, nullptr);
}
GRAINS_TEST_API int skip_steer_layer_norm(const grains::SkipNormArgs* args) {
  return grains::cuda::skip_steer_layer_norm(*args, nullptr);
}
GRAINS_TEST_API const char* error_string(int error) { return grains::cuda::error_string(error); }

GRAINS_TEST_API void plan(std::int64_t rows, std::int64_t dim, int dtype, int capability,
                          int aligned, grains::cuda::LaunchPlan* out) {
  *out = grains::cuda::plan(rows, dim, static_cast<grains::DType>(dtype), capability, aligned != 0);
}
GRAINS_TEST_API void plan_staying(grains::cuda::LaunchPlan* plan, std::int64_t rows,
                                  std::int64_t resident_threads, int stay) {
  *plan = grains::cuda::plan_staying(*plan, rows, resident_threads,
                                     static_cast<grains::cuda::Stay>(stay));
}
GRAINS_TEST_API void plan_interpolate(std::int64_t rows, std::int64_t steps, std::int64_t dim,
                                      int dtype, int capability, int aligned,
                                      grains::cuda::InterpolatePlan* out) {
  *out = grains::cuda::plan_interpolate(rows, steps, dim, static_cast<grains::DType>(dtype),
                                        capability, aligned != 0);
}
GRAINS_TEST_API void plan_accumulate(std::int64_t rows, std::int64_t steps, std::int64_t dim,
                                     int dtype, int capability, int aligned,
                                     grains::cuda::AccumulatePlan* out) {
  *out = grains::cuda::plan_accumulate(rows, steps, dim, static_cast<grains::DType>(dtype),
                                       capability, aligned != 0);
}

// So that the caller's copy of each struct can be checked against this one.
GRAINS_TEST_API std::size_t size_of_interpolate_args() { return sizeof(grains::InterpolateArgs); }
GRAINS_TEST_API std::size_t size_of_accumulate_args() { return sizeof(grains::AccumulateArgs); }
GRAINS_TEST_API std::size_t size_of_steer_args() { return sizeof(grains::SteerArgs); }
GRAINS_TEST_API std::size_t size_of_skip_norm_args() { return sizeof(grains::SkipNormArgs); }

GRAINS_TEST_API void set_compute_capability(int capability) {
  cuda_shim::set_compute_capability(capability);
}
GRAINS_TEST_API void set_multiprocessors(int count) { cuda_shim::set_multiprocessors(count); }
GRAINS_TEST_API void set_max_grid(unsigned blocks) { cuda_shim::set_max_grid(blocks); }
GRAINS_TEST_API int was_programmatic() { return cuda_shim::was_programmatic() ? 1 : 0; }
