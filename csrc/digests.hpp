// A set of digests in at most 16 bytes of memory for each: for finding equal documents.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>

namespace llm {

// A table with linear probing whose keys stand in ascending order: a key's slot follows from its size, so the table is
// made larger in place, by moving keys apart. Of a digest's 128 bits it keeps 96: among 10^10 digests two unequal ones
// are taken for equal with a chance of 10^-9.
class DigestSet {
 public:
  static constexpr std::size_t kBytes = 16;

  DigestSet() { grow(); }
  ~DigestSet() { std::free(keys_); }
  DigestSet(const DigestSet&) = delete;
  DigestSet& operator=(const DigestSet&) = delete;

  // Whether the digest (kBytes, evenly distributed) was not in the set; it is now.
  bool insert(std::string_view digest) {
    if (used_ * 10 >= slots_ * 9) grow();
    Key key;
    std::memcpy(&key, digest.data(), sizeof key);
    if (key.empty()) key.low = 1;
    std::size_t at = home(key);
    while (!keys_[at].empty() && keys_[at] < key) ++at;
    if (!keys_[at].empty() && !(key < keys_[at])) return false;
    std::size_t free = at;
    while (!keys_[free].empty()) ++free;
    std::memmove(keys_ + at + 1, keys_ + at, (free - at) * sizeof(Key));
    keys_[at] = key;
    ++used_;
    if (free + 1 >= slots_ + kSpare) grow();  // the last slot stays free, so that every search ends
    return true;
  }

 private:
  static constexpr std::size_t kSpare = 4096;  // for the keys that the last slots push on

  struct Key {
    std::uint32_t low, middle, high;  // all zero: a free slot

    std::uint64_t number() const { return std::uint64_t{high} << 32 | middle; }
    bool empty() const { return number() == 0 && low == 0; }
    bool operator<(const Key& other) const {
      return number() != other.number() ? number() < other.number() : low < other.low;
    }
  };

  std::size_t home(const Key& key) const {
    __extension__ using Wide = unsigned __int128;
    return static_cast<std::size_t>(Wide{key.number()} * slots_ >> 64);
  }

  void grow() {
    const std::size_t before = slots_ == 0 ? 0 : slots_ + kSpare;
    slots_ = slots_ + slots_ / 7 + 1024;
    const std::size_t total = slots_ + kSpare;
    Key* const keys = static_cast<Key*>(std::realloc(keys_, total * sizeof(Key)));
    if (keys == nullptr) throw std::bad_alloc();
    keys_ = keys;
    std::fill(keys_ + before, keys_ + total, Key{});
    // All keys to the end, then each to its new home or the first free slot behind it.
    std::size_t from = total;
    for (std::size_t at = before; at-- > 0;) {
      if (!keys_[at].empty()) std::swap(keys_[--from], keys_[at]);
    }
    for (std::size_t free = 0; from < total; ++from, ++free) {
      const Key key = keys_[from];
      keys_[from] = Key{};
      free = std::min(std::max(free, home(key)), from);
      keys_[free] = key;
    }
  }

  Key* keys_ = nullptr;
  std::size_t slots_ = 0, used_ = 0;
};

}  // namespace llm
