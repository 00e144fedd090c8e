// Whether blocks stay for many rows: the plan's choice, unless a measurement makes it.
#include <atomic>
#include <cstring>

#include "grains/launch_plan.h"

namespace grains::cuda {
namespace {

std::atomic<Stay>& choice() {
  static std::atomic<Stay> stay{Stay::kAuto};
  return stay;
}

}  // namespace

Stay chosen_stay() { return choice().load(std::memory_order_relaxed); }

}  // namespace grains::cuda

extern "C" __attribute__((visibility("default"))) int grains_set_cuda_stay(const char* name) {
  using grains::cuda::Stay;
  constexpr struct {
    const char* name;
    Stay stay;
  } kChoices[] = {{"auto", Stay::kAuto}, {"never", Stay::kNever}, {"always", Stay::kAlways}};
  for (const auto& choice : kChoices) {
    if (std::strcmp(name, choice.name) != 0) continue;
    grains::cuda::choice().store(choice.stay, std::memory_order_relaxed);
    return 1;
  }
  return 0;
}
