// Attention under a mask, and its gradients: a block of queries at a time, against the keys that
// one of them sees. Scores of a block fit the second-level cache, so they are whole rows: no
// rescaling.
#include "decoder_kernels.h"
#include "exponential.h"
#include "small_product.h"

namespace grains::cpu::GRAINS_ISA {
namespace {

constexpr std::int64_t kBlock = 5 * kTileRows;
constexpr std::int64_t kRowsAhead = 12, kLine = 64;
constexpr float kInfinity = __builtin_inff();

// Rows of float32 in scratch memory, padded with zeros in both directions so that whole tiles can
// be read and written.
struct Matrix {
  float* data = nullptr;
  std::int64_t row = 0, rows = 0;
  float* at(std::int64_t i) const { return data + i * row; }
};

// One allocation, cut up.
class Scratch {
 public:
  ~Scratch() { __builtin_free(memory_); }
  Matrix matrix(std::int64_t rows, std::int64_t columns) {
    // An expanded tensor may have more rows than memory has bytes.
    fits_ = fits_ && columns < kMost && rows < kMost / (columns + kLanes);
    if (!fits_) return {};
    Matrix made;
    made.rows = round_up(round_up(rows, kTileRows), kLanes);
    made.row = round_up(columns, kLanes);
    made.data = reinterpret_cast<float*>(size_);
    size_ += static_cast<std::size_t>(made.rows * made.row + kLanes) * sizeof(float);
    return made;
  }
  // Once all are asked for: zeros everywhere. False without memory.
  template <class... Matrices>
  bool allocate(Matrices&... matrices) {
    if (fits_) memory_ = static_cast<char*>(__builtin_calloc(size_ + sizeof(Register), 1));
    if (memory_ == nullptr) return false;
    const std::size_t past = reinterpret_cast<std::size_t>(memory_) % sizeof(Register);
    char* aligned = memory_ + (sizeof(Register) - past);
    ((matrices.data =
          reinterpret_cast<float*>(aligned + reinterpret_cast<std::size_t>(matrices.data))),
     ...);
    return true;
  }

 private:
  // Elements; a dozen such matrices are still fewer bytes than 64 bits count.
  static constexpr std::int64_t kMost = std::int64_t{1} << 56;

  char* memory_ = nullptr;
  std::size_t size_ = 0;
  bool fits_ = true;
};

template <class T>
const T* rows_of(const void* data, const HeadStrides& strides, std::int64_t batch,
                 std::int64_t head) {
  return static_cast<const T*>(data) + batch * strides.batch + head * strides.head;
}

template <class T>
void read_rows(const Matrix& to, const T* from, std::int64_t stride, std::int64_t count,
               std::int64_t width, float scale = 1.0f) {
  for (std::int64_t i = 0; i < count; ++i) {
    // Rows of one head lie far apart: the processor does not see them coming.
    const T* ahead = from + (i + kRowsAhead < count ? i + kRowsAhead : i) * stride;
    for (std::int64_t j = 0; j < width; j += kLine / static_cast<std::int64_t>(sizeof(T))) {
      __builtin_prefetch(ahead + j);
    }
    to_floats(to.at(i), from + i * stride, width);
    if (scale == 1.0f) continue;
    for (std::int64_t j = 0; j < to.row; j += kLanes) {
      const Register scaled = read_as<Register>(to.at(i) + j) * scale;
      __builtin_memcpy(to.at(i) + j, &scaled, sizeof(scaled));
    }
  }
}

// Elements of a and b in turn, from the first halves (kHalf = 0) or the second ones.
template <int kHalf>
Register interleave(Register a, Register b) {
  if constexpr (kLanes == 16) {
    constexpr int i = 8 * kHalf;
    return __builtin_shufflevector(a, b, i, i + 16, i + 1, i + 17, i + 2, i + 18, i + 3, i + 19,
                                   i + 4, i + 20, i + 5, i + 21, i + 6, i + 22, i + 7, i + 23);
  } else if constexpr (kLanes == 8) {
    constexpr int i = 4 * kHalf;
    return __builtin_shufflevector(a, b, i, i + 8, i + 1, i + 9, i + 2, i + 10, i + 3, i + 11);
  } else {
    constexpr int i = 2 * kHalf;
    return __builtin_shufflevector(a, b, i, i + 4, i + 1, i + 5);
  }
}

// Squares of registers: interleaving each row of the upper half with its counterpart in the lower
// half, as often as the lanes have bits, exchanges rows and columns.
void transpose(const Matrix& to, const Matrix& from, std::int64_t count, std::int64_t width) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    for (std::int64_t j = 0; j < width; j += kLanes) {
      Register square[kLanes], next[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) square[r] = read_as<Register>(from.at(i + r) + j);
#pragma GCC unroll 4
      for (int bit = 1; bit < kLanes; bit *= 2) {
#pragma GCC unroll 8
        for (int r = 0; r < kLanes / 2; ++r) {
          next[2 * r] = interleave<0>(square[r], square[r + kLanes / 2]);
          next[2 * r + 1] = interleave<1>(square[r], square[r + kLanes / 2]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) square[r] = next[r];
      }
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        __builtin_memcpy(to.at(j + r) + i, &square[r], sizeof(Register));
      }
    }
  }
}

// The keys [first, end) that some query of each block sees, for one batch row at a time.
template <class T>
class Seen {
 public:
  explicit Seen(const AttentionArgs& args) : args_(args) {
    const std::int64_t blocks = (args.q_tokens + kBlock - 1) / kBlock;
    ends_ = static_cast<std::int64_t*>(
        __builtin_malloc(static_cast<std::size_t>(2 * blocks) * sizeof(std::int64_t)));
  }
  ~Seen() { __builtin_free(ends_); }
  bool allocated() const { return ends_ != nullptr; }

  void look_at(std::int64_t batch) {
    if (batch == batch_) return;
    batch_ = batch;
    for (std::int64_t q = 0; q < args_.q_tokens; q += kBlock) {
      std::int64_t first = args_.k_tokens, end = 0;
      const std::int64_t last = q + kBlock < args_.q_tokens ? q + kBlock : args_.q_tokens;
      for (std::int64_t i = q; i < last; ++i) {
        std::int64_t left = 0, right = args_.k_tokens;
        if (const T* mask = mask_row(i)) {
          while (right > 0 && hidden(mask[right - 1])) --right;
          while (left < right && hidden(mask[left])) ++left;
          // Softmax of a row that hides everything is that of its scores.
          if (right == 0) left = 0, right = args_.k_tokens;
        }
        first = left < first ? left : first;
        end = right > end ? right : end;
      }
      ends_[2 * (q / kBlock)] = first / kLanes * kLanes;
      ends_[2 * (q / kBlock) + 1] = end;
    }
  }
  std::int64_t first(std::int64_t q) const { return ends_[2 * (q / kBlock)]; }
  std::int64_t end(std::int64_t q) const { return ends_[2 * (q / kBlock) + 1]; }
  const T* mask_row(std::int64_t q) const {
    if (args_.mask == nullptr) return nullptr;
    return static_cast<const T*>(args_.mask) + batch_ * args_.mask_batch_stride +
           q * args_.mask_token_stride;
  }

 private:
  // The least finite value, or less.
  static bool hidden(float value) { return value <= -3.4028234663852886e38f; }
  static bool hidden(Half value) { return value.bits == 0xfbff || value.bits == 0xfc00; }
  static bool hidden(BFloat16 value) { return value.bits == 0xff7f || value.bits == 0xff80; }

  const AttentionArgs& args_;
  std::int64_t* ends_ = nullptr;
  std::int64_t batch_ = -1;
};

// values[0, count) += mask[0, count)
template <class T>
void add_mask(float* values, const T* mask, float* buffer, std::int64_t count) {
  if (mask == nullptr) return;
  to_floats(buffer, mask, count);
  for (std::int64_t j = 0; j < count; j += kLanes) {
    const Register sum = read_as<Register>(values + j) + read_as<Register>(buffer + j);
    __builtin_memcpy(values + j, &sum, sizeof(sum));
  }
}
inline void add_mask(float* values, const float* mask, float*, std::int64_t count) {
  if (mask == nullptr) return;
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Register sum = read_as<Register>(values + j) + read_as<Register>(mask + j);
    __builtin_memcpy(values + j, &sum, sizeof(sum));
  }
  for (; j < count; ++j) values[j] += mask[j];
}

// values = e^(values - shift) in [0, count), 0 up to `padded`; their sum.
float exponentials(float* values, float shift, std::int64_t count, std::int64_t padded) {
  for (std::int64_t j = count; j < padded; ++j) values[j] = -kInfinity;
  Register total{};
  for (std::int64_t j = 0; j < padded; j += kLanes) {
    const Register value = exponential(read_as<Register>(values + j) - shift);
    __builtin_memcpy(values + j, &value, sizeof(value));
    total += value;
  }
  return sum(total);
}

float largest(const float* values, std::int64_t count) {
  Register most = fill(-kInfinity);
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Register value = read_as<Register>(values + j);
    most = value > most ? value : most;
  }
  float result = -kInfinity;
  for (int lane = 0; lane < kLanes; ++lane) result = most[lane] > result ? most[lane] : result;
  for (; j < count; ++j) result = values[j] > result ? values[j] : result;
  return result;
}

std::int64_t at_most(std::int64_t value, std::int64_t limit) {
  return value < limit ? value : limit;
}

void zero(const Matrix& matrix, std::int64_t first, std::int64_t end) {
  if (end <= first) return;
  __builtin_memset(matrix.at(first), 0,
                   static_cast<std::size_t>((end - first) * matrix.row) * sizeof(float));
}

// False, with nothing written: no memory.
template <class T>
bool forward(const AttentionArgs& args, std::int64_t begin, std::int64_t end) {
  Scratch scratch;
  Matrix q = scratch.matrix(kBlock, args.width), k = scratch.matrix(args.k_tokens, args.width);
  Matrix k_columns = scratch.matrix(args.width, args.k_tokens);
  Matrix v = scratch.matrix(args.k_tokens, args.v_width);
  Matrix scores = scratch.matrix(kBlock, args.k_tokens + kTileRows);
  Matrix out = scratch.matrix(kBlock, args.v_width);
  Matrix buffer = scratch.matrix(1, args.k_tokens);
  Seen<T> seen(args);
  if (!seen.allocated() || !scratch.allocate(q, k, k_columns, v, scores, out, buffer)) {
    return false;
  }
  const std::int64_t group = args.heads / args.kv_heads;
  for (std::int64_t task = begin; task < end; ++task) {
    const std::int64_t batch = task / args.kv_heads, kv_head = task % args.kv_heads;
    seen.look_at(batch);
    read_rows(k, rows_of<T>(args.k, args.k_strides, batch, kv_head), args.k_strides.token,
              args.k_tokens, args.width);
    read_rows(v, rows_of<T>(args.v, args.v_strides, batch, kv_head), args.v_strides.token,
              args.k_tokens, args.v_width);
    transpose(k_columns, k, args.k_tokens, args.width);
    for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const T* q_rows = rows_of<T>(args.q, args.q_strides, batch, head);
      for (std::int64_t start = 0; start < args.q_tokens; start += kBlock) {
        const std::int64_t count = at_most(kBlock, args.q_tokens - start);
        const std::int64_t first = seen.first(start), width = seen.end(start) - first;
        const std::int64_t padded = round_up(width, kLanes), rows = round_up(count, kTileRows);
        read_rows(q, q_rows + start * args.q_strides.token, args.q_strides.token, count, args.width,
                  args.scale);
        zero(q, count, rows);
        product<false>({q.data, q.row, 1}, k_columns.data + first, k_columns.row, scores.data,
                       scores.row, rows, padded, args.width);
        float sums[kBlock];
        for (std::int64_t i = 0; i < count; ++i) {
          const T* mask = seen.mask_row(start + i);
          add_mask(scores.at(i), mask == nullptr ? mask : mask + first, buffer.data, width);
          const float most = largest(scores.at(i), width);
          sums[i] = exponentials(scores.at(i), most, width, padded);
          args.lse[(batch * args.heads + head) * args.q_tokens + start + i] =
              most + __builtin_logf(sums[i]);
        }
        product<false>({scores.data, scores.row, 1}, v.at(first), v.row, out.data, out.row, rows,
                       v.row, width);
        for (std::int64_t i = 0; i < count; ++i) {
          const Register scale = fill(1.0f / sums[i]);
          for (std::int64_t j = 0; j < out.row; j += kLanes) {
            const Register value = read_as<Register>(out.at(i) + j) * scale;
            __builtin_memcpy(out.at(i) + j, &value, sizeof(value));
          }
          T* to = static_cast<T*>(args.out) +
                  ((batch * args.q_tokens + start + i) * args.heads + head) * args.v_width;
          from_floats(to, out.at(i), args.v_width);
        }
      }
    }
  }
  return true;
}

template <class T>
void write_rows(void* to, const Matrix& from, std::int64_t batch, std::int64_t tokens,
                std::int64_t start, std::int64_t count, std::int64_t heads, std::int64_t head,
                std::int64_t width) {
  T* rows = static_cast<T*>(to) + ((batch * tokens + start) * heads + head) * width;
  for (std::int64_t i = 0; i < count; ++i) {
    from_floats(rows + i * heads * width, from.at(i), width);
  }
}

// With P = softmax(S), dP = dO V^T and delta = rowsum(dO O): dS = P (dP - delta), dQ = scale dS K,
// dK = scale dS^T Q, dV = P^T dO.
// False, with nothing written: no memory.
template <class T>
bool backward(const AttentionBackwardArgs& all, std::int64_t begin, std::int64_t end) {
  const AttentionArgs& args = all.forward;
  Scratch scratch;
  Matrix q = scratch.matrix(kBlock, args.width), k = scratch.matrix(args.k_tokens, args.width);
  Matrix k_columns = scratch.matrix(args.width, args.k_tokens);
  Matrix v = scratch.matrix(args.k_tokens, args.v_width);
  Matrix v_columns = scratch.matrix(args.v_width, args.k_tokens);
  Matrix p = scratch.matrix(kBlock, args.k_tokens + kTileRows);
  Matrix ds = scratch.matrix(kBlock, args.k_tokens + kTileRows);
  Matrix grad = scratch.matrix(kBlock, args.v_width), out = scratch.matrix(1, args.v_width);
  Matrix grad_q = scratch.matrix(kBlock, args.width);
  Matrix grad_k = scratch.matrix(args.k_tokens + kTileRows, args.width);
  Matrix grad_v = scratch.matrix(args.k_tokens + kTileRows, args.v_width);
  Matrix buffer = scratch.matrix(1, args.k_tokens);
  Seen<T> seen(args);
  if (!seen.allocated() || !scratch.allocate(q, k, k_columns, v, v_columns, p, ds, grad, out,
                                             grad_q, grad_k, grad_v, buffer)) {
    return false;
  }
  const std::int64_t group = args.heads / args.kv_heads;
  for (std::int64_t task = begin; task < end; ++task) {
    const std::int64_t batch = task / args.kv_heads, kv_head = task % args.kv_heads;
    seen.look_at(batch);
    read_rows(k, rows_of<T>(args.k, args.k_strides, batch, kv_head), args.k_strides.token,
              args.k_tokens, args.width);
    read_rows(v, rows_of<T>(args.v, args.v_strides, batch, kv_head), args.v_strides.token,
              args.k_tokens, args.v_width);
    transpose(k_columns, k, args.k_tokens, args.width);
    transpose(v_columns, v, args.k_tokens, args.v_width);
    zero(grad_k, 0, grad_k.rows);
    zero(grad_v, 0, grad_v.rows);
    for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const T* q_rows = rows_of<T>(args.q, args.q_strides, batch, head);
      const T* grad_rows = rows_of<T>(all.grad, all.grad_strides, batch, head);
      const T* out_rows = static_cast<const T*>(args.out) +
                          (batch * args.q_tokens * args.heads + head) * args.v_width;
      for (std::int64_t start = 0; start < args.q_tokens; start += kBlock) {
        const std::int64_t count = at_most(kBlock, args.q_tokens - start);
        const std::int64_t first = seen.first(start), width = seen.end(start) - first;
        const std::int64_t padded = round_up(width, kLanes), rows = round_up(count, kTileRows);
        read_rows(q, q_rows + start * args.q_strides.token, args.q_strides.token, count, args.width,
                  args.scale);
        read_rows(grad, grad_rows + start * all.grad_strides.token, all.grad_strides.token, count,
                  args.v_width);
        zero(q, count, rows);
        zero(grad, count, rows);
        product<false>({q.data, q.row, 1}, k_columns.data + first, k_columns.row, p.data, p.row,
                       rows, padded, args.width);
        product<false>({grad.data, grad.row, 1}, v_columns.data + first, v_columns.row, ds.data,
                       ds.row, rows, padded, args.v_width);
        for (std::int64_t i = 0; i < count; ++i) {
          const T* mask = seen.mask_row(start + i);
          add_mask(p.at(i), mask == nullptr ? mask : mask + first, buffer.data, width);
          const std::int64_t row = start + i;
          exponentials(p.at(i), args.lse[(batch * args.heads + head) * args.q_tokens + row], width,
                       padded);
          to_floats(out.data, out_rows + row * args.heads * args.v_width, args.v_width);
          Register products{};
          for (std::int64_t j = 0; j < out.row; j += kLanes) {
            products += read_as<Register>(out.data + j) * read_as<Register>(grad.at(i) + j);
          }
          const Register delta = fill(sum(products));
          for (std::int64_t j = 0; j < padded; j += kLanes) {
            const Register value =
                read_as<Register>(p.at(i) + j) * (read_as<Register>(ds.at(i) + j) - delta);
            __builtin_memcpy(ds.at(i) + j, &value, sizeof(value));
          }
        }
        product<false>({ds.data, ds.row, 1}, k.at(first), k.row, grad_q.data, grad_q.row, rows,
                       k.row, width);
        for (std::int64_t i = 0; i < count; ++i) {
          for (std::int64_t j = 0; j < grad_q.row; j += kLanes) {
            const Register value = read_as<Register>(grad_q.at(i) + j) * args.scale;
            __builtin_memcpy(grad_q.at(i) + j, &value, sizeof(value));
          }
        }
        write_rows<T>(all.grad_q, grad_q, batch, args.q_tokens, start, count, args.heads, head,
                      args.width);
        // Rows of these are columns of p and ds, and the queries are what is summed over.
        const std::int64_t keys = round_up(width, kTileRows);
        for (std::int64_t i = 0; i < count; ++i) {
          for (std::int64_t j = padded; j < keys; ++j) p.at(i)[j] = ds.at(i)[j] = 0.0f;
        }
        product<true>({p.data, 1, p.row}, grad.data, grad.row, grad_v.at(first), grad_v.row, keys,
                      grad_v.row, count);
        product<true>({ds.data, 1, ds.row}, q.data, q.row, grad_k.at(first), grad_k.row, keys,
                      grad_k.row, count);
      }
    }
    write_rows<T>(all.grad_k, grad_k, batch, args.k_tokens, 0, args.k_tokens, args.kv_heads,
                  kv_head, args.width);
    write_rows<T>(all.grad_v, grad_v, batch, args.k_tokens, 0, args.k_tokens, args.kv_heads,
                  kv_head, args.v_width);
  }
  return true;
}

}  // namespace

bool attention(const AttentionArgs& args, std::int64_t begin, std::int64_t end) {
  bool done = false;
  with_element_type(args.dtype,
                    [&](auto element) { done = forward<decltype(element)>(args, begin, end); });
  return done;
}

bool attention_backward(const AttentionBackwardArgs& args, std::int64_t begin, std::int64_t end) {
  bool done = false;
  with_element_type(args.forward.dtype,
                    [&](auto element) { done = backward<decltype(element)>(args, begin, end); });
  return done;
}

}  // namespace grains::cpu::GRAINS_ISA
