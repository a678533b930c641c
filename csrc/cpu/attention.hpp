// Attention on a CPU, forward and backward: what kernels/attention.py defines, computed in fp32.
//
// As in the Triton kernels, the scores never exist whole, and keys that no query of a tile sees are never loaded. A
// tile is 64 queries by 64 keys, transposed: the lanes of a vector are queries, so that the softmax needs no sum across
// lanes, and every product reads rows as they lie, but for tiles of queries that are transposed once. Before that every
// head's rows are laid side by side, in fp32; the working memory is that of q, k, v and their gradients once more.

#pragma once

#include <cstdint>

#include "strided.hpp"

namespace llm::cpu {

struct AttentionShape {
  std::int64_t b, sq, sk, hq, hkv, d;  // d: a multiple of 16
  bool causal;
  bool bf16;  // of q, k, v, out and their gradients; else fp32
  float scale;
  const std::int32_t* doc_start;  // [B, Sq], or null
  int threads;
};

struct AttentionForward {
  AttentionShape shape;
  Heads q, k, v;
  void* out;   // [B, Sq, Hq, D]
  float* lse;  // [B, Hq, Sq], to the base 2; infinite for a query that sees no key
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
