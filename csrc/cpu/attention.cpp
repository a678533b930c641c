#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../simd.hpp"
#include "parallel.hpp"

namespace llm::cpu {
namespace {

constexpr std::int64_t kPanel = 64;  // columns of a product at once; 64 rows of them are 16 KiB, half of an L1 cache

// c [M, N * Lanes] += a b over `steps`: a's number (m, k) stands at a[m * a_row + k * a_step].
template <int Lanes, int M, int N>
LLM_INLINE void product(const float* a, std::int64_t a_row, std::int64_t a_step, const float* b, std::int64_t b_step,
                        float* c, std::int64_t c_row, std::int64_t steps) {
  Floats<Lanes> sums[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) load<Lanes>(c + m * c_row + n * Lanes, sums[m][n]);
  }
  for (std::int64_t k = 0; k < steps; ++k) {
    Floats<Lanes> values[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) load<Lanes>(b + k * b_step + n * Lanes, values[n]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float factor = a[m * a_row + k * a_step];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] += factor * values[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store<Lanes>(c + m * c_row + n * Lanes, sums[m][n]);
  }
}

template <int Lanes, int N>
LLM_INLINE void panel(const float* a, std::int64_t a_row, std::int64_t a_step, const float* b, std::int64_t b_step,
                      float* c, std::int64_t c_row, std::int64_t rows, std::int64_t steps) {
  constexpr int kRows = 4;
  std::int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) {
    product<Lanes, kRows, N>(a + m * a_row, a_row, a_step, b, b_step, c + m * c_row, c_row, steps);
  }
  for (; m < rows; ++m) product<Lanes, 1, N>(a + m * a_row, a_row, a_step, b, b_step, c + m * c_row, c_row, steps);
}

// c [rows, columns] += a b, columns a multiple of 16; a's number (m, k) stands at a[m * a_row + k * a_step]. By panels,
// so that what is read again and again stays in the nearest cache.
template <int Lanes>
LLM_INLINE void multiply_add(const float* a, std::int64_t a_row, std::int64_t a_step, const float* b,
                             std::int64_t b_step, float* c, std::int64_t c_row, std::int64_t rows, std::int64_t columns,
                             std::int64_t steps) {
  constexpr int kVectors = Lanes == 16 ? 4 : 2;  // with 4 rows, as many sums as fit into the registers
  for (std::int64_t k = 0; k < steps; k += kPanel) {
    const std::int64_t count = std::min(kPanel, steps - k);
    std::int64_t n = 0;
    for (; n + kVectors * Lanes <= columns; n += kVectors * Lanes) {
      panel<Lanes, kVectors>(a + k * a_step, a_row, a_step, b + k * b_step + n, b_step, c + n, c_row, rows, count);
    }
    for (; n < columns; n += Lanes) {
      panel<Lanes, 1>(a + k * a_step, a_row, a_step, b + k * b_step + n, b_step, c + n, c_row, rows, count);
    }
  }
}

// Rows side by side, in fp32: [kTile, d], those from `rows` on zero.
template <int Lanes, typename T>
LLM_INLINE void gather(const T* from, std::int64_t row_stride, std::int64_t rows, std::int64_t d, float* to) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < d; c += Lanes) {
      Floats<Lanes> x;
      load<Lanes>(from + r * row_stride + c, x);
      store<Lanes>(to + r * d + c, x);
    }
  }
  std::fill(to + rows * d, to + kTile * d, 0.0f);
}

// Of a square of numbers, a vector a row: as many perfect shuffles of its rows as turn rows into columns.
template <int Lanes>
LLM_INLINE void transpose_square(Floats<Lanes>* x) {
  Ints<Lanes> low, high;
#pragma GCC unroll 16
  for (int i = 0; i < Lanes; ++i) {
    low[i] = i / 2 + i % 2 * Lanes;
    high[i] = low[i] + Lanes / 2;
  }
#pragma GCC unroll 4
  for (int width = 1; width < Lanes; width *= 2) {
    Floats<Lanes> shuffled[Lanes];
#pragma GCC unroll 16
    for (int i = 0; i < Lanes / 2; ++i) {
      shuffled[2 * i] = __builtin_shuffle(x[i], x[i + Lanes / 2], low);
      shuffled[2 * i + 1] = __builtin_shuffle(x[i], x[i + Lanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Lanes; ++i) x[i] = shuffled[i];
  }
}

// to [d, kTile] = factor * the transpose of from [kTile, d].
template <int Lanes>
LLM_INLINE void transpose(const float* from, std::int64_t d, float factor, float* to) {
  for (std::int64_t r = 0; r < kTile; r += Lanes) {
    for (std::int64_t c = 0; c < d; c += Lanes) {
      Floats<Lanes> x[Lanes];
#pragma GCC unroll 16
      for (int i = 0; i < Lanes; ++i) load<Lanes>(from + (r + i) * d + c, x[i]);
      transpose_square<Lanes>(x);
#pragma GCC unroll 16
      for (int i = 0; i < Lanes; ++i) {
        x[i] *= factor;
        store<Lanes>(to + (c + i) * kTile + r, x[i]);
      }
    }
  }
}

// A tile of queries: which keys its queries see, and in which order blocks of them come.
struct Tile {
  std::int64_t batch, head, first, rows;  // queries first .. first + rows - 1
  std::int64_t begin, end;                // the keys that some query sees
  std::int64_t full, rest;                // those in full .. rest - 1 every query sees
  std::int32_t oldest[kTile], newest[kTile];

  LLM_INLINE Tile(const AttentionShape& s, std::int64_t batch, std::int64_t head, std::int64_t first)
      : batch(batch), head(head), first(first), rows(std::min(kTile, s.sq - first)) {
    const std::int64_t ahead = s.sk - s.sq;
    const std::int32_t* starts = s.doc_start == nullptr ? nullptr : s.doc_start + batch * s.sq + first;
    for (std::int64_t i = 0; i < kTile; ++i) {
      oldest[i] = starts == nullptr || i >= rows ? 0 : starts[i];
      newest[i] = static_cast<std::int32_t>(i >= rows ? -1 : s.causal ? ahead + first + i : s.sk - 1);
    }
    begin = std::max<std::int64_t>(oldest[0], 0);
    full = std::max<std::int64_t>(oldest[rows - 1], 0);
    rest = rows < kTile ? 0 : newest[0] + std::int64_t{1};  // queries that only fill the tile see nothing
    end = newest[rows - 1] + std::int64_t{1};
  }

  bool sees_all(std::int64_t key, std::int64_t keys) const { return key >= full && key + keys <= rest; }

  // Scores of a key that a query does not see become -inf.
  template <int Lanes>
  LLM_INLINE void mask(std::int64_t key, std::int64_t query, Floats<Lanes>& scores) const {
    Ints<Lanes> first_seen, last_seen;
    load<Lanes>(oldest + query, first_seen);
    load<Lanes>(newest + query, last_seen);
    const Ints<Lanes> at = Ints<Lanes>{} + static_cast<std::int32_t>(key);
    const Floats<Lanes> hidden = Floats<Lanes>{} - __builtin_inff();
    scores = ((at >= first_seen) & (at <= last_seen)) ? scores : hidden;
  }
};

// Memory of a thread, kept between calls.
LLM_INLINE float* scratch(std::int64_t floats) {
  thread_local std::vector<float> memory;
  if (memory.size() < static_cast<std::size_t>(floats) + 16) memory.resize(static_cast<std::size_t>(floats) + 16);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + (64 - address % 64) % 64 / 4;
}

template <int Lanes, typename T>
LLM_INLINE void forward_tile(const AttentionForward& a, std::int64_t unit) {
  const AttentionShape& s = a.shape;
  const std::int64_t tiles = (s.sq + kTile - 1) / kTile, d = s.d;
  const std::int64_t heads = unit % (s.b * s.hq);
  const Tile tile(s, heads / s.hq, heads % s.hq, (tiles - 1 - unit / (s.b * s.hq)) * kTile);  // the longest first
  float* q_t = scratch(4 * kTile * d + kTile * kTile);
  float *k = q_t + kTile * d, *v = k + kTile * d, *out = v + kTile * d, *p = out + kTile * d;
  const std::int64_t kv_head = tile.head / (s.hq / s.hkv);
  const T* k_rows = a.k.at<T>(tile.batch, 0, kv_head);
  const T* v_rows = a.v.at<T>(tile.batch, 0, kv_head);
  gather<Lanes>(a.q.at<T>(tile.batch, tile.first, tile.head), a.q.token, tile.rows, d, k);
  transpose<Lanes>(k, d, s.scale * kLog2E, q_t);
  std::fill_n(out, kTile * d, 0.0f);
  float top[kTile], total[kTile], shrink[kTile];
  std::fill_n(top, kTile, -1e38f);  // finite: -inf would make NaN where a query sees no key
  std::fill_n(total, kTile, 0.0f);

  for (std::int64_t key = tile.begin; key < tile.end; key += kTile) {
    const std::int64_t keys = std::min(kTile, tile.end - key);
    gather<Lanes>(k_rows + key * a.k.token, a.k.token, keys, d, k);
    gather<Lanes>(v_rows + key * a.v.token, a.v.token, keys, d, v);
    std::fill_n(p, keys * kTile, 0.0f);
    multiply_add<Lanes>(k, d, 1, q_t, kTile, p, kTile, keys, kTile, d);
    const bool masked = !tile.sees_all(key, keys);
    bool grows = false;
    for (std::int64_t i = 0; i < kTile; i += Lanes) {
      Floats<Lanes> before, highest, sum, x;
      load<Lanes>(top + i, before);
      highest = before;
      for (std::int64_t j = 0; j < keys; ++j) {
        load<Lanes>(p + j * kTile + i, x);
        if (masked) {
          tile.mask<Lanes>(key + j, i, x);
          store<Lanes>(p + j * kTile + i, x);
        }
        maximum<Lanes>(x, highest);
      }
      Floats<Lanes> ratio = before - highest;
      exp2<Lanes>(ratio);
      load<Lanes>(total + i, sum);
      sum *= ratio;
      for (std::int64_t j = 0; j < keys; ++j) {
        load<Lanes>(p + j * kTile + i, x);
        x -= highest;
        exp2<Lanes>(x);
        sum += x;
        store<Lanes>(p + j * kTile + i, x);
      }
      store<Lanes>(top + i, highest);
      store<Lanes>(total + i, sum);
      store<Lanes>(shrink + i, ratio);
      for (int lane = 0; lane < Lanes; ++lane) grows |= shrink[i + lane] != 1.0f;
    }
    if (grows && key > tile.begin) {
      for (std::int64_t i = 0; i < tile.rows; ++i) {
        for (std::int64_t c = 0; c < d; c += Lanes) {
          Floats<Lanes> x;
          load<Lanes>(out + i * d + c, x);
          x *= shrink[i];
          store<Lanes>(out + i * d + c, x);
        }
      }
    }
    multiply_add<Lanes>(p, 1, kTile, v, d, out, d, tile.rows, d, keys);
  }
  T* to = static_cast<T*>(a.out) + ((tile.batch * s.sq + tile.first) * s.hq + tile.head) * d;
  float* lse = a.lse + (tile.batch * s.hq + tile.head) * s.sq + tile.first;
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    const bool none = total[i] == 0.0f;
    lse[i] = none ? __builtin_inff() : top[i] + std::log2(total[i]);
    const float inverse = none ? 0.0f : 1.0f / total[i];
    for (std::int64_t c = 0; c < d; c += Lanes) {
      Floats<Lanes> x;
      load<Lanes>(out + i * d + c, x);
      x *= inverse;
      store<Lanes>(to + i * s.hq * d + c, x);
    }
  }
}

// One query head: its dq, and its share of the gradients of its keys and values.
template <int Lanes, typename T>
LLM_INLINE void backward_head(const AttentionBackward& a, std::int64_t unit) {
  const AttentionShape& s = a.shape;
  const std::int64_t d = s.d, batch = unit / s.hq, head = unit % s.hq, kv_head = head / (s.hq / s.hkv);
  float* q = scratch(7 * kTile * d + 2 * kTile * kTile);
  float *dout = q + kTile * d, *q_t = dout + kTile * d, *dout_t = q_t + kTile * d, *k = dout_t + kTile * d;
  float *v = k + kTile * d, *dq = v + kTile * d, *p = dq + kTile * d, *ds = p + kTile * kTile;
  float *dk = a.dk_heads + unit * s.sk * d, *dv = a.dv_heads + unit * s.sk * d;
  std::fill_n(dk, s.sk * d, 0.0f);
  std::fill_n(dv, s.sk * d, 0.0f);
  const T* k_rows = a.k.at<T>(batch, 0, kv_head);
  const T* v_rows = a.v.at<T>(batch, 0, kv_head);
  for (std::int64_t first = 0; first < s.sq; first += kTile) {
    const Tile tile(s, batch, head, first);
    const std::int64_t out_row = s.hq * d, offset = ((batch * s.sq + first) * s.hq + head) * d;
    gather<Lanes>(a.q.at<T>(batch, first, head), a.q.token, tile.rows, d, q);
    gather<Lanes>(a.dout.at<T>(batch, first, head), a.dout.token, tile.rows, d, dout);
    transpose<Lanes>(q, d, s.scale * kLog2E, q_t);
    transpose<Lanes>(dout, d, 1.0f, dout_t);
    gather<Lanes>(static_cast<const T*>(a.out) + offset, out_row, tile.rows, d, k);
    float delta[kTile], lse[kTile];
    for (std::int64_t i = 0; i < kTile; ++i) {
      Floats<Lanes> total = {};
      for (std::int64_t c = 0; c < d; c += Lanes) {
        Floats<Lanes> x, y;
        load<Lanes>(dout + i * d + c, x);
        load<Lanes>(k + i * d + c, y);
        total += x * y;
      }
      delta[i] = sum<Lanes>(total);
      lse[i] = i < tile.rows ? a.lse[unit * s.sq + first + i] : __builtin_inff();
    }
    std::fill_n(dq, kTile * d, 0.0f);
    for (std::int64_t key = tile.begin; key < tile.end; key += kTile) {
      const std::int64_t keys = std::min(kTile, tile.end - key);
      gather<Lanes>(k_rows + key * a.k.token, a.k.token, keys, d, k);
      gather<Lanes>(v_rows + key * a.v.token, a.v.token, keys, d, v);
      std::fill_n(p, keys * kTile, 0.0f);
      std::fill_n(ds, keys * kTile, 0.0f);
      multiply_add<Lanes>(k, d, 1, q_t, kTile, p, kTile, keys, kTile, d);
      multiply_add<Lanes>(v, d, 1, dout_t, kTile, ds, kTile, keys, kTile, d);
      const bool masked = !tile.sees_all(key, keys);
      for (std::int64_t i = 0; i < kTile; i += Lanes) {
        Floats<Lanes> base, mean;
        load<Lanes>(lse + i, base);
        load<Lanes>(delta + i, mean);
        for (std::int64_t j = 0; j < keys; ++j) {
          Floats<Lanes> x, y;
          load<Lanes>(p + j * kTile + i, x);
          load<Lanes>(ds + j * kTile + i, y);
          x -= base;
          if (masked) tile.mask<Lanes>(key + j, i, x);
          exp2<Lanes>(x);
          y = x * (y - mean);
          store<Lanes>(p + j * kTile + i, x);
          store<Lanes>(ds + j * kTile + i, y);
        }
      }
      multiply_add<Lanes>(p, kTile, 1, dout, d, dv + key * d, d, keys, d, tile.rows);
      multiply_add<Lanes>(ds, kTile, 1, q, d, dk + key * d, d, keys, d, tile.rows);
      multiply_add<Lanes>(ds, 1, kTile, k, d, dq, d, tile.rows, d, keys);
    }
    T* to = static_cast<T*>(a.dq) + offset;
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      for (std::int64_t c = 0; c < d; c += Lanes) {
        Floats<Lanes> x;
        load<Lanes>(dq + i * d + c, x);
        x *= s.scale;
        store<Lanes>(to + i * out_row + c, x);
      }
    }
  }
}

// A tile of keys of one KV head: the sums over its query heads.
template <int Lanes, typename T>
LLM_INLINE void sum_heads(const AttentionBackward& a, std::int64_t unit) {
  const AttentionShape& s = a.shape;
  const std::int64_t tiles = (s.sk + kTile - 1) / kTile, group = s.hq / s.hkv, d = s.d;
  const std::int64_t batch = unit / tiles / s.hkv, kv_head = unit / tiles % s.hkv, first = unit % tiles * kTile;
  for (std::int64_t row = first; row < std::min(first + kTile, s.sk); ++row) {
    const std::int64_t to = ((batch * s.sk + row) * s.hkv + kv_head) * d;
    for (std::int64_t c = 0; c < d; c += Lanes) {
      Floats<Lanes> dk = {}, dv = {};
      for (std::int64_t g = 0; g < group; ++g) {
        const std::int64_t from = ((batch * s.hq + kv_head * group + g) * s.sk + row) * d + c;
        Floats<Lanes> x;
        load<Lanes>(a.dk_heads + from, x);
        dk += x;
        load<Lanes>(a.dv_heads + from, x);
        dv += x;
      }
      dk *= s.scale;
      store<Lanes>(static_cast<T*>(a.dk) + to + c, dk);
      store<Lanes>(static_cast<T*>(a.dv) + to + c, dv);
    }
  }
}

using Forward = void (*)(const AttentionForward&, std::int64_t);
using Backward = void (*)(const AttentionBackward&, std::int64_t);

struct Kernels {
  Forward forward_tile;
  Backward backward_head, sum_heads;
};

#define LLM_VARIANT(name, target, lanes)                                                                             \
  template <typename T>                                                                                              \
  struct name {                                                                                                      \
    target static void forward(const AttentionForward& a, std::int64_t unit) { forward_tile<lanes, T>(a, unit); }    \
    target static void backward(const AttentionBackward& a, std::int64_t unit) { backward_head<lanes, T>(a, unit); } \
    target static void sum(const AttentionBackward& a, std::int64_t unit) { sum_heads<lanes, T>(a, unit); }          \
    static Kernels kernels() { return {forward, backward, sum}; }                                                    \
  }

LLM_VARIANT(Portable, , 4);
LLM_VARIANT(Avx2, LLM_TARGET_AVX2, 8);
LLM_VARIANT(Avx512, LLM_TARGET_AVX512, 16);

template <typename T>
Kernels best() {
  return best_kernels<Portable<T>, Avx2<T>, Avx512<T>>();
}

const Kernels& kernels(bool bf16) {
  static const Kernels of_fp32 = best<float>(), of_bf16 = best<Bf16>();
  return bf16 ? of_bf16 : of_fp32;
}

}  // namespace

void attention_forward(const AttentionForward& arguments) {
  const AttentionShape& s = arguments.shape;
  parallel((s.sq + kTile - 1) / kTile * s.b * s.hq, s.threads, kernels(s.bf16).forward_tile, arguments);
}

void attention_backward(const AttentionBackward& arguments) {
  const AttentionShape& s = arguments.shape;
  parallel(s.b * s.hq, s.threads, kernels(s.bf16).backward_head, arguments);
  parallel((s.sk + kTile - 1) / kTile * s.b * s.hkv, s.threads, kernels(s.bf16).sum_heads, arguments);
}

}  // namespace llm::cpu
