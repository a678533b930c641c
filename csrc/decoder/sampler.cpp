#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "../simd.hpp"

namespace llm {
namespace {

constexpr float kUnit = 4398046511104.0f;                      // 2^42
constexpr std::int64_t kMaxVocabSize = std::int64_t{1} << 20;  // the sum of so many masses is below 2^63
constexpr std::int64_t kBlock = 1024;  // numbers that are added in fp32; the sums of blocks in fp64
constexpr std::size_t kBuckets = 2048;

// Returns the largest of x [n]; numbers that are NaN are passed over.
template <int Lanes>
LLM_INLINE float largest_of(const float* x, std::int64_t n) {
  constexpr int kParts = 4;  // so that comparisons do not wait for each other
  Floats<Lanes> best[kParts];
  for (auto& lanes : best) lanes = Floats<Lanes>{} - __builtin_inff();
  std::int64_t i = 0;
  for (; i + kParts * Lanes <= n; i += kParts * Lanes) {
    for (int part = 0; part < kParts; ++part) {
      Floats<Lanes> values;
      load<Lanes>(x + i + part * Lanes, values);
      maximum<Lanes>(values, best[part]);
    }
  }
  float result = -__builtin_inff();
  for (const auto& lanes : best) {
    for (int lane = 0; lane < Lanes; ++lane) result = lanes[lane] > result ? lanes[lane] : result;
  }
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// Writes the distances of x [n] to its largest number over the temperature, and e^-distance, unless they are null.
// Returns the sum of the latter: NaN if a number is NaN or infinite, or if all are -infinite.
template <int Lanes>
LLM_INLINE double exponentials_of(const float* x, std::int64_t n, float largest, float temperature, float* distances,
                                  float* weights) {
  double total = 0;
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t width = n - begin < kBlock ? n - begin : kBlock;
    Floats<Lanes> sums = {};
    for_columns<Lanes>(width, [&](std::int64_t column, const auto& read, const auto& write) LLM_INLINE_LAMBDA {
      const std::int64_t i = begin + column;
      Floats<Lanes> value;
      read(x + i, value);
      // The difference first: a tiny temperature must not overflow. + 0: of -0.0 and 0.0 it is -0.0, whose bits are
      // large.
      const Floats<Lanes> distance = (largest - value + 0.0f) / temperature;
      Floats<Lanes> weight = distance * -kLog2E;
      exp2<Lanes>(weight);
      if (distances != nullptr) {
        write(distances + i, distance);
        write(weights + i, weight);
      }
      for (std::int64_t lane = n - i; lane < Lanes; ++lane) weight[lane] = 0;  // these lanes have no number
      sums += weight;
    });
    total += static_cast<double>(sum<Lanes>(sums));
  }
  return total;
}

struct Passes {
  float (*largest)(const float*, std::int64_t);
  double (*exponentials)(const float*, std::int64_t, float, float, float*, float*);
};

#define LLM_PASSES(name, target, lanes)                                                                               \
  struct name {                                                                                                       \
    target static float largest(const float* x, std::int64_t n) { return largest_of<lanes>(x, n); }                   \
    target static double exponentials(const float* x, std::int64_t n, float top, float temperature, float* distances, \
                                      float* weights) {                                                               \
      return exponentials_of<lanes>(x, n, top, temperature, distances, weights);                                      \
    }                                                                                                                 \
    static Passes kernels() { return {largest, exponentials}; }                                                       \
  }

LLM_PASSES(Portable, , 4);
LLM_PASSES(Avx2, LLM_TARGET_AVX2, 8);
LLM_PASSES(Avx512, LLM_TARGET_AVX512, 16);

const Passes& passes() {
  static const Passes best = best_kernels<Portable, Avx2, Avx512>();
  return best;
}

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

// The order of numbers >= 0 is the order of their bits.
std::uint32_t bits(float value) {
  std::uint32_t result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

}  // namespace

Sampler::Sampler(std::int64_t vocab_size, const SamplingOptions& options)
    : vocab_size_(vocab_size),
      options_(options),
      penalised_(size(vocab_size)),
      distances_(size(vocab_size)),
      weights_(size(vocab_size)),
      tokens_(size(vocab_size)),
      buckets_(kBuckets),
      finer_(kBuckets),
      candidates_(size(vocab_size)) {
  if (vocab_size > kMaxVocabSize) throw std::invalid_argument("sampling knows at most 2^20 tokens");
}

Choice Sampler::choose(const float* logits, const std::int64_t* held, std::int64_t count, double uniform) {
  const bool greedy = options_.temperature == 0, penalised = options_.repetition_penalty != 1 && count > 0;
  const bool once = !penalised && (greedy || options_.temperature == 1);  // what is drawn from has the logprobs too
  const float* x = logits;
  float top = passes().largest(x, vocab_size_);
  float* distances = once && !greedy ? distances_.data() : nullptr;  // elsewhere only their sum is needed
  double total = passes().exponentials(x, vocab_size_, top, 1, distances, weights_.data());
  const double normaliser = top + std::log(total);
  if (penalised) {
    std::copy_n(logits, vocab_size_, penalised_.begin());
    for (std::int64_t i = 0; i < count; ++i) {
      const float logit = logits[held[i]], penalty = options_.repetition_penalty;
      penalised_[size(held[i])] = logit > 0 ? logit / penalty : logit * penalty;  // once, even if the token comes twice
    }
    x = penalised_.data();
    top = passes().largest(x, vocab_size_);
  }
  if (!once) {
    const float temperature = greedy ? 1 : options_.temperature;
    total += passes().exponentials(x, vocab_size_, top, temperature, distances_.data(), weights_.data());
  }
  if (std::isnan(total)) return {0, total};
  std::int64_t token;
  if (greedy) {
    token = std::find(x, x + vocab_size_, top) - x;
  } else if (options_.top_k < vocab_size_) {
    token = tokens_[size(draw(keep_top_k(), uniform))];
  } else {
    token = draw(vocab_size_, uniform);
  }
  return {token, logits[token] - normaliser};
}

// Moves the k likeliest tokens, and those equal to the last of them, to the beginning. Returns their number.
std::int64_t Sampler::keep_top_k() {
  const auto one = [](std::int64_t) { return std::int64_t{1}; };
  fill_buckets(vocab_size_, one);
  const float border = distances_[size(reach(vocab_size_, options_.top_k, one).place)];
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < vocab_size_; ++i) {
    const float distance = distances_[size(i)];
    // Written always, and kept or not by the count: a branch would be mispredicted. kept <= i, so nothing is lost.
    tokens_[size(kept)] = i;
    weights_[size(kept)] = weights_[size(i)];
    distances_[size(kept)] = distance;
    kept += distance <= border;
  }
  return kept;
}

// Returns the place of the token that the random number chooses among the kept ones, after top-p and min-p.
std::int64_t Sampler::draw(std::int64_t kept, double uniform) {
  const auto mass = [this](std::int64_t place) { return this->mass(place); };
  fill_buckets(kept, mass);
  std::int64_t total = 0;
  for (const std::int64_t part : buckets_) total += part;
  std::int64_t left = total;
  if (options_.top_p < 1) {
    const auto wanted = static_cast<std::int64_t>(std::ceil(options_.top_p * static_cast<double>(total)));
    left = reach(kept, std::clamp(wanted, std::int64_t{1}, total), mass).reached;
  }
  if (options_.min_p > 0) {
    std::int64_t likely = 0;
    // The largest weight is 1.
    for (std::int64_t i = 0; i < kept; ++i) likely += mass(i) & -std::int64_t{weights_[size(i)] >= options_.min_p};
    left = std::min(left, likely);
  }
  const auto target = static_cast<std::int64_t>(uniform * static_cast<double>(left)) + 1;
  return reach(kept, std::min(target, left), mass).place;  // the product may have been rounded up to `left`
}

std::int64_t Sampler::mass(std::int64_t place) const {
  return static_cast<std::int64_t>(weights_[size(place)] * kUnit);
}

template <typename Amount>
void Sampler::fill_buckets(std::int64_t kept, const Amount& amount) {
  // Two sums a bucket, because an addition to the same place waits for the last one.
  std::fill(buckets_.begin(), buckets_.end(), 0);
  std::fill(finer_.begin(), finer_.end(), 0);
  std::int64_t i = 0;
  for (; i + 2 <= kept; i += 2) {
    buckets_[bits(distances_[size(i)]) >> 21] += amount(i);
    finer_[bits(distances_[size(i + 1)]) >> 21] += amount(i + 1);
  }
  if (i < kept) buckets_[bits(distances_[size(i)]) >> 21] += amount(i);
  for (std::size_t bucket = 0; bucket < kBuckets; ++bucket) buckets_[bucket] += finer_[bucket];
}

// Returns the first token, in the order of likelihood, at which the sum of the amounts reaches the target: at least 1,
// at most the sum of all. `buckets_` has the amounts.
template <typename Amount>
Sampler::Border Sampler::reach(std::int64_t kept, std::int64_t target, const Amount& amount) {
  std::int64_t sum = 0;
  const auto find = [&](const std::vector<std::int64_t>& buckets) {
    std::uint32_t found = 0;
    while (sum + buckets[found] < target) sum += buckets[found++];
    return found;
  };
  const std::uint32_t bucket = find(buckets_);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < kept; ++i) {
    candidates_[size(count)] = i;
    count += bits(distances_[size(i)]) >> 21 == bucket;
  }
  for (const int shift : {10, 0}) {
    const auto finer = [&](std::int64_t place) { return (bits(distances_[size(place)]) >> shift) % kBuckets; };
    std::fill(finer_.begin(), finer_.end(), 0);
    for (std::int64_t j = 0; j < count; ++j) finer_[finer(candidates_[size(j)])] += amount(candidates_[size(j)]);
    const std::uint32_t chosen = find(finer_);
    const auto begin = candidates_.begin();
    count = std::remove_if(begin, begin + count, [&](std::int64_t place) { return finer(place) != chosen; }) - begin;
  }
  // These are equal, in the order of their ids.
  std::int64_t j = 0;
  while (sum + amount(candidates_[size(j)]) < target) sum += amount(candidates_[size(j++)]);
  return {candidates_[size(j)], sum + amount(candidates_[size(j)])};
}

}  // namespace llm
