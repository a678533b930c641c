// Byte-pair encoding of UTF-8 text as in SentencePiece, word by word, with a cache of words.
//
// A text is cut before a run of blanks, after a run of newlines, before and after U+2581, and after `segment_chars`
// characters that contain none of these (llm/data/document_reader.py). In such a segment, a word ends between two
// characters that are adjacent in no piece of the vocabulary, because no merge can join them. So the ids of a text are
// the concatenated ids of its words. BPE: Sennrich et al. 2016.

#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace llm {

// Words and their ids, in a bounded amount of memory: a full cache is emptied.
class WordCache {
 public:
  static constexpr std::size_t kLongestWord = 128;

  WordCache();

  // The word's ids, or nothing: {nullptr, 0}. Valid until the next `insert`.
  std::pair<const std::int32_t*, std::size_t> find(std::string_view word, std::uint64_t hash) const;
  void insert(std::string_view word, std::uint64_t hash, const std::int32_t* ids, std::size_t count);

 private:
  static constexpr std::size_t kSlots = std::size_t{1} << 18;
  static constexpr std::size_t kBytes = std::size_t{1} << 22;

  struct Slot {
    std::uint64_t hash;
    std::uint32_t key, ids;
    std::uint16_t key_size, count;  // key_size 0: the slot is free
  };

  void clear();

  std::vector<Slot> slots_;
  std::string keys_;
  std::vector<std::int32_t> ids_;
  std::size_t used_ = 0;
};

class Encoder {
 public:
  // pieces[i]: the text of id i where it may be the result of a merge or a character, else empty. scores[i]: of two
  // possible merges, that of the piece with the higher score is made first. byte_ids[b]: the id of byte b.
  Encoder(const std::vector<std::string>& pieces, std::vector<float> scores, std::vector<std::int32_t> byte_ids);

  // Appends the text's ids. The text must be valid UTF-8; for other bytes the ids are undefined, but valid.
  void encode(std::string_view text, std::size_t segment_chars, std::vector<std::int32_t>& ids);

 private:
  struct Symbol {
    std::int32_t before, after;  // the neighbours' indexes, or -1
    std::uint32_t begin, size;   // bytes of the word; size 0: merged into the part before
    std::int32_t id;             // or -1: a character that the vocabulary lacks
  };
  struct Merge {
    float score;
    std::int32_t left, right, id;
    std::uint32_t size;

    // std::push_heap keeps the largest in front: the highest score and, among equals, the leftmost.
    bool operator<(const Merge& other) const {
      return score < other.score || (score == other.score && left > other.left);
    }
  };
  struct Slot {
    std::uint64_t hash;
    std::int32_t id;  // -1: the slot is free
  };

  void encode_word(std::string_view word, std::vector<std::int32_t>& ids);
  void encode_segment(std::string_view segment, std::vector<std::int32_t>& ids);
  void merge_word(std::string_view word, std::vector<std::int32_t>& ids);
  std::int32_t id_of(std::string_view piece) const;  // or -1
  void propose(std::string_view word, std::int32_t left, std::int32_t right);

  std::vector<std::string> pieces_;
  std::vector<float> scores_;
  std::vector<std::int32_t> byte_ids_;
  std::vector<Slot> slots_;        // their number is a power of two; at most half are in use
  std::bitset<1 << 16> adjacent_;  // pairs of bytes that are adjacent in a piece
  std::size_t longest_piece_ = 0;
  WordCache cache_;
  std::vector<Symbol> symbols_;
  std::vector<Merge> merges_;
};

}  // namespace llm
