// CPU launchers. They choose the instruction set at run time and split the rows over `parallel`.
#pragma once

#include "grains/types.h"

namespace grains::cpu {

enum class Isa : std::int32_t { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3 };
constexpr Isa kIsas[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kNeon};  // best one last

// The best instruction set that was compiled in and that this processor has.
Isa best_isa();
bool isa_supported(Isa isa);
const char* isa_name(Isa isa);

// The set the launchers use now: best_isa() unless GRAINS_CPU_ISA=generic|avx2|avx512|neon was in
// the environment at the first use, or set_isa was called (tests); for a single float32 row, where
// neither was, AVX2 and not AVX-512. set_isa returns false, and changes nothing, where the
// processor lacks the set.
Isa current_isa();
bool set_isa(Isa isa);

void ig_interpolate(const InterpolateArgs& args, const Parallel& parallel);
void ig_accumulate(const AccumulateArgs& args, const Parallel& parallel);
void steer_add_normalize(const SteerArgs& args, const Parallel& parallel);
void skip_steer_rms_norm(const SkipNormArgs& args, const Parallel& parallel);
void skip_steer_layer_norm(const SkipNormArgs& args, const Parallel& parallel);

// The first position in index[0, count) outside [-1, bank), or -1 when all are inside.
std::int64_t first_bad_index(const std::int32_t* index, std::int64_t count, std::int64_t bank);

}  // namespace grains::cpu
