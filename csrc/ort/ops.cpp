// The five ops of the domain: what each takes and gives, the checks of its inputs, and the call of
// the kernels. The checks read shapes only, which lie on the host for every execution provider.
#include "call.h"
#include "grains/cpu.h"
#include "grains/cuda.h"
#include "plain_norm.h"

namespace grains::ort {
namespace {

#ifdef GRAINS_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// Below this fraction of the row's own norm, a steered row is rounding noise. `Steer` has it as its
// attribute `epsilon`; in the fused ops that name belongs to the norm.
constexpr float kMinRelativeNorm = 1e-6f;

// By value, here and below: a tensor whose address is taken cannot stay in registers.
[[noreturn]] void wrong_shape(Tensor given, const std::string& expected) {
  throw InputError(std::string("input `") + given.name + "` has shape " + given.shape.text() +
                   "; expected " + expected);
}

std::string described(Tensor tensor) {
  return std::string("`") + tensor.name + "` " + tensor.shape.text();
}

[[noreturn]] void no_rows(Tensor rows) {
  wrong_shape(rows, "at least one dimension, the hidden size last");
}
[[noreturn]] void not_same(Tensor given, Tensor model) {
  wrong_shape(given, "the shape of " + described(model));
}
[[noreturn]] void no_hidden_vector(Tensor given, Tensor rows) {
  wrong_shape(given, "[" + std::to_string(rows.shape.last()) + "], the last dimension of " +
                         described(rows));
}

void require_rows(Tensor rows) {
  if (rows.shape.rank == 0) no_rows(rows);
}

void require_same(Tensor given, Tensor model) {
  if (!(given.shape == model.shape)) not_same(given, model);
}

void require_hidden_vector(Tensor given, Tensor rows) {
  if (given.shape.rank != 1 || given.shape[0] != rows.shape.last()) no_hidden_vector(given, rows);
}

// Both launchers of one op: `Launch<cpu::f, cuda::f>::run(call, args)`.
template <auto on_cpu, auto on_cuda>
struct Launch {
  template <typename Args>
  static void run(const Call& call, const Args& args) {
    if constexpr (kWithCuda) {
      if (call.cuda()) {
        const int error = on_cuda(args, call.stream());
        if (error != 0) {
          throw std::runtime_error(std::string("the CUDA kernel could not be launched: ") +
                                   cuda::error_string(error));
        }
        return;
      }
    }
    call.run_on_cpu<Args>(on_cpu, args);
  }
};

[[noreturn]] void wrong_vectors(Tensor vectors, Tensor rows) {
  const std::string size = std::to_string(rows.shape.last());
  wrong_shape(vectors, "[" + size + "] or [N, " + size + "], where " + size +
                           " is the last dimension of " + described(rows));
}

[[noreturn]] void wrong_strength(Tensor strength, Tensor vectors, std::int64_t bank) {
  wrong_shape(strength,
              "[] or [" + std::to_string(bank) + "], one for each row of " + described(vectors));
}

[[noreturn]] void missing_index(Tensor vectors) {
  throw InputError("input `index` is missing; with the bank " + described(vectors) +
                   " it is required, to say which vector steers which row");
}

// The row entries of `index`, rows.shape[:-1] or rows.shape[:1].
const std::int32_t* read_index(Call& call, Tensor index, Tensor rows, Tensor vectors,
                               std::int64_t bank) {
  const bool per_row = index.shape == rows.shape.prefix(rows.shape.rank - 1);
  const bool per_batch_row = rows.shape.rank > 1 && index.shape == rows.shape.prefix(1);
  if (!per_row && !per_batch_row) {
    wrong_shape(index, rows.shape.prefix(rows.shape.rank - 1).text() +
                           (rows.shape.rank > 1 ? " or " + rows.shape.prefix(1).text() : "") +
                           ", the leading dimensions of " + described(rows));
  }
  const auto* entries = static_cast<const std::int32_t*>(index.data);
  if (!call.cuda()) {
    const std::int64_t bad = cpu::first_bad_index(entries, index.shape.count(), bank);
    if (bad >= 0) {
      throw InputError("input `index` has " + std::to_string(entries[bad]) + " at position " +
                       std::to_string(bad) + "; expected a row of " + described(vectors) +
                       ", 0 to " + std::to_string(bank - 1) +
                       ", or -1 for a row that is not steered");
    }
  }
  return entries;
}

// `vectors` [D] or [N, D], `strength` [] or [N] (or [1]), and perhaps `index`; of some `rows`.
SteeringArgs read_steering(Call& call, Tensor rows, std::size_t vectors_at, std::size_t strength_at,
                           std::size_t index_at, float min_relative_norm) {
  const std::int64_t dim = rows.shape.last();
  const Tensor vectors = call.input(vectors_at);
  const bool is_bank = vectors.shape.rank == 2;
  if ((vectors.shape.rank != 1 && !is_bank) || vectors.shape.last() != dim ||
      vectors.shape.count() == 0) {
    wrong_vectors(vectors, rows);
  }
  const std::int64_t bank = is_bank ? vectors.shape[0] : 1;
  const Tensor strength = call.input(strength_at);
  const std::int64_t strengths = strength.shape.count();
  if (strength.shape.rank > 1 || (strengths != 1 && strengths != bank)) {
    wrong_strength(strength, vectors, bank);
  }
  const std::int32_t* index = nullptr;
  std::int64_t rows_per_index = 1;
  if (call.has(index_at)) {
    const Tensor entries = call.input(index_at);
    index = read_index(call, entries, rows, vectors, bank);
    rows_per_index = rows.shape.rows() / entries.shape.count();
  } else if (bank > 1) {
    missing_index(vectors);
  }
  return {vectors.data,
          /*vectors_stride=*/dim,
          bank,
          static_cast<const float*>(strength.data),
          /*strength_stride=*/strengths == 1 ? 0 : 1,
          index,
          rows_per_index,
          min_relative_norm};
}

void steer(Call& call) {
  const Tensor hidden = call.input(0);
  require_rows(hidden);
  void* out = call.output(0, hidden.shape);
  if (hidden.shape.count() == 0) return;
  const std::int64_t dim = hidden.shape.last();
  const SteeringArgs steering = read_steering(call, hidden, 1, 2, 3, call.kernel().epsilon);
  const SteerArgs args = {hidden.data,           out,      hidden.shape.rows(), dim,
                          /*hidden_stride=*/dim,
                          /*out_stride=*/dim,    steering, call.dtype()};
  Launch<cpu::steer_add_normalize, cuda::steer_add_normalize>::run(call, args);
}

// The rows that `length` entries of the index steer from entry `first` on.
SkipNormArgs part_of(SkipNormArgs args, std::int64_t first, std::int64_t length) {
  const std::int64_t row = first * args.steering.rows_per_index;
  const std::int64_t size = args.dtype == DType::kFloat32 ? 4 : 2;
  const auto shifted = [&](const void* base, std::int64_t stride) {
    return static_cast<char*>(const_cast<void*>(base)) + row * stride * size;
  };
  args.x = shifted(args.x, args.x_stride);
  args.skip = shifted(args.skip, args.skip_stride);
  args.normed = shifted(args.normed, args.normed_stride);
  args.residual = shifted(args.residual, args.residual_stride);
  args.steering.index += first;
  args.rows = length * args.steering.rows_per_index;
  return args;
}

// Rows that are not steered get the bits that onnxruntime's own operator gives them.
void skip_steer_rms_norm_on_cpu(const SkipNormArgs& args, const Parallel& parallel) {
  if (!has_plain_norm(args)) return cpu::skip_steer_rms_norm(args, parallel);
  if (args.steering.index == nullptr) {
    return is_unsteered(args.steering, 0) ? plain_skip_rms_norm(args, parallel)
                                          : cpu::skip_steer_rms_norm(args, parallel);
  }
  const std::int64_t entries = args.rows / args.steering.rows_per_index;
  for (std::int64_t first = 0; first < entries;) {
    const bool plain = is_unsteered(args.steering, first);
    std::int64_t end = first + 1;
    while (end < entries && is_unsteered(args.steering, end) == plain) ++end;
    const SkipNormArgs part = part_of(args, first, end - first);
    plain ? plain_skip_rms_norm(part, parallel) : cpu::skip_steer_rms_norm(part, parallel);
    first = end;
  }
}

// Inputs x, skip, vectors, strength, weight come first in both norms; `bias_at` is 0 for none.
template <auto on_cpu, auto on_cuda>
void skip_steer_norm(Call& call, std::size_t bias_at, std::size_t index_at) {
  const Tensor x = call.input(0);
  require_rows(x);
  const Tensor skip = call.input(1);
  require_same(skip, x);
  const Tensor weight = call.input(4);
  require_hidden_vector(weight, x);
  const void* bias = nullptr;
  if (bias_at != 0 && call.has(bias_at)) {
    const Tensor given = call.input(bias_at);
    require_hidden_vector(given, x);
    bias = given.data;
  }
  if (x.shape.count() == 0) {
    call.output(0, x.shape);
    call.output(1, x.shape);
    return;
  }
  const SteeringArgs steering = read_steering(call, x, 2, 3, index_at, kMinRelativeNorm);
  void* normed = call.output(0, x.shape);
  void* residual = call.output(1, x.shape);
  const std::int64_t dim = x.shape.last();
  // In one piece: zeroed first and filled in then, it takes 15 ns.
  const SkipNormArgs args = {x.data,
                             skip.data,
                             weight.data,
                             bias,
                             normed,
                             residual,
                             x.shape.rows(),
                             dim,
                             /*x_stride=*/dim,
                             /*skip_stride=*/dim,
                             /*normed_stride=*/dim,
                             /*residual_stride=*/dim,
                             steering,
                             call.kernel().epsilon,
                             call.kernel().weight_offset,
                             call.dtype()};
  Launch<on_cpu, on_cuda>::run(call, args);
}

void skip_steer_rms_norm(Call& call) {
  skip_steer_norm<skip_steer_rms_norm_on_cpu, cuda::skip_steer_rms_norm>(call, 0, 5);
}

void skip_steer_layer_norm(Call& call) {
  skip_steer_norm<cpu::skip_steer_layer_norm, cuda::skip_steer_layer_norm>(call, 5, 6);
}

void require_embeddings(const Tensor& input) {
  if (input.shape.rank != 3) wrong_shape(input, "[batch, tokens, hidden size]");
}

// The batch and token strides of `baseline` when it is broadcast to `input` [B, T, D].
void broadcast_baseline(const Tensor& baseline, const Tensor& input, std::int64_t* batch_stride,
                        std::int64_t* token_stride) {
  const std::size_t rank = baseline.shape.rank;
  const std::int64_t dim = input.shape.last();
  bool fits = rank >= 1 && rank <= 3 && baseline.shape.last() == dim;
  for (std::size_t back = 2; fits && back <= rank; ++back) {
    const std::int64_t size = baseline.shape[rank - back];
    fits = size == 1 || size == input.shape[3 - back];
  }
  if (!fits) {
    wrong_shape(baseline, "a shape that broadcasts to " + described(input) +
                              " and ends in its last dimension");
  }
  const std::int64_t tokens = rank >= 2 ? baseline.shape[rank - 2] : 1;
  *token_stride = tokens == 1 ? 0 : dim;
  *batch_stride = rank < 3 || baseline.shape[0] == 1 ? 0 : tokens * dim;
}

// `per_step` [S] or [S, B]: its strides.
void step_strides(const Tensor& per_step, const Tensor& input, std::int64_t* step_stride,
                  std::int64_t* batch_stride) {
  const Shape& shape = per_step.shape;
  const bool per_row = shape.rank == 2 && shape[1] == input.shape[0];
  if (shape.rank != 1 && !per_row) {
    wrong_shape(per_step, "[steps] or [steps, " + std::to_string(input.shape[0]) + "] for " +
                              described(input));
  }
  *step_stride = per_row ? shape[1] : 1;
  *batch_stride = per_row ? 1 : 0;
}

void ig_interpolate(Call& call) {
  const Tensor input = call.input(0);
  require_embeddings(input);
  const Tensor baseline = call.input(1);
  const Tensor alphas = call.input(2);
  InterpolateArgs args;
  broadcast_baseline(baseline, input, &args.baseline_batch_stride, &args.baseline_token_stride);
  step_strides(alphas, input, &args.alpha_step_stride, &args.alpha_batch_stride);
  const std::int64_t dims[] = {alphas.shape[0], input.shape[0], input.shape[1], input.shape[2]};
  const Shape shape{dims, 4};
  args.input = input.data;
  args.baseline = baseline.data;
  args.alphas = static_cast<const float*>(alphas.data);
  args.out = call.output(0, shape);
  if (shape.count() == 0) return;
  args.steps = shape[0];
  args.batch = shape[1];
  args.tokens = shape[2];
  args.dim = shape[3];
  args.input_token_stride = args.dim;
  args.input_batch_stride = args.tokens * args.dim;
  args.dtype = call.dtype();
  Launch<cpu::ig_interpolate, cuda::ig_interpolate>::run(call, args);
}

void ig_accumulate(Call& call) {
  const Tensor grads = call.input(0);
  const Tensor input = call.input(1);
  require_embeddings(input);
  const bool fits = grads.shape.rank == 4 && grads.shape[1] == input.shape[0] &&
                    grads.shape[2] == input.shape[1] && grads.shape[3] == input.shape[2];
  if (!fits) wrong_shape(grads, "[steps, batch, tokens, hidden size] over " + described(input));
  const Tensor baseline = call.input(2);
  const Tensor weights = call.input(3);
  if (weights.shape.rank == 0 || weights.shape[0] != grads.shape[0]) {
    wrong_shape(weights, "one weight for each of the " + std::to_string(grads.shape[0]) +
                             " steps of " + described(grads));
  }
  AccumulateArgs args;
  broadcast_baseline(baseline, input, &args.baseline_batch_stride, &args.baseline_token_stride);
  step_strides(weights, input, &args.weight_step_stride, &args.weight_batch_stride);
  const Shape shape = input.shape.prefix(2);
  args.grads = grads.data;
  args.input = input.data;
  args.baseline = baseline.data;
  args.weights = static_cast<const float*>(weights.data);
  args.out = static_cast<float*>(call.output(0, shape));
  if (shape.count() == 0) return;
  args.steps = grads.shape[0];
  args.batch = shape[0];
  args.tokens = shape[1];
  args.dim = input.shape.last();
  args.grads_token_stride = args.input_token_stride = args.dim;
  args.grads_batch_stride = args.input_batch_stride = args.tokens * args.dim;
  args.grads_step_stride = args.batch * args.grads_batch_stride;
  args.dtype = call.dtype();
  Launch<cpu::ig_accumulate, cuda::ig_accumulate>::run(call, args);
}

// Which outputs may take over the memory of which inputs. onnxruntime only reads the arrays.
std::size_t hidden_in_place(int** inputs, int** outputs) {
  static int input[] = {0}, output[] = {0};
  *inputs = input;
  *outputs = output;
  return 1;
}

std::size_t x_and_skip_in_place(int** inputs, int** outputs) {
  static int input[] = {0, 1}, output[] = {0, 1};
  *inputs = input;
  *outputs = output;
  return 2;
}

constexpr Port row(const char* name) { return {name, Element::kRow, false}; }
constexpr Port numbers(const char* name) { return {name, Element::kFloat32, false}; }
constexpr Port kIndex = {"index", Element::kInt32, true};
constexpr Port kBias = {"bias", Element::kRow, true};

}  // namespace

const std::array<OpSpec, 5> kOps = {{
    {"Steer",
     {row("hidden"), row("vectors"), numbers("strength"), kIndex},
     4,
     {Element::kRow},
     1,
     kMinRelativeNorm,
     ShapeRule::kAsFirstInput,
     steer,
     hidden_in_place},
    {"SkipSteerRmsNorm",
     {row("x"), row("skip"), row("vectors"), numbers("strength"), row("weight"), kIndex},
     6,
     {Element::kRow, Element::kRow},
     2,
     1e-6f,
     ShapeRule::kAsFirstInput,
     skip_steer_rms_norm,
     x_and_skip_in_place},
    {"SkipSteerLayerNorm",
     {row("x"), row("skip"), row("vectors"), numbers("strength"), row("weight"), kBias, kIndex},
     7,
     {Element::kRow, Element::kRow},
     2,
     1e-5f,
     ShapeRule::kAsFirstInput,
     skip_steer_layer_norm,
     x_and_skip_in_place},
    {"IgInterpolate",
     {row("input"), row("baseline"), numbers("alphas")},
     3,
     {Element::kRow},
     1,
     0.0f,
     ShapeRule::kInterpolate,
     ig_interpolate,
     nullptr},
    {"IgAccumulate",
     {row("grads"), row("input"), row("baseline"), numbers("weights")},
     4,
     {Element::kFloat32},
     1,
     0.0f,
     ShapeRule::kAccumulate,
     ig_accumulate,
     nullptr},
}};

}  // namespace grains::ort
