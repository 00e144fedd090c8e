// out[b,t] = sum_s weight[s,b] sum_d grads[s,b,t,d] (input - baseline)[b,t,d]
#include "kernels.h"
#include "simd.h"

namespace grains::cpu::GRAINS_ISA {
namespace {

template <class T>
float dot_with_difference(const T* grads, const T* input, const T* baseline, std::int64_t dim) {
  Accumulator dot;
  sweep(dim, [&](std::int64_t i, auto extent, int part) GRAINS_INLINE {
    const Vec difference = load(input + i, extent) - load(baseline + i, extent);
    dot.parts[part] += load(grads + i, extent) * difference;
  });
  return dot.total();
}

}  // namespace

// A row is one (batch, token).
void ig_accumulate(const AccumulateArgs& args, std::int64_t begin, std::int64_t end) {
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t batch = row / args.tokens;
      const std::int64_t token = row % args.tokens;
      const T* grads = static_cast<const T*>(args.grads) + batch * args.grads_batch_stride +
                       token * args.grads_token_stride;
      const T* input = static_cast<const T*>(args.input) + batch * args.input_batch_stride +
                       token * args.input_token_stride;
      const T* baseline = static_cast<const T*>(args.baseline) +
                          batch * args.baseline_batch_stride + token * args.baseline_token_stride;
      const float* weights = args.weights + batch * args.weight_batch_stride;
      // Steps of opposite sign cancel; float64 costs nothing here and keeps what is left.
      double total = 0.0;
      for (std::int64_t step = 0; step < args.steps; ++step) {
        total +=
            static_cast<double>(weights[step * args.weight_step_stride]) *
            dot_with_difference(grads + step * args.grads_step_stride, input, baseline, args.dim);
      }
      args.out[row] = static_cast<float>(total);
    }
  });
}

}  // namespace grains::cpu::GRAINS_ISA
