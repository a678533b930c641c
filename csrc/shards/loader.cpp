#include "loader.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>

#include "error.hpp"

namespace llm {
namespace {

constexpr std::int64_t kNoLoss = -100;  // torch's ignore_index

// One pass over the tokens writes the inputs and, one step later, the labels.
template <typename T>
void widen(const unsigned char* sequence, std::uint64_t seq_len, std::int64_t* __restrict input_ids,
           std::int64_t* __restrict labels) {
  const T* tokens = reinterpret_cast<const T*>(sequence);
  for (std::uint64_t i = 0; i < seq_len; ++i) {
    input_ids[i] = tokens[i];
    labels[i] = tokens[i + 1];
  }
}

// While this object exists, new threads block signals, because Python handles them in its own threads.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&all, fault);
    pthread_sigmask(SIG_BLOCK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

// How many shards one loader keeps open: a quarter of what the process may have (`ulimit -n`), because it has two
// loaders and other files, and at most 256, because more save no time.
std::size_t max_open_files() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return 256;
  return static_cast<std::size_t>(std::clamp<rlim_t>(limit.rlim_cur / 4, 4, 256));
}

}  // namespace

Dataset::Dataset(const DatasetSpec& spec, std::vector<ShardSpec> shards, std::uint64_t seq_len)
    : spec_(spec), seq_len_(seq_len), max_open_files_(max_open_files()) {
  std::uint64_t sequences = 0;
  for (ShardSpec& shard : shards) {
    sequences += shard.tokens == 0 ? 0 : (shard.tokens - 1) / seq_len;
    sequence_ends_.push_back(sequences);
    entries_.push_back(std::make_unique<Entry>());
    entries_.back()->spec = std::move(shard);
  }
}

Dataset::Sequence Dataset::locate(std::uint64_t sequence) const {
  const auto end = std::upper_bound(sequence_ends_.begin(), sequence_ends_.end(), sequence);
  const std::uint64_t first = end == sequence_ends_.begin() ? 0 : *(end - 1);
  return {static_cast<std::size_t>(end - sequence_ends_.begin()), (sequence - first) * seq_len_};
}

Dataset::Handle Dataset::open(std::size_t index) {
  Handle handle = find(index);
  handle.shard->check_unchanged(*handle.file);
  return handle;
}

Dataset::Handle Dataset::find(std::size_t index) {
  Entry& entry = *entries_[index];
  const auto cached = [&](Handle& handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!entry.file) return false;
    uses_.splice(uses_.begin(), uses_, entry.use);
    handle = {entry.shard, entry.file};
    return true;
  };
  Handle handle;
  if (cached(handle)) return handle;

  const std::lock_guard<std::mutex> opening(entry.opening);
  if (cached(handle)) return handle;  // another thread was faster
  auto file = std::make_shared<const File>(entry.spec.path);
  std::shared_ptr<const Shard> shard = entry.shard;
  if (!shard) {
    shard = std::make_shared<const Shard>(entry.spec, spec_, *file);
  } else if (!(file->identity() == shard->identity())) {
    throw ShardError(file->path(), kReplaced);
  }
  std::shared_ptr<const File> evicted;  // closed after the lock is released
  const std::lock_guard<std::mutex> lock(mutex_);
  if (uses_.size() >= max_open_files_) {
    evicted = std::move(entries_[uses_.back()]->file);
    uses_.pop_back();
  }
  uses_.push_front(index);
  entry.shard = shard;
  entry.file = file;
  entry.use = uses_.begin();
  return {shard, file};
}

Loader::Loader(const DatasetSpec& spec, std::vector<ShardSpec> shards, const LoaderOptions& options,
               std::vector<Slot> slots, std::uint64_t first_ticket)
    : options_(options),
      slots_(std::move(slots)),
      dataset_(spec, std::move(shards), options.seq_len),
      mixture_(options.stages),
      tickets_(std::numeric_limits<std::uint64_t>::max()),
      states_(slots_.size()),
      next_to_fill_(first_ticket),
      next_to_consume_(first_ticket),
      fill_limit_(first_ticket + options.prefetch) {
  if (options.end != std::numeric_limits<std::uint64_t>::max()) {
    const std::uint64_t left = options.end > options.position ? options.end - options.position : 0;
    tickets_ = (left + options.global_batch - 1) / options.global_batch * options.micro_batches();
  }
  if (dataset_.sequences() == 0) throw std::invalid_argument("there is no sequence to load");
  std::size_t shard = 0;
  for (const std::size_t count : options.source_shards) {
    const std::uint64_t first_sequence = dataset_.sequences_before(shard);
    sources_.push_back({first_sequence, dataset_.sequences_before(shard += count) - first_sequence});
    if (options.shuffle && sources_.back().sequences == 0)
      throw std::invalid_argument("a source has no sequence to load");
  }
  if (mixture_.sources() > sources_.size()) throw std::invalid_argument("the stages name a source too many");
  const SignalsBlocked blocked;
  try {
    for (unsigned i = 0; i < options.threads; ++i) threads_.emplace_back(&Loader::work, this);
  } catch (...) {
    close();
    throw;
  }
}

Loader::~Loader() { close(); }

int Loader::next() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_) return kClosed;
  if (next_to_consume_ >= tickets_) return kEnd;
  // The batch from `prefetch` calls ago is no longer valid, so its slot may be filled.
  if (next_to_consume_ + options_.prefetch + 1 > fill_limit_) {
    fill_limit_ = next_to_consume_ + options_.prefetch + 1;
    slot_freed_.notify_all();
  }
  const std::uint64_t ticket = next_to_consume_;
  State& state = states_[ticket % slots_.size()];
  const bool ready = batch_ready_.wait_for(lock, std::chrono::milliseconds(100), [&] {
    return closed_ || next_to_consume_ != ticket || state.ready == ticket + 1;
  });
  if (closed_) return kClosed;
  // Another consumer took this one: the caller asks again.
  if (!ready || next_to_consume_ != ticket) return kTimeout;
  if (state.error) std::rethrow_exception(state.error);
  ++next_to_consume_;
  batch_ready_.notify_all();  // other consumers wait for the next one now
  return static_cast<int>(ticket % slots_.size());
}

std::uint64_t Loader::targets(std::uint64_t position, std::uint64_t count) {
  Scratch scratch;
  std::uint64_t targets = 0;
  const std::uint64_t end = position + std::min(count, std::numeric_limits<std::uint64_t>::max() - position);
  for (std::uint64_t p = position; p < std::min(end, options_.end); ++p) {
    const Dataset::Sequence sequence = dataset_.locate(sequence_at(p));
    const Dataset::Handle handle = dataset_.open(sequence.shard);
    const std::uint64_t before = handle.shard->documents_until(*handle.file, sequence.first_token, scratch);
    targets += options_.seq_len -
               (handle.shard->documents_until(*handle.file, sequence.first_token + options_.seq_len, scratch) - before);
  }
  return targets;
}

void Loader::close() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    slot_freed_.notify_all();
    batch_ready_.notify_all();
  }
  const std::lock_guard<std::mutex> lock(join_mutex_);
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

std::uint64_t Loader::sequence_at(std::uint64_t position) const {
  if (!options_.shuffle) return position % dataset_.sequences();
  const Mixture::Place place = mixture_(position);
  const Source& source = sources_[place.source];
  // Each source has a separate order.
  const Permutation permutation(options_.seed + place.source, place.index / source.sequences, source.sequences);
  return source.first_sequence + permutation(place.index % source.sequences);
}

void Loader::work() {
  Scratch scratch;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    slot_freed_.wait(lock, [&] { return closed_ || (next_to_fill_ < fill_limit_ && next_to_fill_ < tickets_); });
    if (closed_) return;
    const std::uint64_t ticket = next_to_fill_++;
    State& state = states_[ticket % slots_.size()];
    lock.unlock();
    std::exception_ptr error;
    try {
      fill(ticket, scratch);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    state.error = error;
    state.ready = ticket + 1;
    if (ticket == next_to_consume_) {
      lock.unlock();  // a consumer that wakes up would wait for it
      batch_ready_.notify_all();
      lock.lock();
    }
  }
}

void Loader::fill(std::uint64_t ticket, Scratch& scratch) {
  const Slot& slot = slots_[ticket % slots_.size()];
  const std::uint64_t step = ticket / options_.micro_batches();
  const std::uint64_t micro_batch = ticket % options_.micro_batches();
  const std::uint64_t begin = options_.position + step * options_.global_batch;
  for (std::uint64_t b = 0; b < options_.micro_batch; ++b) {
    const std::uint64_t offset = (micro_batch * options_.world_size + options_.rank) * options_.micro_batch + b;
    const std::uint64_t at = b * options_.seq_len;
    if (offset < options_.global_batch && begin + offset < options_.end) {
      fill_sequence(sequence_at(begin + offset), slot.input_ids + at, slot.labels + at, slot.doc_start + at, scratch);
    } else {
      std::fill_n(slot.input_ids + at, options_.seq_len, 0);
      std::fill_n(slot.labels + at, options_.seq_len, kNoLoss);
      std::fill_n(slot.doc_start + at, options_.seq_len, 0);
    }
  }
}

void Loader::fill_sequence(std::uint64_t sequence, std::int64_t* input_ids, std::int64_t* labels,
                           std::int32_t* doc_start, Scratch& scratch) {
  const Dataset::Sequence place = dataset_.locate(sequence);
  const Dataset::Handle handle = dataset_.open(place.shard);
  const std::uint64_t seq_len = options_.seq_len;
  scratch.tokens.resize((seq_len + 1) * handle.shard->token_bytes());
  handle.shard->read_tokens(*handle.file, place.first_token, seq_len + 1, scratch.tokens.data(), scratch);
  if (handle.shard->token_bytes() == 2) {
    widen<std::uint16_t>(scratch.tokens.data(), seq_len, input_ids, labels);
  } else {
    widen<std::uint32_t>(scratch.tokens.data(), seq_len, input_ids, labels);
  }
  // A document that begins at token 0 of the sequence changes nothing: the step to this token belongs to the previous
  // sequence.
  std::uint64_t begin = 0;
  handle.shard->visit_starts(*handle.file, place.first_token + 1, place.first_token + seq_len, scratch,
                             [&](std::uint64_t start) {
                               const std::uint64_t next = start - place.first_token;
                               labels[next - 1] = kNoLoss;
                               std::fill(doc_start + begin, doc_start + next, static_cast<std::int32_t>(begin));
                               begin = next;
                             });
  std::fill(doc_start + begin, doc_start + seq_len, static_cast<std::int32_t>(begin));
}

}  // namespace llm
