// The public launchers: which instruction set runs, and which rows go to which thread.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "grains/cpu.h"
#include "kernels.h"
#include "run_rows.h"

namespace grains::cpu {
namespace {

struct Kernels {
  void (*ig_interpolate)(const InterpolateArgs&, std::int64_t, std::int64_t);
  void (*ig_accumulate)(const AccumulateArgs&, std::int64_t, std::int64_t);
  void (*steer_add_normalize)(const SteerArgs&, std::int64_t, std::int64_t);
  void (*skip_steer_rms_norm)(const SkipNormArgs&, std::int64_t, std::int64_t);
  void (*skip_steer_layer_norm)(const SkipNormArgs&, std::int64_t, std::int64_t);
};

#define GRAINS_KERNELS(isa)                                                                      \
  Kernels {                                                                                      \
    isa::ig_interpolate, isa::ig_accumulate, isa::steer_add_normalize, isa::skip_steer_rms_norm, \
        isa::skip_steer_layer_norm                                                               \
  }

// Indexed by Isa; no kernels where a set was not compiled.
struct Compiled {
  const char* name;
  Kernels kernels;
};
constexpr Compiled kCompiled[] = {
    {"generic", GRAINS_KERNELS(generic)},
#ifdef GRAINS_X86
    {"avx2", GRAINS_KERNELS(avx2)},
    {"avx512", GRAINS_KERNELS(avx512)},
#else
    {"avx2", {}},
    {"avx512", {}},
#endif
#ifdef GRAINS_NEON
    {"neon", GRAINS_KERNELS(neon)},
#else
    {"neon", {}},
#endif
};

const Compiled& compiled(Isa isa) { return kCompiled[static_cast<std::int32_t>(isa)]; }

bool find_isa(const char* name, Isa* isa) {
  for (const Isa candidate : kIsas) {
    if (std::strcmp(name, isa_name(candidate)) == 0) {
      *isa = candidate;
      return isa_supported(candidate);
    }
  }
  return false;
}

// What is in use, and for one float32 row by itself.
struct Chosen {
  std::atomic<Isa> isa, one_row;
};

// Where nobody asked for a set, a single row does not take the widest. Multiplications of 512 bits
// lower a core's clock for the next 0.6 ms, and for all that runs in them: by 23 % on a Xeon of
// 2019, where those of 256 bits take 13 %. One row gains less than that costs around it.
Chosen best_choice() {
  const Isa best = best_isa();
  return {best, best == Isa::kAvx512 ? Isa::kAvx2 : best};
}

Chosen choice_at_start() {
  const char* wanted = std::getenv("GRAINS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_choice();
  Isa isa = Isa::kGeneric;
  if (find_isa(wanted, &isa)) return {isa, isa};
  std::fprintf(stderr,
               "grains: GRAINS_CPU_ISA=%s is unknown or not supported by this processor; using %s "
               "(choose generic, avx2, avx512 or neon)\n",
               wanted, isa_name(best_isa()));
  return best_choice();
}

Chosen& chosen() {
  static Chosen chosen = choice_at_start();
  return chosen;
}

const Kernels& kernels() { return compiled(current_isa()).kernels; }

const Kernels& kernels(std::int64_t rows, DType dtype) {
  if (rows != 1 || dtype != DType::kFloat32) return kernels();
  return compiled(chosen().one_row.load(std::memory_order_relaxed)).kernels;
}

}  // namespace

bool isa_supported(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return true;
#ifdef GRAINS_X86
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return isa_supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq");
#endif
#ifdef GRAINS_NEON
    case Isa::kNeon:
      return true;  // every 64-bit Arm has it
#endif
    default:
      return false;
  }
}

Isa best_isa() {
  Isa best = Isa::kGeneric;
  for (const Isa isa : kIsas) {
    if (isa_supported(isa)) best = isa;
  }
  return best;
}

const char* isa_name(Isa isa) { return compiled(isa).name; }

Isa current_isa() { return chosen().isa.load(std::memory_order_relaxed); }

bool set_isa(Isa isa) {
  if (!isa_supported(isa)) return false;
  chosen().isa.store(isa, std::memory_order_relaxed);
  chosen().one_row.store(isa, std::memory_order_relaxed);
  return true;
}

void ig_interpolate(const InterpolateArgs& args, const Parallel& parallel) {
  // Each output row is written once; the inputs stay in the cache over the steps.
  run_rows(kernels().ig_interpolate, args, args.steps * args.batch * args.tokens,
           2 * args.dim * bytes(args.dtype), parallel);
}

void ig_accumulate(const AccumulateArgs& args, const Parallel& parallel) {
  // A row of no elements still has a sum: 0.
  if (args.dim <= 0) {
    for (std::int64_t i = 0; i < args.batch * args.tokens; ++i) args.out[i] = 0.0f;
    return;
  }
  run_rows(kernels().ig_accumulate, args, args.batch * args.tokens,
           (args.steps + 2) * args.dim * bytes(args.dtype), parallel);
}

void steer_add_normalize(const SteerArgs& args, const Parallel& parallel) {
  run_rows(kernels(args.rows, args.dtype).steer_add_normalize, args, args.rows,
           2 * args.dim * bytes(args.dtype), parallel);
}

void skip_steer_rms_norm(const SkipNormArgs& args, const Parallel& parallel) {
  run_rows(kernels(args.rows, args.dtype).skip_steer_rms_norm, args, args.rows,
           4 * args.dim * bytes(args.dtype), parallel);
}

void skip_steer_layer_norm(const SkipNormArgs& args, const Parallel& parallel) {
  run_rows(kernels(args.rows, args.dtype).skip_steer_layer_norm, args, args.rows,
           4 * args.dim * bytes(args.dtype), parallel);
}

std::int64_t first_bad_index(const std::int32_t* index, std::int64_t count, std::int64_t bank) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (index[i] < -1 || index[i] >= bank) return i;
  }
  return -1;
}

}  // namespace grains::cpu

// Each library holds its own copy of the kernels. These let a process that loaded several of them
// ask for, and choose, the instruction set of each.
extern "C" {

__attribute__((visibility("default"))) const char* grains_cpu_isa() {
  return grains::cpu::isa_name(grains::cpu::current_isa());
}

// 1 where `name` is an instruction set that was compiled in and that this processor has, else 0.
__attribute__((visibility("default"))) int grains_set_cpu_isa(const char* name) {
  grains::cpu::Isa isa;
  return grains::cpu::find_isa(name, &isa) && grains::cpu::set_isa(isa) ? 1 : 0;
}

}  // extern "C"
