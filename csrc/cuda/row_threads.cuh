// The threads that share a row, and their sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch_limits.h"

namespace grains::cuda {

// Either a part of a warp (a power of two of its lanes; the rest of the warp has other rows and may
// take other branches) or all the threads of the block.
class RowThreads {
 public:
  __device__ explicit RowThreads(int count)
      : count_(count), lane_(static_cast<int>(threadIdx.x) % count) {
    if (count < kWarp) {
      const int warp_lane = static_cast<int>(threadIdx.x) % kWarp;
      mask_ = ((1u << count) - 1u) << (warp_lane - lane_);
    }
  }

  __device__ int count() const { return count_; }
  __device__ int lane() const { return lane_; }

  // The rows of this thread are first_row(), first_row() + row_stride(), ...
  __device__ std::int64_t first_row() const {
    return static_cast<std::int64_t>(blockIdx.x) * rows_per_block() + threadIdx.x / count_;
  }
  __device__ std::int64_t row_stride() const {
    return static_cast<std::int64_t>(gridDim.x) * rows_per_block();
  }

  // Replaces each value by its sum over the row's threads: the same bits in every one of them, so
  // that branches on the result are uniform. Every thread of the row must call it.
  template <typename Real, int kCount>
  __device__ void sum(Real (&values)[kCount]) {
    warp_sum(values, count_ < kWarp ? count_ : kWarp);
    if (count_ <= kWarp) return;
    // Two buffers, used in turn: one barrier is enough, because a buffer is written again only
    // after the barrier of the sum between, which no thread passes before it has read.
    __shared__ Real partial[2][kMaxBlockWarps][kCount];
    const int warp = lane_ / kWarp, warp_lane = lane_ % kWarp, warps = count_ / kWarp;
    if (warp_lane == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) partial[buffer_][warp][i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = warp_lane < warps ? partial[buffer_][warp_lane][i] : Real(0);
    }
    warp_sum(values, kWarp);
    buffer_ ^= 1;
  }

 private:
  template <typename Real, int kCount>
  __device__ void warp_sum(Real (&values)[kCount], int lanes) const {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      if (offset >= lanes) continue;
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(mask_, values[i], offset);
    }
  }

  __device__ int rows_per_block() const { return static_cast<int>(blockDim.x) / count_; }

  int count_;
  int lane_;
  int buffer_ = 0;
  unsigned mask_ = 0xffffffffu;
};

}  // namespace grains::cuda
