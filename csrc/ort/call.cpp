#include "call.h"

#include <algorithm>
#include <thread>

namespace grains::ort {

Shape Shape::prefix(std::size_t length) const {
  Shape result;
  result.rank = length;
  std::copy_n(dims.begin(), length, result.dims.begin());
  return result;
}

std::int64_t Shape::product() const {
  std::int64_t count = 1;
  for (std::size_t i = 0; i < rank; ++i) count *= dims[i];
  return count;
}

bool Shape::operator==(const Shape& other) const {
  return rank == other.rank && std::equal(dims.begin(), dims.begin() + rank, other.dims.begin());
}

std::string Shape::text() const {
  std::string text = "[";
  for (std::size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

const OrtValue* Call::value(std::size_t i) const {
  const OrtApi* api = kernel_.op->api;
  std::size_t count = 0;
  check(kKernelContextGetInputCount(api, context_, &count));
  if (i >= count) return nullptr;  // a trailing optional input that the node does not name
  const OrtValue* value = nullptr;
  check(kKernelContextGetInput(api, context_, i, &value));
  return value;
}

Tensor Call::input(std::size_t i) const {
  const OrtApi* api = kernel_.op->api;
  Tensor tensor;
  tensor.name = kernel_.op->spec->inputs[i].name;
  const OrtValue* value = this->value(i);
  if (value == nullptr) throw InputError(std::string("input `") + tensor.name + "` is missing");

  Info* info = nullptr;
  check(kGetTensorTypeAndShape(api, value, &info));
  Status status = kGetDimensionsCount(api, info, &tensor.shape.rank);
  const bool fits = tensor.shape.rank <= kMaxRank;
  if (status == nullptr && fits) {
    status = kGetDimensions(api, info, tensor.shape.dims.data(), tensor.shape.rank);
  }
  kReleaseTensorTypeAndShapeInfo(api, info);
  check(status);
  if (!fits) {
    throw InputError(std::string("input `") + tensor.name + "` has " +
                     std::to_string(tensor.shape.rank) + " dimensions; expected at most " +
                     std::to_string(kMaxRank));
  }
  // The one accessor that onnxruntime has; inputs are only read through it.
  check(kGetTensorMutableData(api, const_cast<OrtValue*>(value), &tensor.data));
  return tensor;
}

void* Call::output(std::size_t i, const Shape& shape) const {
  const OrtApi* api = kernel_.op->api;
  OrtValue* value = nullptr;
  check(kKernelContextGetOutput(api, context_, i, shape.dims.data(), shape.rank, &value));
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
