#include "shard.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "crc32c.hpp"
#include "error.hpp"

namespace llm {
namespace {

constexpr const char* kRemake = "; make the shards again with `llm prepare_data`";

// Far above any real shard; below it no offset can overflow.
constexpr std::uint64_t kMaxTokens = std::uint64_t{1} << 56;

std::string describe(int error) { return std::generic_category().message(error); }

std::string hex(const std::string& bytes) {
  std::string text;
  for (unsigned char byte : bytes) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

template <typename T>
std::uint64_t largest(const unsigned char* bytes, std::size_t size) {
  const T* ids = reinterpret_cast<const T*>(bytes);
  T largest = 0;
  for (std::size_t i = 0; i < size / sizeof(T); ++i) largest = std::max(largest, ids[i]);
  return largest;
}

// Reads the header; throws if it is damaged, has another version or does not fit the size of the file.
Header read_header(const File& file) {
  const std::uint64_t bytes = file.identity().bytes;
  const auto fail = [&](const std::string& reason) { throw ShardError(file.path(), reason + kRemake); };
  Header header;
  if (bytes < sizeof(header.magic)) fail("not a shard: it has " + std::to_string(bytes) + " bytes");
  std::memset(&header, 0, sizeof(header));
  file.read(0, &header, std::min<std::uint64_t>(bytes, sizeof(header)));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) {
    fail("not a shard: it does not begin with " + std::string(kMagic, sizeof(kMagic)));
  }
  if (bytes < sizeof(header)) fail("truncated: it has " + std::to_string(bytes) + " bytes, its header alone has 4096");
  // Before the checksum, because its place may differ in another version.
  if (header.version != kFormatVersion) {
    fail("shard format version " + std::to_string(header.version) + ", but this program reads version " +
         std::to_string(kFormatVersion));
  }
  if (crc32c(&header, offsetof(Header, checksum)) != header.checksum) {
    fail("checksum of the header does not match: the file is damaged");
  }
  if (header.token_bytes != token_bytes(header.vocab_size)) {
    fail("tokens of " + std::to_string(header.token_bytes) + " bytes do not go with a vocabulary of " +
         std::to_string(header.vocab_size));
  }
  if (header.tokens > kMaxTokens || header.documents > header.tokens) {
    fail("impossible counts: " + std::to_string(header.tokens) + " tokens, " + std::to_string(header.documents) +
         " documents");
  }
  const Layout layout(header.tokens, header.documents, header.token_bytes);
  if (header.header_bytes != kHeaderBytes || header.block_bytes != kBlockBytes ||
      header.tokens_offset != kHeaderBytes || header.documents_offset != layout.documents_offset ||
      header.checksums_offset != layout.checksums_offset || header.file_bytes != layout.file_bytes) {
    fail("the header's section offsets do not go with its counts");
  }
  if (bytes != layout.file_bytes) {
    fail((bytes < layout.file_bytes ? "truncated: " : "too long: ") + std::string("it has ") + std::to_string(bytes) +
         " bytes, but its header says " + std::to_string(layout.file_bytes));
  }
  return header;
}

}  // namespace

Layout::Layout(std::uint64_t tokens, std::uint64_t documents, std::uint32_t token_bytes)
    : documents_offset((kHeaderBytes + tokens * token_bytes + kPageBytes - 1) / kPageBytes * kPageBytes),
      checksums_offset(documents_offset + documents * sizeof(std::uint64_t)),
      blocks((checksums_offset - kHeaderBytes + kBlockBytes - 1) / kBlockBytes),
      file_bytes(checksums_offset + blocks * sizeof(std::uint32_t)) {}

ShardWriter::ShardWriter(const std::string& path, std::uint64_t vocab_size, const std::string& tokenizer_sha256)
    : path_(path), vocab_size_(vocab_size), tokenizer_sha256_(tokenizer_sha256) {
  if (vocab_size < 1 || vocab_size > (std::uint64_t{1} << 31)) {
    throw std::invalid_argument("vocab_size " + std::to_string(vocab_size) + " is not between 1 and 2^31");
  }
  if (tokenizer_sha256.size() != sizeof(Header::tokenizer_sha256)) {
    throw std::invalid_argument("a sha256 has 32 bytes, not " + std::to_string(tokenizer_sha256.size()));
  }
  block_.reserve(kBlockBytes);
  fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) fail();
  try {
    const std::vector<unsigned char> zeros(kHeaderBytes);
    write(zeros.data(), zeros.size());
  } catch (...) {
    abandon();
    ::unlink(path.c_str());
    throw;
  }
}

ShardWriter::~ShardWriter() { abandon(); }

void ShardWriter::fail() const { throw WriteError(errno, path_); }

template <typename T>
void ShardWriter::append(const T* tokens, std::size_t count, const std::uint64_t* starts, std::size_t documents) {
  if (fd_ < 0) throw std::invalid_argument("the shard is closed");
  for (std::size_t i = 0; i < count; ++i) {
    // A negative id becomes a huge one.
    if (static_cast<std::uint64_t>(tokens[i]) >= vocab_size_) {
      throw std::invalid_argument("token " + std::to_string(i) + " has the id " + std::to_string(tokens[i]) +
                                  ", but the vocabulary has " + std::to_string(vocab_size_));
    }
  }
  for (std::size_t i = 0; i < documents; ++i) {
    if (starts[i] >= count || (i > 0 && starts[i] <= starts[i - 1])) {
      throw std::invalid_argument("document start " + std::to_string(i) + " is " + std::to_string(starts[i]) +
                                  ": starts ascend and lie below the number of tokens, " + std::to_string(count));
    }
  }
  for (std::size_t i = 0; i < documents; ++i) starts_.push_back(tokens_ + starts[i]);
  const auto emit_as = [&](auto id) {
    std::vector<decltype(id)> ids(std::min<std::size_t>(count, kBlockBytes));
    for (std::size_t first = 0; first < count; first += ids.size()) {
      const std::size_t chunk = std::min(ids.size(), count - first);
      std::transform(tokens + first, tokens + first + chunk, ids.begin(),
                     [](T token) { return static_cast<decltype(id)>(token); });
      emit(ids.data(), chunk * sizeof(id));
    }
  };
  if (token_bytes(vocab_size_) == 2) {
    emit_as(std::uint16_t{});
  } else {
    emit_as(std::uint32_t{});
  }
  tokens_ += count;
}

template void ShardWriter::append(const std::uint16_t*, std::size_t, const std::uint64_t*, std::size_t);
template void ShardWriter::append(const std::uint32_t*, std::size_t, const std::uint64_t*, std::size_t);
template void ShardWriter::append(const std::int32_t*, std::size_t, const std::uint64_t*, std::size_t);

std::uint32_t ShardWriter::finish() {
  if (fd_ < 0) throw std::invalid_argument("the shard is closed");
  const Layout layout(tokens_, starts_.size(), token_bytes(vocab_size_));
  const std::vector<unsigned char> padding(layout.documents_offset - kHeaderBytes - tokens_ * token_bytes(vocab_size_));
  emit(padding.data(), padding.size());
  emit(starts_.data(), starts_.size() * sizeof(std::uint64_t));
  flush_block();
  write(checksums_.data(), checksums_.size() * sizeof(std::uint32_t));

  Header header;
  std::memset(&header, 0, sizeof(header));
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kFormatVersion;
  header.header_bytes = kHeaderBytes;
  header.token_bytes = token_bytes(vocab_size_);
  header.block_bytes = kBlockBytes;
  header.vocab_size = vocab_size_;
  header.tokens = tokens_;
  header.documents = starts_.size();
  header.tokens_offset = kHeaderBytes;
  header.documents_offset = layout.documents_offset;
  header.checksums_offset = layout.checksums_offset;
  header.file_bytes = layout.file_bytes;
  std::memcpy(header.tokenizer_sha256, tokenizer_sha256_.data(), sizeof(header.tokenizer_sha256));
  header.table_checksum = crc32c(checksums_.data(), checksums_.size() * sizeof(std::uint32_t));
  header.checksum = crc32c(&header, offsetof(Header, checksum));
  if (::lseek(fd_, 0, SEEK_SET) < 0) fail();
  write(&header, sizeof(header));
  if (::fsync(fd_) != 0) fail();
  const int fd = fd_;
  fd_ = -1;
  if (::close(fd) != 0) fail();
  return header.checksum;
}

void ShardWriter::abandon() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void ShardWriter::emit(const void* data, std::size_t size) {
  const unsigned char* bytes = static_cast<const unsigned char*>(data);
  while (size > 0) {
    const std::size_t part = std::min(size, kBlockBytes - block_.size());
    block_.insert(block_.end(), bytes, bytes + part);
    bytes += part;
    size -= part;
    if (block_.size() == kBlockBytes) flush_block();
  }
}

void ShardWriter::flush_block() {
  if (block_.empty()) return;
  checksums_.push_back(crc32c(block_.data(), block_.size()));
  write(block_.data(), block_.size());
  block_.clear();
}

void ShardWriter::write(const void* data, std::size_t size) {
  const unsigned char* bytes = static_cast<const unsigned char*>(data);
  while (size > 0) {
    const ssize_t written = ::write(fd_, bytes, size);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail();
    bytes += written;
    size -= static_cast<std::size_t>(written);
  }
}

// O_NONBLOCK: opening a pipe with that name must not block; it is an error below.
File::File(const std::string& path) : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC)) {
  if (fd_ < 0) {
    const int error = errno;
    throw ShardError(path, error == ENOENT ? std::string("the manifest lists it, but it is not there") + kRemake
                                           : "cannot be opened: " + describe(error));
  }
  struct stat status;
  if (::fstat(fd_, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(fd_);
    throw ShardError(path, "not a regular file");
  }
  identity_.device = status.st_dev;
  identity_.inode = status.st_ino;
  identity_.bytes = static_cast<std::uint64_t>(status.st_size);
  identity_.modified_ns = std::int64_t{status.st_mtim.tv_sec} * 1000000000 + status.st_mtim.tv_nsec;
}

File::~File() { ::close(fd_); }

void File::read(std::uint64_t offset, void* data, std::size_t size) const {
  unsigned char* bytes = static_cast<unsigned char*>(data);
  while (size > 0) {
    const ssize_t got = ::pread(fd_, bytes, size, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw ShardError(path_, "cannot be read at byte " + std::to_string(offset) + ": " + describe(errno));
    if (got == 0) {
      struct stat status;
      const bool known = ::fstat(fd_, &status) == 0;
      throw ShardError(path_, "truncated while in use: it has " +
                                  std::to_string(known ? static_cast<std::uint64_t>(status.st_size) : offset) +
                                  " bytes, not " + std::to_string(identity_.bytes));
    }
    bytes += got;
    offset += static_cast<std::uint64_t>(got);
    size -= static_cast<std::size_t>(got);
  }
}

std::int64_t File::changed_ns() const {
  struct stat status;
  if (::fstat(fd_, &status) != 0) throw ShardError(path_, "cannot be read: " + describe(errno));
  return std::int64_t{status.st_ctim.tv_sec} * 1000000000 + status.st_ctim.tv_nsec;
}

bool File::is_replaced() const {
  struct stat status;
  return ::stat(path_.c_str(), &status) == 0 && (status.st_dev != identity_.device || status.st_ino != identity_.inode);
}

Header read_header(const File& file, const ShardSpec& spec, const DatasetSpec& dataset) {
  const Header header = read_header(file);
  const std::string tokenizer(reinterpret_cast<const char*>(header.tokenizer_sha256), sizeof(header.tokenizer_sha256));
  if (tokenizer != dataset.tokenizer_sha256) {
    throw ShardError(file.path(), "made with another tokenizer (sha256 " + hex(tokenizer).substr(0, 12) +
                                      "..., the manifest says " + hex(dataset.tokenizer_sha256).substr(0, 12) + "...)" +
                                      kRemake);
  }
  if (header.vocab_size != dataset.vocab_size) {
    throw ShardError(file.path(), "made for a vocabulary of " + std::to_string(header.vocab_size) +
                                      ", the manifest says " + std::to_string(dataset.vocab_size) + kRemake);
  }
  if (header.tokens != spec.tokens || header.documents != spec.documents || header.file_bytes != spec.bytes ||
      header.checksum != spec.header_checksum) {
    throw ShardError(
        file.path(),
        "not the shard that the manifest lists: it holds " + std::to_string(header.tokens) + " tokens and " +
            std::to_string(header.documents) + " documents, the manifest says " + std::to_string(spec.tokens) +
            " and " + std::to_string(spec.documents) +
            (header.tokens == spec.tokens && header.documents == spec.documents ? " (their checksums differ)" : "") +
            kRemake);
  }
  return header;
}

std::vector<std::uint32_t> read_table(const File& file, const Header& header) {
  std::vector<std::uint32_t> table((header.file_bytes - header.checksums_offset) / sizeof(std::uint32_t));
  file.read(header.checksums_offset, table.data(), table.size() * sizeof(std::uint32_t));
  if (crc32c(table.data(), table.size() * sizeof(std::uint32_t)) != header.table_checksum) {
    throw ShardError(file.path(),
                     std::string("checksum of the checksum table does not match: the file is damaged") + kRemake);
  }
  return table;
}

std::uint64_t largest_id(const unsigned char* bytes, std::size_t size, std::uint32_t token_bytes) {
  return token_bytes == 2 ? largest<std::uint16_t>(bytes, size) : largest<std::uint32_t>(bytes, size);
}

std::string damaged_block(std::uint64_t block, std::uint64_t begin, std::uint64_t end) {
  return "checksum of block " + std::to_string(block) + " (bytes " + std::to_string(begin) + " to " +
         std::to_string(end) + ") does not match: the file is damaged";
}

Shard::Shard(const ShardSpec& spec, const DatasetSpec& dataset, const File& file)
    : identity_(file.identity()), changed_ns_(file.changed_ns()) {
  const Header header = read_header(file, spec, dataset);
  vocab_size_ = header.vocab_size;
  token_bytes_ = header.token_bytes;
  tokens_ = header.tokens;
  documents_ = header.documents;
  documents_offset_ = header.documents_offset;
  checksums_offset_ = header.checksums_offset;

  Scratch scratch;
  header_checksum_ = header.checksum;
  verified_words_ = (read_table(file, header).size() + 63) / 64;
  verified_ = std::make_unique<std::atomic<std::uint64_t>[]>(verified_words_);
  for (std::uint64_t word = 0; word < verified_words_; ++word) verified_[word].store(0, std::memory_order_relaxed);
  read_document_index(file, scratch);
}

void Shard::read_document_index(const File& file, Scratch& scratch) {
  page_starts_.reserve((documents_ + kPageStarts - 1) / kPageStarts);
  std::vector<std::uint64_t> starts(kBlockBytes / sizeof(std::uint64_t));
  std::uint64_t next = 0;  // the smallest value that the next start may have
  for (std::uint64_t done = 0; done < documents_; done += starts.size()) {
    const std::size_t count = std::min<std::uint64_t>(starts.size(), documents_ - done);
    read_verified(file, documents_offset_ + done * sizeof(std::uint64_t), count * sizeof(std::uint64_t), starts.data(),
                  scratch);
    for (std::size_t i = 0; i < count; ++i) {
      if (starts[i] < next || starts[i] >= tokens_) {
        throw ShardError(file.path(), "document " + std::to_string(done + i) + " begins at token " +
                                          std::to_string(starts[i]) + ": out of order or out of range" + kRemake);
      }
      next = starts[i] + 1;
      if (i % kPageStarts == 0) page_starts_.push_back(starts[i]);
    }
  }
}

void Shard::read_tokens(const File& file, std::uint64_t first, std::size_t count, void* data, Scratch& scratch) const {
  read_verified(file, kHeaderBytes + first * token_bytes_, count * token_bytes_, data, scratch);
}

std::uint64_t Shard::documents_until(const File& file, std::uint64_t token, Scratch& scratch) const {
  const auto after = std::upper_bound(page_starts_.begin(), page_starts_.end(), token);
  if (after == page_starts_.begin()) return 0;
  const std::uint64_t page = static_cast<std::uint64_t>(after - page_starts_.begin()) - 1;
  const std::uint64_t* starts = load_page(file, page, scratch);
  const std::uint64_t* end = starts + std::min(kPageStarts, documents_ - page * kPageStarts);
  return page * kPageStarts + static_cast<std::uint64_t>(std::upper_bound(starts, end, token) - starts);
}

const std::uint64_t* Shard::load_page(const File& file, std::uint64_t page, Scratch& scratch) const {
  const std::uint64_t first = page * kPageStarts;
  if (scratch.page_shard != this || scratch.page_number != page) {
    const std::size_t size = std::min(kPageStarts, documents_ - first) * sizeof(std::uint64_t);
    scratch.page_shard = nullptr;  // until the page is complete
    read_verified(file, documents_offset_ + first * sizeof(std::uint64_t), size, scratch.page.data(), scratch);
    scratch.page_shard = this;
    scratch.page_number = page;
  }
  return scratch.page.data();
}

// Somebody may overwrite a shard, or prepare the data again, while a run reads it. A deleted file is no error: it can
// be read as long as it is open.
void Shard::check_unchanged(const File& file) const {
  const std::int64_t changed = file.changed_ns();
  if (changed == changed_ns_.load(std::memory_order_acquire)) return;
  const std::lock_guard<std::mutex> lock(checking_);
  if (changed == changed_ns_.load(std::memory_order_relaxed)) return;
  const Header header = file.is_replaced() ? Header{} : read_header(file);
  if (header.checksum != header_checksum_) throw ShardError(file.path(), kReplaced);
  read_table(file, header);
  for (std::uint64_t word = 0; word < verified_words_; ++word) verified_[word].store(0, std::memory_order_relaxed);
  changed_ns_.store(changed, std::memory_order_release);
}

void Shard::read_verified(const File& file, std::uint64_t offset, std::size_t size, void* data,
                          Scratch& scratch) const {
  const std::uint64_t first = (offset - kHeaderBytes) / kBlockBytes;
  const std::uint64_t last = (offset + size - 1 - kHeaderBytes) / kBlockBytes;
  bool all_verified = true;
  for (std::uint64_t block = first; block <= last; ++block) all_verified &= is_verified(block);
  if (all_verified) return file.read(offset, data, size);

  for (std::uint64_t block = first; block <= last; ++block) {
    const std::uint64_t begin = kHeaderBytes + block * kBlockBytes;
    const std::uint64_t end = std::min<std::uint64_t>(begin + kBlockBytes, checksums_offset_);
    const std::uint64_t from = std::max(begin, offset);
    const std::uint64_t to = std::min(end, offset + size);
    unsigned char* target = static_cast<unsigned char*>(data) + (from - offset);
    if (is_verified(block)) {
      file.read(from, target, to - from);
    } else {
      // The caller gets the verified bytes, not the result of a second read.
      verify_block(file, block, begin, end, scratch);
      std::memcpy(target, scratch.block.data() + (from - begin), to - from);
    }
  }
}

void Shard::verify_block(const File& file, std::uint64_t block, std::uint64_t begin, std::uint64_t end,
                         Scratch& scratch) const {
  file.read(begin, scratch.block.data(), end - begin);
  std::uint32_t expected;
  file.read(checksums_offset_ + block * sizeof(expected), &expected, sizeof(expected));
  if (crc32c(scratch.block.data(), end - begin) != expected) {
    throw ShardError(file.path(), damaged_block(block, begin, end) + kRemake);
  }
  const std::uint64_t tokens_end = std::min(end, kHeaderBytes + tokens_ * token_bytes_);
  if (tokens_end > begin) {
    const std::size_t size = tokens_end - begin;
    const std::uint64_t id = largest_id(scratch.block.data(), size, token_bytes_);
    if (id >= vocab_size_) {
      throw ShardError(file.path(), "holds the token id " + std::to_string(id) + ", but its vocabulary has " +
                                        std::to_string(vocab_size_) + kRemake);
    }
  }
  // Not if the file has changed since: these bytes are right, but a later read may get others.
  if (file.changed_ns() == changed_ns_.load(std::memory_order_acquire)) {
    verified_[block / 64].fetch_or(std::uint64_t{1} << (block % 64), std::memory_order_relaxed);
  }
}

void Shard::fail_changed(const File& file) {
  throw ShardError(file.path(), "was changed while in use: its document index is no longer in order");
}

}  // namespace llm
