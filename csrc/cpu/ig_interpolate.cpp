// out[s,b,t,:] = baseline + alpha (input - baseline), with both end points exact.
#include "kernels.h"
#include "simd.h"

namespace grains::cpu::GRAINS_ISA {
namespace {

template <class T>
void interpolate_row(T* out, const T* input, const T* baseline, float alpha, std::int64_t dim) {
  if (alpha == 0.0f) return copy_row(out, baseline, dim);
  if (alpha == 1.0f) return copy_row(out, input, dim);
  // Start from the nearer end: then the rounding error is relative to the shorter way.
  const bool near_baseline = alpha < 0.5f;
  const T* start = near_baseline ? baseline : input;
  const Vec way = broadcast(near_baseline ? alpha : alpha - 1.0f);
  sweep(dim, [&](std::int64_t i, auto extent, int) GRAINS_INLINE {
    const Vec difference = load(input + i, extent) - load(baseline + i, extent);
    store(out + i, load(start + i, extent) + way * difference, extent);
  });
}

}  // namespace

// A row is one (batch, token, step), the steps fastest: the input stays in the cache for them all.
void ig_interpolate(const InterpolateArgs& args, std::int64_t begin, std::int64_t end) {
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t step = row % args.steps;
      const std::int64_t token = row / args.steps % args.tokens;
      const std::int64_t batch = row / args.steps / args.tokens;
      const std::int64_t place = (step * args.batch + batch) * args.tokens + token;
      interpolate_row(static_cast<T*>(args.out) + place * args.dim,
                      static_cast<const T*>(args.input) + batch * args.input_batch_stride +
                          token * args.input_token_stride,
                      static_cast<const T*>(args.baseline) + batch * args.baseline_batch_stride +
                          token * args.baseline_token_stride,
                      args.alphas[step * args.alpha_step_stride + batch * args.alpha_batch_stride],
                      args.dim);
    }
  });
}

}  // namespace grains::cpu::GRAINS_ISA
