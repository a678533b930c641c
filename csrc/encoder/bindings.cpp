// llm.data._encoder: the Python interface of csrc/encoder/. Its public interface is llm/data/tokenizer.py.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "encoder.hpp"

namespace py = pybind11;

namespace {

class PyEncoder {
 public:
  PyEncoder(const std::vector<std::string>& pieces, std::vector<float> scores, std::vector<std::int32_t> byte_ids)
      : encoder_(pieces, std::move(scores), std::move(byte_ids)) {}

  // Returns the concatenated ids of all texts, and for each text where its ids end.
  py::tuple encode(const std::vector<py::bytes>& texts, std::size_t segment_chars) {
    const std::vector<std::string_view> views(texts.begin(), texts.end());
    std::vector<std::int32_t> ids;
    std::vector<std::int64_t> ends;
    {
      const py::gil_scoped_release release;
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const std::string_view text : views) {
        encoder_.encode(text, segment_chars, ids);
        ends.push_back(static_cast<std::int64_t>(ids.size()));
      }
    }
    return py::make_tuple(py::array_t<std::int32_t>(static_cast<py::ssize_t>(ids.size()), ids.data()),
                          py::array_t<std::int64_t>(static_cast<py::ssize_t>(ends.size()), ends.data()));
  }

 private:
  std::mutex mutex_;  // guards the cache of words
  llm::Encoder encoder_;
};

}  // namespace

PYBIND11_MODULE(_encoder, module) {
  using namespace pybind11::literals;
  module.doc() = "Byte-pair encoding; see llm.data.tokenizer.";

  py::class_<PyEncoder>(module, "Encoder")
      .def(py::init<const std::vector<std::string>&, std::vector<float>, std::vector<std::int32_t>>(), "pieces"_a,
           "scores"_a, "byte_ids"_a)
      .def("encode", &PyEncoder::encode, "texts"_a, "segment_chars"_a);
}
