// The loader: threads read sequences from the shards in shuffled order, ahead of time, and write them to the caller's
// memory.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "order.hpp"
#include "shard.hpp"

namespace llm {

// The shards of one split. They are opened when first read; at most kMaxOpenFiles stay open. Safe for many threads.
class Dataset {
 public:
  struct Sequence {
    std::size_t shard;
    std::uint64_t first_token;  // index in the shard; the sequence has seq_len + 1 tokens
  };

  // A shard together with its open file.
  struct Handle {
    std::shared_ptr<const Shard> shard;
    std::shared_ptr<const File> file;
  };

  Dataset(const DatasetSpec& spec, std::vector<ShardSpec> shards, std::uint64_t seq_len);

  std::uint64_t sequences() const { return sequences_before(entries_.size()); }
  std::uint64_t sequences_before(std::size_t shard) const { return shard == 0 ? 0 : sequence_ends_[shard - 1]; }
  Sequence locate(std::uint64_t sequence) const;
  Handle open(std::size_t shard);

 private:
  struct Entry {
    ShardSpec spec;
    std::mutex opening;  // held while the file is opened and verified; taken before mutex_
    std::shared_ptr<const Shard> shard;
    std::shared_ptr<const File> file;
    std::list<std::size_t>::iterator use;
  };

  // As open(), without the check whether the file has changed.
  Handle find(std::size_t shard);

  DatasetSpec spec_;
  std::uint64_t seq_len_;
  std::size_t max_open_files_;
  std::vector<std::uint64_t> sequence_ends_;  // the number of sequences up to and with each shard
  std::vector<std::unique_ptr<Entry>> entries_;
  std::mutex mutex_;
  std::list<std::size_t> uses_;  // the open shards, most recently used first
};

// A caller's buffers for one micro-batch, row-major [micro_batch, seq_len].
struct Slot {
  std::int64_t* input_ids;
  std::int64_t* labels;
  std::int32_t* doc_start;
};

struct LoaderOptions {
  std::uint64_t seq_len;
  std::uint64_t seed;
  std::uint64_t global_batch;  // sequences per step, over all ranks
  std::uint64_t micro_batch;   // sequences per batch
  std::uint64_t rank;
  std::uint64_t world_size;
  std::uint64_t position;  // position of the first step
  std::uint64_t end;       // positions from here on are empty sequences; UINT64_MAX: never
  bool shuffle;
  unsigned threads;
  unsigned prefetch;                       // batches kept ready, and batches that stay valid
  std::vector<std::size_t> source_shards;  // how many of the shards, in order, belong to each source
  std::vector<Stage> stages;               // which source each position reads; used with shuffle only

  std::uint64_t micro_batches() const {  // a step
    const std::uint64_t sequences = micro_batch * world_size;
    return (global_batch + sequences - 1) / sequences;
  }
};

// Threads take tickets 0, 1, 2, ... in turn; ticket k is micro-batch k of this rank and fills slot k mod slots.size().
// next() returns batches in the order of tickets, so the output does not depend on the threads. It throws an error of a
// ticket when its turn comes.
class Loader {
 public:
  enum : int { kEnd = -1, kTimeout = -2, kClosed = -3 };

  static std::size_t slots_needed(unsigned prefetch) { return 2 * std::size_t{prefetch}; }

  // `first_ticket` > 0 continues where another loader stopped.
  Loader(const DatasetSpec& spec, std::vector<ShardSpec> shards, const LoaderOptions& options, std::vector<Slot> slots,
         std::uint64_t first_ticket);
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  // Returns the slot of the next batch, valid for the next `prefetch` calls; or kEnd, kClosed, or kTimeout after a
  // tenth of a second without a batch. If a thread failed to fill it, this and every later call throws the error.
  int next();

  // Returns the number of labels other than -100 at positions [position, position + count), from the document index.
  std::uint64_t targets(std::uint64_t position, std::uint64_t count);

  // Ends the threads after their current batches. After that, nothing writes to the slots.
  void close();

 private:
  struct State {
    std::uint64_t ready = 0;  // ticket + 1 of the batch that the slot holds
    std::exception_ptr error;
  };

  struct Source {
    std::uint64_t first_sequence, sequences;
  };

  std::uint64_t sequence_at(std::uint64_t position) const;
  void work();
  void fill(std::uint64_t ticket, Scratch& scratch);
  void fill_sequence(std::uint64_t sequence, std::int64_t* input_ids, std::int64_t* labels, std::int32_t* doc_start,
                     Scratch& scratch);

  const LoaderOptions options_;
  const std::vector<Slot> slots_;
  Dataset dataset_;
  const Mixture mixture_;
  std::vector<Source> sources_;
  std::uint64_t tickets_;  // number of tickets

  std::mutex mutex_;
  std::condition_variable slot_freed_;
  std::condition_variable batch_ready_;
  std::vector<State> states_;      // state of each slot
  std::uint64_t next_to_fill_;     // ticket
  std::uint64_t next_to_consume_;  // ticket
  std::uint64_t fill_limit_;       // tickets below may be filled
  bool closed_ = false;
  std::mutex join_mutex_;  // closers wait for each other
  std::vector<std::thread> threads_;
};

}  // namespace llm
