// llm.inference._decoder: the Python interface of csrc/decoder/. Its public interface is llm/inference/decode.py.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "decoder.hpp"

namespace py = pybind11;

namespace {

class PyDecoder {
 public:
  using Address = std::uintptr_t;  // 0: not there
  using Layer = std::array<Address, 8>;

  PyDecoder(const llm::DecoderShape& shape, const std::vector<Layer>& layers, const std::array<Address, 8>& rest,
            unsigned threads, py::object memory)
      : keep_alive_(std::move(memory)), shape_(shape), decoder_(shape, addressed(layers, rest), threads) {}

  // tokens: int64 [batch]. Returns float32 [batch, vocab_size].
  py::array_t<float> step(const py::array_t<std::int64_t, py::array::c_style>& tokens, std::int64_t position) {
    if (tokens.size() != shape_.batch || position < 0 || position >= shape_.max_len) {
      throw py::value_error("tokens is int64 [batch], and position a slot of the cache");
    }
    py::array_t<float> logits({shape_.batch, shape_.vocab_size});
    float* out = logits.mutable_data();
    const py::gil_scoped_release release;
    decoder_.step(tokens.data(), position, out);
    return logits;
  }

 private:
  static llm::DecoderMemory addressed(const std::vector<Layer>& layers, const std::array<Address, 8>& rest) {
    const auto fp32 = [](Address address) { return reinterpret_cast<float*>(address); };
    const auto matrix = [](Address address) { return reinterpret_cast<const void*>(address); };
    llm::DecoderMemory memory{{},
                              matrix(rest[0]),
                              matrix(rest[1]),
                              fp32(rest[2]),
                              fp32(rest[3]),
                              fp32(rest[4]),
                              fp32(rest[5]),
                              fp32(rest[6]),
                              reinterpret_cast<std::int64_t*>(rest[7])};
    for (const Layer& layer : layers) {
      memory.layers.push_back({fp32(layer[0]), fp32(layer[1]), fp32(layer[2]), fp32(layer[3]), matrix(layer[4]),
                               matrix(layer[5]), matrix(layer[6]), matrix(layer[7])});
    }
    return memory;
  }

  py::object keep_alive_;
  llm::DecoderShape shape_;
  llm::Decoder decoder_;
};

}  // namespace

PYBIND11_MODULE(_decoder, module) {
  using namespace pybind11::literals;
  module.doc() = "Decoding on a CPU; see llm.inference.decode.";

  py::class_<PyDecoder>(module, "Decoder")
      .def(py::init([](std::int64_t n_heads, std::int64_t n_kv_heads, std::int64_t head_dim, std::int64_t d_model,
                       std::int64_t d_ff, std::int64_t vocab_size, std::int64_t batch, std::int64_t max_len,
                       float norm_eps, bool bf16, const std::vector<PyDecoder::Layer>& layers,
                       const std::array<PyDecoder::Address, 8>& rest, unsigned threads, py::object memory) {
             const llm::DecoderShape shape{n_heads,    n_kv_heads, head_dim, d_model,  d_ff,
                                           vocab_size, batch,      max_len,  norm_eps, bf16};
             return std::make_unique<PyDecoder>(shape, layers, rest, threads, std::move(memory));
           }),
           py::kw_only(), "n_heads"_a, "n_kv_heads"_a, "head_dim"_a, "d_model"_a, "d_ff"_a, "vocab_size"_a, "batch"_a,
           "max_len"_a, "norm_eps"_a, "bf16"_a, "layers"_a, "rest"_a, "threads"_a, "memory"_a)
      .def("step", &PyDecoder::step, "tokens"_a, "position"_a);
}
