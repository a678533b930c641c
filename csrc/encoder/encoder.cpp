#include "encoder.hpp"

#include <algorithm>
#include <cstring>

namespace llm {

namespace {

constexpr std::string_view kLowBlock = "\xe2\x96\x81";  // U+2581, which SentencePiece cannot tell from a blank

bool is_continuation(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

std::size_t pair(char before, char after) {
  return std::size_t{static_cast<unsigned char>(before)} << 8 | static_cast<unsigned char>(after);
}

// Returns the end of the segment that begins at `begin`, without the limit of length.
std::size_t end_of_segment(std::string_view text, std::size_t begin) {
  if (text.compare(begin, kLowBlock.size(), kLowBlock) == 0) return begin + kLowBlock.size();
  for (std::size_t at = begin + 1; at < text.size(); ++at) {
    const char byte = text[at];
    if (byte == ' ') {
      if (text[at - 1] != ' ') return at;
    } else if (text[at - 1] == '\n') {
      if (byte != '\n') return at;
    } else if (byte == kLowBlock[0] && text.compare(at, kLowBlock.size(), kLowBlock) == 0) {
      return at;
    }
  }
  return text.size();
}

// Multiply and fold, eight bytes at a time: enough for short words and a hash table.
std::uint64_t hash_bytes(std::string_view text) {
  constexpr std::uint64_t kMultiplier = 0x9E3779B97F4A7C15;
  std::uint64_t hash = text.size() * kMultiplier;
  const char* data = text.data();
  std::size_t left = text.size();
  const auto mix = [&hash](std::uint64_t word) {
    hash = (hash ^ word) * kMultiplier;
    hash ^= hash >> 29;
  };
  for (; left >= 8; left -= 8, data += 8) {
    std::uint64_t word;
    std::memcpy(&word, data, 8);
    mix(word);
  }
  if (left > 0) {
    std::uint64_t word = 0;
    std::memcpy(&word, data, left);
    mix(word);
  }
  return hash ^ (hash >> 32);
}

}  // namespace

WordCache::WordCache() : slots_(kSlots) {}

std::pair<const std::int32_t*, std::size_t> WordCache::find(std::string_view word, std::uint64_t hash) const {
  for (std::size_t at = hash % kSlots; slots_[at].key_size != 0; at = (at + 1) % kSlots) {
    const Slot& slot = slots_[at];
    if (slot.hash == hash && std::string_view(keys_).substr(slot.key, slot.key_size) == word) {
      return {ids_.data() + slot.ids, slot.count};
    }
  }
  return {nullptr, 0};
}

void WordCache::insert(std::string_view word, std::uint64_t hash, const std::int32_t* ids, std::size_t count) {
  if (word.empty() || word.size() > kLongestWord) return;
  if (used_ >= kSlots / 4 * 3 || keys_.size() > kBytes || ids_.size() > kBytes / sizeof(std::int32_t)) clear();
  std::size_t at = hash % kSlots;
  while (slots_[at].key_size != 0) at = (at + 1) % kSlots;
  slots_[at] = {hash, static_cast<std::uint32_t>(keys_.size()), static_cast<std::uint32_t>(ids_.size()),
                static_cast<std::uint16_t>(word.size()), static_cast<std::uint16_t>(count)};
  keys_.append(word);
  ids_.insert(ids_.end(), ids, ids + count);
  ++used_;
}

void WordCache::clear() {
  std::fill(slots_.begin(), slots_.end(), Slot{});
  keys_.clear();
  ids_.clear();
  used_ = 0;
}

Encoder::Encoder(const std::vector<std::string>& pieces, std::vector<float> scores, std::vector<std::int32_t> byte_ids)
    : pieces_(pieces), scores_(std::move(scores)), byte_ids_(std::move(byte_ids)) {
  std::size_t size = 2;
  while (size < 2 * pieces_.size()) size *= 2;
  slots_.assign(size, {0, -1});
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    if (pieces_[i].empty()) continue;
    const std::uint64_t hash = hash_bytes(pieces_[i]);
    std::size_t at = hash % size;
    while (slots_[at].id >= 0) at = (at + 1) % size;
    slots_[at] = {hash, static_cast<std::int32_t>(i)};
    longest_piece_ = std::max(longest_piece_, pieces_[i].size());
    for (std::size_t b = 1; b < pieces_[i].size(); ++b) adjacent_.set(pair(pieces_[i][b - 1], pieces_[i][b]));
  }
}

std::int32_t Encoder::id_of(std::string_view piece) const {
  const std::uint64_t hash = hash_bytes(piece);
  const std::size_t mask = slots_.size() - 1;
  for (std::size_t at = hash & mask; slots_[at].id >= 0; at = (at + 1) & mask) {
    if (slots_[at].hash == hash && pieces_[static_cast<std::size_t>(slots_[at].id)] == piece) return slots_[at].id;
  }
  return -1;
}

void Encoder::encode(std::string_view text, std::size_t segment_chars, std::vector<std::int32_t>& ids) {
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = end_of_segment(text, begin);
    while (end - begin > segment_chars) {  // longer in bytes, so possibly in characters too
      std::size_t chars = 0, at = begin;
      for (; at < end; ++at) {
        if (!is_continuation(text[at]) && ++chars > segment_chars) break;
      }
      if (at == end) break;
      encode_segment(text.substr(begin, at - begin), ids);
      begin = at;
    }
    encode_segment(text.substr(begin, end - begin), ids);
    begin = end;
  }
}

void Encoder::encode_segment(std::string_view segment, std::vector<std::int32_t>& ids) {
  std::size_t begin = 0;
  for (std::size_t at = 1; at < segment.size(); ++at) {
    if (adjacent_[pair(segment[at - 1], segment[at])] || is_continuation(segment[at])) continue;
    encode_word(segment.substr(begin, at - begin), ids);
    begin = at;
  }
  encode_word(segment.substr(begin), ids);
}

void Encoder::encode_word(std::string_view word, std::vector<std::int32_t>& ids) {
  if (word.size() > WordCache::kLongestWord) return merge_word(word, ids);
  const std::uint64_t hash = hash_bytes(word);
  const auto [known, count] = cache_.find(word, hash);
  if (known != nullptr) {
    ids.insert(ids.end(), known, known + count);
    return;
  }
  const std::size_t before = ids.size();
  merge_word(word, ids);
  cache_.insert(word, hash, ids.data() + before, ids.size() - before);
}

void Encoder::merge_word(std::string_view word, std::vector<std::int32_t>& ids) {
  symbols_.clear();
  merges_.clear();
  for (std::size_t begin = 0; begin < word.size();) {
    std::size_t end = begin + 1;
    while (end < word.size() && is_continuation(word[end])) ++end;
    const std::int32_t index = static_cast<std::int32_t>(symbols_.size());
    symbols_.push_back({index - 1, index + 1, static_cast<std::uint32_t>(begin),
                        static_cast<std::uint32_t>(end - begin), id_of(word.substr(begin, end - begin))});
    begin = end;
  }
  symbols_.back().after = -1;
  for (std::size_t i = 1; i < symbols_.size(); ++i) {
    propose(word, static_cast<std::int32_t>(i - 1), static_cast<std::int32_t>(i));
  }
  while (!merges_.empty()) {
    std::pop_heap(merges_.begin(), merges_.end());
    const Merge merge = merges_.back();
    merges_.pop_back();
    Symbol& left = symbols_[static_cast<std::size_t>(merge.left)];
    Symbol& right = symbols_[static_cast<std::size_t>(merge.right)];
    // One of the two has been merged with another part since then.
    if (left.size == 0 || right.size == 0 || left.size + right.size != merge.size) continue;
    left.size += right.size;
    left.id = merge.id;
    right.size = 0;
    left.after = right.after;
    if (right.after >= 0) symbols_[static_cast<std::size_t>(right.after)].before = merge.left;
    propose(word, left.before, merge.left);
    propose(word, merge.left, left.after);
  }
  for (std::int32_t i = 0; i >= 0; i = symbols_[static_cast<std::size_t>(i)].after) {
    const Symbol& symbol = symbols_[static_cast<std::size_t>(i)];
    if (symbol.id >= 0) {
      ids.push_back(symbol.id);
    } else {
      for (const char byte : word.substr(symbol.begin, symbol.size))
        ids.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
    }
  }
}

void Encoder::propose(std::string_view word, std::int32_t left, std::int32_t right) {
  if (left < 0 || right < 0) return;
  const Symbol& first = symbols_[static_cast<std::size_t>(left)];
  const std::uint32_t size = first.size + symbols_[static_cast<std::size_t>(right)].size;
  if (size > longest_piece_) return;
  const std::int32_t id = id_of(word.substr(first.begin, size));
  if (id < 0) return;
  merges_.push_back({scores_[static_cast<std::size_t>(id)], left, right, id, size});
  std::push_heap(merges_.begin(), merges_.end());
}

}  // namespace llm
