// Vectors of floats, written once for all instruction sets.
//
// A kernel is a template over the number of lanes. It is inlined into one function per instruction set, and only that
// function names the set (LLM_TARGET_...); `best_kernels` picks the best one of this machine. Vectors are passed by
// reference, because how they are passed by value depends on the instruction set.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#define LLM_INLINE __attribute__((always_inline)) inline
#define LLM_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__)
#define LLM_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define LLM_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#else  // only Portable is chosen there
#define LLM_TARGET_AVX2
#define LLM_TARGET_AVX512
#endif

namespace llm {

using Bf16 = std::uint16_t;  // the upper half of an fp32

template <int Lanes>
struct Vectors {
  typedef float Floats __attribute__((vector_size(4 * Lanes)));
  typedef std::int32_t Ints __attribute__((vector_size(4 * Lanes)));
  typedef std::uint32_t Words __attribute__((vector_size(4 * Lanes)));
  typedef std::uint16_t Halves __attribute__((vector_size(2 * Lanes)));
  // As they lie in an array of numbers. (A copy by memcpy may go through the stack in two halves.)
  typedef float FloatsInMemory __attribute__((vector_size(4 * Lanes), aligned(4), may_alias));
  typedef std::int32_t IntsInMemory __attribute__((vector_size(4 * Lanes), aligned(4), may_alias));
  typedef std::uint32_t WordsInMemory __attribute__((vector_size(4 * Lanes), aligned(2), may_alias));
  typedef std::uint16_t HalvesInMemory __attribute__((vector_size(2 * Lanes), aligned(2), may_alias));
};
template <int Lanes>
using Floats = typename Vectors<Lanes>::Floats;
template <int Lanes>
using Ints = typename Vectors<Lanes>::Ints;
template <int Lanes>
using Words = typename Vectors<Lanes>::Words;

template <int Lanes>
LLM_INLINE void load(const float* from, Floats<Lanes>& to) {
  to = *reinterpret_cast<const typename Vectors<Lanes>::FloatsInMemory*>(from);
}

template <int Lanes>
LLM_INLINE void load(const Bf16* from, Floats<Lanes>& to) {
  const typename Vectors<Lanes>::Halves halves =
      *reinterpret_cast<const typename Vectors<Lanes>::HalvesInMemory*>(from);
  const Words<Lanes> words = __builtin_convertvector(halves, Words<Lanes>) << 16;
  to = reinterpret_cast<Floats<Lanes>>(words);
}

template <int Lanes>
LLM_INLINE void load(const std::int32_t* from, Ints<Lanes>& to) {
  to = *reinterpret_cast<const typename Vectors<Lanes>::IntsInMemory*>(from);
}

template <int Lanes>
LLM_INLINE void store(float* to, const Floats<Lanes>& from) {
  *reinterpret_cast<typename Vectors<Lanes>::FloatsInMemory*>(to) = from;
}

// Rounds to nearest, ties to even, as torch does.
template <int Lanes>
LLM_INLINE void store(Bf16* to, const Floats<Lanes>& from) {
  const Words<Lanes> words = reinterpret_cast<Words<Lanes>>(from);
  Words<Lanes> rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
  const Words<Lanes> nan = Words<Lanes>{} + 0x7fc0u;
  rounded = from == from ? rounded : nan;  // rounding could turn a NaN into a number
  *reinterpret_cast<typename Vectors<Lanes>::HalvesInMemory*>(to) =
      __builtin_convertvector(rounded, typename Vectors<Lanes>::Halves);
}

// The first `count` < Lanes numbers; the other lanes are zero.
template <int Lanes, typename T>
LLM_INLINE void load_some(const T* from, std::int64_t count, Floats<Lanes>& to) {
  T padded[Lanes] = {};
  for (std::int64_t i = 0; i < count; ++i) padded[i] = from[i];
  load<Lanes>(padded, to);
}

template <int Lanes, typename T>
LLM_INLINE void store_some(T* to, std::int64_t count, const Floats<Lanes>& from) {
  T padded[Lanes];
  store<Lanes>(padded, from);
  for (std::int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

// Calls body(column, read, write) for the columns 0, Lanes, ... of rows of `width` numbers. read(pointer, vector) and
// write(pointer, vector) move the numbers from that column on; the last vector may be incomplete.
template <int Lanes, typename Body>
LLM_INLINE void for_columns(std::int64_t width, const Body& body) {
  std::int64_t column = 0;
  for (; column + Lanes <= width; column += Lanes) {
    body(
        column, [](const auto* from, Floats<Lanes>& to) LLM_INLINE_LAMBDA { load<Lanes>(from, to); },
        [](auto* to, const Floats<Lanes>& from) LLM_INLINE_LAMBDA { store<Lanes>(to, from); });
  }
  if (const std::int64_t rest = width - column; rest > 0) {
    body(
        column, [rest](const auto* from, Floats<Lanes>& to) LLM_INLINE_LAMBDA { load_some<Lanes>(from, rest, to); },
        [rest](auto* to, const Floats<Lanes>& from) LLM_INLINE_LAMBDA { store_some<Lanes>(to, rest, from); });
  }
}

// As a tree, because additions that wait for each other are slow.
template <int Lanes>
LLM_INLINE float sum(const Floats<Lanes>& lanes) {
  if constexpr (Lanes == 4) {
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  } else {
    Floats<Lanes / 2> halves[2];
    std::memcpy(halves, &lanes, sizeof halves);
    const Floats<Lanes / 2> pairs = halves[0] + halves[1];
    return sum<Lanes / 2>(pairs);
  }
}

template <int Lanes>
LLM_INLINE void maximum(const Floats<Lanes>& a, Floats<Lanes>& b) {
  b = a > b ? a : b;
}

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// 2^x to about 1e-7 of it; 0 below 2^-126, infinite from 2^128 on, NaN for NaN. The fraction, in -1/2 .. 1/2, goes
// through Taylor's series of 2^x to the seventh power, whose next term is below 2^-27.
template <int Lanes>
LLM_INLINE void exp2(Floats<Lanes>& x) {
  const Floats<Lanes> given = x, shift = Floats<Lanes>{} + 12582912.0f;  // 1.5 * 2^23: added, it leaves whole numbers
  const Floats<Lanes> shifted = x + shift;
  const Floats<Lanes> f = x - (shifted - shift);
  Floats<Lanes> p = f * 1.5252734e-5f + 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const Words<Lanes> whole = reinterpret_cast<Words<Lanes>>(shifted) - reinterpret_cast<Words<Lanes>>(shift);
  const Words<Lanes> scaled = reinterpret_cast<Words<Lanes>>(p) + (whole << 23);  // added to the exponent
  x = reinterpret_cast<Floats<Lanes>>(scaled);
  x = given < -126.0f ? Floats<Lanes>{} : x;
  x = given >= 128.0f ? Floats<Lanes>{} + __builtin_inff() : x;
  x = given == given ? x : given;
}

// Returns the kernels of the best instruction set of this machine. Each type's `kernels()` returns its own table.
//
// The environment variable LLM_INSTRUCTION_SET selects another one, "portable", "avx2" or "avx512", for tests and for
// equal bits on different machines. Throws std::invalid_argument for one that this machine does not have.
template <typename Portable, typename Avx2, typename Avx512>
auto best_kernels() -> decltype(Portable::kernels()) {
  bool has_avx2 = false, has_avx512 = false;
#if defined(__x86_64__)
  has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  const char* variable = std::getenv("LLM_INSTRUCTION_SET");
  const std::string named = variable == nullptr ? "" : variable;
  if (has_avx512 && (named.empty() || named == "avx512")) return Avx512::kernels();
  if (has_avx2 && (named.empty() || named == "avx2")) return Avx2::kernels();
  if (named.empty() || named == "portable") return Portable::kernels();
  throw std::invalid_argument("LLM_INSTRUCTION_SET=" + named + ": this machine has portable" +
                              (has_avx2 ? ", avx2" : "") + (has_avx512 ? ", avx512" : ""));
}

}  // namespace llm
