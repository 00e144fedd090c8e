// Every number of a CUDA launch, chosen on the host by pure functions that need no GPU. `rows`,
// `dim`, `steps` > 0. compute_capability is 10 * major + minor, or 0 where the device runs what was
// compiled for an older one. `aligned`: every base pointer and row stride is a multiple of 16
// bytes.
#pragma once

#include <cstdint>

#include "grains/types.h"

namespace grains::cuda {

// The steering ops: threads / rows_per_block threads share a row, a power of two where they are
// less than a warp, whole warps of one row per block otherwise. `blocks` is the grid's x; blocks
// stride over the rows where the grid's limit leaves fewer of them than rows ask for.
struct LaunchPlan {
  std::int32_t threads = 0;  // per block
  std::int32_t rows_per_block = 1;
  std::int32_t vector_elements = 1;  // elements per load: 16 bytes where alignment allows, else 1
  std::int32_t elements_per_thread = 0;  // kept in registers; 0: the row is re-read
  std::int64_t blocks = 0;
  bool programmatic_launch = false;  // programmatic dependent launch, cc >= 9 only
  bool stays = false;  // blocks work through many rows, with their one direction in registers
};

LaunchPlan plan(std::int64_t rows, std::int64_t dim, DType dtype, std::int32_t compute_capability,
                bool aligned);

// For a call with one direction for all rows: `plan`, with fewer blocks that stay, where registers
// hold the row. `resident_threads`: what the device runs at once of the staying kernel. kAuto:
// where the rows are enough to pay; the other choices are for measuring one against the other.
enum class Stay : std::int32_t { kAuto = 0, kNever = 1, kAlways = 2 };

LaunchPlan plan_staying(LaunchPlan plan, std::int64_t rows, std::int64_t resident_threads,
                        Stay stay);

// What the launchers pass to it: kAuto, or what grains_set_cuda_stay was last told.
Stay chosen_stay();

// ig_interpolate: a thread per vector of an input row, which makes that vector of steps_per_block
// points. `blocks` is the grid's x (vectors), `step_blocks` its y.
struct InterpolatePlan {
  std::int32_t threads = 0;
  std::int32_t vector_elements = 1;
  std::int32_t steps_per_block = 0;
  std::int64_t blocks = 0;
  std::int64_t step_blocks = 0;
  bool programmatic_launch = false;
};

InterpolatePlan plan_interpolate(std::int64_t rows, std::int64_t steps, std::int64_t dim,
                                 DType dtype, std::int32_t compute_capability, bool aligned);

// ig_accumulate: the threads of a row form groups of column_threads; a group walks the columns, and
// the groups share the steps among them.
struct AccumulatePlan {
  std::int32_t threads = 0;
  std::int32_t rows_per_block = 1;
  std::int32_t column_threads = 1;  // divides threads / rows_per_block
  std::int32_t vector_elements = 1;
  std::int64_t blocks = 0;
  bool programmatic_launch = false;
};

AccumulatePlan plan_accumulate(std::int64_t rows, std::int64_t steps, std::int64_t dim, DType dtype,
                               std::int32_t compute_capability, bool aligned);

}  // namespace grains::cuda

// "auto", "never" or "always", of the kernels of this library; 1, or 0 for any other word. Every
// library with the CUDA kernels exports it.
extern "C" int grains_set_cuda_stay(const char* choice);
