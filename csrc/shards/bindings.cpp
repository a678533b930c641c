// llm.data._shards: the Python interface of csrc/shards/. Its public interface is llm/data/shards.py.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "crc32c.hpp"
#include "error.hpp"
#include "loader.hpp"
#include "order.hpp"
#include "shard.hpp"
#include "verify.hpp"

namespace py = pybind11;

namespace {

class PyShardWriter {
 public:
  // Paths and digests are passed as bytes.
  PyShardWriter(const std::string& path, std::uint64_t vocab_size, const std::string& tokenizer_sha256)
      : writer_(path, vocab_size, tokenizer_sha256) {}

  void append(const py::array& tokens, const py::array& document_starts) {
    const auto starts = contiguous<std::uint64_t>(document_starts);
    if (!starts) throw py::type_error("document_starts is a one-dimensional uint64 array");
    if (!append_as<std::uint16_t>(tokens, *starts) && !append_as<std::uint32_t>(tokens, *starts) &&
        !append_as<std::int32_t>(tokens, *starts)) {
      throw py::type_error("tokens is a one-dimensional array of uint16, uint32 or int32");
    }
  }

  std::uint32_t finish() {
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    return writer_.finish();
  }

  void abandon() {
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    writer_.abandon();
  }

  std::uint64_t tokens() const { return writer_.tokens(); }
  std::uint64_t documents() const { return writer_.documents(); }

 private:
  template <typename T>
  using Array = py::array_t<T, py::array::c_style>;

  // Returns the array as contiguous memory, or nothing if it has another type or shape.
  template <typename T>
  static std::optional<Array<T>> contiguous(const py::array& array) {
    if (array.ndim() != 1 || !py::isinstance<py::array_t<T>>(array)) return std::nullopt;
    return Array<T>(array);
  }

  template <typename T>
  bool append_as(const py::array& array, const Array<std::uint64_t>& starts) {
    const auto tokens = contiguous<T>(array);
    if (!tokens) return false;
    const T* ids = tokens->data();
    const std::size_t count = static_cast<std::size_t>(tokens->size());
    const std::uint64_t* begins = starts.data();
    const std::size_t documents = static_cast<std::size_t>(starts.size());
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    writer_.append(ids, count, begins, documents);
    return true;
  }

  std::mutex mutex_;
  llm::ShardWriter writer_;
};

// Path, tokens, documents, bytes, checksum of the header.
using Spec = std::tuple<std::string, std::uint64_t, std::uint64_t, std::uint64_t, std::uint32_t>;

llm::ShardSpec shard_spec(const Spec& spec) {
  const auto& [path, tokens, documents, bytes, header_checksum] = spec;
  return {path, tokens, documents, bytes, header_checksum};
}

// Owns the C++ loader and keeps the memory of the slots alive until its threads have ended. A forked child has no such
// threads, and its locks may be locked for ever. So the child abandons its copy of the loader, without a destructor,
// and makes a new one.
class PyLoader {
 public:
  using Pointers = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;

  PyLoader(std::uint64_t vocab_size, const std::string& tokenizer_sha256, const std::vector<Spec>& shards,
           const llm::LoaderOptions& options, const std::vector<Pointers>& slots, py::object memory)
      : dataset_{vocab_size, tokenizer_sha256}, options_(options), memory_(std::move(memory)) {
    for (const Spec& spec : shards) shards_.push_back(shard_spec(spec));
    for (const auto& [input_ids, labels, doc_start] : slots) {
      slots_.push_back({reinterpret_cast<std::int64_t*>(input_ids), reinterpret_cast<std::int64_t*>(labels),
                        reinterpret_cast<std::int32_t*>(doc_start)});
    }
    start();
  }

  ~PyLoader() {
    if (pid_ != ::getpid()) {
      static_cast<void>(loader_.release());
      return;
    }
    const py::gil_scoped_release release;
    loader_.reset();
  }

  std::size_t next() {
    for (;;) {
      if (closed_) throw py::value_error("the loader is closed");
      llm::Loader& loader = here();
      int slot;
      {
        const py::gil_scoped_release release;
        slot = loader.next();
      }
      if (slot >= 0) {
        ++consumed_;
        return static_cast<std::size_t>(slot);
      }
      if (slot == llm::Loader::kEnd) throw py::stop_iteration();
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
  }

  std::uint64_t targets(std::uint64_t position, std::uint64_t count) {
    llm::Loader& loader = here();
    const py::gil_scoped_release release;
    return loader.targets(position, count);
  }

  void close() {
    closed_ = true;
    if (pid_ != ::getpid()) return;
    const py::gil_scoped_release release;
    loader_->close();
  }

 private:
  void start() {
    loader_ = std::make_unique<llm::Loader>(dataset_, shards_, options_, slots_, consumed_);
    pid_ = ::getpid();
  }

  llm::Loader& here() {
    if (pid_ != ::getpid()) {
      static_cast<void>(loader_.release());
      start();
    }
    return *loader_;
  }

  llm::DatasetSpec dataset_;
  std::vector<llm::ShardSpec> shards_;
  llm::LoaderOptions options_;
  std::vector<llm::Slot> slots_;
  py::object memory_;
  std::uint64_t consumed_ = 0;  // batches handed out; changed and read under the GIL
  bool closed_ = false;
  pid_t pid_ = 0;
  std::unique_ptr<llm::Loader> loader_;
};

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const llm::ShardError& error) {
    const py::object user_error = py::module_::import("llm.errors").attr("UserError");
    // A file name may hold any bytes.
    const py::object message = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.what()));
    PyErr_SetObject(user_error.ptr(), message.ptr());
  } catch (const llm::WriteError& error) {
    errno = error.error;
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.path.c_str());
  }
}

std::uint32_t crc32c(const py::buffer& data, std::uint32_t crc, bool portable) {
  // Before the lock is released: bytes that another thread may resize are locked by the buffer.
  const py::buffer_info bytes = data.request();
  py::ssize_t size = bytes.itemsize;
  for (py::ssize_t axis = bytes.ndim; axis-- > 0; size *= bytes.shape[axis]) {
    if (bytes.shape[axis] > 1 && bytes.strides[axis] != size) throw py::value_error("the bytes are not contiguous");
  }
  const py::gil_scoped_release release;
  const auto length = static_cast<std::size_t>(size);
  return portable ? llm::crc32c_table(bytes.ptr, length, crc) : llm::crc32c(bytes.ptr, length, crc);
}

}  // namespace

PYBIND11_MODULE(_shards, module) {
  using namespace pybind11::literals;
  module.doc() = "Shard files, the order of sequences, and the prefetching loader; see llm.data.shards.";
  py::register_local_exception_translator(translate);

  module.attr("FORMAT_VERSION") = llm::kFormatVersion;
  module.attr("ORDER_VERSION") = llm::kOrderVersion;
  module.attr("CRC32C_IMPLEMENTATION") = llm::crc32c_implementation();
  module.def(
      "crc32c", &crc32c, "data"_a, "crc"_a = 0, "portable"_a = false,
      "CRC-32C of contiguous bytes or an array; portable: from the table even where the CPU has an instruction.");
  module.def("token_bytes", &llm::token_bytes, "vocab_size"_a, "Bytes of a token in a shard: 2 or 4.");
  module.def("slots_needed", &llm::Loader::slots_needed, "prefetch"_a);
  module.def(
      "sequence_at",
      [](std::uint64_t seed, std::uint64_t epoch, std::uint64_t sequences, std::uint64_t index) {
        if (index >= sequences || sequences > (std::uint64_t{1} << 63)) {
          throw py::value_error("sequence_at wants index < sequences <= 2**63");
        }
        return llm::Permutation(seed, epoch, sequences)(index);
      },
      "seed"_a, "epoch"_a, "sequences"_a, "index"_a);

  module.def(
      "verify_shard",
      [](const Spec& shard, std::uint64_t vocab_size, const std::string& tokenizer_sha256, std::uint32_t bos,
         std::uint32_t eos, bool in_text) {
        std::vector<std::string> problems;
        {
          const py::gil_scoped_release release;
          problems = llm::verify_shard(shard_spec(shard), {vocab_size, tokenizer_sha256}, {bos, eos, in_text});
        }
        py::list decoded;
        for (const std::string& problem : problems) {  // a file name may hold any bytes
          decoded.append(py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(problem.c_str())));
        }
        return decoded;
      },
      "shard"_a, "vocab_size"_a, "tokenizer_sha256"_a, "bos"_a, "eos"_a, "in_text"_a);
  module.def(
      "document_starts",
      [](const Spec& shard, std::uint64_t vocab_size, const std::string& tokenizer_sha256) {
        std::vector<std::uint64_t> starts;
        {
          const py::gil_scoped_release release;
          starts = llm::document_starts(shard_spec(shard), {vocab_size, tokenizer_sha256});
        }
        return py::array_t<std::uint64_t>(static_cast<py::ssize_t>(starts.size()), starts.data());
      },
      "shard"_a, "vocab_size"_a, "tokenizer_sha256"_a);

  py::class_<PyShardWriter>(module, "ShardWriter")
      .def(py::init<const std::string&, std::uint64_t, const std::string&>(), "path"_a, "vocab_size"_a,
           "tokenizer_sha256"_a)
      .def("append", &PyShardWriter::append, "tokens"_a, "document_starts"_a)
      .def("finish", &PyShardWriter::finish)
      .def("abandon", &PyShardWriter::abandon)
      .def_property_readonly("tokens", &PyShardWriter::tokens)
      .def_property_readonly("documents", &PyShardWriter::documents);

  py::class_<PyLoader>(module, "Loader")
      .def(py::init([](std::uint64_t vocab_size, const std::string& tokenizer_sha256, const std::vector<Spec>& shards,
                       const std::vector<PyLoader::Pointers>& slots, py::object memory, std::uint64_t seq_len,
                       std::uint64_t seed, std::uint64_t global_batch, std::uint64_t micro_batch, std::uint64_t rank,
                       std::uint64_t world_size, std::uint64_t position, std::optional<std::uint64_t> end, bool shuffle,
                       unsigned threads, unsigned prefetch, const std::vector<std::size_t>& source_shards,
                       const std::vector<std::pair<std::uint64_t, std::vector<std::uint16_t>>>& stages) {
             llm::LoaderOptions options{
                 seq_len, seed,       global_batch, micro_batch,
                 rank,    world_size, position,     end.value_or(std::numeric_limits<std::uint64_t>::max()),
                 shuffle, threads,    prefetch,     source_shards,
                 {}};
             for (const auto& [begin, period] : stages) options.stages.push_back({begin, period});
             return std::make_unique<PyLoader>(vocab_size, tokenizer_sha256, shards, options, slots, std::move(memory));
           }),
           py::kw_only(), "vocab_size"_a, "tokenizer_sha256"_a, "shards"_a, "slots"_a, "memory"_a, "seq_len"_a,
           "seed"_a, "global_batch"_a, "micro_batch"_a, "rank"_a, "world_size"_a, "position"_a, "end"_a, "shuffle"_a,
           "threads"_a, "prefetch"_a, "source_shards"_a, "stages"_a)
      .def("next", &PyLoader::next, "The index of the slot that holds the next batch. Raises StopIteration at the end.")
      .def("targets", &PyLoader::targets, "position"_a, "count"_a)
      .def("close", &PyLoader::close);
}
