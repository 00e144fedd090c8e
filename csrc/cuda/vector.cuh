// Loads and stores of several elements at once, and conversions to the type of the arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "launch_limits.h"

namespace grains::cuda {

// Aligned to its own size, so that the compiler moves it with one instruction.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Packet {
  T element[kSize];
};

template <int kSize, typename T>
__device__ Packet<T, kSize> load(const T* row, std::int64_t vector) {
  return reinterpret_cast<const Packet<T, kSize>*>(row)[vector];
}

template <typename T, int kSize>
__device__ void store(T* row, std::int64_t vector, const Packet<T, kSize>& packet) {
  reinterpret_cast<Packet<T, kSize>*>(row)[vector] = packet;
}

// What was made of the packet is made again where it is needed again, instead of being kept: as
// float32, half types take twice the registers.
template <typename T, int kSize>
__device__ void forget_conversions(Packet<T, kSize>& packet) {
  static_assert(sizeof(packet) == kVectorBytes);
  unsigned words[kVectorBytes / 4];
  memcpy(words, &packet, sizeof(packet));
#pragma unroll
  for (int i = 0; i < kVectorBytes / 4; ++i) asm volatile("" : "+r"(words[i]));
  memcpy(&packet, words, sizeof(packet));
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

}  // namespace grains::cuda
