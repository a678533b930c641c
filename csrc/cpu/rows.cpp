#include "rows.hpp"

#include <algorithm>
#include <cmath>

#include "../simd.hpp"
#include "parallel.hpp"

namespace llm::cpu {
namespace {

constexpr std::int64_t kGroup = 16;  // rows per unit of work of a thread

template <typename T>
T* packed(void* data, std::int64_t row, std::int64_t width) {
  return data == nullptr ? nullptr : static_cast<T*>(data) + row * width;
}
template <typename T>
const T* packed(const void* data, std::int64_t row, std::int64_t width) {
  return data == nullptr ? nullptr : static_cast<const T*>(data) + row * width;
}

std::int64_t groups(std::int64_t rows, std::int64_t size = kGroup) { return (rows + size - 1) / size; }

template <int Lanes>
LLM_INLINE void sigmoid(const Floats<Lanes>& x, Floats<Lanes>& y) {
  y = x * -kLog2E;
  exp2<Lanes>(y);
  y = 1.0f / (1.0f + y);
}

template <int Lanes, typename T>
LLM_INLINE void swiglu_forward_rows(const SwiGLU& a, std::int64_t group) {
  for (std::int64_t row = group * kGroup; row < std::min(a.rows, (group + 1) * kGroup); ++row) {
    const T *gate = a.gate.row<T>(row), *up = a.up.row<T>(row);
    T* y = packed<T>(a.y, row, a.f);
    for_columns<Lanes>(a.f, [&](std::int64_t c, const auto& read, const auto& write) LLM_INLINE_LAMBDA {
      Floats<Lanes> g, u, s;
      read(gate + c, g);
      read(up + c, u);
      sigmoid<Lanes>(g, s);
      const Floats<Lanes> result = g * s * u;
      write(y + c, result);
    });
  }
}

template <int Lanes, typename T>
LLM_INLINE void swiglu_backward_rows(const SwiGLU& a, std::int64_t group) {
  for (std::int64_t row = group * kGroup; row < std::min(a.rows, (group + 1) * kGroup); ++row) {
    const T *gate = a.gate.row<T>(row), *up = a.up.row<T>(row), *dy = a.dy.row<T>(row);
    T *dgate = packed<T>(a.dgate, row, a.gradient_row), *dup = packed<T>(a.dup, row, a.gradient_row);
    for_columns<Lanes>(a.f, [&](std::int64_t c, const auto& read, const auto& write) LLM_INLINE_LAMBDA {
      Floats<Lanes> g, u, d, s;
      read(gate + c, g);
      read(up + c, u);
      read(dy + c, d);
      sigmoid<Lanes>(g, s);
      const Floats<Lanes> dg = d * u * s * (1.0f + g * (1.0f - s)), du = d * g * s;
      write(dgate + c, dg);
      write(dup + c, du);
    });
  }
}

template <int Lanes, typename T>
LLM_INLINE void rms_norm_forward_rows(const RMSNorm& a, std::int64_t group) {
  const T* weight = static_cast<const T*>(a.weight);
  for (std::int64_t row = group * kNormRows; row < std::min(a.rows, (group + 1) * kNormRows); ++row) {
    const T *x = a.x.row<T>(row), *residual = packed<T>(a.residual, row, a.d);
    T *y = packed<T>(a.y, row, a.d), *total = packed<T>(a.total, row, a.d);
    Floats<Lanes> squares = {};
    for_columns<Lanes>(a.d, [&](std::int64_t c, const auto& read, const auto& write) LLM_INLINE_LAMBDA {
      Floats<Lanes> v;
      read(x + c, v);
      if (residual != nullptr) {
        Floats<Lanes> other;
        read(residual + c, other);
        v += other;
        write(total + c, v);
        read(total + c, v);  // the norm of the rounded sum
      }
      squares += v * v;
    });
    const float inverse = 1.0f / std::sqrt(sum<Lanes>(squares) / static_cast<float>(a.d) + a.eps);
    a.rstd[row] = inverse;
    const T* normed = residual != nullptr ? total : x;
    for_columns<Lanes>(a.d, [&](std::int64_t c, const auto& read, const auto& write) LLM_INLINE_LAMBDA {
      Floats<Lanes> v, w;
      read(normed + c, v);
      read(weight + c, w);
      v = v * inverse * w;
      write(y + c, v);
    });
  }
}

template <int Lanes, typename T>
LLM_INLINE void rms_norm_backward_rows(const RMSNorm& a, std::int64_t group) {
  const T* weight = static_cast<const T*>(a.weight);
  float* share = a.dw_shares + group * a.d;
  std::fill_n(share, a.d, 0.0f);
  for (std::int64_t row = group * kNormRows; row < std::min(a.rows, (group + 1) * kNormRows); ++row) {
    const T *x = a.x.row<T>(row), *dy = packed<T>(a.dy, row, a.d), *dtotal = packed<T>(a.dtotal, row, a.d);
    T* dx = packed<T>(a.dx, row, a.d);
    const float inverse = a.rstd[row];
    Floats<Lanes> products = {};
    for_columns<Lanes>(a.d, [&](std::int64_t c, const auto& read, const auto& write) LLM_INLINE_LAMBDA {
      Floats<Lanes> v, d, w, s;
      read(x + c, v);
      read(dy + c, d);
      read(weight + c, w);
      read(share + c, s);
      d *= v * inverse;
      products += d * w;
      s += d;
      write(share + c, s);
    });
    const float mean = sum<Lanes>(products) / static_cast<float>(a.d);
    for_columns<Lanes>(a.d, [&](std::int64_t c, const auto& read, const auto& write) LLM_INLINE_LAMBDA {
      Floats<Lanes> v, d, w;
      read(x + c, v);
      read(dy + c, d);
      read(weight + c, w);
      d = inverse * (d * w - v * inverse * mean);
      if (dtotal != nullptr) {
        Floats<Lanes> other;
        read(dtotal + c, other);
        d += other;
      }
      write(dx + c, d);
    });
  }
}

template <int Lanes, typename T>
LLM_INLINE void rope_tokens(const RoPE& a, std::int64_t group) {
  const std::int64_t half = a.d / 2;
  const float sign = a.inverse ? -1.0f : 1.0f;
  for (std::int64_t token = group * kGroup; token < std::min(a.b * a.s, (group + 1) * kGroup); ++token) {
    const std::int64_t batch = token / a.s, position = token % a.s;
    const float *cos = a.cos + position * half, *sin = a.sin + position * half;
    for (std::int64_t head = 0; head < a.q_heads + a.k_heads; ++head) {
      const bool is_q = head < a.q_heads;
      const std::int64_t of_k = head - a.q_heads;
      const T* from = is_q ? a.q.at<T>(batch, position, head) : a.k.at<T>(batch, position, of_k);
      T* to =
          is_q ? packed<T>(a.q_out, token * a.q_heads + head, a.d) : packed<T>(a.k_out, token * a.k_heads + of_k, a.d);
      for_columns<Lanes>(half, [&](std::int64_t c, const auto& read, const auto& write) LLM_INLINE_LAMBDA {
        Floats<Lanes> x1, x2, angle_cos, angle_sin;
        read(from + c, x1);
        read(from + half + c, x2);
        read(cos + c, angle_cos);
        read(sin + c, angle_sin);
        angle_sin *= sign;
        const Floats<Lanes> y1 = x1 * angle_cos - x2 * angle_sin, y2 = x2 * angle_cos + x1 * angle_sin;
        write(to + c, y1);
        write(to + half + c, y2);
      });
    }
  }
}

// Lanes beyond the end of a row are zero; where zero would count, they are set to `filler`.
template <int Lanes>
LLM_INLINE void fill_beyond(std::int64_t column, std::int64_t width, float filler, Floats<Lanes>& x) {
  if (column + Lanes <= width) return;
  for (std::int64_t i = width - column; i < Lanes; ++i) x[i] = filler;
}

template <int Lanes, typename T>
LLM_INLINE void cross_entropy_row(const CrossEntropy& a, std::int64_t row) {
  T* logits = packed<T>(a.logits, row, a.row_stride);
  const std::int64_t target = a.target[row];
  if (target == a.ignore_index) {
    a.loss[row] = 0.0f;
    if (a.lse != nullptr) a.lse[row] = 0.0f;
    std::fill_n(logits, a.columns, T{});
    return;
  }
  Floats<Lanes> at_target;
  load_some<Lanes>(logits + target, 1, at_target);
  const float target_logit = at_target[0], lowest = -__builtin_inff();
  Floats<Lanes> highest = Floats<Lanes>{} + lowest, total = {};
  for_columns<Lanes>(a.vocab_size, [&](std::int64_t c, const auto& read, const auto&) LLM_INLINE_LAMBDA {
    Floats<Lanes> x;
    read(logits + c, x);
    fill_beyond<Lanes>(c, a.vocab_size, lowest, x);
    maximum<Lanes>(x, highest);
  });
  float peak = highest[0];
  for (int i = 1; i < Lanes; ++i) peak = std::max(peak, highest[i]);
  for_columns<Lanes>(a.vocab_size, [&](std::int64_t c, const auto& read, const auto&) LLM_INLINE_LAMBDA {
    Floats<Lanes> x;
    read(logits + c, x);
    fill_beyond<Lanes>(c, a.vocab_size, lowest, x);
    x = (x - peak) * kLog2E;
    exp2<Lanes>(x);
    total += x;
  });
  const float sum_of_row = sum<Lanes>(total), log_sum = std::log(sum_of_row), lse = peak + log_sum;
  a.loss[row] = (peak - target_logit) + log_sum + a.z_loss * lse * lse;
  if (a.lse != nullptr) a.lse[row] = lse;

  const float factor = a.factor == nullptr ? 1.0f : a.factor[row];
  const float slope = factor * (1.0f + 2.0f * a.z_loss * lse) / sum_of_row;
  for_columns<Lanes>(a.vocab_size, [&](std::int64_t c, const auto& read, const auto& write) LLM_INLINE_LAMBDA {
    Floats<Lanes> x;
    read(logits + c, x);
    x = (x - peak) * kLog2E;
    exp2<Lanes>(x);
    x *= slope;
    write(logits + c, x);
  });
  std::fill(logits + a.vocab_size, logits + a.columns, T{});
  // From the logit in fp32, because a rounded softmax - 1 has lost its digits.
  Floats<Lanes> gradient = (at_target - peak) * kLog2E;
  exp2<Lanes>(gradient);
  gradient = slope * gradient - factor;
  store_some<Lanes>(logits + target, 1, gradient);
}

struct Kernels {
  void (*swiglu_forward)(const SwiGLU&, std::int64_t);
  void (*swiglu_backward)(const SwiGLU&, std::int64_t);
  void (*rms_norm_forward)(const RMSNorm&, std::int64_t);
  void (*rms_norm_backward)(const RMSNorm&, std::int64_t);
  void (*rope)(const RoPE&, std::int64_t);
  void (*cross_entropy)(const CrossEntropy&, std::int64_t);
};

#define LLM_VARIANT(name, target, lanes)                                                                           \
  template <typename T>                                                                                            \
  struct name {                                                                                                    \
    target static void swiglu_forward(const SwiGLU& a, std::int64_t i) { swiglu_forward_rows<lanes, T>(a, i); }    \
    target static void swiglu_backward(const SwiGLU& a, std::int64_t i) { swiglu_backward_rows<lanes, T>(a, i); }  \
    target static void norm_forward(const RMSNorm& a, std::int64_t i) { rms_norm_forward_rows<lanes, T>(a, i); }   \
    target static void norm_backward(const RMSNorm& a, std::int64_t i) { rms_norm_backward_rows<lanes, T>(a, i); } \
    target static void rope(const RoPE& a, std::int64_t i) { rope_tokens<lanes, T>(a, i); }                        \
    target static void cross_entropy(const CrossEntropy& a, std::int64_t i) { cross_entropy_row<lanes, T>(a, i); } \
    static Kernels kernels() {                                                                                     \
      return {swiglu_forward, swiglu_backward, norm_forward, norm_backward, rope, cross_entropy};                  \
    }                                                                                                              \
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

void swiglu_forward(const SwiGLU& a) { parallel(groups(a.rows), a.threads, kernels(a.bf16).swiglu_forward, a); }
void swiglu_backward(const SwiGLU& a) { parallel(groups(a.rows), a.threads, kernels(a.bf16).swiglu_backward, a); }
void rms_norm_forward(const RMSNorm& a) {
  parallel(groups(a.rows, kNormRows), a.threads, kernels(a.bf16).rms_norm_forward, a);
}
void rms_norm_backward(const RMSNorm& a) {
  parallel(groups(a.rows, kNormRows), a.threads, kernels(a.bf16).rms_norm_backward, a);
}
void rope(const RoPE& a) { parallel(groups(a.b * a.s), a.threads, kernels(a.bf16).rope, a); }
void cross_entropy_in_place(const CrossEntropy& a) { parallel(a.rows, a.threads, kernels(a.bf16).cross_entropy, a); }

}  // namespace llm::cpu
