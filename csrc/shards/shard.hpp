// The shard file: its layout, and how it is written, read and checked.
//
// Little endian.
//   [0, 4096)             Header, zero-padded; its last four bytes are the CRC-32C of the bytes before
//   [4096, ...)           the tokens, u16 or u32 each, zero-padded to a multiple of 4096
//   [documents_offset, )  for every document that begins in this shard, the index of its first token: u64, ascending
//   [checksums_offset, )  the CRC-32C (u32) of each 64 KiB block of [4096, checksums_offset), the last one shorter;
//                         the header holds the checksum of this table
// So a checksum covers every byte of the file, and the header's own checksum identifies the whole file. A document may
// begin in one shard and end in the next.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace llm {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shards are read and written as little endian, without swaps");

constexpr char kMagic[8] = {'L', 'L', 'M', 'S', 'H', 'A', 'R', 'D'};
constexpr std::uint32_t kFormatVersion = 1;
constexpr std::size_t kHeaderBytes = 4096;
constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kBlockBytes = 65536;

// The width of a token: u16 if and only if every id fits. Only this function decides it.
constexpr std::uint32_t token_bytes(std::uint64_t vocab_size) { return vocab_size <= 65536 ? 2 : 4; }

struct Header {
  char magic[8];
  std::uint32_t version;
  std::uint32_t header_bytes;  // 4096
  std::uint32_t token_bytes;   // 2 or 4
  std::uint32_t block_bytes;   // 65536
  std::uint64_t vocab_size;
  std::uint64_t tokens;
  std::uint64_t documents;
  std::uint64_t tokens_offset;  // 4096
  std::uint64_t documents_offset;
  std::uint64_t checksums_offset;
  std::uint64_t file_bytes;
  unsigned char tokenizer_sha256[32];
  std::uint32_t table_checksum;
  unsigned char zeros[3976];
  std::uint32_t checksum;  // of all bytes before
};
static_assert(sizeof(Header) == kHeaderBytes && offsetof(Header, checksum) == kHeaderBytes - 4);

// Where the sections begin; derived from three numbers.
struct Layout {
  Layout(std::uint64_t tokens, std::uint64_t documents, std::uint32_t token_bytes);

  std::uint64_t documents_offset;
  std::uint64_t checksums_offset;
  std::uint64_t blocks;
  std::uint64_t file_bytes;
};

// Writes one shard as a stream; keeps the document starts (8 bytes each) and checksums (4 bytes per 64 KiB) in memory.
// The header is written last, so a file without finish() is not a shard. After a WriteError the writer is unusable.
class ShardWriter {
 public:
  ShardWriter(const std::string& path, std::uint64_t vocab_size, const std::string& tokenizer_sha256);
  ~ShardWriter();
  ShardWriter(const ShardWriter&) = delete;
  ShardWriter& operator=(const ShardWriter&) = delete;

  // `starts`: ascending offsets into this call's tokens. Throws std::invalid_argument, changing nothing, where an id is
  // not in the vocabulary or a start is out of order or range. T: std::uint16_t, std::uint32_t or std::int32_t.
  template <typename T>
  void append(const T* tokens, std::size_t count, const std::uint64_t* starts, std::size_t documents);

  // Completes, syncs and closes the file. Returns the checksum of the header.
  std::uint32_t finish();

  // Closes the file without completing it.
  void abandon();

  std::uint64_t tokens() const { return tokens_; }
  std::uint64_t documents() const { return starts_.size(); }

 private:
  void emit(const void* data, std::size_t size);
  void flush_block();
  void write(const void* data, std::size_t size);
  [[noreturn]] void fail() const;

  std::string path_;
  std::uint64_t vocab_size_;
  std::string tokenizer_sha256_;
  int fd_ = -1;
  std::uint64_t tokens_ = 0;
  std::vector<std::uint64_t> starts_;
  std::vector<std::uint32_t> checksums_;
  std::vector<unsigned char> block_;
};

// A file open for reading. Reads are positional, so threads and forked processes may share it.
class File {
 public:
  // Identifies the file at a path; when opened again, it must be the same file.
  struct Identity {
    std::uint64_t device, inode, bytes;
    std::int64_t modified_ns;
    bool operator==(const Identity& other) const {
      return device == other.device && inode == other.inode && bytes == other.bytes && modified_ns == other.modified_ns;
    }
  };

  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const Identity& identity() const { return identity_; }
  const std::string& path() const { return path_; }
  // The bytes must lie below identity().bytes.
  void read(std::uint64_t offset, void* data, std::size_t size) const;
  // Returns the time of the last change of contents, size or links. Unlike the time of modification, no program sets
  // it.
  std::int64_t changed_ns() const;
  // Whether there is another file at the path now; false if there is none.
  bool is_replaced() const;

 private:
  std::string path_;
  int fd_;
  Identity identity_;
};

// The manifest's entry for a shard.
struct ShardSpec {
  std::string path;
  std::uint64_t tokens, documents, bytes;
  std::uint32_t header_checksum;
};

// What all shards of a data set share.
struct DatasetSpec {
  std::uint64_t vocab_size;
  std::string tokenizer_sha256;  // 32 bytes
};

// Returns the header of a shard; throws ShardError if the shard is not the one in the manifest.
Header read_header(const File& file, const ShardSpec& spec, const DatasetSpec& dataset);

// Returns the checksum of every block, after a check of the table itself.
std::vector<std::uint32_t> read_table(const File& file, const Header& header);

// Returns the largest id in `size` bytes, 0 if there is none.
std::uint64_t largest_id(const unsigned char* bytes, std::size_t size, std::uint32_t token_bytes);

// Returns the message for a block [begin, end) whose checksum is wrong.
std::string damaged_block(std::uint64_t block, std::uint64_t begin, std::uint64_t end);

constexpr const char* kReplaced = "was replaced or changed while in use; start again";

class Shard;

// Working memory of a thread for reading.
struct Scratch {
  std::vector<unsigned char> block = std::vector<unsigned char>(kBlockBytes);
  std::vector<unsigned char> tokens;
  // The page of a document index that was read last: the sequences of a step are random, but the look-ups of a sequence
  // share a page.
  std::vector<std::uint64_t> page = std::vector<std::uint64_t>(kPageBytes / sizeof(std::uint64_t));
  const Shard* page_shard = nullptr;
  std::uint64_t page_number = 0;
};

// A shard whose header, checksum table and document index have been verified. Tokens are verified block by block when
// they are first read, and again after the file has changed. Its memory is bounded: it keeps every 512th document start
// and one bit per block, but not the rest of the index or the open file. Safe for many threads.
class Shard {
 public:
  Shard(const ShardSpec& spec, const DatasetSpec& dataset, const File& file);

  const File::Identity& identity() const { return identity_; }

  // Called before the file is read again: if it has changed, throws ShardError unless it is still this shard, and has
  // every block verified again.
  void check_unchanged(const File& file) const;

  // Copies tokens [first, first + count), which must exist, to `data`.
  void read_tokens(const File& file, std::uint64_t first, std::size_t count, void* data, Scratch& scratch) const;

  // Returns how many documents of this shard begin at or before `token`.
  std::uint64_t documents_until(const File& file, std::uint64_t token, Scratch& scratch) const;

  // Calls visit(start) for the documents that begin in [first, last], in order.
  template <typename Visit>
  void visit_starts(const File& file, std::uint64_t first, std::uint64_t last, Scratch& scratch, Visit visit) const {
    for (std::uint64_t document = first == 0 ? 0 : documents_until(file, first - 1, scratch); document < documents_;
         ++document) {
      if (document % kPageStarts == 0 && page_starts_[document / kPageStarts] > last) return;
      const std::uint64_t start = load_page(file, document / kPageStarts, scratch)[document % kPageStarts];
      if (start > last) return;
      if (start < first) fail_changed(file);
      first = start + 1;
      visit(start);
    }
  }

  std::uint32_t token_bytes() const { return token_bytes_; }

 private:
  static constexpr std::uint64_t kPageStarts = kPageBytes / sizeof(std::uint64_t);
  void read_verified(const File& file, std::uint64_t offset, std::size_t size, void* data, Scratch& scratch) const;
  void verify_block(const File& file, std::uint64_t block, std::uint64_t begin, std::uint64_t end,
                    Scratch& scratch) const;
  bool is_verified(std::uint64_t block) const {
    return (verified_[block / 64].load(std::memory_order_relaxed) >> (block % 64)) & 1;
  }
  void read_document_index(const File& file, Scratch& scratch);
  const std::uint64_t* load_page(const File& file, std::uint64_t page, Scratch& scratch) const;
  [[noreturn]] static void fail_changed(const File& file);

  File::Identity identity_;
  std::uint64_t vocab_size_;
  std::uint32_t token_bytes_;
  std::uint64_t tokens_;
  std::uint64_t documents_;
  std::uint64_t documents_offset_;
  std::uint64_t checksums_offset_;
  std::vector<std::uint64_t> page_starts_;  // the first document start of each 4 KiB page of the index
  std::uint64_t verified_words_;
  std::unique_ptr<std::atomic<std::uint64_t>[]> verified_;
  std::uint32_t header_checksum_;
  mutable std::mutex checking_;
  mutable std::atomic<std::int64_t> changed_ns_;  // of the file whose blocks `verified_` is about
};

}  // namespace llm
