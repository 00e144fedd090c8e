// A row h, the direction that its index chose, and s = (h + a v) |h| / |h + a v|.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "grains/types.h"
#include "launch_limits.h"
#include "row_threads.cuh"
#include "vector.cuh"

namespace grains::cuda {

// How a thread holds its part of a row: kVectors vectors of kVector elements at a time, which are
// all of its part (kept in registers from the first pass on), or a tile of several. A thread that
// stays for many rows of one direction holds its part of that too, and reads a row ahead.
template <int kVectorElements, int kTileSize, bool kKeepRow, bool kStay = false>
struct RowShape {
  static constexpr int kVector = kVectorElements;
  static constexpr int kVectors = kTileSize;
  static constexpr bool kKept = kKeepRow;
  static constexpr bool kStays = kStay;
};

// For rows whose sums leave float32's range: rare, so small rather than fast.
using SlowShape = RowShape<1, 1, false>;

template <typename T>
struct Direction {
  const T* vector = nullptr;  // null: no direction for this row
  float strength = 0.0f;
  bool valid = true;  // false: the index names no bank row
};

template <typename T>
__device__ Direction<T> direction_of(const SteeringArgs& steering, std::int64_t row) {
  Direction<T> direction;
  std::int64_t bank_row = 0;
  if (steering.index != nullptr) bank_row = steering.index[row / steering.rows_per_index];
  direction.valid = bank_row >= -1 && bank_row < steering.bank;
  if (direction.valid && bank_row >= 0) {
    direction.vector = static_cast<const T*>(steering.vectors) + bank_row * steering.vectors_stride;
    direction.strength = steering.strength[bank_row * steering.strength_stride];
  }
  return direction;
}

// The vectors of a row that one thread holds at a time.
template <int kVectors>
struct Tile {
  int first;
  int step;
  int end;

  __device__ int at(int k) const { return first + k * step; }
  __device__ bool holds(int k) const { return at(k) < end; }

  template <int kVector, typename T>
  __device__ void load_from(const T* row, Packet<T, kVector> (&packets)[kVectors]) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      packets[k] = {};
      if (holds(k)) packets[k] = load<kVector>(row, at(k));
    }
  }

  template <int kVector, typename T>
  __device__ void store_to(T* row, const Packet<T, kVector> (&packets)[kVectors]) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (holds(k)) store(row, at(k), packets[k]);
    }
  }
};

// Not unrolled: a tile is as many loads in flight as there are registers for.
template <typename Shape, typename Body>
__device__ void for_each_tile(Tile<Shape::kVectors> tile, Body body) {
  if constexpr (Shape::kKept) {
    body(tile);
  } else {
#pragma unroll 1
    for (; tile.first < tile.end; tile.first += Shape::kVectors * tile.step) body(tile);
  }
}

// h is the sum of kParts rows.
template <typename T, int kParts>
struct RowOf {
  const T* parts[kParts];
};

// A tile of those rows, and of their direction.
template <typename T, int kParts, typename Shape>
struct Inputs {
  using Packets = Packet<T, Shape::kVector>[Shape::kVectors];
  Packets parts[kParts] = {};
  Packets vector = {};

  __device__ void forget_conversions() {
#pragma unroll
    for (int k = 0; k < Shape::kVectors; ++k) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) cuda::forget_conversions(parts[p][k]);
      cuda::forget_conversions(vector[k]);
    }
  }
};

template <typename T, int kParts, typename Shape>
__device__ void load_parts(const Tile<Shape::kVectors>& tile, const RowOf<T, kParts>& row,
                           Inputs<T, kParts, Shape>& inputs) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) tile.load_from(row.parts[p], inputs.parts[p]);
}

// Real is float, or double for rows whose sums leave float's range.
template <typename Real, typename T, int kParts, typename Shape>
class SteeredRow {
 public:
  static constexpr int kVector = Shape::kVector;
  static constexpr int kVectors = Shape::kVectors;
  using Values = Real[kVectors][kVector];

  // With Shape::kStays `inputs` holds the row already.
  __device__ SteeredRow(const RowOf<T, kParts>& row, const Inputs<T, kParts, Shape>& inputs,
                        const Direction<T>& direction, int dim, const RowThreads& threads)
      : row_(row),
        inputs_(inputs),
        direction_(direction),
        own_{threads.lane(), threads.count(), dim / kVector} {}

  // Sums the squares of h and of h + a v, and with kMean also their values, in one reduction.
  // Returns false, with nothing decided, where float cannot hold them.
  template <bool kMean>
  __device__ bool measure(RowThreads& threads, float min_relative_norm) {
    Real sums[kMean ? 4 : 2] = {};
    for_each_tile([&](const Tile<kVectors>& tile) {
      Values base, steered;
      read(tile, base, steered);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          sums[0] += base[k][e] * base[k][e];
          sums[1] += steered[k][e] * steered[k][e];
          if constexpr (kMean) {
            sums[2] += base[k][e];
            sums[3] += steered[k][e];
          }
          if constexpr (kKeepsSum) kept_[k][e] = steered[k][e];
        }
      }
    });
    threads.sum(sums);
    if constexpr (std::is_same_v<Real, float>) {
      if (!in_float_range(sums[0]) || !in_float_range(sums[1])) return false;
    }
    sum_of_squares_ = sums[0];
    if (changed()) {
      const Real epsilon = min_relative_norm;
      // The row of an infinite h is not left alone: it becomes NaN, like every other use of it.
      if (sums[1] <= epsilon * epsilon * sums[0] && sums[1] < Real(INFINITY)) {
        direction_.vector = nullptr;
        if constexpr (kKeepsSum) {
          Values base;
          read(own_, base, kept_);
        }
      } else {
        const Real norm = sums[0] == Real(0) ? Real(0) : sums[0] * rsqrt(sums[0]);
        scale_ = norm * rsqrt(sums[1]);
      }
    }
    if constexpr (kMean) sum_ = changed() ? sums[3] * scale_ : sums[2];
    return true;
  }

  // After measure(): hands body each tile of the steered row, the scale applied.
  template <typename Body>
  __device__ void for_each_steered(Body body) {
    if constexpr (Shape::kStays) inputs_.forget_conversions();
    for_each_tile([&](const Tile<kVectors>& tile) {
      Values values;
      if constexpr (!kKeepsSum) {
        Values base;
        read(tile, base, values);
      }
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          if constexpr (kKeepsSum) values[k][e] = kept_[k][e];
          values[k][e] *= scale_;
        }
      }
      body(tile, values);
    });
  }

  // False: strength 0, or a steered row of no norm; the row stays h.
  __device__ bool changed() const {
    return direction_.vector != nullptr && direction_.strength != 0.0f;
  }
  // Of the steered row.
  __device__ Real sum_of_squares() const { return sum_of_squares_; }
  __device__ Real sum() const { return sum_; }

 private:
  // With Shape::kStays the inputs are in registers anyway, half as many for the half types: the sum
  // is formed again.
  static constexpr bool kKeepsSum = Shape::kKept && !Shape::kStays;

  // Under the lower bound, squares of elements may have been flushed or rounded as subnormals.
  // Written so that NaN is out of range.
  __device__ static bool in_float_range(float sum) { return sum >= 1e-25f && sum <= FLT_MAX; }

  template <typename Body>
  __device__ void for_each_tile(Body body) const {
    cuda::for_each_tile<Shape>(own_, body);
  }

  // All loads come before the first use. Past the end of the row both are zero.
  __device__ void read(const Tile<kVectors>& tile, Values& base, Values& steered) const {
    if constexpr (Shape::kStays) {
      combine(inputs_, base, steered);
    } else {
      Inputs<T, kParts, Shape> inputs;
      load_parts(tile, row_, inputs);
      if (direction_.vector != nullptr) {
        tile.load_from(direction_.vector, inputs.vector);
      }
      combine(inputs, base, steered);
    }
  }

  __device__ void combine(const Inputs<T, kParts, Shape>& inputs, Values& base,
                          Values& steered) const {
    const Real strength = direction_.strength;
    const bool active = changed();
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        Real h = to_float(inputs.parts[0][k].element[e]);
#pragma unroll
        for (int p = 1; p < kParts; ++p) {
          h += static_cast<Real>(to_float(inputs.parts[p][k].element[e]));
        }
        const Real v = to_float(inputs.vector[k].element[e]);
        base[k][e] = h;
        // Not h + 0 v: v may be infinite.
        steered[k][e] = active ? fma(strength, v, h) : h;
      }
    }
  }

  RowOf<T, kParts> row_;
  Inputs<T, kParts, Shape> inputs_;
  Direction<T> direction_;
  Tile<kVectors> own_;
  Values kept_;
  Real scale_ = 1;
  Real sum_of_squares_ = 0;
  Real sum_ = 0;
};

// Calls body(row, direction, inputs) for each row of this thread; row_of(row) is where its parts
// lie. With Shape::kStays the direction is read once, and a row's parts while the row before it is
// worked on; else `inputs` is empty.
template <typename T, int kParts, typename Shape, typename Place, typename Body>
__device__ void for_each_row(const SteeringArgs& steering, std::int64_t rows, int dim,
                             const RowThreads& threads, Place row_of, Body body) {
  const std::int64_t stride = threads.row_stride();
  std::int64_t row = threads.first_row();
  if constexpr (Shape::kStays) {
    if (row >= rows) return;
    const Tile<Shape::kVectors> own{threads.lane(), threads.count(), dim / Shape::kVector};
    const Direction<T> direction{static_cast<const T*>(steering.vectors), steering.strength[0]};
    Inputs<T, kParts, Shape> ahead;
    own.load_from(direction.vector, ahead.vector);
    load_parts(own, row_of(row), ahead);
#pragma unroll 1
    for (; row < rows; row += stride) {
      ahead.forget_conversions();
      const Inputs<T, kParts, Shape> inputs = ahead;
      if (row + stride < rows) load_parts(own, row_of(row + stride), ahead);
      body(row, direction, inputs);
    }
  } else {
    for (; row < rows; row += stride) {
      body(row, direction_of<T>(steering, row), Inputs<T, kParts, Shape>{});
    }
  }
}

template <typename T>
__device__ void fill_row(T* row, float value, int dim, const RowThreads& threads) {
#pragma unroll 1
  for (int d = threads.lane(); d < dim; d += threads.count()) row[d] = from_float<T>(value);
}

}  // namespace grains::cuda
