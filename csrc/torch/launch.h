// Runs a kernel where its tensors are: on torch's own CPU threads, or on the current CUDA stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

#include "checks.h"
#include "grains/cpu.h"
#include "grains/cuda.h"

#ifdef GRAINS_WITH_CUDA
#define GRAINS_CUDA_LAUNCHER(op) grains::cuda::op
// It lives in libtorch_cuda, which a CPU-only torch lacks: weak, so that this library loads there.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(std::int32_t device_index, void** stream);
#else
#define GRAINS_CUDA_LAUNCHER(op) nullptr
#endif

namespace grains::torch_ops {

// torch's intra-op threads.
inline Parallel torch_threads() {
  Parallel parallel;
  std::uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  parallel.threads = static_cast<std::int32_t>(threads);
  parallel.run = [](void*, std::int64_t chunks, Parallel::Body body, void* context) {
    struct Call {
      Parallel::Body body;
      void* context;
    } call{body, context};
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(
        0, chunks, 1,
        [](std::int64_t begin, std::int64_t end, void* opaque) {
          const Call& call = *static_cast<const Call*>(opaque);
          for (std::int64_t chunk = begin; chunk < end; ++chunk) call.body(call.context, chunk);
        },
        &call));
  };
  return parallel;
}

template <class Args>
void launch(const char* op, const Tensor& where, const Args& args,
            void (*on_cpu)(const Args&, const Parallel&),
            [[maybe_unused]] std::type_identity_t<int (*)(const Args&, void*)> on_cuda) {
  if (where.is_cpu()) return on_cpu(args, torch_threads());
#ifdef GRAINS_WITH_CUDA
  const std::int32_t device = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = on_cuda(args, stream);
  if (error != 0) fail(op, "CUDA launch failed: ", cuda::error_string(error));
#else
  fail(op,
       "the tensors are on CUDA, but grains_ext was built without it; build it again with nvcc on "
       "the PATH and GRAINS_CUDA=ON, or move the tensors to the CPU");
#endif
}

}  // namespace grains::torch_ops
