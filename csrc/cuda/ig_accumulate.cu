// out[b,t] = sum_s weight[s,b] sum_d grads[s,b,t,d] (input[b,t,d] - baseline[b,t,d])
#include "grains/cuda.h"
#include "launch.cuh"
#include "row_threads.cuh"
#include "vector.cuh"

namespace grains::cuda {
namespace {

template <typename T, int kVector>
__global__ void __launch_bounds__(kMaxRowThreads, kMinBlocks)
    accumulate_kernel(const AccumulateArgs args, const int row_threads, const int column_threads) {
  wait_for_previous_kernel();
  RowThreads threads(row_threads);
  const int group = threads.lane() / column_threads, groups = row_threads / column_threads;
  const std::int64_t columns = args.dim / kVector, rows = args.batch * args.tokens;
  for (std::int64_t row = threads.first_row(); row < rows; row += threads.row_stride()) {
    const std::int64_t b = row / args.tokens, t = row % args.tokens;
    const T* input = static_cast<const T*>(args.input) + b * args.input_batch_stride +
                     t * args.input_token_stride;
    const T* baseline = static_cast<const T*>(args.baseline) + b * args.baseline_batch_stride +
                        t * args.baseline_token_stride;
    const T* grads = static_cast<const T*>(args.grads) + b * args.grads_batch_stride +
                     t * args.grads_token_stride;
    const float* weights = args.weights + b * args.weight_batch_stride;
    float total[1] = {};
#pragma unroll 1
    for (std::int64_t column = threads.lane() % column_threads; column < columns;
         column += column_threads) {
      const auto to = load<kVector>(input, column), from = load<kVector>(baseline, column);
      float difference[kVector];
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        difference[e] = to_float(to.element[e]) - to_float(from.element[e]);
      }
      // Unrolled to have several loads in flight.
#pragma unroll 4
      for (std::int64_t s = group; s < args.steps; s += groups) {
        const auto grad = load<kVector>(grads + s * args.grads_step_stride, column);
        float product = 0.0f;
#pragma unroll
        for (int e = 0; e < kVector; ++e) product += to_float(grad.element[e]) * difference[e];
        total[0] += weights[s * args.weight_step_stride] * product;
      }
    }
    threads.sum(total);
    if (threads.lane() == 0) args.out[row] = total[0];
  }
}

}  // namespace

int ig_accumulate(const AccumulateArgs& args, void* stream) {
  const std::int64_t rows = args.batch * args.tokens;
  if (rows == 0) return cudaSuccess;
  std::int32_t capability = 0;
  if (const cudaError_t error = compute_capability(&capability)) return error;
  const bool aligned =
      pointers_aligned({args.grads, args.input, args.baseline}) &&
      strides_aligned(args.dtype,
                      {args.grads_step_stride, args.grads_batch_stride, args.grads_token_stride,
                       args.input_batch_stride, args.input_token_stride, args.baseline_batch_stride,
                       args.baseline_token_stride});
  const AccumulatePlan plan =
      plan_accumulate(rows, args.steps, args.dim, args.dtype, capability, aligned);
  return with_type(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(
        plan.vector_elements == 1 ? accumulate_kernel<T, 1> : accumulate_kernel<T, kVectorOf<T>>,
        dim3(static_cast<unsigned>(plan.blocks)), plan.threads, plan.programmatic_launch, stream,
        args, plan.threads / plan.rows_per_block, static_cast<int>(plan.column_threads));
  });
}

}  // namespace grains::cuda
