#include "plain_norm.h"

#include <algorithm>
#include <cmath>

namespace grains::ort {
namespace {

// onnxruntime adds the squares of a row up one after the other, in float32, and each addition waits
// for the one before. Rows do not wait for each other: several are summed side by side.
constexpr std::int64_t kRowsAtOnce = 4;
constexpr std::int64_t kGrainBytes = 128 * 1024;

template <std::int64_t kRows>
void norm_rows(const SkipNormArgs& args, std::int64_t first) {
  const auto row = [first](const void* base, std::int64_t stride, std::int64_t r) {
    return static_cast<float*>(const_cast<void*>(base)) + (first + r) * stride;
  };
  float squares[kRows] = {};
  const float *x[kRows], *skip[kRows];
  float *residual[kRows], *normed[kRows];
  for (std::int64_t r = 0; r < kRows; ++r) {
    x[r] = row(args.x, args.x_stride, r);
    skip[r] = row(args.skip, args.skip_stride, r);
    residual[r] = row(args.residual, args.residual_stride, r);
    normed[r] = row(args.normed, args.normed_stride, r);
  }
  for (std::int64_t i = 0; i < args.dim; ++i) {
    for (std::int64_t r = 0; r < kRows; ++r) {
      const float value = x[r][i] + skip[r][i];
      squares[r] += value * value;
      residual[r][i] = value;
    }
  }
  const auto* weight = static_cast<const float*>(args.weight);
  for (std::int64_t r = 0; r < kRows; ++r) {
    const float size = std::sqrt(squares[r] / static_cast<float>(args.dim) + args.eps);
    for (std::int64_t i = 0; i < args.dim; ++i) {
      normed[r][i] = residual[r][i] / size * weight[i];
    }
  }
}

void norm_range(const SkipNormArgs& args, std::int64_t begin, std::int64_t end) {
  for (; begin + kRowsAtOnce <= end; begin += kRowsAtOnce) norm_rows<kRowsAtOnce>(args, begin);
  for (; begin < end; ++begin) norm_rows<1>(args, begin);
}

}  // namespace

void plain_skip_rms_norm(const SkipNormArgs& args, const Parallel& parallel) {
  const std::int64_t bytes = args.rows * args.dim * 4 * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t chunks =
      std::min({bytes / kGrainBytes, static_cast<std::int64_t>(parallel.threads), args.rows});
  if (chunks <= 1) return norm_range(args, 0, args.rows);
  struct Job {
    const SkipNormArgs& args;
    std::int64_t chunks;
  } job{args, chunks};
  parallel.run(
      parallel.host, chunks,
      [](void* context, std::int64_t chunk) {
        const Job& job = *static_cast<const Job*>(context);
        norm_range(job.args, job.args.rows * chunk / job.chunks,
                   job.args.rows * (chunk + 1) / job.chunks);
      },
      &job);
}

}  // namespace grains::ort
