// Runs every CUDA kernel once over sizes that take each of its branches, with no torch around it:
// what compute-sanitizer watches, in seconds. Prints what ran; exits 1 at the first CUDA error.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "grains/cuda.h"
#include "grains/launch_plan.h"

namespace {

using namespace grains;

void check(int error, const char* what) {
  if (error == 0) return;
  std::fprintf(stderr, "cuda_check: %s: %s\n", what, cuda::error_string(error));
  std::exit(1);
}

// Device memory of exactly this many bytes, so that one byte too many is seen, set to the bytes of
// ordinary numbers of any type.
class Memory {
 public:
  explicit Memory(std::int64_t bytes) {
    check(cudaMalloc(&data_, static_cast<std::size_t>(bytes > 0 ? bytes : 1)), "cudaMalloc");
    check(cudaMemset(data_, 0x3c, static_cast<std::size_t>(bytes)), "cudaMemset");
  }
  Memory(const Memory&) = delete;
  ~Memory() { cudaFree(data_); }
  void* at(std::int64_t bytes) const { return static_cast<char*>(data_) + bytes; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

template <class T>
void fill(const Memory& memory, const std::vector<T>& values) {
  check(
      cudaMemcpy(memory.as<T>(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
      "cudaMemcpy");
}

// One direction, by blocks that stay for several rows of what is enough rows for that.
void run_staying(DType dtype, std::int64_t rows, std::int64_t dim) {
  const std::int64_t row_bytes = dim * (dtype == DType::kFloat32 ? 4 : 2);
  const Memory x(rows * row_bytes), skip(rows * row_bytes), out(rows * row_bytes);
  const Memory vector(row_bytes), weight(row_bytes), strength(4);
  fill<float>(strength, {0.5f});
  SteeringArgs steering;
  steering.vectors = vector.at(0);
  steering.vectors_stride = dim;
  steering.strength = strength.as<float>();
  SteerArgs steer;
  steer.hidden = x.at(0);
  steer.out = out.at(0);
  steer.rows = rows;
  steer.dim = steer.hidden_stride = steer.out_stride = dim;
  steer.steering = steering;
  steer.dtype = dtype;
  check(cuda::steer_add_normalize(steer, nullptr), "steer_add_normalize, staying");
  steer.out = x.at(0);
  check(cuda::steer_add_normalize(steer, nullptr), "steer_add_normalize in place, staying");
  SkipNormArgs norm;
  norm.x = norm.residual = x.at(0);
  norm.skip = skip.at(0);
  norm.weight = weight.at(0);
  norm.normed = out.at(0);
  norm.rows = rows;
  norm.dim = norm.x_stride = norm.skip_stride = norm.normed_stride = norm.residual_stride = dim;
  norm.steering = steering;
  norm.dtype = dtype;
  check(cuda::skip_steer_rms_norm(norm, nullptr), "skip_steer_rms_norm, staying");
  norm.bias = weight.at(0);
  check(cuda::skip_steer_layer_norm(norm, nullptr), "skip_steer_layer_norm, staying");
  check(cudaDeviceSynchronize(), "a kernel whose blocks stay");
}

// `offset` elements off the alignment of cudaMalloc: what a slice of a tensor is.
void run(DType dtype, std::int64_t rows, std::int64_t dim, std::int64_t offset) {
  constexpr std::int64_t kBank = 3, kSteps = 11;
  const std::int64_t size = dtype == DType::kFloat32 ? 4 : 2, skipped = offset * size;
  const std::int64_t row_bytes = dim * size, bytes = rows * row_bytes;
  const Memory x(bytes + skipped), skip(bytes + skipped), vectors(kBank * row_bytes + skipped);
  const Memory weight(row_bytes + skipped), bias(row_bytes + skipped);
  const Memory out(kSteps * bytes + skipped), residual(bytes + skipped);
  const Memory strength(kBank * 4), index(rows * 4), per_step(kSteps * 4), sums(rows * 4);
  fill<float>(strength, {0.5f, 0.0f, -1.0f});
  fill<float>(per_step, std::vector<float>(kSteps, 0.25f));
  std::vector<std::int32_t> indices;
  for (std::int64_t r = 0; r < rows; ++r) indices.push_back(static_cast<std::int32_t>(r % 5) - 1);
  fill(index, indices);  // 3 is outside the bank: such a row becomes NaN

  SteeringArgs steering;
  steering.vectors = vectors.at(skipped);
  steering.vectors_stride = dim;
  steering.bank = kBank;
  steering.strength = strength.as<float>();
  steering.strength_stride = 1;
  steering.index = index.as<std::int32_t>();
  SteerArgs steer;
  steer.hidden = x.at(skipped);
  steer.out = out.at(skipped);
  steer.rows = rows;
  steer.dim = steer.hidden_stride = steer.out_stride = dim;
  steer.steering = steering;
  steer.dtype = dtype;
  check(cuda::steer_add_normalize(steer, nullptr), "steer_add_normalize");
  steer.out = x.at(skipped);
  check(cuda::steer_add_normalize(steer, nullptr), "steer_add_normalize in place");

  SkipNormArgs norm;
  norm.x = x.at(skipped);
  norm.skip = skip.at(skipped);
  norm.weight = weight.at(skipped);
  norm.normed = out.at(skipped);
  norm.residual = residual.at(skipped);
  norm.rows = rows;
  norm.dim = norm.x_stride = norm.skip_stride = norm.normed_stride = norm.residual_stride = dim;
  norm.steering = steering;
  norm.dtype = dtype;
  check(cuda::skip_steer_rms_norm(norm, nullptr), "skip_steer_rms_norm");
  norm.bias = bias.at(skipped);
  check(cuda::skip_steer_layer_norm(norm, nullptr), "skip_steer_layer_norm");

  InterpolateArgs path;
  path.input = x.at(skipped);
  path.baseline = vectors.at(skipped);
  path.alphas = per_step.as<float>();
  path.out = out.at(skipped);
  path.steps = kSteps;
  path.batch = 1;
  path.tokens = rows;
  path.dim = path.input_token_stride = dim;
  path.alpha_step_stride = 1;
  path.dtype = dtype;
  check(cuda::ig_interpolate(path, nullptr), "ig_interpolate");

  AccumulateArgs scores;
  scores.grads = out.at(skipped);
  scores.input = x.at(skipped);
  scores.baseline = vectors.at(skipped);
  scores.weights = per_step.as<float>();
  scores.out = sums.as<float>();
  scores.steps = kSteps;
  scores.batch = 1;
  scores.tokens = rows;
  scores.dim = scores.input_token_stride = scores.grads_token_stride = dim;
  scores.grads_step_stride = rows * dim;
  scores.weight_step_stride = 1;
  scores.dtype = dtype;
  check(cuda::ig_accumulate(scores, nullptr), "ig_accumulate");
  check(cudaDeviceSynchronize(), "a kernel");
}

}  // namespace

int main() {
  int shapes = 0;
  if (grains_set_cuda_stay("always") != 1) return 1;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    // Several rows per block, one, rows that registers hold and rows that they do not; odd widths.
    for (const std::int64_t dim : {1, 7, 64, 100, 512, 1000, 4096, 4099, 8192, 9000}) {
      for (const std::int64_t rows : {1, 33}) {
        for (const std::int64_t offset : {0, 1}) run(dtype, rows, dim, offset), ++shapes;
      }
    }
    // More rows than any GPU holds blocks.
    run_staying(dtype, 1500, 8192), ++shapes;
    run_staying(dtype, 50000, 128), ++shapes;
  }
  std::printf("cuda_check: every op ran in %d shapes\n", shapes);
}
