// The rotary embedding of queries or keys, and its transpose, which is its gradient.
#include "decoder_kernels.h"
#include "simd.h"

namespace grains::cpu::GRAINS_ISA {

// A row is one (batch, token, head).
void rotary(const RotaryArgs& args, std::int64_t begin, std::int64_t end) {
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const std::int64_t half = args.dim / 2;
    // Counted on, not divided out: a division costs as much as a fifth of a short head.
    std::int64_t head = begin % args.heads, token = begin / args.heads % args.tokens;
    std::int64_t batch = begin / args.heads / args.tokens;
    const auto place = [&](const HeadStrides& strides) GRAINS_INLINE {
      return batch * strides.batch + head * strides.head + token * strides.token;
    };
    for (std::int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(args.x) + place(args.x_strides);
      T* out = static_cast<T*>(args.out) + place(args.out_strides);
      const std::int64_t at = place({args.table_batch_stride, 0, args.table_token_stride});
      const T* cos = static_cast<const T*>(args.cos) + at;
      const T* sin = static_cast<const T*>(args.sin) + at;
      sweep(half, [&](std::int64_t i, auto extent, int) GRAINS_INLINE {
        const Vec first = load(x + i, extent), second = load(x + half + i, extent);
        const Vec sin_first = load(sin + i, extent), sin_second = load(sin + half + i, extent);
        const Vec kept_first = first * load(cos + i, extent);
        const Vec kept_second = second * load(cos + half + i, extent);
        if (args.transpose) {
          store(out + i, kept_first + second * sin_second, extent);
          store(out + half + i, kept_second - first * sin_first, extent);
        } else {
          store(out + i, kept_first - second * sin_first, extent);
          store(out + half + i, kept_second + first * sin_second, extent);
        }
      });
      copy_row(out + args.dim, x + args.dim, args.width - args.dim);
      if (++head < args.heads) continue;
      head = 0;
      if (++token < args.tokens) continue;
      token = 0;
      ++batch;
    }
  });
}

}  // namespace grains::cpu::GRAINS_ISA
