// Products and transposes of small fp32 matrices, for attention.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../simd.hpp"

namespace llm::cpu {

constexpr std::int64_t kTile = 64;  // rows and columns of a tile; 16 KiB, half of an L1 cache

// c [M, N * Lanes] += a b over `steps`, or = without Add. Element (m, k) of a is a[m * a_row + k * a_step].
template <int Lanes, int M, int N, bool Add>
LLM_INLINE void product(const float* a, std::int64_t a_row, std::int64_t a_step, const float* b, std::int64_t b_step,
                        float* c, std::int64_t c_row, std::int64_t steps) {
  Floats<Lanes> sums[M][N] = {};
#pragma GCC unroll 8
  for (int m = 0; Add && m < M; ++m) {
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

template <int Lanes, int N, bool Add>
LLM_INLINE void panel(const float* a, std::int64_t a_row, std::int64_t a_step, const float* b, std::int64_t b_step,
                      float* c, std::int64_t c_row, std::int64_t rows, std::int64_t steps) {
  constexpr int kRows = 4;
  std::int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) {
    product<Lanes, kRows, N, Add>(a + m * a_row, a_row, a_step, b, b_step, c + m * c_row, c_row, steps);
  }
  for (; m < rows; ++m) {
    product<Lanes, 1, N, Add>(a + m * a_row, a_row, a_step, b, b_step, c + m * c_row, c_row, steps);
  }
}

template <int Lanes, bool Add>
LLM_INLINE void panels(const float* a, std::int64_t a_row, std::int64_t a_step, const float* b, std::int64_t b_step,
                       float* c, std::int64_t c_row, std::int64_t rows, std::int64_t columns, std::int64_t steps) {
  constexpr int kVectors = Lanes == 16 ? 4 : 2;  // with 4 rows, all sums fit into the registers
  std::int64_t n = 0;
  for (; n + kVectors * Lanes <= columns; n += kVectors * Lanes) {
    panel<Lanes, kVectors, Add>(a, a_row, a_step, b + n, b_step, c + n, c_row, rows, steps);
  }
  for (; n < columns; n += Lanes) panel<Lanes, 1, Add>(a, a_row, a_step, b + n, b_step, c + n, c_row, rows, steps);
}

// c [rows, columns] += a b, columns a multiple of 16, steps at most kTile. Element (m, k) of a is
// a[m * a_row + k * a_step]. Computed in panels, so that data that is read often stays in the L1 cache.
template <int Lanes>
LLM_INLINE void multiply_add(const float* a, std::int64_t a_row, std::int64_t a_step, const float* b,
                             std::int64_t b_step, float* c, std::int64_t c_row, std::int64_t rows, std::int64_t columns,
                             std::int64_t steps) {
  panels<Lanes, true>(a, a_row, a_step, b, b_step, c, c_row, rows, columns, steps);
}

// c [rows, kTile] = a b: a [rows, steps], b [steps, kTile].
template <int Lanes>
LLM_INLINE void multiply(const float* a, const float* b, float* c, std::int64_t rows, std::int64_t steps) {
  panels<Lanes, false>(a, steps, 1, b, kTile, c, kTile, rows, kTile, std::min(kTile, steps));
  for (std::int64_t k = kTile; k < steps; k += kTile) {
    panels<Lanes, true>(a + k, steps, 1, b + k * kTile, kTile, c, kTile, rows, kTile, std::min(kTile, steps - k));
  }
}

// Transposes a square, one vector per row, by perfect shuffles of its rows.
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

}  // namespace llm::cpu
