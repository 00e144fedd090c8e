#include "grains/launch_plan.h"

#include "launch_limits.h"

namespace grains::cuda {
namespace {

// Blocks of several rows: four warps hide latency, and sixteen such blocks fill any multiprocessor.
constexpr std::int64_t kSharedBlockThreads = 128;
// A thread reads an input vector once and writes it for this many steps: reads are then at most a
// quarter of the traffic, and 20 steps of one 4096-wide bfloat16 row still give six blocks.
constexpr std::int64_t kStepsPerBlock = 8;
// Up to this many rows there are too few blocks for every multiprocessor (132 on an H100), and each
// row gets as many threads as a block may have.
constexpr std::int64_t kFewRows = 128;
// Vectors of the gradient per thread, at least: fewer do not pay for the reduction.
constexpr std::int64_t kMinVectorsPerThread = 4;
constexpr std::int64_t kMaxColumnThreads = 128;

// Rows of a staying block, at least: then loading its direction is at most one load in 17 of an
// op with one input, and as all blocks end within one row of each other, at most a 16th of the time
// has idle multiprocessors. (Blocks of one row each are balanced by the hardware.)
constexpr std::int64_t kMinRowsOfStay = 16;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

std::int64_t power_of_two_at_least(std::int64_t value, std::int64_t limit) {
  std::int64_t power = 1;
  while (power < value && power < limit) power *= 2;
  return power;
}

std::int32_t vector_width(std::int64_t dim, DType dtype, bool aligned) {
  const std::int32_t width = kVectorBytes / (dtype == DType::kFloat32 ? 4 : 2);
  return aligned && dim % width == 0 ? width : 1;
}

bool has_programmatic_launch(std::int32_t compute_capability) { return compute_capability >= 90; }

}  // namespace

LaunchPlan plan(std::int64_t rows, std::int64_t dim, DType dtype, std::int32_t compute_capability,
                bool aligned) {
  LaunchPlan plan;
  plan.vector_elements = vector_width(dim, dtype, aligned);
  const bool vectors = plan.vector_elements > 1;
  if (vectors && dim <= kKeptElements * kMaxRowThreads) plan.elements_per_thread = kKeptElements;
  // The largest row that is kept, and every longer one, has kMaxRowThreads.
  const std::int64_t wanted = ceil_div(dim, vectors ? kKeptElements : kScalarTile);
  if (wanted <= kWarp) {
    plan.threads = static_cast<std::int32_t>(kSharedBlockThreads);
    plan.rows_per_block =
        static_cast<std::int32_t>(kSharedBlockThreads / power_of_two_at_least(wanted, kWarp));
  } else {
    plan.threads =
        static_cast<std::int32_t>(smaller(ceil_div(wanted, kWarp) * kWarp, kMaxRowThreads));
  }
  plan.blocks = smaller(ceil_div(rows, plan.rows_per_block), kMaxGridX);
  plan.programmatic_launch = has_programmatic_launch(compute_capability);
  return plan;
}

LaunchPlan plan_staying(LaunchPlan plan, std::int64_t rows, std::int64_t resident_threads,
                        Stay stay) {
  if (stay == Stay::kNever || plan.elements_per_thread == 0) return plan;
  const std::int64_t groups = ceil_div(rows, plan.rows_per_block);
  const std::int64_t resident = resident_threads / plan.threads;
  const std::int64_t most = resident > 1 ? resident : 1;
  if (stay == Stay::kAuto && groups / most < kMinRowsOfStay) return plan;
  // As few blocks as take no longer: then each has as many rows as the others, but for the last.
  plan.blocks = ceil_div(groups, ceil_div(groups, most));
  plan.stays = true;
  return plan;
}

InterpolatePlan plan_interpolate(std::int64_t rows, std::int64_t steps, std::int64_t dim,
                                 DType dtype, std::int32_t compute_capability, bool aligned) {
  InterpolatePlan plan;
  plan.threads = kStreamThreads;
  plan.vector_elements = vector_width(dim, dtype, aligned);
  plan.steps_per_block = static_cast<std::int32_t>(smaller(kStepsPerBlock, steps));
  const std::int64_t vectors = rows * (dim / plan.vector_elements);
  plan.blocks = smaller(ceil_div(vectors, kStreamThreads), kMaxGridX);
  plan.step_blocks = smaller(ceil_div(steps, plan.steps_per_block), kMaxGridY);
  plan.programmatic_launch = has_programmatic_launch(compute_capability);
  return plan;
}

AccumulatePlan plan_accumulate(std::int64_t rows, std::int64_t steps, std::int64_t dim, DType dtype,
                               std::int32_t compute_capability, bool aligned) {
  AccumulatePlan plan;
  plan.vector_elements = vector_width(dim, dtype, aligned);
  const std::int64_t columns = dim / plan.vector_elements;
  const std::int64_t limit = rows <= kFewRows ? kMaxRowThreads : kStreamThreads;
  // steps * columns vectors of the gradient; the product is only needed up to the limit.
  const std::int64_t vectors =
      smaller(steps, limit * kMinVectorsPerThread) * smaller(columns, limit * kMinVectorsPerThread);
  const std::int64_t row_threads =
      power_of_two_at_least(ceil_div(vectors, kMinVectorsPerThread), limit);
  plan.threads =
      static_cast<std::int32_t>(row_threads <= kWarp ? kSharedBlockThreads : row_threads);
  plan.rows_per_block = static_cast<std::int32_t>(plan.threads / row_threads);
  plan.column_threads = static_cast<std::int32_t>(
      smaller(power_of_two_at_least(columns, kMaxColumnThreads), row_threads));
  plan.blocks = smaller(ceil_div(rows, plan.rows_per_block), kMaxGridX);
  plan.programmatic_launch = has_programmatic_launch(compute_capability);
  return plan;
}

}  // namespace grains::cuda
