// residual = steered(x + skip), normed = RMSNorm or LayerNorm of it. Steering keeps the row's norm,
// so RMSNorm needs no reduction of its own.
#include "grains/cuda.h"
#include "launch.cuh"
#include "steered_row.cuh"

namespace grains::cuda {
namespace {

enum class Norm { kRms, kLayer };

// normed = (residual - mean) * rstd * (weight + offset) + bias
template <typename Real>
struct Affine {
  Real mean = 0;
  Real rstd = 1;
};

template <Norm kNorm, typename Real, typename Row>
__device__ Affine<Real> affine_of(Row& steered, Real inverse_dim, Real eps, RowThreads& threads) {
  if constexpr (kNorm == Norm::kRms) {
    return {Real(0), rsqrt(steered.sum_of_squares() * inverse_dim + eps)};
  } else {
    // From the centred values: E[x^2] - E[x]^2 would lose all digits where the mean is large.
    const Real mean = steered.sum() * inverse_dim;
    Real squares[1] = {};
    steered.for_each_steered([&](const auto& tile, const auto& values) {
#pragma unroll
      for (int k = 0; k < Row::kVectors; ++k) {
        if (!tile.holds(k)) continue;
#pragma unroll
        for (int e = 0; e < Row::kVector; ++e) {
          const Real centred = values[k][e] - mean;
          squares[0] += centred * centred;
        }
      }
    });
    threads.sum(squares);
    return {mean, rsqrt(squares[0] * inverse_dim + eps)};
  }
}

// False: nothing was written, the sums are not for this Real.
template <Norm kNorm, typename Real, typename T, typename Shape>
__device__ bool skip_norm_row(const SkipNormArgs& args, const RowOf<T, 2>& row, T* residual,
                              T* normed, const Direction<T>& direction, Real inverse_dim,
                              RowThreads& threads, const Inputs<T, 2, Shape>& inputs) {
  const T* weight = static_cast<const T*>(args.weight);
  const T* bias = static_cast<const T*>(args.bias);
  using Row = SteeredRow<Real, T, 2, Shape>;
  Row steered(row, inputs, direction, static_cast<int>(args.dim), threads);
  if (!steered.template measure<kNorm == Norm::kLayer>(threads, args.steering.min_relative_norm)) {
    return false;
  }
  const auto [mean, rstd] =
      affine_of<kNorm, Real>(steered, inverse_dim, static_cast<Real>(args.eps), threads);
  const Real offset = kNorm == Norm::kRms ? args.weight_offset : 0.0f;
  steered.for_each_steered([&, mean = mean, rstd = rstd](const auto& tile, const auto& values) {
    Packet<T, Shape::kVector> weights[Shape::kVectors], biases[Shape::kVectors] = {};
    tile.load_from(weight, weights);
    if (bias != nullptr) tile.load_from(bias, biases);
    Packet<T, Shape::kVector> residuals[Shape::kVectors], results[Shape::kVectors];
#pragma unroll
    for (int k = 0; k < Shape::kVectors; ++k) {
#pragma unroll
      for (int e = 0; e < Shape::kVector; ++e) {
        const Real w = to_float(weights[k].element[e]), b = to_float(biases[k].element[e]);
        const Real value = (values[k][e] - mean) * rstd * (w + offset) + b;
        residuals[k].element[e] = from_float<T>(static_cast<float>(values[k][e]));
        results[k].element[e] = from_float<T>(static_cast<float>(value));
      }
    }
    tile.store_to(residual, residuals);
    tile.store_to(normed, results);
  });
  return true;
}

template <Norm kNorm, typename T, typename Shape>
__global__ void __launch_bounds__(kMaxRowThreads, kMinBlocks)
    skip_norm_kernel(const SkipNormArgs args, const float inverse_dim, const int row_threads) {
  wait_for_previous_kernel();
  RowThreads threads(row_threads);
  const int dim = static_cast<int>(args.dim);
  const auto row_of = [&](std::int64_t row) {
    return RowOf<T, 2>{static_cast<const T*>(args.x) + row * args.x_stride,
                       static_cast<const T*>(args.skip) + row * args.skip_stride};
  };
  for_each_row<T, 2, Shape>(
      args.steering, args.rows, dim, threads, row_of,
      [&](std::int64_t row, const Direction<T>& direction, const Inputs<T, 2, Shape>& inputs) {
        T* residual = static_cast<T*>(args.residual) + row * args.residual_stride;
        T* normed = static_cast<T*>(args.normed) + row * args.normed_stride;
        if (!direction.valid) {
          fill_row(residual, NAN, dim, threads);
          fill_row(normed, NAN, dim, threads);
        } else if (!skip_norm_row<kNorm, float, T, Shape>(args, row_of(row), residual, normed,
                                                          direction, inverse_dim, threads,
                                                          inputs)) {
          skip_norm_row<kNorm, double, T, SlowShape>(args, row_of(row), residual, normed, direction,
                                                     inverse_dim, threads, {});
        }
      });
}

template <Norm kNorm>
int skip_norm(const SkipNormArgs& args, void* stream) {
  if (args.rows == 0 || args.dim == 0) return cudaSuccess;
  if (args.dim > kMaxRowElements) return cudaErrorInvalidValue;
  std::int32_t capability = 0;
  if (const cudaError_t error = compute_capability(&capability)) return error;
  const SteeringArgs& steering = args.steering;
  const bool aligned =
      pointers_aligned({args.x, args.skip, args.residual, args.normed, args.weight, args.bias,
                        steering.vectors}) &&
      strides_aligned(args.dtype, {args.x_stride, args.skip_stride, args.residual_stride,
                                   args.normed_stride, steering.vectors_stride});
  LaunchPlan plan = cuda::plan(args.rows, args.dim, args.dtype, capability, aligned);
  if (const cudaError_t error = let_stay(&plan, steering, args.rows, kMinBlocks)) return error;
  return with_type(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return with_shape<T>(plan, [&](auto shape) {
      return launch(skip_norm_kernel<kNorm, T, decltype(shape)>,
                    dim3(static_cast<unsigned>(plan.blocks)), plan.threads,
                    plan.programmatic_launch, stream, args, 1.0f / static_cast<float>(args.dim),
                    plan.threads / plan.rows_per_block);
    });
  });
}

}  // namespace

int skip_steer_rms_norm(const SkipNormArgs& args, void* stream) {
  return skip_norm<Norm::kRms>(args, stream);
}

int skip_steer_layer_norm(const SkipNormArgs& args, void* stream) {
  return skip_norm<Norm::kLayer>(args, stream);
}

}  // namespace grains::cuda
