// kernels._cpu: the Python interface of csrc/cpu/. The ops use kernels/cpu.py.
//
// Tensors are passed as addresses. The caller checks shapes and dtypes, and keeps the tensors alive during a call.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "attention.hpp"
#include "gram.hpp"
#include "rows.hpp"

namespace py = pybind11;
namespace cpu = llm::cpu;

namespace {

using Address = std::uintptr_t;  // 0: null
using Strided = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;
using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename Layout>
Layout strided(const Strided& x) {
  return {at<const void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

cpu::AttentionShape attention_shape(const Shape& shape, bool causal, bool bf16, float scale, Address doc_start,
                                    int threads) {
  const auto [b, sq, sk, hq, hkv, d] = shape;
  return {b, sq, sk, hq, hkv, d, causal, bf16, scale, at<const std::int32_t>(doc_start), threads};
}

template <typename Arguments>
void run(void (*kernel)(const Arguments&), const Arguments& arguments) {
  const py::gil_scoped_release release;
  kernel(arguments);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  // Arguments have no names here: kernels/cpu.py passes them by position, and kernels/_cpu.pyi names them.
  module.def("attention_forward",
             [](const Shape& shape, bool causal, bool bf16, float scale, Address doc_start, int threads,
                const Strided& q, const Strided& k, const Strided& v, Address out, Address lse) {
               run(cpu::attention_forward,
                   {attention_shape(shape, causal, bf16, scale, doc_start, threads), strided<cpu::Heads>(q),
                    strided<cpu::Heads>(k), strided<cpu::Heads>(v), at<void>(out), at<float>(lse)});
             });

  module.def("attention_backward", [](const Shape& shape, bool causal, bool bf16, float scale, Address doc_start,
                                      int threads, const Strided& dout, const Strided& q, const Strided& k,
                                      const Strided& v, Address out, Address lse, Address dq, Address dk, Address dv) {
    run(cpu::attention_backward,
        {attention_shape(shape, causal, bf16, scale, doc_start, threads), strided<cpu::Heads>(dout),
         strided<cpu::Heads>(q), strided<cpu::Heads>(k), strided<cpu::Heads>(v), at<const void>(out),
         at<const float>(lse), at<void>(dq), at<void>(dk), at<void>(dv)});
  });

  module.def("swiglu_forward", [](bool bf16, int threads, std::int64_t rows, std::int64_t f, const Strided& gate,
                                  const Strided& up, Address y) {
    run(cpu::swiglu_forward, {bf16,
                              threads,
                              rows,
                              f,
                              {},
                              strided<cpu::Rows>(gate),
                              strided<cpu::Rows>(up),
                              at<void>(y),
                              nullptr,
                              nullptr,
                              0});
  });

  module.def("swiglu_backward", [](bool bf16, int threads, std::int64_t rows, std::int64_t f, const Strided& dy,
                                   const Strided& gate, const Strided& up, Address dgate, Address dup,
                                   std::int64_t gradient_row) {
    run(cpu::swiglu_backward, {bf16, threads, rows, f, strided<cpu::Rows>(dy), strided<cpu::Rows>(gate),
                               strided<cpu::Rows>(up), nullptr, at<void>(dgate), at<void>(dup), gradient_row});
  });

  module.def(
      "rms_norm_forward", [](bool bf16, int threads, std::int64_t rows, std::int64_t d, float eps, const Strided& x,
                             Address residual, Address weight, Address y, Address total, Address rstd) {
        run(cpu::rms_norm_forward,
            {bf16, threads, rows, d, eps, strided<cpu::Rows>(x), at<const void>(residual), at<const void>(weight),
             nullptr, nullptr, at<void>(y), at<void>(total), nullptr, at<float>(rstd), nullptr});
      });

  module.def(
      "rms_norm_backward", [](bool bf16, int threads, std::int64_t rows, std::int64_t d, const Strided& x,
                              Address weight, Address dy, Address dtotal, Address dx, Address rstd, Address dw_shares) {
        run(cpu::rms_norm_backward,
            {bf16, threads, rows, d, 0.0f, strided<cpu::Rows>(x), nullptr, at<const void>(weight), at<const void>(dy),
             at<const void>(dtotal), nullptr, nullptr, at<void>(dx), at<float>(rstd), at<float>(dw_shares)});
      });
  module.attr("NORM_ROWS") = cpu::kNormRows;

  module.def("rope", [](bool bf16, int threads, bool inverse,
                        const std::tuple<std::int64_t, std::int64_t>& batch_and_length,
                        const std::tuple<std::int64_t, std::int64_t>& heads, std::int64_t d, const Strided& q,
                        const Strided& k, Address cos, Address sin, Address q_out, Address k_out) {
    const auto [b, s] = batch_and_length;
    const auto [q_heads, k_heads] = heads;
    run(cpu::rope, {bf16, threads, inverse, b, s, q_heads, k_heads, d, strided<cpu::Heads>(q), strided<cpu::Heads>(k),
                    at<const float>(cos), at<const float>(sin), at<void>(q_out), at<void>(k_out)});
  });

  module.def(
      "gram_polynomial", [](int threads, int steps, std::int64_t count, std::int64_t rows,
                            const std::tuple<float, float, float>& coefficients, Address gram, Address polynomial) {
        const auto [a, b, c] = coefficients;
        run(cpu::gram_polynomial, {threads, steps, count, rows, a, b, c, at<const float>(gram), at<float>(polynomial)});
      });
  module.attr("GRAM_ROWS") = cpu::kGramRows;

  module.def("cross_entropy_in_place",
             [](bool bf16, int threads, std::int64_t rows, std::int64_t columns, std::int64_t row_stride,
                std::int64_t vocab_size, std::int64_t ignore_index, float z_loss, Address logits, Address target,
                Address factor, Address loss, Address lse) {
               const auto* labels = at<const std::int64_t>(target);
               for (std::int64_t row = 0; row < rows; ++row) {
                 if (labels[row] != ignore_index && (labels[row] < 0 || labels[row] >= vocab_size)) {
                   throw std::out_of_range("target " + std::to_string(labels[row]) + " of row " + std::to_string(row) +
                                           " is not in 0 .. " + std::to_string(vocab_size - 1));  // IndexError
                 }
               }
               run(cpu::cross_entropy_in_place,
                   {bf16, threads, rows, columns, row_stride, vocab_size, ignore_index, z_loss, at<void>(logits),
                    labels, at<const float>(factor), at<float>(loss), at<float>(lse)});
             });
}
