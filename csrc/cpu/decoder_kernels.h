// What each instruction set's units define of the ops between a decoder's matrix products, and
// dispatch_decoder.cpp chooses from. A kernel does the rows [begin, end) of its op on the calling
// thread; a row of the attention ops is one (batch, head of keys and values).
#pragma once

#include "grains/decoder.h"

#define GRAINS_DECLARE_DECODER_KERNELS(isa)                                                      \
  namespace grains::cpu::isa {                                                                   \
  void rms_norm(const RmsNormArgs& args, std::int64_t begin, std::int64_t end);                  \
  void rms_norm_backward(const RmsNormBackwardArgs& args, std::int64_t begin, std::int64_t end); \
  void gated_activation(const GatedArgs& args, std::int64_t begin, std::int64_t end);            \
  void gated_activation_backward(const GatedBackwardArgs& args, std::int64_t begin,              \
                                 std::int64_t end);                                              \
  void rotary(const RotaryArgs& args, std::int64_t begin, std::int64_t end);                     \
  bool attention(const AttentionArgs& args, std::int64_t begin, std::int64_t end);               \
  bool attention_backward(const AttentionBackwardArgs& args, std::int64_t begin,                 \
                          std::int64_t end);                                                     \
  }

GRAINS_DECLARE_DECODER_KERNELS(generic)
#ifdef GRAINS_X86
GRAINS_DECLARE_DECODER_KERNELS(avx2)
GRAINS_DECLARE_DECODER_KERNELS(avx512)
#endif
#ifdef GRAINS_NEON
GRAINS_DECLARE_DECODER_KERNELS(neon)
#endif
