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
inline void check(Status status) {
  if (status != nullptr) throw OrtFailure{status};
}

// A wrong input, said as "what was given; what was expected".
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Shape {
  std::array<std::int64_t, kMaxRank> dims{};
  std::size_t rank = 0;

  std::int64_t operator[](std::size_t i) const { return dims[i]; }
  std::int64_t last() const { return dims[rank - 1]; }
  std::int64_t count() const { return prefix(rank).product(); }
  std::int64_t rows() const { return prefix(rank - 1).product(); }
  Shape prefix(std::size_t length) const;
  bool operator==(const Shape& other) const;
  std::string text() const;

 private:
  std::int64_t product() const;
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

// The node's attributes, read once when the session is made.
struct Kernel {
  const Op* op = nullptr;
  float epsilon = 0.0f;
  float weight_offset = 0.0f;
};

// An OrtCustomOp with what its callbacks need behind it. Lives until the process ends.
struct Op : OrtCustomOp {
  const OpSpec* spec = nullptr;
  const OrtApi* api = nullptr;
  DType dtype = DType::kFloat32;
  bool cuda = false;
};

class Call {
 public:
  Call(const Kernel& kernel, OrtKernelContext* context) : kernel_(kernel), context_(context) {}

  const Kernel& kernel() const { return kernel_; }
  DType dtype() const { return kernel_.op->dtype; }
  bool cuda() const { return kernel_.op->cuda; }
  bool has(std::size_t i) const { return value(i) != nullptr; }
  Tensor input(std::size_t i) const;
  void* output(std::size_t i, const Shape& shape) const;
  void* stream() const;

  // Runs a CPU launcher on the session's thread pool.
  template <typename Args>
  void run_on_cpu(void (*launcher)(const Args&, const Parallel&), const Args& args) const {
    ThreadPool pool{kernel_.op->api, context_, nullptr};
    launcher(args, {&ThreadPool::run, &pool, processors()});
    check(pool.status);
  }

 private:
  struct ThreadPool {
    const OrtApi* api;
    OrtKernelContext* context;
    Status status;
    static void run(void* self, std::int64_t chunks, Parallel::Body body, void* context);
  };
  static std::int32_t processors();
  const OrtValue* value(std::size_t i) const;

  const Kernel& kernel_;
  OrtKernelContext* context_;
};

// The five ops of the domain, in the order of the table in docs.
extern const std::array<OpSpec, 5> kOps;

}  // namespace grains::ort
