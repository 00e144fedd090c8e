#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_shim {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 64 << 10;
constexpr std::size_t kMaxExchange = 16;

enum class State { kRunnable, kBarrier, kExchange, kDone };

struct Fiber {
  ucontext_t context;
  State state = State::kRunnable;
  dim3 thread;
  int line = 0;  // of the barrier or the shuffle it waits at
  unsigned mask = 0;
  int lane_xor = 0;
  unsigned char sent[kMaxExchange];
  unsigned char received[kMaxExchange];
};

// Of the launch that runs; launches come one at a time.
std::vector<Fiber> fibers;
unsigned running = 0;
ucontext_t scheduler;
const std::function<void()>* kernel = nullptr;
std::string message;
int capability = 90;
int multiprocessors = 132;
unsigned max_grid = 0;
bool programmatic = false;

unsigned char* stack_of(unsigned index) {
  static unsigned char* const stacks =
      static_cast<unsigned char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return stacks + index * kStackBytes;
}

// AddressSanitizer has to know which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;

void entered_fiber(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}
void switch_to_scheduler(ucontext_t* from, bool last) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
  swapcontext(from, &scheduler);
  entered_fiber(fake_stack);
}
void switch_to_fiber(unsigned index) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_of(index), kStackBytes);
  swapcontext(&scheduler, &fibers[index].context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
#else
void entered_fiber(void*) {}
void switch_to_scheduler(ucontext_t* from, bool) { swapcontext(from, &scheduler); }
void switch_to_fiber(unsigned index) { swapcontext(&scheduler, &fibers[index].context); }
#endif

void run_thread() {
  entered_fiber(nullptr);
  (*kernel)();
  fibers[running].state = State::kDone;
  switch_to_scheduler(&fibers[running].context, true);
}

void fail(const std::string& what) {
  if (!message.empty()) return;
  message = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
            "), thread " + std::to_string(threadIdx.x) + ": " + what;
}

void wait(State state, int line) {
  fibers[running].state = state;
  fibers[running].line = line;
  switch_to_scheduler(&fibers[running].context, false);
}

void start(unsigned index) {
  Fiber& fiber = fibers[index];
  fiber.state = State::kRunnable;
  fiber.thread = dim3(index, 0, 0);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_of(index);
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, run_thread, 0);
}

// Runs every runnable thread up to its next wait, in ascending or descending order: results that
// depend on the order show a missing barrier. False when none was runnable.
bool run_threads(bool descending) {
  bool any = false;
  const unsigned count = static_cast<unsigned>(fibers.size());
  for (unsigned i = 0; i < count && message.empty(); ++i) {
    running = descending ? count - 1 - i : i;
    if (fibers[running].state != State::kRunnable) continue;
    any = true;
    threadIdx = fibers[running].thread;
    switch_to_fiber(running);
  }
  return any;
}

std::string census() {
  std::size_t counts[4] = {};
  for (const Fiber& fiber : fibers) ++counts[static_cast<int>(fiber.state)];
  return std::to_string(counts[static_cast<int>(State::kBarrier)]) +
         " threads wait at a barrier, " +
         std::to_string(counts[static_cast<int>(State::kExchange)]) + " in a shuffle, " +
         std::to_string(counts[static_cast<int>(State::kDone)]) + " have returned";
}

void run_block(bool descending) {
  for (unsigned i = 0; i < fibers.size(); ++i) start(i);
  while (message.empty()) {
    while (run_threads(descending)) {
    }
    const auto all = [](State state) {
      return std::all_of(fibers.begin(), fibers.end(), [&](const Fiber& fiber) {
        return fiber.state == state && fiber.line == fibers[0].line;
      });
    };
    if (all(State::kBarrier)) {
      for (Fiber& fiber : fibers) fiber.state = State::kRunnable;
      continue;
    }
    if (std::all_of(fibers.begin(), fibers.end(),
                    [](const Fiber& fiber) { return fiber.state == State::kDone; })) {
      return;
    }
    fail("not every thread reached the same barrier or shuffle: " + census());
  }
}

}  // namespace

void barrier(int line) { wait(State::kBarrier, line); }

void exchange(int line, unsigned mask, int lane_xor, const void* sent, void* received,
              std::size_t size) {
  Fiber& self = fibers[running];
  const unsigned lane = running % kWarp, warp = running - lane;
  std::memcpy(self.sent, sent, size);
  self.mask = mask;
  self.lane_xor = lane_xor;
  self.state = State::kExchange;
  self.line = line;
  const auto in_mask = [&](unsigned i) { return i < kWarp && (mask >> i & 1u) != 0; };
  if (!in_mask(lane) || !in_mask(lane ^ static_cast<unsigned>(lane_xor))) {
    fail("line " + std::to_string(line) + ": a shuffle outside its mask");
  }
  bool complete = true;
  for (unsigned i = 0; i < kWarp && message.empty(); ++i) {
    if (!in_mask(i)) continue;
    if (warp + i >= fibers.size() || fibers[warp + i].state == State::kDone) {
      fail("line " + std::to_string(line) + ": a shuffle waits for a lane that has returned");
      break;
    }
    const Fiber& other = fibers[warp + i];
    complete &= other.state == State::kExchange && other.line == line && other.mask == mask;
  }
  if (complete && message.empty()) {
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!in_mask(i)) continue;
      Fiber& fiber = fibers[warp + i];
      std::memcpy(fiber.received, fibers[warp + (i ^ static_cast<unsigned>(fiber.lane_xor))].sent,
                  size);
      fiber.state = State::kRunnable;
    }
  }
  switch_to_scheduler(&self.context, false);
  std::memcpy(received, self.received, size);
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const unsigned threads = config.blockDim.x * config.blockDim.y * config.blockDim.z;
  const dim3 grid = config.gridDim;
  if (threads == 0 || threads > kMaxThreads || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 ||
      grid.y > 0xffffu || grid.z != 1 || config.blockDim.y != 1 || config.blockDim.z != 1 ||
      (config.numAttrs > 0 && capability < 90)) {
    return cudaErrorInvalidConfiguration;
  }
  message.clear();
  programmatic = config.numAttrs > 0;
  kernel = &thread;
  fibers.resize(threads);
  blockDim = config.blockDim;
  gridDim = grid;
  if (max_grid > 0) gridDim.x = std::min(grid.x, max_grid);
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block((x + y) % 2 != 0);
      if (!message.empty()) return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

void set_compute_capability(int value) { capability = value; }
void set_multiprocessors(int count) { multiprocessors = count; }
void set_max_grid(unsigned blocks) { max_grid = blocks; }
bool was_programmatic() { return programmatic; }
const char* failure() { return message.c_str(); }

}  // namespace cuda_shim

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_shim::multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = cuda_shim::capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = cuda_shim::capability % 10;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return cuda_shim::failure();
  }
  return "unrecognized error code";
}
