// The ops that work row by row on a CPU: SwiGLU, RMSNorm, RoPE and cross-entropy. The formulas are in
// kernels/<op>.py. Tensors are fp32 or bf16, arithmetic is in fp32, and each result is rounded once.

#pragma once

#include <cstdint>

#include "strided.hpp"

namespace llm::cpu {

struct SwiGLU {
  bool bf16;
  int threads;
  std::int64_t rows, f;
  Rows dy, gate, up;          // dy: for backward
  void *y, *dgate, *dup;      // forward: y, packed; backward: the gradients
  std::int64_t gradient_row;  // stride of the rows of dgate and dup
};

struct RMSNorm {
  bool bf16;
  int threads;
  std::int64_t rows, d;
  float eps;
  Rows x;
  const void *residual, *weight, *dy, *dtotal;  // residual and dtotal may be null
  void *y, *total, *dx;                         // packed
  float* rstd;                                  // [rows]
  float* dw_shares;                             // [ceil(rows / kNormRows), d]
};

constexpr std::int64_t kNormRows = 32;  // rows per share of dw, so that no order depends on the threads

struct RoPE {
  bool bf16;
  int threads;
  bool inverse;
  std::int64_t b, s, q_heads, k_heads, d;
  Heads q, k;
  const float *cos, *sin;  // [S, D/2]
  void *q_out, *k_out;     // packed
};

struct CrossEntropy {
  bool bf16;
  int threads;
  std::int64_t rows, columns, row_stride, vocab_size, ignore_index;
  float z_loss;
  void* logits;                // [rows, columns], contiguous columns; overwritten by their gradient
  const std::int64_t* target;  // each in 0 .. vocab_size - 1, or ignore_index
  const float* factor;         // factor of each row's loss, or null
  float *loss, *lse;           // [rows]; lse may be null
};

void swiglu_forward(const SwiGLU& arguments);
void swiglu_backward(const SwiGLU& arguments);
void rms_norm_forward(const RMSNorm& arguments);
void rms_norm_backward(const RMSNorm& arguments);
void rope(const RoPE& arguments);
void cross_entropy_in_place(const CrossEntropy& arguments);

}  // namespace llm::cpu
