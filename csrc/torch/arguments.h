// From torch tensors to the kernels' plain arguments: dtypes, strides, steering.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "grains/cpu.h"

namespace grains::torch_ops {

inline DType element_type(const Argument& given) {
  const std::int32_t dtype = raw_dtype(given.tensor);
  if (dtype == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (dtype == aoti_torch_dtype_float16()) return DType::kFloat16;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  fail(given.op, "`", given.name, "` is ", dtype_name(given.tensor.scalar_type()),
       ", expected float32, float16 or bfloat16; convert it with .to(), or use "
       "grains_ext.reference for other types");
}

inline bool last_dim_contiguous(const Tensor& tensor) {
  const std::int64_t last = tensor.dim() - 1;
  return last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1;
}

// The call through the dispatcher costs more than a small kernel: only where it is needed.
inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor with_contiguous_last_dim(const Tensor& tensor) {
  return last_dim_contiguous(tensor) ? tensor : torch::stable::contiguous(tensor);
}

// A new tensor on the device of `like`.
inline Tensor new_strided(const std::int64_t* sizes, const std::int64_t* strides, std::int64_t dims,
                          std::int32_t dtype, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, raw_device(like),
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor new_tensor(const std::int64_t* sizes, std::int64_t dims, std::int32_t dtype,
                         const Tensor& like) {
  constexpr std::int64_t kMaxDims = 64;  // torch's own limit
  std::int64_t strides[kMaxDims];
  std::int64_t stride = 1;
  for (std::int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return new_strided(sizes, strides, dims, dtype, like);
}

inline Tensor new_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return new_tensor(sizes.data(), static_cast<std::int64_t>(sizes.size()), raw_dtype(like), like);
}

// A tensor [..., dim] seen as rows with one distance between them.
struct Rows {
  Tensor tensor;
  std::int64_t rows = 1, dim = 0, stride = 0;
};

// False where the leading dimensions do not collapse into one, or the last one is not contiguous.
inline bool as_rows(const Tensor& tensor, Rows* view) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const std::size_t last = sizes.size() - 1;
  *view = Rows{tensor, 1, sizes[last], sizes[last]};
  if (sizes[last] > 1 && strides[last] != 1) return false;
  bool uniform = true;
  for (std::size_t i = last; i-- > 0;) {
    if (sizes[i] != 1) {
      if (view->rows == 1) {
        view->stride = strides[i];
      } else if (strides[i] != view->stride * view->rows) {
        uniform = false;
      }
    }
    view->rows *= sizes[i];
  }
  return uniform || view->rows == 0;
}

inline void check_rows(const Argument& given) {
  if (given.tensor.dim() >= 1 && given.tensor.size(given.tensor.dim() - 1) >= 1) return;
  fail(given.op, "`", given.name, "` has shape ", ShapeOf{given.tensor},
       ", expected [..., hidden size] with a hidden size of at least 1");
}

inline Rows rows_of(const Tensor& tensor) {
  Rows view;
  if (!as_rows(tensor, &view)) as_rows(torch::stable::contiguous(tensor), &view);
  return view;
}

// The steering arguments of an op, checked, with the tensors that they point into.
struct Steering {
  Tensor vectors, strength;
  std::optional<Tensor> index;
  SteeringArgs args;
};

inline Steering steering_of(const Argument& hidden, std::int64_t rows, std::int64_t dim,
                            const Tensor& vectors, const Tensor& strength,
                            const std::optional<Tensor>& index) {
  const char* op = hidden.op;
  const Argument vectors_given{op, "vectors", vectors}, strength_given{op, "strength", strength};
  check_like(vectors_given, hidden);
  const std::int64_t dims = vectors.dim();
  check_shape(vectors_given, (dims == 1 || dims == 2) && vectors.size(dims - 1) == dim,
              "[D] or a bank [N, D] with D the last dimension", hidden);
  const std::int64_t bank = dims == 2 ? vectors.size(0) : 1;
  check_shape(vectors_given, bank >= 1, "a bank [N, D] of at least one direction", hidden);

  check_dtype(strength_given, ScalarType::Float, "strengths are always float32");
  check_same_device(strength_given, hidden);
  const bool one_strength = strength.dim() == 0;
  check_shape(strength_given, one_strength || (strength.dim() == 1 && strength.size(0) == bank),
              "[] or [N], one per direction of `vectors`,", vectors_given);

  Steering steering{with_contiguous_last_dim(vectors), packed(strength), std::nullopt,
                    SteeringArgs{}};
  SteeringArgs& args = steering.args;
  args.vectors = steering.vectors.const_data_ptr();
  args.vectors_stride = dims == 2 ? steering.vectors.stride(0) : dim;
  args.bank = bank;
  args.strength = static_cast<const float*>(steering.strength.const_data_ptr());
  args.strength_stride = one_strength ? 0 : 1;
  if (!index.has_value()) {
    if (bank > 1) {
      fail(op, "`index` is missing: `vectors` is a bank of ", bank,
           " directions; give an int32 index per row (or per batch row), -1 to leave a row alone");
    }
    return steering;
  }

  const Argument index_given{op, "index", *index};
  check_dtype(index_given, ScalarType::Int, "an index is always int32");
  check_same_device(index_given, hidden);
  const auto sizes = index->sizes();
  const auto hidden_sizes = hidden.tensor.sizes();
  const std::size_t leading = hidden_sizes.size() - 1;
  bool fits = sizes.size() == leading || (sizes.size() == 1 && leading >= 1);
  for (std::size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] == hidden_sizes[i];
  check_shape(index_given, fits, "all dimensions but the last, or the first one alone,", hidden);
  steering.index = packed(*index);
  args.index = static_cast<const std::int32_t*>(steering.index->const_data_ptr());
  const std::int64_t count = steering.index->numel();
  args.rows_per_index = count > 0 ? rows / count : 1;
  // On CUDA the kernel cannot raise without a synchronisation: it fills such a row with NaN.
  if (index->is_cpu()) {
    const std::int64_t bad = cpu::first_bad_index(args.index, count, bank);
    if (bad >= 0) {
      fail(op, "`index` is ", args.index[bad], " at position ", bad, ", expected -1 to ", bank - 1,
           " (-1 leaves the row alone) for `vectors` of shape ", ShapeOf{vectors});
    }
  }
  return steering;
}

}  // namespace grains::torch_ops
