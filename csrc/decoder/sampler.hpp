// Chooses the next token from logits, in a few passes over them and without a sort.
//
// All options keep a beginning of one order: by likelihood, equal tokens by their id. So an option is the probability
// of the tokens that it keeps, and the token is the one at which the probabilities in this order reach a random share
// of the smallest. Both are one search: by the bits of the distance to the likeliest, as a radix sort would, but only
// in the bucket that has the border.
//
// Probabilities are whole multiples of 2^-42 of the largest, and their sums exact. So an option, the random share and
// the search agree about every sum, in whatever order they add.

#pragma once

#include <cstdint>
#include <vector>

namespace llm {

struct SamplingOptions {
  float repetition_penalty;  // 1: none
  float temperature;         // 0: always the likeliest token
  std::int64_t top_k;        // of equal tokens at the border all stay
  double top_p;              // of equal tokens at the border those with the smallest ids stay
  float min_p;
};

struct Choice {
  std::int64_t token;
  double logprob;  // by the logits alone, in nats; NaN: they are not finite, and `token` means nothing
};

class Sampler {
 public:
  Sampler(std::int64_t vocab_size, const SamplingOptions& options);

  // logits [vocab_size]; held [count]: the tokens so far, for the penalty; 0 <= uniform < 1.
  Choice choose(const float* logits, const std::int64_t* held, std::int64_t count, double uniform);

 private:
  struct Border {
    std::int64_t place;    // of a token among the kept ones
    std::int64_t reached;  // the sum up to it, with its own part
  };

  std::int64_t keep_top_k();
  std::int64_t draw(std::int64_t kept, double uniform);
  template <typename Amount>
  void fill_buckets(std::int64_t kept, const Amount& amount);
  template <typename Amount>
  Border reach(std::int64_t kept, std::int64_t target, const Amount& amount);
  std::int64_t mass(std::int64_t place) const;

  std::int64_t vocab_size_;
  SamplingOptions options_;
  std::vector<float> penalised_;          // [vocab_size]
  std::vector<float> distances_;          // [vocab_size] to the largest logit, over the temperature
  std::vector<float> weights_;            // [vocab_size] e^-distance
  std::vector<std::int64_t> tokens_;      // [vocab_size] after top-k; before it, a place is a token
  std::vector<std::int64_t> buckets_;     // by the upper bits of the distance
  std::vector<std::int64_t> finer_;       // one of them, by the bits below
  std::vector<std::int64_t> candidates_;  // [vocab_size] the places in it
};

}  // namespace llm
