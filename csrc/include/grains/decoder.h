// The pieces of a decoder block between its matrix products, forward and backward to the inputs:
// weights are frozen. CPU only; a GPU runs the model's own modules.
#pragma once

#include "grains/types.h"

namespace grains {

// out = x * rstd * (weight + weight_offset), rstd = 1 / sqrt(mean x^2 + eps), row by row. `out` is
// contiguous.
struct RmsNormArgs {
  const void* x = nullptr;
  const void* weight = nullptr;  // [dim]
  void* out = nullptr;
  float* rstd = nullptr;  // [rows]
  std::int64_t rows = 0, dim = 0, x_stride = 0;
  float eps = 1e-6f, weight_offset = 0.0f;
  DType dtype = DType::kFloat32;
};

// grad_x = rstd * (g - x * rstd^2 * mean(g x)) with g = grad * (weight + weight_offset). `grad_x`
// is contiguous.
struct RmsNormBackwardArgs {
  const void* grad = nullptr;
  const void* x = nullptr;
  const void* weight = nullptr;
  const float* rstd = nullptr;
  void* grad_x = nullptr;
  std::int64_t rows = 0, dim = 0, grad_stride = 0, x_stride = 0;
  float weight_offset = 0.0f;
  DType dtype = DType::kFloat32;
};

enum class Activation : std::int32_t { kSilu = 0, kGeluTanh = 1 };

// out = activation(gate) * up, row by row. `out` is contiguous.
struct GatedArgs {
  const void* gate = nullptr;
  const void* up = nullptr;
  void* out = nullptr;
  std::int64_t rows = 0, dim = 0, gate_stride = 0, up_stride = 0;
  Activation activation = Activation::kSilu;
  DType dtype = DType::kFloat32;
};

// grad_gate = grad * up * activation'(gate), grad_up = grad * activation(gate).
struct GatedBackwardArgs {
  const void* grad = nullptr;
  const void* gate = nullptr;
  const void* up = nullptr;
  void* grad_gate = nullptr;
  void* grad_up = nullptr;
  std::int64_t rows = 0, dim = 0;
  std::int64_t grad_stride = 0, gate_stride = 0, up_stride = 0;
  std::int64_t grad_gate_stride = 0, grad_up_stride = 0;
  Activation activation = Activation::kSilu;
  DType dtype = DType::kFloat32;
};

// Elements between batch rows, between heads and between tokens of a tensor [batch, heads, tokens,
// width] whose last dimension is contiguous.
struct HeadStrides {
  std::int64_t batch = 0, head = 0, token = 0;
};

// The rotary embedding of the first `dim` of `width` elements; the others are copied. With halves
// x1 and x2 of those, and c1 c2, s1 s2 of cos and sin: out = (x1 c1 - x2 s1, x2 c2 + x1 s2), or,
// for the gradient, its transpose (x1 c1 + x2 s2, x2 c2 - x1 s1).
struct RotaryArgs {
  const void* x = nullptr;
  const void* cos = nullptr;  // [batch or 1, tokens, dim]
  const void* sin = nullptr;
  void* out = nullptr;
  std::int64_t batch = 0, heads = 0, tokens = 0, width = 0;
  std::int64_t dim = 0;  // even
  HeadStrides x_strides, out_strides;
  std::int64_t table_batch_stride = 0, table_token_stride = 0;
  bool transpose = false;
  DType dtype = DType::kFloat32;
};

// out = softmax(scale q k^T + mask) v, per head; head h reads keys and values of h / (heads /
// kv_heads). A mask is added to the scores, its least value hides a key. `out` and `lse`, the
// logarithm of each row's sum of exponentials, are contiguous [batch, q_tokens, heads, v_width] and
// [batch, heads, q_tokens].
struct AttentionArgs {
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  const void* mask = nullptr;  // [batch or 1, q_tokens, k_tokens] or null
  void* out = nullptr;
  float* lse = nullptr;
  std::int64_t batch = 0, heads = 0, kv_heads = 0, q_tokens = 0, k_tokens = 0;
  std::int64_t width = 0, v_width = 0;
  HeadStrides q_strides, k_strides, v_strides;
  std::int64_t mask_batch_stride = 0, mask_token_stride = 0;
  float scale = 1.0f;
  DType dtype = DType::kFloat32;
};

// The gradients, contiguous [batch, tokens, heads or kv_heads, width].
struct AttentionBackwardArgs {
  AttentionArgs forward;  // `out` and `lse` as that wrote them
  const void* grad = nullptr;
  HeadStrides grad_strides;
  void* grad_q = nullptr;
  void* grad_k = nullptr;
  void* grad_v = nullptr;
};

}  // namespace grains

namespace grains::cpu {

void rms_norm(const RmsNormArgs& args, const Parallel& parallel);
void rms_norm_backward(const RmsNormBackwardArgs& args, const Parallel& parallel);
void gated_activation(const GatedArgs& args, const Parallel& parallel);
void gated_activation_backward(const GatedBackwardArgs& args, const Parallel& parallel);
void rotary(const RotaryArgs& args, const Parallel& parallel);
// False: some thread had no memory for a head's keys, values and scores in float32, and what `out`
// or the gradients hold means nothing.
bool attention(const AttentionArgs& args, const Parallel& parallel);
bool attention_backward(const AttentionBackwardArgs& args, const Parallel& parallel);

}  // namespace grains::cpu
