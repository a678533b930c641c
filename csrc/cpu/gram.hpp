// The polynomials of Gram matrices that Muon's orthogonalisation needs; see llm/training/muon.py.

#pragma once

#include <cstdint>

namespace llm::cpu {

struct GramPolynomial {
  int threads, steps;
  std::int64_t count, rows;  // rows: a multiple of kGramRows
  float a, b, c;
  const float* gram;  // [count, rows, rows], symmetric
  float* polynomial;  // as gram
};

constexpr std::int64_t kGramRows = 16;

void gram_polynomial(const GramPolynomial&);

}  // namespace llm::cpu
