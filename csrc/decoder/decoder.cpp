#include "decoder.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "../simd.hpp"

namespace llm {
namespace {

// Converts one vector of weights in memory to kVectors vectors of floats.
template <typename Weight, int Lanes>
struct Load;

template <int Lanes>
struct Load<float, Lanes> {
  static constexpr int kVectors = 1;
  LLM_INLINE static void at(const float* from, Floats<Lanes>* to) { load<Lanes>(from, *to); }
  LLM_INLINE static float one(float value) { return value; }
};

// A word holds two numbers; separated, they are the even and the odd ones. `x` is put into this order once, because
// reordering the weights would take longer than reading them.
template <int Lanes>
struct Load<Bf16, Lanes> {
  static constexpr int kVectors = 2;
  LLM_INLINE static void at(const Bf16* from, Floats<Lanes>* to) {
    const Words<Lanes> words = *reinterpret_cast<const typename Vectors<Lanes>::WordsInMemory*>(from);
    to[0] = reinterpret_cast<Floats<Lanes>>(words << 16);
    to[1] = reinterpret_cast<Floats<Lanes>>(words & 0xffff0000u);
  }
  LLM_INLINE static float one(Bf16 value) {
    const std::uint32_t word = static_cast<std::uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &word, sizeof result);
    return result;
  }
};

// Products of N rows of `w` with M rows of `x`, in `Unroll` sums each, so that additions do not wait for each other.
// The loops over the sums are unrolled, because a sum with an index known only at run time is kept in memory.
template <int Lanes, int N, int M, int Unroll, typename Weight>
LLM_INLINE void block(const Weight* w, std::int64_t columns, const float* x, std::int64_t x_stride, float* y,
                      std::int64_t y_stride) {
  using Loaded = Load<Weight, Lanes>;
  constexpr std::int64_t kStep = Loaded::kVectors * Lanes;
  Floats<Lanes> sums[N][M][Unroll] = {};
  const auto add = [&](std::int64_t c, int unroll) LLM_INLINE_LAMBDA {
    Floats<Lanes> weights[N][Loaded::kVectors];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) Loaded::at(w + n * columns + c, weights[n]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < Loaded::kVectors; ++v) {
        Floats<Lanes> values;
        load<Lanes>(x + m * x_stride + c + v * Lanes, values);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[n][m][unroll] += weights[n][v] * values;
      }
    }
  };
  std::int64_t c = 0;
  for (; c + Unroll * kStep <= columns; c += Unroll * kStep) {
#pragma GCC unroll 8
    for (int unroll = 0; unroll < Unroll; ++unroll) add(c + unroll * kStep, unroll);
  }
  for (; c + kStep <= columns; c += kStep) add(c, 0);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
      for (int unroll = 1; unroll < Unroll; ++unroll) sums[n][m][0] += sums[n][m][unroll];
      float total = sum<Lanes>(sums[n][m][0]);
      for (std::int64_t rest = c; rest < columns; ++rest) {
        total += Loaded::one(w[n * columns + rest]) * x[m * x_stride + rest];
      }
      y[m * y_stride + n] = total;
    }
  }
}

// For one row of x, the weights are read in memory order, which is fastest. For four rows, each loaded value is used
// several times, because arithmetic is the limit, and the next rows are prefetched. N: rows of w, as many as the
// registers have room for sums.
template <int Lanes, int N, typename Weight>
LLM_INLINE void multiply_rows(const Weight* w, std::int64_t rows, std::int64_t columns, const float* x,
                              std::int64_t x_stride, std::int64_t batch, float* y, std::int64_t y_stride) {
  for (std::int64_t r = 0; r < rows; r += N) {
    std::int64_t b = 0;
    if (r + N <= rows && batch >= 4) {
      const auto* next = reinterpret_cast<const char*>(w + std::min(r + N, rows) * columns);
      const auto* end = reinterpret_cast<const char*>(w + std::min(r + 2 * N, rows) * columns);
      for (; next < end; next += 64) __builtin_prefetch(next, 0, 2);
      for (; b + 4 <= batch; b += 4) {
        block<Lanes, N, 4, 1>(w + r * columns, columns, x + b * x_stride, x_stride, y + b * y_stride + r, y_stride);
      }
    }
    for (std::int64_t row = r; row < std::min(r + N, rows); ++row) {
      for (std::int64_t rest = b; rest < batch; ++rest) {
        block<Lanes, 1, 1, 8>(w + row * columns, columns, x + rest * x_stride, x_stride, y + rest * y_stride + row,
                              y_stride);
      }
    }
  }
}

// out[d] += sum_i weights[i] rows[i][d]
LLM_INLINE void add_rows(const float* weights, std::int64_t count, const float* rows, std::int64_t dims, float* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t d = 0; d < dims; ++d) out[d] += weights[i] * rows[i * dims + d];
  }
}

template <typename Weight>
using Multiply = void (*)(const Weight*, std::int64_t, std::int64_t, const float*, std::int64_t, std::int64_t, float*,
                          std::int64_t);

struct Kernels {
  int lanes;
  Multiply<float> multiply_fp32;
  Multiply<Bf16> multiply_bf16;
  void (*add)(const float*, std::int64_t, const float*, std::int64_t, float*);
};

// The same code for each instruction set; the best one of this machine runs. y [batch, rows] = x [batch, columns]
// times the transposed w [rows, columns].
#define LLM_VARIANT(name, target, lanes, n)                                                                   \
  struct name {                                                                                               \
    target static void multiply(const float* w, std::int64_t rows, std::int64_t columns, const float* x,      \
                                std::int64_t x_stride, std::int64_t batch, float* y, std::int64_t y_stride) { \
      multiply_rows<lanes, n>(w, rows, columns, x, x_stride, batch, y, y_stride);                             \
    }                                                                                                         \
    target static void multiply(const Bf16* w, std::int64_t rows, std::int64_t columns, const float* x,       \
                                std::int64_t x_stride, std::int64_t batch, float* y, std::int64_t y_stride) { \
      multiply_rows<lanes, n>(w, rows, columns, x, x_stride, batch, y, y_stride);                             \
    }                                                                                                         \
    target static void add(const float* weights, std::int64_t count, const float* rows, std::int64_t dims,    \
                           float* out) {                                                                      \
      add_rows(weights, count, rows, dims, out);                                                              \
    }                                                                                                         \
    static Kernels kernels() { return {lanes, multiply, multiply, add}; }                                     \
  }

LLM_VARIANT(Portable, , 4, 4);
LLM_VARIANT(Avx2, LLM_TARGET_AVX2, 8, 2);
LLM_VARIANT(Avx512, LLM_TARGET_AVX512, 16, 4);

const Kernels& kernels() {
  static const Kernels best = best_kernels<Portable, Avx2, Avx512>();
  return best;
}

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

void multiply(const float* w, std::int64_t rows, std::int64_t columns, const float* x, std::int64_t x_stride,
              std::int64_t batch, float* y, std::int64_t y_stride) {
  kernels().multiply_fp32(w, rows, columns, x, x_stride, batch, y, y_stride);
}

void multiply(const Bf16* w, std::int64_t rows, std::int64_t columns, const float* x, std::int64_t x_stride,
              std::int64_t batch, float* y, std::int64_t y_stride) {
  thread_local std::vector<float> ordered;
  const std::int64_t lanes = kernels().lanes;
  ordered.resize(size(batch * columns));
  for (std::int64_t b = 0; b < batch; ++b) {
    const float* from = x + b * x_stride;
    float* to = &ordered[size(b * columns)];
    std::int64_t c = 0;
    for (; c + 2 * lanes <= columns; c += 2 * lanes) {
      for (std::int64_t i = 0; i < lanes; ++i) {
        to[c + i] = from[c + 2 * i];
        to[c + lanes + i] = from[c + 2 * i + 1];
      }
    }
    std::copy(from + c, from + columns, to + c);
  }
  kernels().multiply_bf16(w, rows, columns, ordered.data(), columns, batch, y, y_stride);
}

void rms_norm(const float* x, const float* weight, std::int64_t width, float eps, float* y) {
  float squares;
  multiply(x, 1, width, x, width, 1, &squares, 1);
  const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
  for (std::int64_t i = 0; i < width; ++i) y[i] = x[i] * inverse * weight[i];
}

// Rotates the pairs (x[i], x[i + half]).
void rotate(float* x, const float* cos, const float* sin, std::int64_t half) {
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

float silu(float x) { return x / (1.0f + std::exp(-x)); }

}  // namespace

Team::Team(unsigned threads) {
  for (unsigned thread = 1; thread < threads; ++thread) workers_.emplace_back(&Team::serve, this, thread);
}

Team::~Team() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Team::run(void (*work)(void*, unsigned), void* argument) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    work_ = work;
    argument_ = argument;
    ++calls_;
  }
  wake_.notify_all();
  work(argument, 0);
  meet();  // after it, no thread reads the call's arguments
}

void Team::serve(unsigned thread) {
  for (std::uint64_t served = 0;; ++served) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || calls_ > served; });
      if (stop_) return;
    }
    work_(argument_, thread);
    meet();
  }
}

void Team::meet() {
  const unsigned meeting = meetings_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
    arrived_.store(0, std::memory_order_relaxed);
    meetings_.fetch_add(1, std::memory_order_release);
    return;
  }
  // Meetings are microseconds apart, so polling is cheaper than sleep. On busy cores this thread must yield to the one
  // that it waits for.
  for (int looks = 0; meetings_.load(std::memory_order_acquire) == meeting; ++looks) {
    if (looks > 2000) std::this_thread::yield();
  }
}

DecoderStep decoder_step(const std::string& op, const std::vector<DecoderWeight>& weights, const DecoderShape& s) {
  const std::int64_t vocabulary = s.vocab_size * s.d_model, inner = s.d_ff * s.d_model;
  const std::int64_t q = s.n_heads * s.head_dim * s.d_model, kv = s.n_kv_heads * s.head_dim * s.d_model;
  const std::int64_t qkv_bias = (s.n_heads + 2 * s.n_kv_heads) * s.head_dim;
  const std::map<std::string, std::pair<Op, std::vector<std::int64_t>>> known = {
      {"embedding", {Op::kEmbedding, {vocabulary}}},
      {"rms_norm", {Op::kRmsNorm, {s.d_model}}},
      {"attention", {Op::kAttention, {q + 2 * kv, q, s.head_dim, s.head_dim, qkv_bias, s.d_model}}},
      {"swiglu", {Op::kSwiglu, {2 * inner, inner}}},
      {"lm_head", {Op::kLmHead, {vocabulary}}},
  };
  const auto found = known.find(op);
  if (found == known.end()) throw std::invalid_argument("it has no op '" + op + "'");
  const auto& [kind, sizes] = found->second;
  DecoderStep step{kind, {}};
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const DecoderWeight weight = i < weights.size() ? weights[i] : DecoderWeight{nullptr, 0};
    const bool may_be_null = kind == Op::kAttention && i >= 2;
    if (weight.data == nullptr ? !may_be_null : weight.size < sizes[i]) {
      throw std::invalid_argument("its '" + op + "' reads larger weights");
    }
    step.weights[i] = weight.data;
  }
  return step;
}

Decoder::Decoder(const DecoderShape& shape, std::vector<DecoderStep> steps, const DecoderCache& cache, unsigned threads)
    : shape_(shape),
      steps_(std::move(steps)),
      cache_(cache),
      team_(threads),
      stream_(size(shape.batch * shape.d_model)),
      qkv_(size(shape.batch * (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim)),
      attended_(size(shape.batch * shape.n_heads * shape.head_dim)),
      inner_(size(shape.batch * 2 * shape.d_ff)),
      normed_(team_.size(), std::vector<float>(size(shape.batch * shape.d_model))),
      scores_(team_.size(), std::vector<float>(size(shape.n_heads / shape.n_kv_heads * shape.max_len))) {}

void Decoder::step(const std::int64_t* tokens, std::int64_t position, float* logits) {
  tokens_ = tokens;
  position_ = position;
  logits_ = logits;
  team_.run(
      [](void* self, unsigned thread) {
        auto* decoder = static_cast<Decoder*>(self);
        decoder->shape_.bf16 ? decoder->work<Bf16>(thread) : decoder->work<float>(thread);
      },
      this);
}

template <typename Weight>
void Decoder::work(unsigned thread) {
  const DecoderShape& s = shape_;
  const std::int64_t threads = team_.size();
  std::vector<float>& normed = normed_[thread];
  // Returns this thread's share of n rows, in whole blocks of four.
  const auto share = [&](std::int64_t n) {
    const auto begin = [&](std::int64_t t) { return std::min(n, (n + 3) / 4 * t / threads * 4); };
    return std::pair(begin(thread), begin(thread + 1));
  };
  // y [batch, n] (+)= x [batch, columns] times the transposed matrix [n, columns], in this thread's rows of it.
  const auto multiply_share = [&](const void* matrix, std::int64_t n, std::int64_t columns, const float* x, float* y) {
    const auto [begin, end] = share(n);
    multiply(static_cast<const Weight*>(matrix) + begin * columns, end - begin, columns, x, columns, s.batch, y + begin,
             n);
  };
  // Every thread normalises every row, which is faster than waiting for another thread.
  const auto norm = [&](const void* weight) {
    for (std::int64_t b = 0; b < s.batch; ++b) {
      rms_norm(&stream_[size(b * s.d_model)], static_cast<const float*>(weight), s.d_model, s.norm_eps,
               &normed[size(b * s.d_model)]);
    }
  };
  // y [batch, n] += a bias [n], in this thread's columns; null: no bias.
  const auto add_bias_share = [&](const void* bias, std::int64_t n, float* y) {
    if (bias == nullptr) return;
    const auto [begin, end] = share(n);
    for (std::int64_t b = 0; b < s.batch; ++b) {
      for (std::int64_t i = begin; i < end; ++i) y[b * n + i] += static_cast<const float*>(bias)[i];
    }
  };
  // stream += x times the transposed matrix, and a bias, in this thread's columns of the stream.
  const auto add_to_stream = [&](const void* matrix, const void* bias, std::int64_t columns, const float* x) {
    multiply_share(matrix, s.d_model, columns, x, normed.data());
    add_bias_share(bias, s.d_model, normed.data());
    const auto [begin, end] = share(s.d_model);
    for (std::int64_t b = 0; b < s.batch; ++b) {
      for (std::int64_t i = b * s.d_model + begin; i < b * s.d_model + end; ++i) stream_[size(i)] += normed[size(i)];
    }
  };

  std::int64_t layer = 0;  // of the cache
  for (const DecoderStep& step : steps_) {
    const auto& weights = step.weights;
    switch (step.op) {
      case Op::kEmbedding:
        for (std::int64_t b = 0; thread == 0 && b < s.batch; ++b) {
          const Weight* row = static_cast<const Weight*>(weights[0]) + tokens_[b] * s.d_model;
          for (std::int64_t i = 0; i < s.d_model; ++i) stream_[size(b * s.d_model + i)] = Load<Weight, 4>::one(row[i]);
        }
        team_.meet();
        break;
      case Op::kRmsNorm:
        norm(weights[0]);
        break;
      case Op::kAttention:
        multiply_share(weights[0], (s.n_heads + 2 * s.n_kv_heads) * s.head_dim, s.d_model, normed.data(), qkv_.data());
        add_bias_share(weights[4], (s.n_heads + 2 * s.n_kv_heads) * s.head_dim, qkv_.data());
        team_.meet();
        for (std::int64_t unit = thread; unit < s.batch * s.n_kv_heads; unit += threads) {
          attend<Weight>(step, layer, unit, scores_[thread]);
        }
        ++layer;
        team_.meet();
        add_to_stream(weights[1], weights[5], s.n_heads * s.head_dim, attended_.data());
        team_.meet();
        break;
      case Op::kSwiglu: {
        const auto [begin, end] = share(s.d_ff);
        for (const std::int64_t half : {std::int64_t{0}, s.d_ff}) {  // gate, then up
          multiply(static_cast<const Weight*>(weights[0]) + (half + begin) * s.d_model, end - begin, s.d_model,
                   normed.data(), s.d_model, s.batch, &inner_[size(half * s.batch + begin)], s.d_ff);
        }
        for (std::int64_t b = 0; b < s.batch; ++b) {
          for (std::int64_t i = b * s.d_ff + begin; i < b * s.d_ff + end; ++i) {
            inner_[size(i)] = silu(inner_[size(i)]) * inner_[size(s.batch * s.d_ff + i)];
          }
        }
        team_.meet();
        add_to_stream(weights[1], nullptr, s.d_ff, inner_.data());
        team_.meet();
        break;
      }
      case Op::kLmHead:
        multiply_share(weights[0], s.vocab_size, s.d_model, normed.data(), logits_);
        break;
    }
  }
}

// One KV head of one sequence: its new key and value, and the query heads that read it.
template <typename Weight>
void Decoder::attend(const DecoderStep& step, std::int64_t layer, std::int64_t unit, std::vector<float>& scores) {
  const DecoderShape& s = shape_;
  const std::int64_t sequence = unit / s.n_kv_heads, head = unit % s.n_kv_heads, group = s.n_heads / s.n_kv_heads;
  float* heads = &qkv_[size(sequence * (s.n_heads + 2 * s.n_kv_heads) * s.head_dim)];
  float* q = heads + head * group * s.head_dim;
  float* k = heads + (s.n_heads + head) * s.head_dim;
  const float* v = k + s.n_kv_heads * s.head_dim;
  const auto place = [&](float* x, const void* norm) {
    if (norm != nullptr) rms_norm(x, static_cast<const float*>(norm), s.head_dim, s.norm_eps, x);
    rotate(x, cache_.cos + position_ * s.head_dim / 2, cache_.sin + position_ * s.head_dim / 2, s.head_dim / 2);
  };
  for (std::int64_t g = 0; g < group; ++g) place(q + g * s.head_dim, step.weights[2]);
  place(k, step.weights[3]);
  const std::int64_t slots = ((layer * s.batch + sequence) * s.n_kv_heads + head) * s.max_len * s.head_dim;
  std::copy_n(k, s.head_dim, cache_.k + slots + position_ * s.head_dim);
  std::copy_n(v, s.head_dim, cache_.v + slots + position_ * s.head_dim);

  const std::int64_t first = cache_.first[sequence], count = position_ + 1 - first;
  if (count < 1) {  // padding, which no token sees
    std::fill_n(&attended_[size((sequence * s.n_heads + head * group) * s.head_dim)], group * s.head_dim, 0.0f);
    return;
  }
  multiply(cache_.k + slots + first * s.head_dim, count, s.head_dim, q, s.head_dim, group, scores.data(), s.max_len);
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  for (std::int64_t g = 0; g < group; ++g) {
    float* p = &scores[size(g * s.max_len)];
    const float largest = *std::max_element(p, p + count);
    float total = 0;
    for (std::int64_t i = 0; i < count; ++i) total += p[i] = std::exp(scale * (p[i] - largest));
    for (std::int64_t i = 0; i < count; ++i) p[i] /= total;
    float* out = &attended_[size((sequence * s.n_heads + head * group + g) * s.head_dim)];
    std::fill_n(out, s.head_dim, 0.0f);
    kernels().add(p, count, cache_.v + slots + first * s.head_dim, s.head_dim, out);
  }
}

}  // namespace llm
