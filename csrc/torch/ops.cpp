// torch.ops.grains on the LibTorch stable ABI. The ops check their arguments here, because they can
// be called without the Python wrappers; fake kernels and autograd are in grains_ext/ops.py, in the
// same order.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "arguments.h"
#include "launch.h"

namespace grains::torch_ops {
namespace {

// --- ig_interpolate and ig_accumulate
// -------------------------------------------------------------

void check_input(const Argument& input) {
  if (input.tensor.dim() == 3 && input.tensor.size(2) >= 1) return;
  fail(input.op, "`input` has shape ", ShapeOf{input.tensor},
       ", expected [batch, tokens, hidden size] with a hidden size of at least 1");
}

// Elements between batches and between tokens of `baseline`, 0 where it is broadcast.
struct BroadcastStrides {
  std::int64_t batch = 0, token = 0;
};

BroadcastStrides check_baseline(const Argument& baseline, const Argument& input) {
  check_like(baseline, input);
  const std::int64_t dims = baseline.tensor.dim();
  bool fits = dims >= 1 && dims <= 3 && baseline.tensor.size(dims - 1) == input.tensor.size(2);
  for (std::int64_t i = 0; fits && i + 1 < dims; ++i) {
    const std::int64_t size = baseline.tensor.size(i);
    fits = size == 1 || size == input.tensor.size(i + 3 - dims);
  }
  check_shape(baseline, fits, "a shape that ends in the hidden size and broadcasts", input);
  const auto stride = [&](std::int64_t i) {
    return i >= 0 && baseline.tensor.size(i) > 1 ? baseline.tensor.stride(i) : 0;
  };
  return {stride(dims - 3), stride(dims - 2)};
}

// alphas and weights: float32 [steps] or [steps, batch].
void check_per_step(const Argument& given, const Argument& input) {
  check_dtype(given, ScalarType::Float, "steps are always float32");
  check_same_device(given, input);
  const std::int64_t dims = given.tensor.dim();
  check_shape(given, dims == 1 || (dims == 2 && given.tensor.size(1) == input.tensor.size(0)),
              "[steps] or [steps, batch]", input);
}

Tensor ig_interpolate(const Tensor& input_given, const Tensor& baseline_given,
                      const Tensor& alphas) {
  const char* op = "ig_interpolate";
  const Tensor input = with_contiguous_last_dim(input_given);
  const Tensor baseline = with_contiguous_last_dim(baseline_given);
  const Argument input_argument{op, "input", input};
  InterpolateArgs args;
  args.dtype = element_type(input_argument);
  check_input(input_argument);
  const BroadcastStrides strides = check_baseline({op, "baseline", baseline}, input_argument);
  check_per_step({op, "alphas", alphas}, input_argument);
  args.steps = alphas.size(0);
  args.batch = input.size(0);
  args.tokens = input.size(1);
  args.dim = input.size(2);
  const std::int64_t sizes[] = {args.steps, args.batch, args.tokens, args.dim};
  Tensor out = new_tensor(sizes, 4, raw_dtype(input), input);
  if (out.numel() == 0) return out;
  args.input = input.const_data_ptr();
  args.baseline = baseline.const_data_ptr();
  args.alphas = static_cast<const float*>(alphas.const_data_ptr());
  args.out = out.mutable_data_ptr();
  args.input_batch_stride = input.stride(0);
  args.input_token_stride = input.stride(1);
  args.baseline_batch_stride = strides.batch;
  args.baseline_token_stride = strides.token;
  args.alpha_step_stride = alphas.stride(0);
  args.alpha_batch_stride = alphas.dim() == 2 ? alphas.stride(1) : 0;
  launch(op, out, args, cpu::ig_interpolate, GRAINS_CUDA_LAUNCHER(ig_interpolate));
  return out;
}

Tensor ig_accumulate(const Tensor& grads_given, const Tensor& input_given,
                     const Tensor& baseline_given, const Tensor& weights) {
  const char* op = "ig_accumulate";
  const Tensor grads = with_contiguous_last_dim(grads_given);
  const Tensor input = with_contiguous_last_dim(input_given);
  const Tensor baseline = with_contiguous_last_dim(baseline_given);
  const Argument input_argument{op, "input", input}, grads_argument{op, "grads", grads};
  AccumulateArgs args;
  args.dtype = element_type(input_argument);
  check_input(input_argument);
  const BroadcastStrides strides = check_baseline({op, "baseline", baseline}, input_argument);
  const Argument weights_argument{op, "weights", weights};
  check_per_step(weights_argument, input_argument);
  args.steps = weights.size(0);
  args.batch = input.size(0);
  args.tokens = input.size(1);
  args.dim = input.size(2);
  check_like(grads_argument, input_argument);
  check_shape(grads_argument,
              grads.dim() == 4 && grads.size(1) == args.batch && grads.size(2) == args.tokens &&
                  grads.size(3) == args.dim,
              "[steps, batch, tokens, hidden size]", input_argument);
  check_shape(weights_argument, args.steps == grads.size(0), "one weight per step", grads_argument);
  const std::int64_t sizes[] = {args.batch, args.tokens};
  Tensor out = new_tensor(sizes, 2, raw_dtype(ScalarType::Float), input);
  if (out.numel() == 0) return out;
  args.grads = grads.const_data_ptr();
  args.input = input.const_data_ptr();
  args.baseline = baseline.const_data_ptr();
  args.weights = static_cast<const float*>(weights.const_data_ptr());
  args.out = static_cast<float*>(out.mutable_data_ptr());
  args.grads_step_stride = grads.stride(0);
  args.grads_batch_stride = grads.stride(1);
  args.grads_token_stride = grads.stride(2);
  args.input_batch_stride = input.stride(0);
  args.input_token_stride = input.stride(1);
  args.baseline_batch_stride = strides.batch;
  args.baseline_token_stride = strides.token;
  args.weight_step_stride = weights.stride(0);
  args.weight_batch_stride = weights.dim() == 2 ? weights.stride(1) : 0;
  launch(op, out, args, cpu::ig_accumulate, GRAINS_CUDA_LAUNCHER(ig_accumulate));
  return out;
}

// --- steer_add_normalize
// --------------------------------------------------------------------------

float relative_norm_of(const char* op, double eps) {
  if (!(eps >= 0.0 && eps < 1.0)) fail(op, "`eps` is ", eps, ", expected a number in [0, 1)");
  return static_cast<float>(eps);
}

void steer(const Argument& hidden, const Rows& from, const Rows& to, const Tensor& vectors,
           const Tensor& strength, const std::optional<Tensor>& index, double eps) {
  SteerArgs args;
  args.dtype = element_type(hidden);
  const float min_relative_norm = relative_norm_of(hidden.op, eps);
  Steering steering = steering_of(hidden, from.rows, from.dim, vectors, strength, index);
  steering.args.min_relative_norm = min_relative_norm;
  if (from.rows == 0) return;
  args.hidden = from.tensor.const_data_ptr();
  args.out = to.tensor.mutable_data_ptr();
  args.rows = from.rows;
  args.dim = from.dim;
  args.hidden_stride = from.stride;
  args.out_stride = to.stride;
  args.steering = steering.args;
  launch(hidden.op, from.tensor, args, cpu::steer_add_normalize,
         GRAINS_CUDA_LAUNCHER(steer_add_normalize));
}

Tensor steer_add_normalize(const Tensor& hidden, const Tensor& vectors, const Tensor& strength,
                           const std::optional<Tensor>& index, double eps) {
  const Argument argument{"steer_add_normalize", "hidden", hidden};
  check_rows(argument);
  const Rows from = rows_of(hidden);
  const Rows to{new_like(hidden), from.rows, from.dim, from.dim};
  steer(argument, from, to, vectors, strength, index, eps);
  return to.tensor;
}

// A layout that is not rows with one distance between them is steered in a copy, and copied back.
void steer_add_normalize_inplace(const Tensor& hidden, const Tensor& vectors,
                                 const Tensor& strength, const std::optional<Tensor>& index,
                                 double eps) {
  const Argument argument{"steer_add_normalize_", "hidden", hidden};
  check_rows(argument);
  Rows rows;
  if (as_rows(hidden, &rows)) {
    if (rows.rows > 1 && rows.stride < rows.dim && rows.stride > -rows.dim) {
      fail(argument.op,
           "`hidden` has rows that overlap in memory (it was expanded); clone it first");
    }
    return steer(argument, rows, rows, vectors, strength, index, eps);
  }
  const Rows copy = rows_of(hidden);
  steer(argument, copy, copy, vectors, strength, index, eps);
  Tensor target = hidden;
  torch::stable::copy_(target, copy.tensor);
}

// --- skip_steer_rms_norm and skip_steer_layer_norm
// ------------------------------------------------

struct Normed {
  Tensor normed, residual;
};

Normed skip_steer_norm(const char* op, const Tensor& x, const Tensor& skip, const Tensor& vectors,
                       const Tensor& strength, const Tensor& weight,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
                       double eps, double weight_offset,
                       void (*on_cpu)(const SkipNormArgs&, const Parallel&),
                       int (*on_cuda)(const SkipNormArgs&, void*)) {
  const Argument argument{op, "x", x}, skip_argument{op, "skip", skip};
  check_rows(argument);
  SkipNormArgs args;
  args.dtype = element_type(argument);
  check_like(skip_argument, argument);
  const auto x_sizes = x.sizes(), skip_sizes = skip.sizes();
  check_shape(skip_argument,
              std::equal(x_sizes.begin(), x_sizes.end(), skip_sizes.begin(), skip_sizes.end()),
              "the same shape", argument);
  const Rows from = rows_of(x), skipped = rows_of(skip);
  const auto check_parameter = [&](const Argument& given) {
    check_like(given, argument);
    check_shape(given, given.tensor.dim() == 1 && given.tensor.size(0) == from.dim,
                "[D] with D the last dimension", argument);
  };
  check_parameter({op, "weight", weight});
  if (bias.has_value()) check_parameter({op, "bias", *bias});
  if (!(eps >= 0.0)) fail(op, "`eps` is ", eps, ", expected a number >= 0");
  const Steering steering = steering_of(argument, from.rows, from.dim, vectors, strength, index);
  Normed out{new_like(x), new_like(x)};
  if (from.rows == 0) return out;
  const Tensor weights = with_contiguous_last_dim(weight);
  const Tensor biases = bias.has_value() ? with_contiguous_last_dim(*bias) : weights;
  args.x = from.tensor.const_data_ptr();
  args.skip = skipped.tensor.const_data_ptr();
  args.weight = weights.const_data_ptr();
  args.bias = bias.has_value() ? biases.const_data_ptr() : nullptr;
  args.normed = out.normed.mutable_data_ptr();
  args.residual = out.residual.mutable_data_ptr();
  args.rows = from.rows;
  args.dim = from.dim;
  args.x_stride = from.stride;
  args.skip_stride = skipped.stride;
  args.normed_stride = args.residual_stride = from.dim;
  args.steering = steering.args;
  args.eps = static_cast<float>(eps);
  args.weight_offset = static_cast<float>(weight_offset);
  launch(op, x, args, on_cpu, on_cuda);
  return out;
}

std::tuple<Tensor, Tensor> skip_steer_rms_norm(const Tensor& x, const Tensor& skip,
                                               const Tensor& vectors, const Tensor& strength,
                                               const Tensor& weight,
                                               const std::optional<Tensor>& index, double eps,
                                               double weight_offset) {
  const Normed out = skip_steer_norm(
      "skip_steer_rms_norm", x, skip, vectors, strength, weight, std::nullopt, index, eps,
      weight_offset, cpu::skip_steer_rms_norm, GRAINS_CUDA_LAUNCHER(skip_steer_rms_norm));
  return {out.normed, out.residual};
}

std::tuple<Tensor, Tensor> skip_steer_layer_norm(const Tensor& x, const Tensor& skip,
                                                 const Tensor& vectors, const Tensor& strength,
                                                 const Tensor& weight,
                                                 const std::optional<Tensor>& bias,
                                                 const std::optional<Tensor>& index, double eps) {
  const Normed out =
      skip_steer_norm("skip_steer_layer_norm", x, skip, vectors, strength, weight, bias, index, eps,
                      0.0, cpu::skip_steer_layer_norm, GRAINS_CUDA_LAUNCHER(skip_steer_layer_norm));
  return {out.normed, out.residual};
}

// Every op but the one in place has two overloads of one kernel: `default`, whose gradient is
// registered in grains_ext/ops.py, and `no_grad`, which costs no call of Python.
void define(torch::stable::detail::StableLibrary& m, const std::string& op,
            const std::string& signature) {
  m.def((op + signature).c_str());
  m.def((op + ".no_grad" + signature).c_str());
}

template <class Kernel>
void register_kernel(torch::stable::detail::StableLibrary& m, const std::string& op,
                     Kernel kernel) {
  m.impl(op.c_str(), kernel);
  m.impl((op + ".no_grad").c_str(), kernel);
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  register_kernel(m, "ig_interpolate", TORCH_BOX(&ig_interpolate));
  register_kernel(m, "ig_accumulate", TORCH_BOX(&ig_accumulate));
  register_kernel(m, "steer_add_normalize", TORCH_BOX(&steer_add_normalize));
  m.impl("steer_add_normalize_", TORCH_BOX(&steer_add_normalize_inplace));
  register_kernel(m, "skip_steer_rms_norm", TORCH_BOX(&skip_steer_rms_norm));
  register_kernel(m, "skip_steer_layer_norm", TORCH_BOX(&skip_steer_layer_norm));
}

}  // namespace
}  // namespace grains::torch_ops

STABLE_TORCH_LIBRARY(grains, m) {
  using grains::torch_ops::define;
  define(m, "ig_interpolate", "(Tensor input, Tensor baseline, Tensor alphas) -> Tensor");
  define(m, "ig_accumulate",
         "(Tensor grads, Tensor input, Tensor baseline, Tensor weights) -> Tensor");
  define(m, "steer_add_normalize",
         "(Tensor hidden, Tensor vectors, Tensor strength, Tensor? index=None, float eps=1e-6) -> "
         "Tensor");
  // No tensor is returned: torch.compile takes a mutating op only without an aliasing result.
  m.def(
      "steer_add_normalize_(Tensor(a!) hidden, Tensor vectors, Tensor strength, "
      "Tensor? index=None, float eps=1e-6) -> ()");
  define(m, "skip_steer_rms_norm",
         "(Tensor x, Tensor skip, Tensor vectors, Tensor strength, Tensor weight, "
         "Tensor? index=None, float eps=1e-6, float weight_offset=0) -> (Tensor, Tensor)");
  define(m, "skip_steer_layer_norm",
         "(Tensor x, Tensor skip, Tensor vectors, Tensor strength, Tensor weight, "
         "Tensor? bias=None, Tensor? index=None, float eps=1e-5) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grains, CPU, m) { grains::torch_ops::register_kernels(m); }
// Registered without CUDA kernels too: there the ops say how to build them.
STABLE_TORCH_LIBRARY_IMPL(grains, CUDA, m) { grains::torch_ops::register_kernels(m); }
