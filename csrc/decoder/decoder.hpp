// One step of decoding on a CPU: one token more for each sequence of a batch, from the model's own weights.
//
// Decoding is bound by reading the weights. So every matrix is read once per step, row by row at the speed of memory,
// by threads that wait for each other only if one needs the results of the others. The ops and their order come from
// the modules of llm/model/transformer.py (`decoder_steps`). Activations are fp32, even if the weights are bf16.
//
// To add an op: a line in Op and in decoder_step, and a case in Decoder::work.

#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace llm {

// Threads that run one function together, each with its own number. They sleep between calls.
class Team {
 public:
  explicit Team(unsigned threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  unsigned size() const { return static_cast<unsigned>(workers_.size()) + 1; }
  void run(void (*work)(void* argument, unsigned thread), void* argument);
  // Inside `run`: waits until every thread has called it.
  void meet();

 private:
  void serve(unsigned thread);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  void (*work_)(void*, unsigned) = nullptr;
  void* argument_ = nullptr;
  std::uint64_t calls_ = 0;
  bool stop_ = false;
  std::atomic<unsigned> arrived_{0}, meetings_{0};
};

struct DecoderShape {
  std::int64_t n_heads, n_kv_heads, head_dim, d_model, d_ff, vocab_size, batch, max_len;
  float norm_eps;
  bool bf16;  // dtype of the matrices: bf16 or fp32
};

enum class Op { kEmbedding, kRmsNorm, kAttention, kSwiglu, kLmHead };

// An op and its weights. Norms and biases are fp32; matrices are [out, in], row by row. Nothing is copied.
//   embedding: weight. Begins the stream.      rms_norm: weight. Of the stream, for the next op.
//   attention: qkv, o_proj, q_norm, k_norm, biases of qkv and o_proj (all but two may be null). Adds to the stream.
//   swiglu: gate_up, down_proj. Adds to the stream.      lm_head: weight. Ends with the logits.
struct DecoderStep {
  Op op;
  std::array<const void*, 6> weights;
};

struct DecoderWeight {
  const void* data;
  std::int64_t size;  // elements
};

// Throws std::invalid_argument for an op that the decoder does not know, or whose weights are too small for the shape.
DecoderStep decoder_step(const std::string& op, const std::vector<DecoderWeight>& weights, const DecoderShape& shape);

struct DecoderCache {
  float *k, *v;               // [n_layers, batch, n_kv_heads, max_len, head_dim]
  const float *cos, *sin;     // [max_len, head_dim / 2]
  const std::int64_t* first;  // [batch], the first slot of each sequence
};

class Decoder {
 public:
  Decoder(const DecoderShape& shape, std::vector<DecoderStep> steps, const DecoderCache& cache, unsigned threads);

  // tokens [batch] go to slot `position` of the cache; writes the logits [batch, vocab_size] after them.
  void step(const std::int64_t* tokens, std::int64_t position, float* logits);

 private:
  // What a thread computes in is the same whatever the weights' type.
  template <typename Weight>
  void work(unsigned thread);
  template <typename Weight>
  void attend(const DecoderStep& step, std::int64_t layer, std::int64_t unit, std::vector<float>& scores);

  DecoderShape shape_;
  std::vector<DecoderStep> steps_;
  DecoderCache cache_;
  Team team_;
  std::vector<float> stream_, qkv_, attended_, inner_;  // [batch, ...]
  std::vector<std::vector<float>> normed_, scores_;     // per thread
  const std::int64_t* tokens_ = nullptr;
  std::int64_t position_ = 0;
  float* logits_ = nullptr;
};

}  // namespace llm
