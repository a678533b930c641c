// A set of digests in at most 16 bytes of memory for each, beside 30 KiB: for finding equal documents.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

namespace llm {

// Holds 104 of a digest's 128 bits: the first byte chooses a table, the next twelve stand in it. Among 10^10 digests
// two unequal ones are taken for equal with a chance of 10^-12. Small tables, so that one that grows needs little room
// for its old self; and grown by a fifth at nine tenths, so that three quarters are always in use.
class DigestSet {
 public:
  static constexpr std::size_t kBytes = 16;

  // Whether the digest (kBytes, evenly distributed) was not in the set; it is now.
  bool insert(std::string_view digest) {
    Table& table = tables_[static_cast<unsigned char>(digest[0])];
    if (table.used * 10 >= table.slots.size() * 9) grow(table);
    Key key;
    std::memcpy(key.data(), digest.data() + 1, sizeof key);
    if (key == Key{}) key[0] = 1;  // all zeros stands for a free slot
    const std::size_t at = find(table, key);
    if (table.slots[at] == key) return false;
    table.slots[at] = key;
    ++table.used;
    return true;
  }

 private:
  using Key = std::array<std::uint32_t, 3>;
  struct Table {
    std::vector<Key> slots = std::vector<Key>(8);
    std::size_t used = 0;
  };

  // Where the key is or belongs.
  static std::size_t find(const Table& table, const Key& key) {
    const std::uint64_t number = key[0] | std::uint64_t{key[1]} << 32;
    std::size_t at = static_cast<std::size_t>(number % table.slots.size());
    while (table.slots[at] != key && table.slots[at] != Key{}) at = at + 1 == table.slots.size() ? 0 : at + 1;
    return at;
  }

  static void grow(Table& table) {
    Table larger;
    larger.slots.assign(table.slots.size() * 6 / 5 + 1, Key{});
    larger.used = table.used;
    for (const Key& key : table.slots) {
      if (key != Key{}) larger.slots[find(larger, key)] = key;
    }
    table = std::move(larger);
  }

  std::array<Table, 256> tables_;
};

}  // namespace llm
