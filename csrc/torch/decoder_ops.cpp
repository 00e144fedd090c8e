// torch.ops.grains, the ops between a decoder's matrix products: CPU only. Fake kernels and
// autograd are in grains_ext/decoder_ops.py, in the same order.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "arguments.h"
#include "grains/decoder.h"
#include "launch.h"

namespace grains::torch_ops {
namespace {

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto first = a.sizes(), second = b.sizes();
  return std::equal(first.begin(), first.end(), second.begin(), second.end());
}

// --- rms_norm -----------------------------------------------------------------------------------

void check_weight(const Argument& weight, const Argument& x) {
  check_like(weight, x);
  check_shape(
      weight,
      weight.tensor.dim() == 1 && weight.tensor.size(0) == x.tensor.size(x.tensor.dim() - 1),
      "[D] with D the last dimension", x);
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight_given, double eps,
                                    double weight_offset) {
  const char* op = "rms_norm";
  const Argument argument{op, "x", x};
  check_rows(argument);
  RmsNormArgs args;
  args.dtype = element_type(argument);
  check_weight({op, "weight", weight_given}, argument);
  if (!(eps >= 0.0)) fail(op, "`eps` is ", eps, ", expected a number >= 0");
  const Rows from = rows_of(x);
  const Tensor weight = with_contiguous_last_dim(weight_given);
  Tensor out = new_like(x);
  const auto sizes = x.sizes();
  Tensor rstd = new_tensor(sizes.data(), x.dim() - 1, raw_dtype(ScalarType::Float), x);
  args.x = from.tensor.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  args.rows = from.rows;
  args.dim = from.dim;
  args.x_stride = from.stride;
  args.eps = static_cast<float>(eps);
  args.weight_offset = static_cast<float>(weight_offset);
  cpu::rms_norm(args, torch_threads());
  return {out, rstd};
}

Tensor rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight_given,
                         const Tensor& rstd_given, double weight_offset) {
  const char* op = "rms_norm_backward";
  const Argument argument{op, "x", x}, grad_argument{op, "grad", grad};
  const Argument rstd_argument{op, "rstd", rstd_given};
  check_rows(argument);
  RmsNormBackwardArgs args;
  args.dtype = element_type(argument);
  check_weight({op, "weight", weight_given}, argument);
  check_like(grad_argument, argument);
  check_shape(grad_argument, same_shape(grad, x), "the same shape", argument);
  const Rows from = rows_of(x), upstream = rows_of(grad);
  check_dtype(rstd_argument, ScalarType::Float, "as rms_norm returned it");
  check_shape(rstd_argument, rstd_given.numel() == from.rows, "one number per row", argument);
  const Tensor weight = with_contiguous_last_dim(weight_given), rstd = packed(rstd_given);
  Tensor grad_x = new_like(x);
  args.grad = upstream.tensor.const_data_ptr();
  args.x = from.tensor.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.rstd = static_cast<const float*>(rstd.const_data_ptr());
  args.grad_x = grad_x.mutable_data_ptr();
  args.rows = from.rows;
  args.dim = from.dim;
  args.grad_stride = upstream.stride;
  args.x_stride = from.stride;
  args.weight_offset = static_cast<float>(weight_offset);
  cpu::rms_norm_backward(args, torch_threads());
  return grad_x;
}

// --- gated_activation ---------------------------------------------------------------------------

Activation activation_of(const char* op, std::int64_t activation) {
  if (activation == 0 || activation == 1) return static_cast<Activation>(activation);
  fail(op, "`activation` is ", activation, ", expected 0 (SiLU) or 1 (GELU, tanh)");
}

void check_gate_and_up(const Argument& gate, const Argument& up) {
  check_rows(gate);
  check_like(up, gate);
  check_shape(up, same_shape(up.tensor, gate.tensor), "the same shape", gate);
}

Tensor gated_activation(const Tensor& gate, const Tensor& up, std::int64_t activation) {
  const char* op = "gated_activation";
  const Argument argument{op, "gate", gate};
  check_gate_and_up(argument, {op, "up", up});
  GatedArgs args;
  args.dtype = element_type(argument);
  args.activation = activation_of(op, activation);
  const Rows gates = rows_of(gate), ups = rows_of(up);
  Tensor out = new_like(gate);
  args.gate = gates.tensor.const_data_ptr();
  args.up = ups.tensor.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.rows = gates.rows;
  args.dim = gates.dim;
  args.gate_stride = gates.stride;
  args.up_stride = ups.stride;
  cpu::gated_activation(args, torch_threads());
  return out;
}

std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad, const Tensor& gate,
                                                     const Tensor& up, std::int64_t activation) {
  const char* op = "gated_activation_backward";
  const Argument argument{op, "gate", gate}, grad_argument{op, "grad", grad};
  check_gate_and_up(argument, {op, "up", up});
  check_like(grad_argument, argument);
  check_shape(grad_argument, same_shape(grad, gate), "the same shape", argument);
  GatedBackwardArgs args;
  args.dtype = element_type(argument);
  args.activation = activation_of(op, activation);
  const Rows upstream = rows_of(grad), gates = rows_of(gate), ups = rows_of(up);
  Tensor grad_gate = new_like(gate), grad_up = new_like(gate);
  args.grad = upstream.tensor.const_data_ptr();
  args.gate = gates.tensor.const_data_ptr();
  args.up = ups.tensor.const_data_ptr();
  args.grad_gate = grad_gate.mutable_data_ptr();
  args.grad_up = grad_up.mutable_data_ptr();
  args.rows = gates.rows;
  args.dim = gates.dim;
  args.grad_stride = upstream.stride;
  args.gate_stride = gates.stride;
  args.up_stride = ups.stride;
  args.grad_gate_stride = args.grad_up_stride = gates.dim;
  cpu::gated_activation_backward(args, torch_threads());
  return {grad_gate, grad_up};
}

// --- heads --------------------------------------------------------------------------------------

HeadStrides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A new tensor [batch, heads, tokens, width] that lies in memory as [batch, tokens, heads, width]:
// what a projection of all heads reads and writes.
Tensor new_heads(std::int64_t batch, std::int64_t heads, std::int64_t tokens, std::int64_t width,
                 const Tensor& like) {
  const std::int64_t sizes[] = {batch, heads, tokens, width};
  const std::int64_t strides[] = {tokens * heads * width, width, heads * width, 1};
  return new_strided(sizes, strides, 4, raw_dtype(like), like);
}

void check_heads(const Argument& given) {
  const Tensor& tensor = given.tensor;
  if (tensor.dim() == 4 && tensor.size(1) >= 1 && tensor.size(3) >= 1) return;
  fail(given.op, "`", given.name, "` has shape ", ShapeOf{tensor},
       ", expected [batch, heads, tokens, width] with at least one head and a width of at least 1");
}

// --- rotary -------------------------------------------------------------------------------------

Tensor rotated(const Argument& x_given, const Argument& cos_given, const Argument& sin_given,
               bool transpose) {
  check_heads(x_given);
  RotaryArgs args;
  args.dtype = element_type(x_given);
  const Tensor x = with_contiguous_last_dim(x_given.tensor);
  const Tensor cos = packed(cos_given.tensor), sin = packed(sin_given.tensor);
  for (const Argument& table : {cos_given, sin_given}) {
    check_like(table, x_given);
    const Tensor& t = table.tensor;
    check_shape(table,
                t.dim() == 3 && (t.size(0) == 1 || t.size(0) == x.size(0)) &&
                    t.size(1) == x.size(2) && t.size(2) % 2 == 0 && t.size(2) <= x.size(3),
                "[batch or 1, tokens, an even number of at most width]", x_given);
  }
  check_shape(sin_given, same_shape(cos, sin), "the shape of `cos`", x_given);
  Tensor out = new_heads(x.size(0), x.size(1), x.size(2), x.size(3), x);
  args.x = x.const_data_ptr();
  args.cos = cos.const_data_ptr();
  args.sin = sin.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.batch = x.size(0);
  args.heads = x.size(1);
  args.tokens = x.size(2);
  args.width = x.size(3);
  args.dim = cos.size(2);
  args.x_strides = strides_of(x);
  args.out_strides = strides_of(out);
  args.table_batch_stride = cos.size(0) > 1 ? cos.stride(0) : 0;
  args.table_token_stride = cos.size(2);
  args.transpose = transpose;
  cpu::rotary(args, torch_threads());
  return out;
}

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos,
                                  const Tensor& sin, bool transpose) {
  const char* op = "rotary";
  const Argument q_argument{op, "q", q}, k_argument{op, "k", k};
  check_like(k_argument, q_argument);
  const Argument cos_argument{op, "cos", cos}, sin_argument{op, "sin", sin};
  return {rotated(q_argument, cos_argument, sin_argument, transpose),
          rotated(k_argument, cos_argument, sin_argument, transpose)};
}

// --- attention ----------------------------------------------------------------------------------

// The arguments that forward and backward share, checked, with the tensors that they point into.
struct Attention {
  Tensor q, k, v;
  std::optional<Tensor> mask;
  AttentionArgs args;
};

Attention attention_of(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                       const std::optional<Tensor>& mask, double scale) {
  const Argument q_given{op, "q", q}, k_given{op, "k", k}, v_given{op, "v", v};
  for (const Argument& given : {q_given, k_given, v_given}) check_heads(given);
  Attention made{with_contiguous_last_dim(q), with_contiguous_last_dim(k),
                 with_contiguous_last_dim(v), std::nullopt, AttentionArgs{}};
  AttentionArgs& args = made.args;
  args.dtype = element_type(q_given);
  check_like(k_given, q_given);
  check_like(v_given, q_given);
  check_shape(k_given,
              k.size(0) == q.size(0) && q.size(1) % k.size(1) == 0 && k.size(3) == q.size(3) &&
                  k.size(2) >= 1,
              "[batch, a number of heads that divides it, keys, width]", q_given);
  check_shape(v_given, v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
              "the same batch, heads and keys", k_given);
  args.q = made.q.const_data_ptr();
  args.k = made.k.const_data_ptr();
  args.v = made.v.const_data_ptr();
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.q_tokens = q.size(2);
  args.width = q.size(3);
  args.kv_heads = k.size(1);
  args.k_tokens = k.size(2);
  args.v_width = v.size(3);
  args.q_strides = strides_of(made.q);
  args.k_strides = strides_of(made.k);
  args.v_strides = strides_of(made.v);
  args.scale = static_cast<float>(scale);
  if (!mask.has_value()) return made;

  const Argument mask_given{op, "mask", *mask};
  check_like(mask_given, q_given);
  check_shape(mask_given,
              mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == q.size(0)) &&
                  mask->size(1) == 1 && mask->size(2) == q.size(2) && mask->size(3) == k.size(2),
              "[batch or 1, 1, queries, keys]", q_given);
  made.mask = with_contiguous_last_dim(*mask);
  args.mask = made.mask->const_data_ptr();
  args.mask_batch_stride = mask->size(0) > 1 ? made.mask->stride(0) : 0;
  args.mask_token_stride = made.mask->stride(2);
  return made;
}

[[noreturn]] void fail_without_memory(const char* op, const AttentionArgs& args) {
  fail(op, "no memory for the scores of `k`, ", args.k_tokens, " keys of width ", args.width,
       ", on each thread; shorten the sequences, or use fewer threads (torch.set_num_threads)");
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& mask, double scale) {
  const char* op = "attention";
  Attention made = attention_of(op, q, k, v, mask, scale);
  AttentionArgs& args = made.args;
  Tensor out = new_heads(args.batch, args.heads, args.q_tokens, args.v_width, q);
  const std::int64_t sizes[] = {args.batch, args.heads, args.q_tokens};
  Tensor lse = new_tensor(sizes, 3, raw_dtype(ScalarType::Float), q);
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (!cpu::attention(args, torch_threads())) fail_without_memory(op, args);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_given, const Tensor& q,
                                                      const Tensor& k, const Tensor& v,
                                                      const std::optional<Tensor>& mask,
                                                      const Tensor& out, const Tensor& lse,
                                                      double scale) {
  const char* op = "attention_backward";
  const Attention made = attention_of(op, q, k, v, mask, scale);
  AttentionBackwardArgs args;
  args.forward = made.args;
  const AttentionArgs& forward = args.forward;
  const Argument q_argument{op, "q", q}, out_argument{op, "out", out};
  const Argument grad_argument{op, "grad", grad_given}, lse_argument{op, "lse", lse};
  check_like(out_argument, q_argument);
  check_like(grad_argument, q_argument);
  check_dtype(lse_argument, ScalarType::Float, "as attention returned it");
  check_shape(out_argument,
              out.dim() == 4 && out.size(0) == forward.batch && out.size(1) == forward.heads &&
                  out.size(2) == forward.q_tokens && out.size(3) == forward.v_width,
              "as attention returned it", q_argument);
  check_shape(grad_argument, same_shape(grad_given, out), "the same shape", out_argument);
  check_shape(lse_argument, lse.numel() == forward.batch * forward.heads * forward.q_tokens,
              "[batch, heads, queries]", q_argument);
  const Tensor grad = with_contiguous_last_dim(grad_given);
  // The kernel reads it as attention lays it out.
  Tensor laid_out = out;
  const HeadStrides strides = strides_of(out);
  if (out.numel() > 0 &&
      (strides.head != forward.v_width || strides.token != forward.heads * forward.v_width ||
       strides.batch != forward.q_tokens * forward.heads * forward.v_width)) {
    laid_out = new_heads(forward.batch, forward.heads, forward.q_tokens, forward.v_width, q);
    torch::stable::copy_(laid_out, out);
  }
  const Tensor sums = packed(lse);
  Tensor grad_q = new_heads(forward.batch, forward.heads, forward.q_tokens, forward.width, q);
  Tensor grad_k = new_heads(forward.batch, forward.kv_heads, forward.k_tokens, forward.width, q);
  Tensor grad_v = new_heads(forward.batch, forward.kv_heads, forward.k_tokens, forward.v_width, q);
  args.forward.out = const_cast<void*>(laid_out.const_data_ptr());
  args.forward.lse = const_cast<float*>(static_cast<const float*>(sums.const_data_ptr()));
  args.grad = grad.const_data_ptr();
  args.grad_strides = strides_of(grad);
  args.grad_q = grad_q.mutable_data_ptr();
  args.grad_k = grad_k.mutable_data_ptr();
  args.grad_v = grad_v.mutable_data_ptr();
  if (!cpu::attention_backward(args, torch_threads())) fail_without_memory(op, forward);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace grains::torch_ops

STABLE_TORCH_LIBRARY_FRAGMENT(grains, m) {
  m.def(
      "rms_norm(Tensor x, Tensor weight, float eps=1e-6, float weight_offset=0) -> "
      "(Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, "
      "float weight_offset=0) -> Tensor");
  m.def("gated_activation(Tensor gate, Tensor up, int activation) -> Tensor");
  m.def(
      "gated_activation_backward(Tensor grad, Tensor gate, Tensor up, int activation) -> "
      "(Tensor, Tensor)");
  m.def(
      "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transpose=False) -> "
      "(Tensor, Tensor)");
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, "
      "Tensor lse, float scale) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grains, CPU, m) {
  using namespace grains::torch_ops;
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
  m.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward));
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
