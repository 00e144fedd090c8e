// out = (h + a v) |h| / |h + a v|, one reduction per row.
#include "grains/cuda.h"
#include "launch.cuh"
#include "steered_row.cuh"

namespace grains::cuda {
namespace {

template <typename T, typename Shape>
__device__ void copy_row(const T* from, T* to, int dim, const RowThreads& threads) {
  if (from == to) return;
  const Tile<Shape::kVectors> own{threads.lane(), threads.count(), dim / Shape::kVector};
  for_each_tile<Shape>(own, [&](const auto& tile) {
    Packet<T, Shape::kVector> packets[Shape::kVectors];
    tile.load_from(from, packets);
    tile.store_to(to, packets);
  });
}

// False: nothing was written, the sums are not for this Real.
template <typename Real, typename T, typename Shape>
__device__ bool steer_row(const SteerArgs& args, const T* hidden, T* out,
                          const Direction<T>& direction, RowThreads& threads,
                          const Inputs<T, 1, Shape>& inputs) {
  const int dim = static_cast<int>(args.dim);
  SteeredRow<Real, T, 1, Shape> steered({hidden}, inputs, direction, dim, threads);
  if (!steered.template measure<false>(threads, args.steering.min_relative_norm)) return false;
  if (!steered.changed()) {
    copy_row<T, Shape>(hidden, out, dim, threads);
    return true;
  }
  steered.for_each_steered([&](const auto& tile, const auto& values) {
    Packet<T, Shape::kVector> packets[Shape::kVectors];
#pragma unroll
    for (int k = 0; k < Shape::kVectors; ++k) {
#pragma unroll
      for (int e = 0; e < Shape::kVector; ++e) {
        packets[k].element[e] = from_float<T>(static_cast<float>(values[k][e]));
      }
    }
    tile.store_to(out, packets);
  });
  return true;
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(kMaxRowThreads,
                                  Shape::kStays ? stay_blocks(sizeof(T)) : kSteerBlocks)
    steer_kernel(const SteerArgs args, const int row_threads) {
  wait_for_previous_kernel();
  RowThreads threads(row_threads);
  const int dim = static_cast<int>(args.dim);
  const auto hidden_of = [&](std::int64_t row) {
    return RowOf<T, 1>{static_cast<const T*>(args.hidden) + row * args.hidden_stride};
  };
  for_each_row<T, 1, Shape>(
      args.steering, args.rows, dim, threads, hidden_of,
      [&](std::int64_t row, const Direction<T>& direction, const Inputs<T, 1, Shape>& inputs) {
        const T* hidden = hidden_of(row).parts[0];
        T* out = static_cast<T*>(args.out) + row * args.out_stride;
        if (!direction.valid) {
          fill_row(out, NAN, dim, threads);
        } else if (!Shape::kStays && direction.vector == nullptr) {
          copy_row<T, Shape>(hidden, out, dim, threads);
        } else if (!steer_row<float, T, Shape>(args, hidden, out, direction, threads, inputs)) {
          steer_row<double, T, SlowShape>(args, hidden, out, direction, threads, {});
        }
      });
}

}  // namespace

int steer_add_normalize(const SteerArgs& args, void* stream) {
  if (args.rows == 0 || args.dim == 0) return cudaSuccess;
  if (args.dim > kMaxRowElements) return cudaErrorInvalidValue;
  std::int32_t capability = 0;
  if (const cudaError_t error = compute_capability(&capability)) return error;
  const SteeringArgs& steering = args.steering;
  const bool aligned =
      pointers_aligned({args.hidden, args.out, steering.vectors}) &&
      strides_aligned(args.dtype, {args.hidden_stride, args.out_stride, steering.vectors_stride});
  LaunchPlan plan = cuda::plan(args.rows, args.dim, args.dtype, capability, aligned);
  return with_type(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (int error = let_stay(&plan, steering, args.rows, stay_blocks(sizeof(T)))) return error;
    return with_shape<T>(plan, [&](auto shape) {
      return launch(steer_kernel<T, decltype(shape)>, dim3(static_cast<unsigned>(plan.blocks)),
                    plan.threads, plan.programmatic_launch, stream, args,
                    plan.threads / plan.rows_per_block);
    });
  });
}

}  // namespace grains::cuda
