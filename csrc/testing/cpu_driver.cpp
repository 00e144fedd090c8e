// The CPU kernels as a program of their own, with no Python and no torch: to run them on another
// processor's emulator, to count their instructions and to time them beside memcpy.
//
//   cpu_driver isas                            the instruction sets that this processor has
//   cpu_driver compiler                        what it was compiled with
//   cpu_driver outputs ISA                     every op's outputs: a line "op dtype rows dim
//   bytes",
//                                              then as many bytes; the inputs are the same
//                                              everywhere
//   cpu_driver count ISA OP DTYPE ROWS DIM     instructions of one call, one thread. This and time
//                                              take a decoder's ops too, ROWS being its tokens
//   cpu_driver time ISA OP DTYPE ROWS DIM N    N times: nanoseconds of one call and of memcpy of as
//                                              many bytes as the op's rows have, one thread, hot
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "grains/cpu.h"
#include "grains/decoder.h"

namespace {

using namespace grains;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "cpu_driver: %s\n", what.c_str());
  std::exit(2);
}

// --- Inputs --------------------------------------------------------------------------------------

constexpr std::int64_t kSteps = 4;
constexpr std::size_t kAlignment = 64;

std::size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

std::uint16_t to_half(float value) {  // for 0, infinity, NaN and what float16 holds exactly
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const std::uint32_t sign = bits >> 16 & 0x8000u, exponent = bits >> 23 & 0xffu;
  if (exponent == 0) return static_cast<std::uint16_t>(sign);
  if (exponent == 0xff) {
    return static_cast<std::uint16_t>(sign | 0x7c00u | (value == value ? 0u : 0x200u));
  }
  return static_cast<std::uint16_t>(sign | (exponent - 112) << 10 | (bits >> 13 & 0x3ffu));
}

struct Buffer {
  explicit Buffer(std::size_t bytes)
      : bytes(bytes),
        data(std::aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment), &std::free) {
    std::memset(data.get(), 0, bytes);
  }
  void set(DType dtype, std::int64_t i, float value) {
    if (dtype == DType::kFloat32) {
      static_cast<float*>(data.get())[i] = value;
    } else if (dtype == DType::kFloat16) {
      static_cast<std::uint16_t*>(data.get())[i] = to_half(value);
    } else {
      std::uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      static_cast<std::uint16_t*>(data.get())[i] = static_cast<std::uint16_t>(bits >> 16);
    }
  }
  std::size_t bytes;
  std::unique_ptr<void, decltype(&std::free)> data;
};

// Multiples of 1/64 in [-2, 2]: every element type holds them exactly. None is 0: where a row is
// steered in place over and over, an element whose direction is 0 would become subnormal, and slow.
float number(std::uint64_t seed, std::int64_t i) {
  std::uint64_t state = seed * 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(i) + 1;
  state = (state ^ state >> 30) * 0xbf58476d1ce4e5b9u;
  state = (state ^ state >> 27) * 0x94d049bb133111ebu;
  const auto value = static_cast<std::int32_t>(state >> 56) - 128;
  return static_cast<float>(value < 0 ? value : value + 1) / 64.0f;
}

Buffer random_rows(DType dtype, std::int64_t count, std::uint64_t seed, float scale = 1.0f) {
  Buffer buffer(static_cast<std::size_t>(count) * size_of(dtype));
  for (std::int64_t i = 0; i < count; ++i) buffer.set(dtype, i, number(seed, i) * scale);
  return buffer;
}

// Every fifth row each: zeros; a NaN; an infinity; close to the type's largest value; tiny.
void add_special_rows(Buffer* rows, DType dtype, std::int64_t count, std::int64_t dim) {
  const float largest = dtype == DType::kFloat16 ? 0x1p15f : 0x1p126f;
  const float smallest = dtype == DType::kFloat16 ? 0x1p-7f : 0x1p-110f;
  for (std::int64_t row = 0; row < count; ++row) {
    for (std::int64_t d = 0; d < dim; ++d) {
      const std::int64_t i = row * dim + d;
      if (row % 10 == 1) rows->set(dtype, i, 0.0f);
      if (row % 10 == 3 && d == dim / 2) rows->set(dtype, i, __builtin_nanf(""));
      if (row % 10 == 5 && d == dim / 2) rows->set(dtype, i, __builtin_inff());
      if (row % 10 == 7) rows->set(dtype, i, d % 3 == 0 ? -largest : largest);
      if (row % 10 == 9) rows->set(dtype, i, number(7, i) * smallest);
    }
  }
}

// --- One call of one op --------------------------------------------------------------------------

const char* const kOps[] = {"steer_add_normalize",   "steer_add_normalize_", "skip_steer_rms_norm",
                            "skip_steer_layer_norm", "ig_interpolate",       "ig_accumulate"};
const char* const kDecoderOps[] = {
    "rms_norm", "rms_norm_backward", "gated_activation",  "gated_activation_backward",
    "rotary",   "attention",         "attention_backward"};
const char* const kTypes[] = {"float32", "float16", "bfloat16"};

struct Problem {
  std::string op;
  DType dtype;
  std::int64_t rows, dim;
  bool special = false;
};

class Call {
 public:
  explicit Call(const Problem& problem) : problem_(problem) {
    const auto [op, dtype, rows, dim, special] = problem;
    const std::int64_t count = rows * dim;
    const bool interpolate = op == "ig_interpolate", accumulate = op == "ig_accumulate";
    add(random_rows(dtype, count, 1));
    if (special) add_special_rows(&buffers_[kInput], dtype, rows, dim);
    add(random_rows(dtype, accumulate ? kSteps * count : count, 2));
    add(random_rows(dtype, dim, 3));
    add(random_rows(dtype, dim, 4));
    add(random_rows(dtype, dim, 5));
    add(random_rows(DType::kFloat32, kSteps, 6));
    const auto bytes = static_cast<std::size_t>(count) * size_of(dtype);
    add(Buffer(accumulate    ? static_cast<std::size_t>(rows) * 4
               : interpolate ? kSteps * bytes
                             : bytes));
    add(Buffer(op.rfind("skip", 0) == 0 ? bytes : 0));
    static_cast<float*>(data(kFloats))[0] = 0.75f;
  }

  // Bytes of the outputs, and of memory that the op must move at least once.
  std::vector<const Buffer*> outputs() const {
    if (problem_.op == "steer_add_normalize_") return {&buffers_[kInput]};
    if (buffers_[kSecondOutput].bytes == 0) return {&buffers_[kOutput]};
    return {&buffers_[kOutput], &buffers_[kSecondOutput]};
  }
  // What a copy of this many bytes reads and writes, the op reads and writes at least.
  std::size_t copied_bytes() const {
    const std::size_t row_bytes = buffers_[kInput].bytes;
    if (problem_.op.rfind("skip", 0) == 0) return 2 * row_bytes;
    if (problem_.op == "ig_interpolate") return (kSteps + 1) * row_bytes / 2;
    if (problem_.op == "ig_accumulate") return (kSteps + 1) * row_bytes / 2;
    return row_bytes;
  }

  void run() {
    const std::string& op = problem_.op;
    const Parallel serial;
    if (op == "ig_interpolate") {
      InterpolateArgs args;
      args.input = data(kInput);
      args.baseline = data(kVector);
      args.alphas = static_cast<float*>(data(kFloats));
      args.out = data(kOutput);
      args.steps = kSteps;
      args.batch = 1;
      args.tokens = problem_.rows;
      args.dim = args.input_token_stride = problem_.dim;
      args.alpha_step_stride = 1;
      args.dtype = problem_.dtype;
      cpu::ig_interpolate(args, serial);
    } else if (op == "ig_accumulate") {
      AccumulateArgs args;
      args.grads = data(kSecondInput);
      args.input = data(kInput);
      args.baseline = data(kVector);
      args.weights = static_cast<float*>(data(kFloats));
      args.out = static_cast<float*>(data(kOutput));
      args.steps = kSteps;
      args.batch = 1;
      args.tokens = problem_.rows;
      args.dim = args.input_token_stride = args.grads_token_stride = problem_.dim;
      args.grads_step_stride = problem_.rows * problem_.dim;
      args.weight_step_stride = 1;
      args.dtype = problem_.dtype;
      cpu::ig_accumulate(args, serial);
    } else if (op.rfind("skip", 0) == 0) {
      SkipNormArgs args;
      args.x = data(kInput);
      args.skip = data(kSecondInput);
      args.weight = data(kWeight);
      args.bias = data(kBias);
      args.normed = data(kOutput);
      args.residual = data(kSecondOutput);
      args.rows = problem_.rows;
      args.dim = args.x_stride = args.skip_stride = problem_.dim;
      args.normed_stride = args.residual_stride = problem_.dim;
      args.steering = steering();
      args.dtype = problem_.dtype;
      (op == "skip_steer_rms_norm" ? cpu::skip_steer_rms_norm : cpu::skip_steer_layer_norm)(args,
                                                                                            serial);
    } else {
      SteerArgs args;
      args.hidden = data(kInput);
      args.out = data(op == "steer_add_normalize_" ? kInput : kOutput);
      args.rows = problem_.rows;
      args.dim = args.hidden_stride = args.out_stride = problem_.dim;
      args.steering = steering();
      args.dtype = problem_.dtype;
      cpu::steer_add_normalize(args, serial);
    }
  }

 private:
  enum { kInput, kSecondInput, kVector, kWeight, kBias, kFloats, kOutput, kSecondOutput };

  void add(Buffer buffer) { buffers_.push_back(std::move(buffer)); }
  void* data(int i) { return buffers_[static_cast<std::size_t>(i)].data.get(); }
  SteeringArgs steering() {
    SteeringArgs args;
    args.vectors = data(kVector);
    args.vectors_stride = problem_.dim;
    args.strength = static_cast<float*>(data(kFloats));
    return args;
  }

  Problem problem_;
  std::vector<Buffer> buffers_;
};

// One sequence of `rows` tokens, in heads of 64 elements.
class DecoderCall {
 public:
  explicit DecoderCall(const Problem& problem) : problem_(problem) {
    const std::int64_t count = problem.rows * problem.dim;
    for (std::uint64_t seed = 1; seed <= 4; ++seed) {
      buffers_.push_back(random_rows(problem.dtype, count, seed));
    }
    buffers_.push_back(random_rows(problem.dtype, problem.rows * kWidth, 5));
    buffers_.push_back(random_rows(problem.dtype, problem.rows * kWidth, 6));
    buffers_.push_back(random_rows(problem.dtype, problem.dim, 7));
    const std::size_t floats = static_cast<std::size_t>(problem.rows * problem.dim) * sizeof(float);
    buffers_.emplace_back(floats);
    for (int i = 0; i < 4; ++i) buffers_.emplace_back(buffers_[kFirst].bytes);
    const bool gradient = problem.op.rfind("_backward") != std::string::npos;
    if (!gradient) return;
    if (problem.op == "rms_norm_backward") cpu::rms_norm(rms_norm(), Parallel{});
    if (problem.op == "attention_backward") cpu::attention(attention(), Parallel{});
  }

  std::size_t copied_bytes() const {
    const std::string& op = problem_.op;
    const std::size_t halves = op == "rms_norm" || op == "rotary"  ? 2
                               : op == "attention"                 ? 4
                               : op == "attention_backward"        ? 8
                               : op == "gated_activation_backward" ? 5
                                                                   : 3;
    return halves * buffers_[kFirst].bytes / 2;
  }

  void run() {
    const std::string& op = problem_.op;
    const Parallel serial;
    if (op == "rms_norm") {
      cpu::rms_norm(rms_norm(), serial);
    } else if (op == "rms_norm_backward") {
      RmsNormBackwardArgs args;
      args.grad = data(kSecond);
      args.x = data(kFirst);
      args.weight = data(kWeight);
      args.rstd = static_cast<float*>(data(kFloats));
      args.grad_x = data(kOutput);
      args.rows = problem_.rows;
      args.dim = args.grad_stride = args.x_stride = problem_.dim;
      args.dtype = problem_.dtype;
      cpu::rms_norm_backward(args, serial);
    } else if (op == "gated_activation") {
      GatedArgs args;
      args.gate = data(kFirst);
      args.up = data(kSecond);
      args.out = data(kOutput);
      args.rows = problem_.rows;
      args.dim = args.gate_stride = args.up_stride = problem_.dim;
      args.dtype = problem_.dtype;
      cpu::gated_activation(args, serial);
    } else if (op == "gated_activation_backward") {
      GatedBackwardArgs args;
      args.grad = data(kThird);
      args.gate = data(kFirst);
      args.up = data(kSecond);
      args.grad_gate = data(kOutput);
      args.grad_up = data(kOutput + 1);
      args.rows = problem_.rows;
      args.dim = args.grad_stride = args.gate_stride = args.up_stride = problem_.dim;
      args.grad_gate_stride = args.grad_up_stride = problem_.dim;
      args.dtype = problem_.dtype;
      cpu::gated_activation_backward(args, serial);
    } else if (op == "rotary") {
      RotaryArgs args;
      args.x = data(kFirst);
      args.cos = data(kCos);
      args.sin = data(kSin);
      args.out = data(kOutput);
      args.batch = 1;
      args.heads = problem_.dim / kWidth;
      args.tokens = problem_.rows;
      args.width = args.dim = args.table_token_stride = kWidth;
      args.x_strides = args.out_strides = strides();
      args.dtype = problem_.dtype;
      cpu::rotary(args, serial);
    } else if (op == "attention") {
      cpu::attention(attention(), serial);
    } else {
      AttentionBackwardArgs args;
      args.forward = attention();
      args.grad = data(kFourth);
      args.grad_strides = strides();
      args.grad_q = data(kOutput + 1);
      args.grad_k = data(kOutput + 2);
      args.grad_v = data(kOutput + 3);
      cpu::attention_backward(args, serial);
    }
  }

 private:
  enum { kFirst, kSecond, kThird, kFourth, kCos, kSin, kWeight, kFloats, kOutput };
  static constexpr std::int64_t kWidth = 64;

  void* data(int i) { return buffers_[static_cast<std::size_t>(i)].data.get(); }
  HeadStrides strides() const { return {problem_.rows * problem_.dim, kWidth, problem_.dim}; }
  RmsNormArgs rms_norm() {
    RmsNormArgs args;
    args.x = data(kFirst);
    args.weight = data(kWeight);
    args.out = data(kOutput);
    args.rstd = static_cast<float*>(data(kFloats));
    args.rows = problem_.rows;
    args.dim = args.x_stride = problem_.dim;
    args.dtype = problem_.dtype;
    return args;
  }
  AttentionArgs attention() {
    AttentionArgs args;
    args.q = data(kFirst);
    args.k = data(kSecond);
    args.v = data(kThird);
    args.out = data(kOutput);
    args.lse = static_cast<float*>(data(kFloats));
    args.batch = 1;
    args.heads = args.kv_heads = problem_.dim / kWidth;
    args.q_tokens = args.k_tokens = problem_.rows;
    args.width = args.v_width = kWidth;
    args.q_strides = args.k_strides = args.v_strides = strides();
    args.scale = 0.125f;
    args.dtype = problem_.dtype;
    return args;
  }

  Problem problem_;
  std::vector<Buffer> buffers_;
};

// --- Commands ------------------------------------------------------------------------------------

void print_isas() {
  for (const cpu::Isa isa : cpu::kIsas) {
    if (cpu::isa_supported(isa)) std::printf("%s\n", cpu::isa_name(isa));
  }
}

void choose_isa(const std::string& name) {
  for (const cpu::Isa isa : cpu::kIsas) {
    if (name == cpu::isa_name(isa) && cpu::set_isa(isa)) return;
  }
  fail("this processor does not run the instruction set " + name + "; see: cpu_driver isas");
}

void print_outputs() {
  for (const char* op : kOps) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      for (const std::int64_t dim : {1, 3, 16, 31, 64, 100, 257, 768}) {
        Call call({op, static_cast<DType>(dtype), 20, dim, true});
        call.run();
        for (const Buffer* output : call.outputs()) {
          std::printf("%s %s 20 %d %zu\n", op, kTypes[dtype], static_cast<int>(dim), output->bytes);
          std::fwrite(output->data.get(), 1, output->bytes, stdout);
        }
      }
    }
  }
}

// Steps a child through the call: valgrind does not know AVX-512, and a virtual machine has seldom
// a counter. Two stops mark the call; what they cost themselves is taken off.
long steps_between_stops(const std::function<void()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(3);
    raise(SIGSTOP);
    body();
    raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  long steps = 0;
  waitpid(child, &status, 0);
  if (!WIFSTOPPED(status)) fail("ptrace is not allowed here: instructions cannot be counted");
  do {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) {
      fail("ptrace does not step through a program here: instructions cannot be counted");
    }
    waitpid(child, &status, 0);
    ++steps;
  } while (WIFSTOPPED(status) && WSTOPSIG(status) != SIGSTOP);
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return steps;
}

template <class Call>
void print_count(const Problem& problem) {
  Call call(problem);
  call.run();  // binds what the loader leaves open until the first use
  std::printf("%ld\n", steps_between_stops([&] { call.run(); }) - steps_between_stops([] {}));
}

double now() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return 1e9 * static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec);
}

template <class Body>
double nanoseconds(int repeats, Body body) {
  const double start = now();
  for (int i = 0; i < repeats; ++i) body();
  return (now() - start) / repeats;
}

template <class Call>
void print_times(const Problem& problem, int rounds) {
  Call call(problem);
  const Buffer from(call.copied_bytes()), to(call.copied_bytes());
  const auto copy = [&] {
    std::memcpy(to.data.get(), from.data.get(), from.bytes);
    asm volatile("" ::: "memory");
  };
  const auto op = [&] { call.run(); };
  constexpr double kTurn = 2e5;  // nanoseconds: reading the clock takes a microsecond
  op(), copy();
  const int ops = 1 + static_cast<int>(kTurn / nanoseconds(2, op));
  const int copies = 1 + static_cast<int>(kTurn / nanoseconds(2, copy));
  for (int i = 0; i < rounds; ++i) {
    const double of_op = nanoseconds(ops, op);
    std::printf("%.1f %.1f\n", of_op, nanoseconds(copies, copy));
  }
}

bool is_decoder_op(const std::string& name) {
  for (const char* op : kDecoderOps) {
    if (name == op) return true;
  }
  return false;
}

Problem problem_of(char** words) {
  Problem problem{words[0], DType::kFloat32, std::atoll(words[2]), std::atoll(words[3])};
  bool known = is_decoder_op(problem.op);
  for (const char* op : kOps) known |= problem.op == op;
  if (!known) fail("there is no op " + problem.op);
  for (int dtype = 0; dtype < 3; ++dtype) {
    if (std::strcmp(words[1], kTypes[dtype]) == 0) {
      problem.dtype = static_cast<DType>(dtype);
      return problem;
    }
  }
  fail(std::string("there is no element type ") + words[1]);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  if (argc > 2) choose_isa(argv[2]);
  if (command == "isas" && argc == 2) {
    print_isas();
  } else if (command == "compiler" && argc == 2) {
    std::printf("%s\n", __VERSION__);
  } else if (command == "outputs" && argc == 3) {
    print_outputs();
  } else if (command == "count" && argc == 7) {
    const Problem problem = problem_of(argv + 3);
    is_decoder_op(problem.op) ? print_count<DecoderCall>(problem) : print_count<Call>(problem);
  } else if (command == "time" && argc == 8) {
    const Problem problem = problem_of(argv + 3);
    const int rounds = std::atoi(argv[7]);
    is_decoder_op(problem.op) ? print_times<DecoderCall>(problem, rounds)
                              : print_times<Call>(problem, rounds);
  } else {
    fail(
        "give a command: isas | compiler | outputs ISA | count ISA OP DTYPE ROWS DIM | "
        "time ISA OP DTYPE ROWS DIM ROUNDS");
  }
}
