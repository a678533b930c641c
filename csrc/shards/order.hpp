// The order of sequences: a pseudo-random permutation of [0, sequences) for each (seed, epoch), computed, not stored.
//
// An alternating Feistel network permutes the range up to the smallest power of two >= `sequences` (Luby and Rackoff
// 1988). A result outside of [0, sequences) is permuted again until it is inside ("cycle walking", Black and Rogaway
// 2002), in fewer than two steps on average. Networks of few bits give some permutations more often than others, so
// small numbers of sequences use six bits. Any change to the numbers below makes a new order: raise kOrderVersion.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
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

// From position `begin` to the next stage, `period` repeated for ever gives the source of each position.
struct Stage {
  std::uint64_t begin;
  std::vector<std::uint16_t> period;
};

// The source of the sequence at each position: the schedules of llm/data/mixture.py, one after the other.
class Mixture {
 public:
  struct Place {
    std::size_t source;
    std::uint64_t index;  // number of sequences of this source at earlier positions, those of earlier stages included
  };

  // The first stage begins at 0, no stage before the one that it follows, and no period is empty.
  explicit Mixture(const std::vector<Stage>& stages) {
    std::uint64_t begin = 0;
    for (const Stage& stage : stages) {
      if (stage.begin < begin || stage.period.empty()) throw std::invalid_argument("a stage out of order, or empty");
      begin = stage.begin;
      for (const std::uint16_t source : stage.period) sources_ = std::max(sources_, std::size_t{source} + 1);
    }
    if (stages.empty() || stages.front().begin != 0) throw std::invalid_argument("no stage begins at position 0");
    // A source goes on where it stopped: its count continues from stage to stage.
    std::vector<std::uint64_t> before(sources_);
    for (std::size_t i = 0; i < stages.size(); ++i) {
      Part part{stages[i].begin, stages[i].period, before, std::vector<std::uint64_t>(sources_), {}};
      for (const std::uint16_t source : part.period) part.earlier.push_back(part.counts[source]++);
      if (i + 1 < stages.size()) {
        const std::uint64_t length = stages[i + 1].begin - part.begin;
        const std::uint64_t periods = length / part.period.size();
        for (std::size_t source = 0; source < sources_; ++source) before[source] += periods * part.counts[source];
        for (std::size_t at = 0; at < length % part.period.size(); ++at) ++before[part.period[at]];
      }
      parts_.push_back(std::move(part));
    }
  }

  std::size_t sources() const { return sources_; }

  Place operator()(std::uint64_t position) const {
    auto part = parts_.rbegin();
    while (part->begin > position) ++part;  // ends at the first one, which begins at 0
    const std::uint64_t offset = position - part->begin;
    const std::uint64_t at = offset % part->period.size();
    const std::size_t source = part->period[at];
    return {source, part->before[source] + offset / part->period.size() * part->counts[source] + part->earlier[at]};
  }

 private:
  struct Part {
    std::uint64_t begin;
    std::vector<std::uint16_t> period;
    std::vector<std::uint64_t> before;   // positions of each source before this stage
    std::vector<std::uint64_t> counts;   // positions of each source in the period
    std::vector<std::uint64_t> earlier;  // at each place of the period, positions before it with the same source
  };

  std::size_t sources_ = 0;
  std::vector<Part> parts_;
};

}  // namespace llm
