// What is wrong with an argument, in words: the argument's name, what was given, what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace grains::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(type);
  }
}

// Prints a tensor's shape as [2, 3].
struct ShapeOf {
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
  const char* separator = "[";
  if (shape.tensor.dim() == 0) out << separator;
  for (const std::int64_t size : shape.tensor.sizes()) {
    out << separator << size;
    separator = ", ";
  }
  return out << "]";
}

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "grains::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// An argument of an op, as the checks and their messages need it.
struct Argument {
  const char* op;
  const char* name;
  const Tensor& tensor;
};

// As libtorch numbers them. A ScalarType is made of that with one call of libtorch for each type
// that it might be.
inline std::int32_t raw_dtype(const Tensor& tensor) {
  std::int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline std::int32_t raw_dtype(ScalarType type) {
  return torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type));
}

inline std::int32_t raw_device(const Tensor& tensor) {
  std::int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
  return device;
}

inline void check_dtype(const Argument& given, ScalarType expected, const char* why) {
  if (raw_dtype(given.tensor) == raw_dtype(expected)) return;
  fail(given.op, "`", given.name, "` is ", dtype_name(given.tensor.scalar_type()), ", expected ",
       dtype_name(expected), " (", why, "); convert it with .to(torch.", dtype_name(expected), ")");
}

inline void check_same_device(const Argument& given, const Argument& first) {
  if (raw_device(given.tensor) == raw_device(first.tensor) &&
      given.tensor.get_device_index() == first.tensor.get_device_index()) {
    return;
  }
  const auto name = [](const Tensor& tensor) -> std::string {
    return tensor.is_cpu() ? "cpu" : "cuda:" + std::to_string(tensor.get_device_index());
  };
  fail(given.op, "`", given.name, "` is on ", name(given.tensor), ", but `", first.name, "` is on ",
       name(first.tensor), "; move it there with .to()");
}

// Type and device as `first` has them.
inline void check_like(const Argument& given, const Argument& first) {
  if (raw_dtype(given.tensor) != raw_dtype(first.tensor)) {
    fail(given.op, "`", given.name, "` is ", dtype_name(given.tensor.scalar_type()), ", but `",
         first.name, "` is ", dtype_name(first.tensor.scalar_type()),
         "; both must have one dtype: convert with .to()");
  }
  check_same_device(given, first);
}

inline void check_shape(const Argument& given, bool fits, const char* expected,
                        const Argument& first) {
  if (fits) return;
  fail(given.op, "`", given.name, "` has shape ", ShapeOf{given.tensor}, ", expected ", expected,
       " for `", first.name, "` of shape ", ShapeOf{first.tensor});
}

}  // namespace grains::torch_ops
