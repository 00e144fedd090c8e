// The numbers that the launch plan and the kernels must agree on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace grains::cuda {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest load of one thread

// Elements of a row that one thread keeps in registers, as float32: 256 threads hold a 4096-wide
// row, with loads of two or three inputs in flight, in 64 (steer) to 96 (skip and LayerNorm)
// registers on sm_90, bfloat16.
constexpr int kKeptElements = 16;
// A row that is not kept is walked in tiles, whose loads are in flight together.
constexpr int kTileVectors = 2;
constexpr int kScalarTile = 4;
constexpr int kMaxRowThreads = 512;
// Blocks of that size that a multiprocessor holds at least: two limit a thread to 64 registers,
// where the fused kernels, with twice the inputs, would spill. One is not the same as none given:
// then ptxas spills a few registers to fit a second block.
constexpr int kMinBlocks = 1;
constexpr int kSteerBlocks = 2;
// Of the steering kernel whose blocks stay, by the bytes of an element: half types fit 64 registers
// (sm_90), float32, where the direction and the row ahead are twice as many, has 93.
constexpr int stay_blocks(std::size_t element) { return element == 2 ? kSteerBlocks : kMinBlocks; }
// Rows of the steering ops, so that 32-bit positions within a row cannot overflow.
constexpr std::int64_t kMaxRowElements = 1 << 30;

// The interpolation keeps nothing from one store to the next: at most 64 registers.
constexpr int kStreamThreads = 256;
constexpr int kStreamBlocks = 4;
constexpr int kMaxBlockWarps = kMaxRowThreads / kWarp;
constexpr std::int64_t kMaxGridX = 2147483647;
constexpr std::int64_t kMaxGridY = 65535;

}  // namespace grains::cuda
