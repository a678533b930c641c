// llm.inference._decoder: the Python interface of csrc/decoder/. Its public interface is llm/inference/decode.py and
// llm/inference/sampling.py.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "decoder.hpp"
#include "sampler.hpp"

namespace py = pybind11;

namespace {

class PyDecoder {
 public:
  using Address = std::uintptr_t;  // 0: absent
  using Step = std::pair<std::string, std::vector<std::pair<Address, std::int64_t>>>;

  PyDecoder(const llm::DecoderShape& shape, const std::vector<Step>& steps, const std::array<Address, 5>& cache,
            unsigned threads, py::object memory)
      : keep_alive_(std::move(memory)),
        shape_(shape),
        decoder_(shape, addressed(steps, shape),
                 {at<float>(cache[0]), at<float>(cache[1]), at<float>(cache[2]), at<float>(cache[3]),
                  at<std::int64_t>(cache[4])},
                 threads) {}

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
  template <typename T>
  static T* at(Address address) {
    return reinterpret_cast<T*>(address);
  }
  static std::vector<llm::DecoderStep> addressed(const std::vector<Step>& steps, const llm::DecoderShape& shape) {
    std::vector<llm::DecoderStep> result;
    for (const auto& [op, tensors] : steps) {
      std::vector<llm::DecoderWeight> weights;
      for (const auto& [address, size] : tensors) weights.push_back({at<const void>(address), size});
      result.push_back(llm::decoder_step(op, weights, shape));
    }
    return result;
  }

  py::object keep_alive_;
  llm::DecoderShape shape_;
  llm::Decoder decoder_;
};

// A sampler with the tokens of each sequence, which the penalty needs.
class PySampler {
 public:
  PySampler(std::vector<std::vector<std::int64_t>> sequences, std::int64_t vocab_size,
            const llm::SamplingOptions& options)
      : sequences_(std::move(sequences)), vocab_size_(vocab_size), sampler_(vocab_size, options) {
    for (const auto& sequence : sequences_) {
      for (const std::int64_t token : sequence) {
        if (token < 0 || token >= vocab_size) throw py::value_error("a token is outside of the vocabulary");
      }
    }
  }

  // logits: float32 [sequences, vocab_size]; rows, uniforms: one for each token to choose. Returns (token, logprob)s.
  std::vector<std::pair<std::int64_t, double>> choose(const py::array_t<float, py::array::c_style>& logits,
                                                      const std::vector<std::int64_t>& rows,
                                                      const std::vector<double>& uniforms) {
    const auto sequences = static_cast<std::int64_t>(sequences_.size());
    bool fits = logits.ndim() == 2 && logits.shape(0) == sequences && logits.shape(1) == vocab_size_;
    fits = fits && uniforms.size() == rows.size();
    for (const std::int64_t row : rows) fits = fits && row >= 0 && row < sequences;
    for (const double uniform : uniforms) fits = fits && uniform >= 0 && uniform < 1;
    if (!fits) throw py::value_error("logits is float32 [sequences, vocab_size], and uniforms 0 <= u < 1 for each row");
    const float* data = logits.data();
    std::vector<std::pair<std::int64_t, double>> chosen;
    const py::gil_scoped_release release;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      std::vector<std::int64_t>& held = sequences_[static_cast<std::size_t>(rows[i])];
      const auto count = static_cast<std::int64_t>(held.size());
      const llm::Choice choice = sampler_.choose(data + rows[i] * vocab_size_, held.data(), count, uniforms[i]);
      held.push_back(choice.token);
      chosen.emplace_back(choice.token, choice.logprob);
    }
    return chosen;
  }

 private:
  std::vector<std::vector<std::int64_t>> sequences_;
  std::int64_t vocab_size_;
  llm::Sampler sampler_;
};

}  // namespace

PYBIND11_MODULE(_decoder, module) {
  using namespace pybind11::literals;
  module.doc() = "Decoding on a CPU, and sampling; see llm.inference.decode and llm.inference.sampling.";

  py::class_<PyDecoder>(module, "Decoder")
      .def(py::init([](std::int64_t n_heads, std::int64_t n_kv_heads, std::int64_t head_dim, std::int64_t d_model,
                       std::int64_t d_ff, std::int64_t vocab_size, std::int64_t batch, std::int64_t max_len,
                       float norm_eps, bool bf16, const std::vector<PyDecoder::Step>& steps,
                       const std::array<PyDecoder::Address, 5>& cache, unsigned threads, py::object memory) {
             const llm::DecoderShape shape{n_heads,    n_kv_heads, head_dim, d_model,  d_ff,
                                           vocab_size, batch,      max_len,  norm_eps, bf16};
             return std::make_unique<PyDecoder>(shape, steps, cache, threads, std::move(memory));
           }),
           py::kw_only(), "n_heads"_a, "n_kv_heads"_a, "head_dim"_a, "d_model"_a, "d_ff"_a, "vocab_size"_a, "batch"_a,
           "max_len"_a, "norm_eps"_a, "bf16"_a, "steps"_a, "cache"_a, "threads"_a, "memory"_a)
      .def("step", &PyDecoder::step, "tokens"_a, "position"_a);

  py::class_<PySampler>(module, "Sampler")
      .def(py::init([](std::vector<std::vector<std::int64_t>> sequences, std::int64_t vocab_size,
                       float repetition_penalty, float temperature, std::int64_t top_k, double top_p, float min_p) {
             const llm::SamplingOptions options{repetition_penalty, temperature, top_k, top_p, min_p};
             return std::make_unique<PySampler>(std::move(sequences), vocab_size, options);
           }),
           py::kw_only(), "sequences"_a, "vocab_size"_a, "repetition_penalty"_a, "temperature"_a, "top_k"_a, "top_p"_a,
           "min_p"_a)
      .def("choose", &PySampler::choose, "logits"_a, "rows"_a, "uniforms"_a);
}
