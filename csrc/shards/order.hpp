// The order of sequences: a pseudo-random permutation of [0, sequences) for each (seed, epoch), computed, not stored.
//
// An alternating Feistel network permutes the range up to the smallest power of two >= `sequences` (Luby and Rackoff
// 1988). A result outside of [0, sequences) is permuted again until it is inside ("cycle walking", Black and Rogaway
// 2002), in fewer than two steps on average. Networks of few bits give some permutations more often than others, so
// small numbers of sequences use six bits. Any change to the numbers below makes a new order: raise kOrderVersion.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace llm {

constexpr const char* kOrderVersion = "feistel-v1";

class Permutation {
 public:
  // 1 <= sequences <= 2^63.
  Permutation(std::uint64_t seed, std::uint64_t epoch, std::uint64_t sequences) : sequences_(sequences) {
    int bits = kMinBits;
    while (bits < 63 && (std::uint64_t{1} << bits) < sequences) ++bits;
    low_bits_ = bits / 2;
    low_mask_ = (std::uint64_t{1} << low_bits_) - 1;
    high_mask_ = (std::uint64_t{1} << (bits - low_bits_)) - 1;
    // For one seed, different epochs give different streams of keys: each step is a bijection of 64 bits.
    const std::uint64_t stream = mix(mix(seed + kGolden) + epoch);
    for (std::uint64_t round = 0; round < kRounds; ++round) keys_[round] = mix(stream + (round + 1) * kGolden);
  }

  // index < sequences.
  std::uint64_t operator()(std::uint64_t index) const {
    do {
      std::uint64_t low = index & low_mask_;
      std::uint64_t high = index >> low_bits_;
      for (int round = 0; round < kRounds; round += 2) {
        high ^= mix(low ^ keys_[round]) & high_mask_;
        low ^= mix(high ^ keys_[round + 1]) & low_mask_;
      }
      index = (high << low_bits_) | low;
    } while (index >= sequences_);
    return index;
  }

 private:
  static constexpr int kMinBits = 6;
  static constexpr int kRounds = 8;
  static constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15u;

  // The output function of SplitMix64 (Steele, Lea and Flood 2014; constants: Stafford's variant 13).
  static std::uint64_t mix(std::uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }

  std::uint64_t sequences_;
  int low_bits_;
  std::uint64_t low_mask_;
  std::uint64_t high_mask_;
  std::uint64_t keys_[kRounds];
};

// The source of the sequence at each position: a schedule of one period (llm/data/mixture.py), repeated for ever.
class Mixture {
 public:
  struct Place {
    std::size_t source;
    std::uint64_t index;  // number of sequences of this source at earlier positions
  };

  // `period` has at least one entry.
  explicit Mixture(std::vector<std::uint16_t> period) : period_(std::move(period)) {
    for (const std::uint16_t source : period_) {
      if (source >= counts_.size()) counts_.resize(std::size_t{source} + 1);
      earlier_.push_back(counts_[source]++);
    }
  }

  std::size_t sources() const { return counts_.size(); }

  Place operator()(std::uint64_t position) const {
    const std::uint64_t at = position % period_.size();
    const std::size_t source = period_[at];
    return {source, position / period_.size() * counts_[source] + earlier_[at]};
  }

 private:
  std::vector<std::uint16_t> period_;
  std::vector<std::uint64_t> counts_;   // positions of each source in the period
  std::vector<std::uint64_t> earlier_;  // at each place of the period, positions before it with the same source
};

}  // namespace llm
