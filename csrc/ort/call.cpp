#include "call.h"

namespace grains::ort {

void fail(Status status) { throw OrtFailure{status}; }

std::string Shape::text() const {
  std::string text = "[";
  for (std::size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
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

void Call::missing(std::size_t i) const {
  throw InputError(std::string("input `") + kernel_.op->spec->inputs[i].name + "` is missing");
}

void* Call::output(std::size_t i, Shape shape) const {
  const OrtApi* api = kernel_.op->api;
  OrtValue* value = nullptr;
  check(kKernelContextGetOutput(api, context_, i, shape.dims, shape.rank, &value));
  if (value == nullptr) {
    throw InputError("output " + std::to_string(i) +
                     " is not named by the node; name all outputs, also unused ones");
  }
  return data_of(*kernel_.op, value);
}

void* Call::stream() const {
  void* stream = nullptr;
  check(kKernelContextGetGpuComputeStream(kernel_.op->api, context_, &stream));
  return stream;
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
