// One step of decoding on a CPU: a token more in each row of a batch, from the model's own weights.
//
// Decoding is bound by reading the weights. So every matrix is read once a step, row by row at the memory's rate, by
// threads that meet only where one needs what the others computed. llm/model/transformer.py is the model; what is computed here is
// Transformer.step with activations in fp32, also where the weights are bf16.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace llm {

// Threads that run one function together, each with its number. They sleep between calls.
class Team {
 public:
  explicit Team(unsigned threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  unsigned size() const { return static_cast<unsigned>(workers_.size()) + 1; }
  void run(void (*work)(void* argument, unsigned thread), void* argument);
  // Within `run`: waits until every thread has come here.
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
  bool bf16;  // of the matrices; else fp32
};

// Norm weights are fp32; matrices are [out, in], row by row. Nothing is copied.
struct DecoderLayer {
  const float *attn_norm, *mlp_norm;
  const float *q_norm, *k_norm;  // or null
  const void *qkv, *o_proj, *gate_up, *down_proj;
};

struct DecoderMemory {
  std::vector<DecoderLayer> layers;
  const void *embed_tokens, *lm_head;
  const float* norm;
  float *k, *v;               // [n_layers, batch, n_kv_heads, max_len, head_dim]
  const float *cos, *sin;     // [max_len, head_dim / 2]
  const std::int64_t* first;  // [batch], each row's first slot
};

class Decoder {
 public:
  Decoder(const DecoderShape& shape, DecoderMemory memory, unsigned threads);

  // tokens [batch] go to slot `position` of the cache; writes the logits [batch, vocab_size] after them.
  void step(const std::int64_t* tokens, std::int64_t position, float* logits);

 private:
  // What a thread computes in is the same whatever the weights' type.
  template <typename Weight>
  void work(unsigned thread);
  template <typename Weight>
  void attend(const DecoderLayer& layer, std::size_t index, std::int64_t unit, std::vector<float>& scores);

  DecoderShape shape_;
  DecoderMemory memory_;
  Team team_;
  std::vector<float> stream_, qkv_, attended_, inner_;  // [batch, ...]
  std::vector<std::vector<float>> normed_, scores_;     // each thread's own
  const std::int64_t* tokens_ = nullptr;
  std::int64_t position_ = 0;
  float* logits_ = nullptr;
};

}  // namespace llm
