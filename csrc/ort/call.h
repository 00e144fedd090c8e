// One run of one op: its inputs and outputs as the kernels want them, and errors as exceptions that
// the registry turns into an OrtStatus at the border.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "abi.h"
#include "grains/types.h"

namespace grains::ort {

struct Op;
class Call;

constexpr std::size_t kMaxRank = 8;
constexpr std::size_t kMaxInputs = 7;

// A status of onnxruntime on its way out of our code.
struct OrtFailure {
  Status status;
};
[[noreturn]] void fail(Status status);
inline void check(Status status) {
  if (status != nullptr) fail(status);
}

// A wrong input, said as "what was given; what was expected".
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Sizes that lie elsewhere: in onnxruntime's tensor, which outlives the run of an op, or in the
// Call.
struct Shape {
  const std::int64_t* dims = nullptr;
  std::size_t rank = 0;

  std::int64_t operator[](std::size_t i) const { return dims[i]; }
  std::int64_t last() const { return dims[rank - 1]; }
  std::int64_t count() const {
    std::int64_t count = 1;
    for (std::size_t i = 0; i < rank; ++i) count *= dims[i];
    return count;
  }
  std::int64_t rows() const { return prefix(rank - 1).count(); }
  Shape prefix(std::size_t length) const { return {dims, length}; }
  bool operator==(const Shape& other) const {
    if (rank != other.rank) return false;
    for (std::size_t i = 0; i < rank; ++i) {  // not std::equal, which calls memcmp for these few
      if (dims[i] != other.dims[i]) return false;
    }
    return true;
  }
  std::string text() const;
};

struct Tensor {
  const char* name = nullptr;
  Shape shape;
  void* data = nullptr;  // on the device of the op's execution provider
};

// Element types: the op's own row type (float32, float16 or bfloat16), or a fixed one.
enum class Element { kRow, kFloat32, kInt32 };
enum class ShapeRule { kAsFirstInput, kInterpolate, kAccumulate };

struct Port {
  const char* name = nullptr;
  Element element = Element::kRow;
  bool optional = false;
};

// What an op is, apart from its element type and its execution provider.
struct OpSpec {
  const char* name;
  std::array<Port, kMaxInputs> inputs;
  std::size_t input_count;
  std::array<Element, 2> outputs;
  std::size_t output_count;
  float epsilon;  // default of the attribute
  ShapeRule shape_rule;
  void (*compute)(Call&);
  std::size_t (*may_inplace)(int** inputs, int** outputs);
};

struct Constant {
  Tensor tensor;
  std::int64_t dims[kMaxRank];
};

// What is known of a node when the session is made: its attributes, and its constant inputs, which
// need not be asked for at each run. A question to onnxruntime costs about 10 ns; at one row of 512
// elements that is what the op's time is made of. What each run reads comes first: with the many
// nodes of a model none of this is in the first-level cache.
struct Kernel {
  const Op* op = nullptr;
  float epsilon = 0.0f;
  float weight_offset = 0.0f;
  std::uint32_t input_count = 0;
  std::uint32_t constant_inputs = 0;  // bit i: input i is constants[i]
  std::array<Constant, kMaxInputs> constants;

  explicit Kernel(const Op& op) : op(&op) {}
  Kernel(const Kernel&) = delete;  // shapes point into it
  Kernel& operator=(const Kernel&) = delete;

  bool is_constant(std::size_t i) const { return (constant_inputs >> i & 1u) != 0; }
};

// An OrtCustomOp with what its callbacks need behind it. Lives until the process ends.
struct Op : OrtCustomOp {
  const OpSpec* spec = nullptr;
  const OrtApi* api = nullptr;
  DType dtype = DType::kFloat32;
  bool cuda = false;
  bool has_shape_data = false;  // `api` is of kShapeDataApiVersion
  std::int32_t processors = 1;
};

// The sizes of a value, which is input `i` of `op`, copied to `room`.
Shape copied_shape_of(const Op& op, const OrtValue* value, std::size_t i,
                      std::int64_t (&room)[kMaxRank]);

// The same in onnxruntime's own memory where it shows us that.
inline Shape shape_of(const Op& op, const OrtValue* value, std::size_t i,
                      std::int64_t (&room)[kMaxRank]) {
  if (!op.has_shape_data) return copied_shape_of(op, value, i, room);
  Shape shape;
  ElementType type;
  check(kGetTensorElementTypeAndShapeData(op.api, value, &type, &shape.dims, &shape.rank));
  return shape;
}

inline void* data_of(const Op& op, const OrtValue* value) {
  // The one accessor that every onnxruntime has; inputs are only read through it.
  void* data = nullptr;
  check(kGetTensorMutableData(op.api, const_cast<OrtValue*>(value), &data));
  return data;
}

class Call {
 public:
  Call(const Kernel& kernel, OrtKernelContext* context) : kernel_(kernel), context_(context) {}
  Call(const Call&) = delete;  // shapes point into it
  Call& operator=(const Call&) = delete;

  const Kernel& kernel() const { return kernel_; }
  DType dtype() const { return kernel_.op->dtype; }
  bool cuda() const { return kernel_.op->cuda; }
  bool has(std::size_t i) const { return kernel_.is_constant(i) || value(i) != nullptr; }
  Tensor input(std::size_t i) {
    if (kernel_.is_constant(i)) return kernel_.constants[i].tensor;
    const Op& op = *kernel_.op;
    const OrtValue* value = this->value(i);
    if (value == nullptr) missing(i);
    return {op.spec->inputs[i].name, shape_of(op, value, i, dims_[i]), data_of(op, value)};
  }
  void* output(std::size_t i, Shape shape) const;
  void* stream() const;

  // Runs a CPU launcher on the session's thread pool.
  template <typename Args>
  void run_on_cpu(void (*launcher)(const Args&, const Parallel&), const Args& args) const {
    ThreadPool pool{kernel_.op->api, context_, nullptr};
    launcher(args, {&ThreadPool::run, &pool, kernel_.op->processors});
    check(pool.status);
  }

 private:
  struct ThreadPool {
    const OrtApi* api;
    OrtKernelContext* context;
    Status status;
    static void run(void* self, std::int64_t chunks, Parallel::Body body, void* context);
  };
  [[noreturn]] void missing(std::size_t i) const;
  const OrtValue* value(std::size_t i) const {
    // Trailing optional inputs that the node does not name are not counted.
    if (i >= kernel_.input_count) return nullptr;
    const OrtValue* value = nullptr;
    check(kKernelContextGetInput(kernel_.op->api, context_, i, &value));
    return value;
  }

  const Kernel& kernel_;
  OrtKernelContext* context_;
  std::int64_t dims_[kMaxInputs][kMaxRank];
};

// The five ops of the domain, in the order of the table in docs.
extern const std::array<OpSpec, 5> kOps;

}  // namespace grains::ort
