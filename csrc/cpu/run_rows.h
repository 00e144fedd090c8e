// Which rows of an op go to which thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <initializer_list>

#include "grains/types.h"

namespace grains::cpu {

// A thread is worth waking for this many bytes read and written: waking one and waiting for it
// takes a few microseconds, in which one core moves about this much. Nor is less than this handed
// out at a time.
constexpr std::int64_t kGrainBytes = 128 * 1024;
// Parts of a thread's share, at most: the last one to finish is then late by 1/16 of a share.
constexpr std::int64_t kPartsOfShare = 16;
// More threads than that share one op's rows on no machine.
constexpr std::int64_t kMaxShares = 256;

// Every share is a range of rows, as equal as can be, and worked off in parts. Who is done with its
// own helps with the others', so that a thread that is slower, or has other work, does not decide.
// Rows stay with their thread where that keeps up: from call to call they are in its cache.
template <class Args>
struct Job {
  void (*kernel)(const Args&, std::int64_t, std::int64_t);
  const Args& args;
  std::int64_t rows, shares, parts;
  std::atomic<std::int32_t> taken[kMaxShares];  // parts of each share

  void work_on(std::int64_t share) {
    const std::int64_t begin = rows * share / shares, end = rows * (share + 1) / shares;
    for (;;) {
      const std::int64_t part = taken[share].fetch_add(1, std::memory_order_relaxed);
      if (part >= parts) return;
      kernel(args, begin + (end - begin) * part / parts,
             begin + (end - begin) * (part + 1) / parts);
    }
  }
};

template <class Args>
void run_rows(void (*kernel)(const Args&, std::int64_t, std::int64_t), const Args& args,
              std::int64_t rows, std::int64_t bytes_per_row, const Parallel& parallel) {
  if (rows <= 0 || bytes_per_row <= 0) return;
  if (parallel.threads <= 1 || parallel.run == nullptr) return kernel(args, 0, rows);
  const std::int64_t grains = rows * bytes_per_row / kGrainBytes;
  std::int64_t shares = grains;
  for (const std::int64_t limit : {std::int64_t{parallel.threads}, rows, kMaxShares}) {
    if (shares > limit) shares = limit;
  }
  if (shares <= 1) return kernel(args, 0, rows);
  const std::int64_t parts = grains / shares;
  Job<Args> job{kernel, args, rows, shares, parts < kPartsOfShare ? parts : kPartsOfShare, {}};
  parallel.run(
      parallel.host, shares,
      [](void* context, std::int64_t own) {
        auto& job = *static_cast<Job<Args>*>(context);
        for (std::int64_t i = 0; i < job.shares; ++i) job.work_on((own + i) % job.shares);
      },
      &job);
}

inline std::int64_t bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace grains::cpu
