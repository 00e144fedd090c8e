// What onnxruntime calls: RegisterCustomOps, and the callbacks of OrtCustomOp, which are the same
// for every op because the Op behind the pointer says what it is.
#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstdio>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "abi.h"
#include "call.h"

namespace grains::ort {
namespace {

constexpr char kDomain[] = "grains";
// Marks the SessionOptions that have the domain already: onnxruntime refuses one domain twice.
constexpr char kRegisteredKey[] = "grains.ops_registered";

const Op& op_of(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

// Runs `body` and turns what it throws into a status; no exception may cross into onnxruntime.
template <typename Body>
Status guarded(const OrtApi* api, const char* name, Body body) {
  const auto failed = [&](OrtErrorCode code, const char* what) {
    return kCreateStatus(api, code, (std::string("grains.") + name + ": " + what).c_str());
  };
  try {
    body();
    return nullptr;
  } catch (const OrtFailure& failure) {
    return failure.status;
  } catch (const InputError& error) {
    return failed(kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return failed(kRuntimeException, error.what());
  }
}

ElementType element_type(Element element, DType dtype) {
  if (element == Element::kFloat32) return kFloat;
  if (element == Element::kInt32) return kInt32;
  if (dtype == DType::kFloat16) return kHalf;
  return dtype == DType::kBFloat16 ? kBrain : kFloat;
}

// --- kernels
// --------------------------------------------------------------------------------------

float float_attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name,
                      float fallback) {
  float value = fallback;
  Status status = kKernelInfoGetAttributeFloat(api, info, name, &value);
  if (status != nullptr) {  // absent, or of another type
    kReleaseStatus(api, status);
    value = fallback;
    std::int64_t integer = 0;
    status = kKernelInfoGetAttributeInt64(api, info, name, &integer);
    if (status == nullptr) {
      throw InputError(std::string("attribute `") + name + "` is an integer; expected a float");
    }
    kReleaseStatus(api, status);
  }
  if (!std::isfinite(value)) {
    throw InputError(std::string("attribute `") + name + "` is not a finite number");
  }
  return value;
}

void read_constants(const Op& op, const OrtKernelInfo* info, Kernel* kernel) {
  std::size_t count = 0;
  check(kKernelInfoGetInputCount(op.api, info, &count));
  count = std::min(count, op.spec->input_count);
  kernel->input_count = static_cast<std::uint32_t>(count);
  for (std::size_t i = 0; i < count; ++i) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(kKernelInfoGetConstantInput(op.api, info, i, &is_constant, &value));
    if (is_constant == 0 || value == nullptr) continue;
    Constant& constant = kernel->constants[i];
    const Shape shape = copied_shape_of(op, value, i, constant.dims);
    constant.tensor = {op.spec->inputs[i].name, shape, data_of(op, value)};
    kernel->constant_inputs |= 1u << i;
  }
}

Status create_kernel(const OrtCustomOp* custom, const OrtApi* api, const OrtKernelInfo* info,
                     void** out) {
  const Op& op = op_of(custom);
  return guarded(api, op.spec->name, [&] {
    auto kernel = std::make_unique<Kernel>(op);
    kernel->epsilon = float_attribute(api, info, "epsilon", op.spec->epsilon);
    kernel->weight_offset = float_attribute(api, info, "weight_offset", 0.0f);
    if (kernel->epsilon < 0) {
      throw InputError("attribute `epsilon` is " + std::to_string(kernel->epsilon) +
                       "; expected 0 or more");
    }
    read_constants(op, info, kernel.get());
    *out = kernel.release();
  });
}

Status compute(void* state, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return guarded(kernel.op->api, kernel.op->spec->name, [&] {
    Call call(kernel, context);
    kernel.op->spec->compute(call);
  });
}

// --- shape inference
// ------------------------------------------------------------------------------

struct SymbolicShape {
  std::array<std::int64_t, kMaxRank> dims{};
  std::array<const char*, kMaxRank> symbols{};  // "" where the size is a number
  std::size_t rank = 0;

  void push(std::int64_t size, const char* symbol) {
    dims[rank] = size;
    symbols[rank++] = symbol;
  }
};

// False where onnxruntime cannot say all dimensions. An unknown rank reads as no dimensions, and a
// nameless unknown size as -1: copied to an output, either would become a wrong promise.
bool known_shape(const OrtApi* api, const OrtShapeInferContext* context, std::size_t input,
                 Info** info, SymbolicShape* shape) {
  check(kShapeInferContextGetInputTypeShape(api, context, input, info));
  check(kGetDimensionsCount(api, *info, &shape->rank));
  if (shape->rank == 0 || shape->rank > kMaxRank) return false;
  check(kGetDimensions(api, *info, shape->dims.data(), shape->rank));
  check(kGetSymbolicDimensions(api, *info, shape->symbols.data(), shape->rank));
  for (std::size_t i = 0; i < shape->rank; ++i) {
    const bool named = shape->symbols[i] != nullptr && shape->symbols[i][0] != '\0';
    if (shape->dims[i] < 0 && !named) return false;
  }
  return true;
}

void set_first_output(const OrtApi* api, OrtShapeInferContext* context, ElementType type,
                      SymbolicShape shape) {
  Info* info = nullptr;
  check(kCreateTensorTypeAndShapeInfo(api, &info));
  Status status = kSetTensorElementType(api, info, type);
  if (status == nullptr) status = kSetDimensions(api, info, shape.dims.data(), shape.rank);
  if (status == nullptr) {
    status = kSetSymbolicDimensions(api, info, shape.symbols.data(), shape.rank);
  }
  if (status == nullptr) status = kShapeInferContextSetOutputTypeShape(api, context, 0, info);
  kReleaseTensorTypeAndShapeInfo(api, info);
  check(status);
}

void infer_shapes(const Op& op, OrtShapeInferContext* context) {
  Info* info = nullptr;
  if (op.spec->shape_rule == ShapeRule::kAsFirstInput) {
    SymbolicShape shape;
    if (!known_shape(op.api, context, 0, &info, &shape)) return;
    for (std::size_t i = 0; i < op.spec->output_count; ++i) {
      check(kShapeInferContextSetOutputTypeShape(op.api, context, i, info));
    }
    return;
  }
  SymbolicShape first, second, result;
  if (!known_shape(op.api, context, 0, &info, &first)) return;
  // Not the type of `op`: onnxruntime infers for all element types through the first one's
  // callback.
  ElementType type = kFloat;
  if (op.spec->outputs[0] == Element::kRow) check(kGetTensorElementType(op.api, info, &type));
  if (op.spec->shape_rule == ShapeRule::kInterpolate) {  // [alphas[0], *input]
    if (!known_shape(op.api, context, 2, &info, &second) || first.rank != 3) return;
    result.push(second.dims[0], second.symbols[0]);
    for (std::size_t i = 0; i < 3; ++i) result.push(first.dims[i], first.symbols[i]);
  } else {  // grads[1:3]
    if (first.rank != 4) return;
    for (std::size_t i = 1; i < 3; ++i) result.push(first.dims[i], first.symbols[i]);
  }
  set_first_output(op.api, context, type, result);
}

Status infer(const OrtCustomOp* custom, OrtShapeInferContext* context) {
  const Op& op = op_of(custom);
  // Inference only saves work, and onnxruntime drops (and leaks) a status that is returned here:
  // a failure leaves the shapes open, and the kernel says what is wrong when it runs.
  Status status = guarded(op.api, op.spec->name, [&] { infer_shapes(op, context); });
  if (status != nullptr) kReleaseStatus(op.api, status);
  return nullptr;
}

// --- registration
// ---------------------------------------------------------------------------------

// One onnxruntime in the process.
struct Runtime {
  const OrtApi* api = nullptr;
  bool has_shape_data = false;

  // It writes to stderr when it is asked for a version that it lacks: its name is read first.
  explicit Runtime(const OrtApiBase* base) {
    unsigned major = 0, minor = 0;
    const bool is_named = std::sscanf(base->GetVersionString(), "%u.%u", &major, &minor) == 2;
    has_shape_data = is_named && (major > 1 || minor >= kShapeDataApiVersion);
    api = base->GetApi(has_shape_data ? kShapeDataApiVersion : kApiVersion);
  }
};

Op make_op(const OpSpec& spec, const Runtime& runtime, DType dtype, bool cuda) {
  // onnxruntime does not tell the size of its pool; spare chunks cost next to nothing.
  const auto processors = static_cast<std::int32_t>(std::thread::hardware_concurrency());
  Op op;
  op.processors = std::max(processors, 1);
  op.spec = &spec;
  op.api = runtime.api;
  op.has_shape_data = runtime.has_shape_data;
  op.dtype = dtype;
  op.cuda = cuda;
  op.GetName = [](const OrtCustomOp* self) { return op_of(self).spec->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp* self) {
    return op_of(self).cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };
  op.GetInputType = [](const OrtCustomOp* self, std::size_t i) {
    return element_type(op_of(self).spec->inputs[i].element, op_of(self).dtype);
  };
  op.GetInputTypeCount = [](const OrtCustomOp* self) { return op_of(self).spec->input_count; };
  op.GetOutputType = [](const OrtCustomOp* self, std::size_t i) {
    return element_type(op_of(self).spec->outputs[i], op_of(self).dtype);
  };
  op.GetOutputTypeCount = [](const OrtCustomOp* self) { return op_of(self).spec->output_count; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetInputCharacteristic = [](const OrtCustomOp* self, std::size_t i) {
    return op_of(self).spec->inputs[i].optional ? kOptional : kRequired;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return kDefaultMemory; };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = compute;
  op.InferOutputShapeFn = infer;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
  if (spec.may_inplace != nullptr) {
    op.GetMayInplace = spec.may_inplace;
    op.ReleaseMayInplace = [](int*, int*) {};  // the arrays are static
  }
  return op;
}

// The ops and the domain for one onnxruntime; a process can hold several (Python's and another
// binding's), and shape inference has no other way to its API than through the op.
struct Registration {
  std::deque<Op> ops;  // stable addresses
  OrtCustomOpDomain* domain = nullptr;

  explicit Registration(const Runtime& runtime) {
    check(kCreateCustomOpDomain(runtime.api, kDomain, &domain));
#ifdef GRAINS_WITH_CUDA
    constexpr std::array<bool, 2> devices = {false, true};
#else
    constexpr std::array<bool, 1> devices = {false};
#endif
    for (const OpSpec& spec : kOps) {
      for (const bool cuda : devices) {
        for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
          ops.push_back(make_op(spec, runtime, dtype, cuda));
          check(kCustomOpDomainAdd(runtime.api, domain, &ops.back()));
        }
      }
    }
  }
};

// Made once and never freed: sessions keep pointers to it and may outlive every static object.
OrtCustomOpDomain* domain_for(const Runtime& runtime) {
  static auto& mutex = *new std::mutex;
  static auto& registrations = *new std::map<const OrtApi*, Registration>;
  const std::lock_guard<std::mutex> lock(mutex);
  return registrations.try_emplace(runtime.api, runtime).first->second.domain;
}

}  // namespace
}  // namespace grains::ort

// The entry point that onnxruntime looks up by name when the library is registered with
// SessionOptions. Calling it again for the same options changes nothing.
extern "C" __attribute__((visibility("default"))) grains::ort::OrtStatus* RegisterCustomOps(
    grains::ort::OrtSessionOptions* options, const grains::ort::OrtApiBase* base) {
  using namespace grains::ort;
  const Runtime runtime(base);
  const OrtApi* api = runtime.api;
  if (api == nullptr) {
    const std::string message = std::string("the grains op library needs onnxruntime 1.18 or ") +
                                "newer; this is " + base->GetVersionString();
    return kCreateStatus(base->GetApi(1), kFail, message.c_str());
  }
  return guarded(api, "RegisterCustomOps", [&] {
    int registered = 0;
    check(kHasSessionConfigEntry(api, options, kRegisteredKey, &registered));
    if (registered != 0) return;
    check(kAddCustomOpDomain(api, options, domain_for(runtime)));
    check(kAddSessionConfigEntry(api, options, kRegisteredKey, "1"));
  });
}
