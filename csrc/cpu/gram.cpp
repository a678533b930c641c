#include "gram.hpp"

#include <algorithm>
#include <vector>

#include "parallel.hpp"
#include "product.hpp"

namespace llm::cpu {
namespace {

// c = scale b + a b, all [m, m] and symmetric, as is the product of polynomials of one matrix: half of it is computed,
// by bands of kGramRows rows from the diagonal on, and mirrored. (With scale on a's diagonal, the small numbers there
// would be rounded as the large one is, and directions in which the matrix has nearly nothing would grow out of that.)
template <int Lanes>
LLM_INLINE void symmetric_product(float scale, const float* a, const float* b, float* c, std::int64_t m) {
  for (std::int64_t r = 0; r < m; r += kGramRows) {
    panels<Lanes, false>(a + r * m, m, 1, b + r, m, c + r * m + r, m, kGramRows, m - r, std::min(kTile, m));
    for (std::int64_t k = kTile; k < m; k += kTile) {
      panels<Lanes, true>(a + r * m + k, m, 1, b + k * m + r, m, c + r * m + r, m, kGramRows, m - r,
                          std::min(kTile, m - k));
    }
    for (std::int64_t row = r; row < r + kGramRows; ++row) {
      for (std::int64_t column = r; column < m; ++column) c[row * m + column] += scale * b[row * m + column];
    }
    for (std::int64_t column = r + kGramRows; column < m; ++column) {
      for (std::int64_t row = r; row < r + kGramRows; ++row) c[column * m + row] = c[row * m + column];
    }
  }
}

template <int Lanes>
LLM_INLINE void polynomial(const GramPolynomial& g, std::int64_t i) {
  const std::int64_t m = g.rows, size = m * m;
  std::vector<float> memory(4 * size);
  float *gram = memory.data(), *factor = gram + size, *once = factor + size, *next = once + size;
  float* result = g.polynomial + i * size;
  std::copy_n(g.gram + i * size, size, gram);
  for (int step = 0; step < g.steps; ++step) {
    symmetric_product<Lanes>(0.0f, gram, gram, factor, m);
    for (std::int64_t n = 0; n < size; ++n) factor[n] = g.b * gram[n] + g.c * factor[n];
    if (step == 0) {
      std::copy_n(factor, size, result);
      for (std::int64_t n = 0; n < m; ++n) result[n * m + n] += g.a;
    } else {
      symmetric_product<Lanes>(g.a, factor, result, next, m);
      std::copy_n(next, size, result);
    }
    if (step + 1 < g.steps) {
      symmetric_product<Lanes>(g.a, factor, gram, once, m);
      symmetric_product<Lanes>(g.a, factor, once, gram, m);
    }
  }
}

using Kernel = void (*)(const GramPolynomial&, std::int64_t);

struct Portable {
  static void compute(const GramPolynomial& g, std::int64_t i) { polynomial<4>(g, i); }
  static Kernel kernels() { return compute; }
};
struct Avx2 {
  LLM_TARGET_AVX2 static void compute(const GramPolynomial& g, std::int64_t i) { polynomial<8>(g, i); }
  static Kernel kernels() { return compute; }
};
struct Avx512 {
  LLM_TARGET_AVX512 static void compute(const GramPolynomial& g, std::int64_t i) { polynomial<16>(g, i); }
  static Kernel kernels() { return compute; }
};

}  // namespace

void gram_polynomial(const GramPolynomial& g) {
  static const Kernel kernel = best_kernels<Portable, Avx2, Avx512>();
  parallel(g.count, g.threads, kernel, g);
}

}  // namespace llm::cpu
