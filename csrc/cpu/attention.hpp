// Attention on a CPU, forward and backward, as kernels/attention.py defines it, computed in fp32.
//
// As in the Triton kernels, not all scores exist at once, and keys that no query of a tile sees are not loaded. A tile
// is 64 queries by 64 keys, transposed: the lanes of a vector are queries, so the softmax needs no sum across lanes.
// Every product reads rows in memory order, except that tiles of queries are transposed once. First, the rows of every
// head are copied to be contiguous, in fp32, so the working memory has the size of q, k, v and their gradients.

#pragma once

#include <cstdint>

#include "strided.hpp"

namespace llm::cpu {

struct AttentionShape {
  std::int64_t b, sq, sk, hq, hkv, d;  // d: a multiple of 16
  bool causal;
  bool bf16;  // dtype of q, k, v, out and their gradients: bf16 or fp32
  float scale;
  const std::int32_t* doc_start;  // [B, Sq], or null
  int threads;
};

struct AttentionForward {
  AttentionShape shape;
  Heads q, k, v;
  void* out;   // [B, Sq, Hq, D]
  float* lse;  // [B, Hq, Sq], base-2 logarithm; infinite for a query that sees no key
};

struct AttentionBackward {
  AttentionShape shape;
  Heads dout, q, k, v;
  const void* out;
  const float* lse;
  void *dq, *dk, *dv;  // packed, like q, k and v
};

void attention_forward(const AttentionForward& arguments);
void attention_backward(const AttentionBackward& arguments);

}  // namespace llm::cpu
