// out[s,b,t,:] = baseline[b,t,:] + alpha[s,b] (input[b,t,:] - baseline[b,t,:])
#include "grains/cuda.h"
#include "launch.cuh"
#include "vector.cuh"

namespace grains::cuda {
namespace {

template <typename T, int kVector>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    interpolate_kernel(const InterpolateArgs args, const int steps_per_block) {
  wait_for_previous_kernel();
  const std::int64_t columns = args.dim / kVector, rows = args.batch * args.tokens;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < rows * columns; i += threads) {
    const std::int64_t row = i / columns, column = i % columns;
    const std::int64_t b = row / args.tokens, t = row % args.tokens;
    const auto input = load<kVector>(static_cast<const T*>(args.input) +
                                         b * args.input_batch_stride + t * args.input_token_stride,
                                     column);
    const auto baseline =
        load<kVector>(static_cast<const T*>(args.baseline) + b * args.baseline_batch_stride +
                          t * args.baseline_token_stride,
                      column);
    for (std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * steps_per_block;
         first < args.steps; first += static_cast<std::int64_t>(gridDim.y) * steps_per_block) {
      for (std::int64_t s = first; s < first + steps_per_block && s < args.steps; ++s) {
        const float alpha = args.alphas[s * args.alpha_step_stride + b * args.alpha_batch_stride];
        Packet<T, kVector> out;
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const float from = to_float(baseline.element[e]), to = to_float(input.element[e]);
          // From the nearer end: the rounding error is relative to the shorter way.
          float value =
              alpha < 0.5f ? from + alpha * (to - from) : to - (1.0f - alpha) * (to - from);
          if (alpha == 0.0f) value = from;
          if (alpha == 1.0f) value = to;
          out.element[e] = from_float<T>(value);
        }
        store(static_cast<T*>(args.out) + (s * rows + row) * args.dim, column, out);
      }
    }
  }
}

}  // namespace

int ig_interpolate(const InterpolateArgs& args, void* stream) {
  if (args.steps == 0 || args.batch == 0 || args.tokens == 0 || args.dim == 0) return cudaSuccess;
  std::int32_t capability = 0;
  if (const cudaError_t error = compute_capability(&capability)) return error;
  const bool aligned =
      pointers_aligned({args.input, args.baseline, args.out}) &&
      strides_aligned(args.dtype, {args.input_batch_stride, args.input_token_stride,
                                   args.baseline_batch_stride, args.baseline_token_stride});
  const InterpolatePlan plan = plan_interpolate(args.batch * args.tokens, args.steps, args.dim,
                                                args.dtype, capability, aligned);
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.step_blocks));
  return with_type(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(
        plan.vector_elements == 1 ? interpolate_kernel<T, 1> : interpolate_kernel<T, kVectorOf<T>>,
        grid, plan.threads, plan.programmatic_launch, stream, args,
        static_cast<int>(plan.steps_per_block));
  });
}

}  // namespace grains::cuda
