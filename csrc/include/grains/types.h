// Plain types shared by every kernel and every host framework. No torch, no onnxruntime.
#pragma once

#include <cstdint>

namespace grains {

enum class DType : std::int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// The host framework's own thread pool. The CPU kernels never start a thread: they hand out
// `chunks` of work, and the caller runs body(context, chunk) for each chunk in [0, chunks), in any
// order, possibly concurrently. A null function runs them one after another.
struct Parallel {
  using Body = void (*)(void* context, std::int64_t chunk);
  void (*run)(void* host, std::int64_t chunks, Body body, void* context) = nullptr;
  void* host = nullptr;
  std::int32_t threads = 1;  // upper bound on how many chunks are worth making
};

// out[s,b,t,:] = baseline[b,t,:] + alpha[s,b] * (input[b,t,:] - baseline[b,t,:])
// Strides are in elements. The last dimension is contiguous everywhere; a broadcast dimension has
// stride 0. `out` is contiguous [steps, batch, tokens, dim]. input, baseline and out share `dtype`.
struct InterpolateArgs {
  const void* input = nullptr;
  const void* baseline = nullptr;
  const float* alphas = nullptr;
  void* out = nullptr;
  std::int64_t steps = 0, batch = 0, tokens = 0, dim = 0;
  std::int64_t input_batch_stride = 0, input_token_stride = 0;
  std::int64_t baseline_batch_stride = 0, baseline_token_stride = 0;
  std::int64_t alpha_step_stride = 0, alpha_batch_stride = 0;
  DType dtype = DType::kFloat32;
};

// out[b,t] = sum_s weight[s,b] * sum_d grads[s,b,t,d] * (input[b,t,d] - baseline[b,t,d])
// `out` is contiguous float32 [batch, tokens]. grads, input and baseline share `dtype`.
struct AccumulateArgs {
  const void* grads = nullptr;
  const void* input = nullptr;
  const void* baseline = nullptr;
  const float* weights = nullptr;
  float* out = nullptr;
  std::int64_t steps = 0, batch = 0, tokens = 0, dim = 0;
  std::int64_t grads_step_stride = 0, grads_batch_stride = 0, grads_token_stride = 0;
  std::int64_t input_batch_stride = 0, input_token_stride = 0;
  std::int64_t baseline_batch_stride = 0, baseline_token_stride = 0;
  std::int64_t weight_step_stride = 0, weight_batch_stride = 0;
  DType dtype = DType::kFloat32;
};

// Which direction steers which row: row r uses bank row j = index[r / rows_per_index] (0 without
// an index) and strength[j * strength_stride]. j = -1 leaves the row alone. Any other j outside
// [0, bank) is an error: the CPU hosts refuse it before the launch; a CUDA kernel cannot raise
// without a synchronisation, so it fills that row with NaN.
struct SteeringArgs {
  const void* vectors = nullptr;    // [bank, dim], the row type
  std::int64_t vectors_stride = 0;  // elements between bank rows
  std::int64_t bank = 1;
  const float* strength = nullptr;   // [1] or [bank]
  std::int64_t strength_stride = 0;  // 0: one strength for all bank rows; 1: one each
  const std::int32_t* index = nullptr;
  std::int64_t rows_per_index = 1;
  // A row whose steered norm is <= min_relative_norm * its norm is returned unchanged: there the
  // sum is rounding noise and has no direction to keep.
  float min_relative_norm = 1e-6f;
};

// out[r,:] = (h + a v) * |h| / |h + a v|, per row. `out` may be `hidden` itself (same strides);
// any other overlap is not allowed.
struct SteerArgs {
  const void* hidden = nullptr;
  void* out = nullptr;
  std::int64_t rows = 0, dim = 0;
  std::int64_t hidden_stride = 0, out_stride = 0;  // elements between rows
  SteeringArgs steering;
  DType dtype = DType::kFloat32;
};

// residual = steered(x + skip); normed = RMSNorm(residual) * (weight + weight_offset), or
// normed = LayerNorm(residual) * weight + bias. The sum and the norm are taken in float32, before
// `residual` is rounded. residual or normed may alias x or skip exactly (same strides).
struct SkipNormArgs {
  const void* x = nullptr;
  const void* skip = nullptr;
  const void* weight = nullptr;  // [dim]
  const void* bias = nullptr;    // [dim] or null; LayerNorm only
  void* normed = nullptr;
  void* residual = nullptr;
  std::int64_t rows = 0, dim = 0;
  std::int64_t x_stride = 0, skip_stride = 0, normed_stride = 0, residual_stride = 0;
  SteeringArgs steering;
  float eps = 1e-6f;
  float weight_offset = 0.0f;  // RMSNorm only (1 for Gemma)
  DType dtype = DType::kFloat32;
};

}  // namespace grains
