#include "verify.hpp"

#include <algorithm>
#include <optional>

#include "crc32c.hpp"
#include "error.hpp"

namespace llm {
namespace {

class Verifier {
 public:
  Verifier(const File& file, const Header& header, const Markers& markers, std::vector<std::string>& problems)
      : file_(file), header_(header), markers_(markers), problems_(problems), table_(read_table(file, header)) {}

  void run() {
    const std::uint64_t tokens_end = kHeaderBytes + header_.tokens * header_.token_bytes;
    const std::uint64_t indexed = (header_.documents_offset - kHeaderBytes) / kBlockBytes;
    bool shared_is_bad = false;
    // The index first, because the tokens are checked against it.
    for (std::uint64_t block = indexed; block < table_.size(); ++block) {
      const std::uint64_t from = std::max(begin_of(block), header_.documents_offset);
      if (read(block)) {
        check_starts(from - begin_of(block), end_of(block) - from, from);
      } else {
        index_is_whole_ = false;
        shared_is_bad |= block == indexed;
      }
    }
    for (std::uint64_t block = 0; block < table_.size() && begin_of(block) < header_.documents_offset; ++block) {
      if ((block == indexed && shared_is_bad) || !read(block)) {
        before_.reset();
      } else if (begin_of(block) < tokens_end) {
        const std::size_t size = std::min(end_of(block), tokens_end) - begin_of(block);
        if (header_.token_bytes == 2) {
          check_tokens<std::uint16_t>(block, size / sizeof(std::uint16_t));
        } else {
          check_tokens<std::uint32_t>(block, size / sizeof(std::uint32_t));
        }
      }
    }
  }

 private:
  static std::uint64_t begin_of(std::uint64_t block) { return kHeaderBytes + block * kBlockBytes; }
  std::uint64_t end_of(std::uint64_t block) const {
    return std::min<std::uint64_t>(begin_of(block) + kBlockBytes, header_.checksums_offset);
  }

  void report(const std::string& reason) { problems_.push_back(file_.path() + ": " + reason); }

  bool read(std::uint64_t block) {
    const std::uint64_t begin = begin_of(block), end = end_of(block);
    file_.read(begin, block_.data(), end - begin);
    if (crc32c(block_.data(), end - begin) == table_[block]) return true;
    report(damaged_block(block, begin, end));
    return false;
  }

  void check_starts(std::uint64_t at, std::uint64_t size, std::uint64_t offset) {
    const std::uint64_t* starts = reinterpret_cast<const std::uint64_t*>(block_.data() + at);
    const std::uint64_t first = (offset - header_.documents_offset) / sizeof(std::uint64_t);
    for (std::uint64_t i = 0; i < size / sizeof(std::uint64_t); ++i) {
      if (starts[i] >= header_.tokens || (!starts_.empty() && starts[i] <= starts_.back())) {
        report("document " + std::to_string(first + i) + " begins at token " + std::to_string(starts[i]) +
               ": out of order or out of range");
        index_is_whole_ = false;
        return;
      }
      starts_.push_back(starts[i]);
    }
  }

  template <typename T>
  void check_tokens(std::uint64_t block, std::size_t count) {
    const std::uint64_t first = block * (kBlockBytes / sizeof(T));
    const T* tokens = reinterpret_cast<const T*>(block_.data());
    const std::string where = "block " + std::to_string(block) + " ";
    const std::uint64_t id = largest_id(block_.data(), count * sizeof(T), header_.token_bytes);
    if (id >= header_.vocab_size) {
      report(where + "holds the token id " + std::to_string(id) + ", but the vocabulary has " +
             std::to_string(header_.vocab_size));
    }
    if (index_is_whole_) {
      const auto begin = std::lower_bound(starts_.begin(), starts_.end(), first);
      const auto end = std::lower_bound(begin, starts_.end(), first + count);
      const auto begins = static_cast<std::ptrdiff_t>(std::count(tokens, tokens + count, static_cast<T>(markers_.bos)));
      bool right = markers_.in_text || begins == end - begin;
      for (auto start = begin; start != end && right; ++start) {
        const std::uint64_t i = *start - first;
        const std::optional<std::uint32_t> before = i > 0 ? std::optional<std::uint32_t>(tokens[i - 1]) : before_;
        right = tokens[i] == markers_.bos && (!before || *before == markers_.eos);
      }
      if (!right) {
        report(where + "does not hold BOS where a document begins, after an EOS, and nowhere else");
      }
    }
    before_ = tokens[count - 1];
  }

  const File& file_;
  const Header& header_;
  const Markers& markers_;
  std::vector<std::string>& problems_;
  const std::vector<std::uint32_t> table_;
  std::vector<unsigned char> block_ = std::vector<unsigned char>(kBlockBytes);
  std::vector<std::uint64_t> starts_;
  bool index_is_whole_ = true;
  std::optional<std::uint32_t> before_;  // the token before the block, if it is known
};

}  // namespace

std::vector<std::string> verify_shard(const ShardSpec& spec, const DatasetSpec& dataset, const Markers& markers) {
  std::vector<std::string> problems;
  try {
    const File file(spec.path);
    const Header header = read_header(file, spec, dataset);
    Verifier(file, header, markers, problems).run();
  } catch (const ShardError& error) {
    problems.push_back(error.what());
  }
  return problems;
}

std::vector<std::uint64_t> document_starts(const ShardSpec& spec, const DatasetSpec& dataset) {
  const File file(spec.path);
  const Shard shard(spec, dataset, file);
  Scratch scratch;
  std::vector<std::uint64_t> starts;
  shard.visit_starts(file, 0, spec.tokens, scratch, [&](std::uint64_t start) { starts.push_back(start); });
  return starts;
}

}  // namespace llm
