// The public launchers of the ops between a decoder's matrix products.
#include <atomic>

#include "decoder_kernels.h"
#include "grains/cpu.h"
#include "run_rows.h"

namespace grains::cpu {
namespace {

struct Kernels {
  void (*rms_norm)(const RmsNormArgs&, std::int64_t, std::int64_t);
  void (*rms_norm_backward)(const RmsNormBackwardArgs&, std::int64_t, std::int64_t);
  void (*gated_activation)(const GatedArgs&, std::int64_t, std::int64_t);
  void (*gated_activation_backward)(const GatedBackwardArgs&, std::int64_t, std::int64_t);
  void (*rotary)(const RotaryArgs&, std::int64_t, std::int64_t);
  bool (*attention)(const AttentionArgs&, std::int64_t, std::int64_t);
  bool (*attention_backward)(const AttentionBackwardArgs&, std::int64_t, std::int64_t);
};

#define GRAINS_DECODER_KERNELS(isa)                                                               \
  Kernels {                                                                                       \
    isa::rms_norm, isa::rms_norm_backward, isa::gated_activation, isa::gated_activation_backward, \
        isa::rotary, isa::attention, isa::attention_backward                                      \
  }

// Indexed by Isa; no kernels where a set was not compiled.
constexpr Kernels kKernels[] = {
    GRAINS_DECODER_KERNELS(generic),
#ifdef GRAINS_X86
    GRAINS_DECODER_KERNELS(avx2),
    GRAINS_DECODER_KERNELS(avx512),
#else
    {},
    {},
#endif
#ifdef GRAINS_NEON
    GRAINS_DECODER_KERNELS(neon),
#else
    {},
#endif
};

const Kernels& kernels() { return kKernels[static_cast<std::int32_t>(current_isa())]; }

// One head's scores and products are worth a thread, whatever their size.
constexpr std::int64_t kWorthAThread = kGrainBytes;

// A kernel that needs memory of its own, on whatever thread, and whether each time it got it.
template <class Args>
struct Attempt {
  bool (*kernel)(const Args&, std::int64_t, std::int64_t);
  const Args& args;
  mutable std::atomic<bool> done{true};
};

template <class Args>
bool run_heads(bool (*kernel)(const Args&, std::int64_t, std::int64_t), const Args& args,
               std::int64_t heads, const Parallel& parallel) {
  const Attempt<Args> attempt{kernel, args};
  run_rows<Attempt<Args>>(
      [](const Attempt<Args>& attempt, std::int64_t begin, std::int64_t end) {
        if (!attempt.kernel(attempt.args, begin, end)) attempt.done = false;
      },
      attempt, heads, kWorthAThread, parallel);
  return attempt.done;
}

}  // namespace

void rms_norm(const RmsNormArgs& args, const Parallel& parallel) {
  run_rows(kernels().rms_norm, args, args.rows, 2 * args.dim * bytes(args.dtype), parallel);
}

void rms_norm_backward(const RmsNormBackwardArgs& args, const Parallel& parallel) {
  run_rows(kernels().rms_norm_backward, args, args.rows, 3 * args.dim * bytes(args.dtype),
           parallel);
}

void gated_activation(const GatedArgs& args, const Parallel& parallel) {
  run_rows(kernels().gated_activation, args, args.rows, 3 * args.dim * bytes(args.dtype), parallel);
}

void gated_activation_backward(const GatedBackwardArgs& args, const Parallel& parallel) {
  run_rows(kernels().gated_activation_backward, args, args.rows, 5 * args.dim * bytes(args.dtype),
           parallel);
}

void rotary(const RotaryArgs& args, const Parallel& parallel) {
  run_rows(kernels().rotary, args, args.batch * args.tokens * args.heads,
           2 * args.width * bytes(args.dtype), parallel);
}

bool attention(const AttentionArgs& args, const Parallel& parallel) {
  return run_heads(kernels().attention, args, args.batch * args.kv_heads, parallel);
}

bool attention_backward(const AttentionBackwardArgs& args, const Parallel& parallel) {
  const AttentionArgs& forward = args.forward;
  return run_heads(kernels().attention_backward, args, forward.batch * forward.kv_heads, parallel);
}

}  // namespace grains::cpu
