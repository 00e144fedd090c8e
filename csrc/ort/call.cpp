#include "call.h"

#include <algorithm>
#include <thread>

namespace grains::ort {

std::string Shape::text() const {
  std::string text = "[";
  for (std::size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

Shape shape_of(const Op& op, const OrtValue* value, std::size_t i, std::int64_t (&room)[kMaxRank]) {
  if (!op.has_shape_data) return copied_shape_of(op, value, i, room);
  Shape shape;
  ElementType type{};
  check(kGetTensorElementTypeAndShapeData(op.api, value, &type, &shape.dims, &shape.rank));
  return shape;
}

Shape copied_shape_of(const Op& op, const OrtValue* value, std::size_t i,
                      std::int64_t (&room)[kMaxRank]) {
  Shape shape{room, 0};
  Info* info = nullptr;
  check(kGetTensorTypeAndShape(op.api, value, &info));
  Status status = kGetDimensionsCount(op.api, info, &shape.rank);
  if (status == nullptr && shape.rank <= kMaxRank) {
    status = kGetDimensions(op.api, info, room, shape.rank);
  }
  kReleaseTensorTypeAndShapeInfo(op.api, info);
  check(status);
  if (shape.rank > kMaxRank) {
    throw InputError(std::string("input `") + op.spec->inputs[i].name + "` has " +
                     std::to_string(shape.rank) + " dimensions; expected at most " +
                     std::to_string(kMaxRank));
  }
  return shape;
}

void* data_of(const Op& op, const OrtValue* value) {
  // The one accessor that every onnxruntime has; inputs are only read through it.
  void* data = nullptr;
  check(kGetTensorMutableData(op.api, const_cast<OrtValue*>(value), &data));
  return data;
}

const OrtValue* Call::value(std::size_t i) const {
  // Trailing optional inputs that the node does not name are not counted.
  if (i >= kernel_.input_count) return nullptr;
  const OrtValue* value = nullptr;
  check(kKernelContextGetInput(kernel_.op->api, context_, i, &value));
  return value;
}

Tensor Call::input(std::size_t i) {
  if (kernel_.constants[i].data != nullptr) return kernel_.constants[i];
  const Op& op = *kernel_.op;
  Tensor tensor;
  tensor.name = op.spec->inputs[i].name;
  const OrtValue* value = this->value(i);
  if (value == nullptr) throw InputError(std::string("input `") + tensor.name + "` is missing");
  tensor.shape = shape_of(op, value, i, dims_[i]);
  tensor.data = data_of(op, value);
  return tensor;
}

void* Call::output(std::size_t i, const Shape& shape) const {
  const OrtApi* api = kernel_.op->api;
  OrtValue* value = nullptr;
  check(kKernelContextGetOutput(api, context_, i, shape.dims, shape.rank, &value));
  if (value == nullptr) {
    throw InputError("output " + std::to_string(i) +
                     " is not named by the node; name all outputs, also unused ones");
  }
  void* data = nullptr;
  check(kGetTensorMutableData(api, value, &data));
  return data;
}

void* Call::stream() const {
  void* stream = nullptr;
  check(kKernelContextGetGpuComputeStream(kernel_.op->api, context_, &stream));
  return stream;
}

std::int32_t Call::processors() {
  // onnxruntime does not tell the size of its pool; spare chunks cost next to nothing.
  static const auto count = static_cast<std::int32_t>(std::thread::hardware_concurrency());
  return std::max(count, 1);
}

void Call::ThreadPool::run(void* self, std::int64_t chunks, Parallel::Body body, void* context) {
  struct Job {
    Parallel::Body body;
    void* context;
  } job{body, context};
  auto* pool = static_cast<ThreadPool*>(self);
  if (pool->status != nullptr) return;  // an earlier loop of this call failed: run() will say so
  const auto one = [](void* job, std::size_t chunk) {
    const Job& work = *static_cast<Job*>(job);
    work.body(work.context, static_cast<std::int64_t>(chunk));
  };
  pool->status = kKernelContextParallelFor(pool->api, pool->context, one,
                                           static_cast<std::size_t>(chunks), 0, &job);
}

}  // namespace grains::ort
