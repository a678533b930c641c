// NCCL between processes of this host, which meet in shared memory. Where NCCL would wait for ever because the ranks do
// not make the same call, a call here fails after STUB_GPU_NCCL_SECONDS.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "stub.hpp"

using namespace stub;

namespace {

enum Result { kSuccess = 0, kSystemError = 2, kInvalidUsage = 5, kRemoteError = 6 };
enum Operation { kSum, kProduct, kMax, kMin };

struct UniqueId {
  char name[128];
};

size_t width(int type) {  // of a ncclDataType_t, in bytes
  constexpr size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return bytes[type];
}

template <class T>
void add(void* to, const void* from, size_t size, int operation) {
  auto a = static_cast<T*>(to);
  auto b = static_cast<const T*>(from);
  for (size_t i = 0; i < size / sizeof(T); ++i)
    a[i] = operation == kMax ? std::max(a[i], b[i]) : operation == kMin ? std::min(a[i], b[i]) : T(a[i] + b[i]);
}

// Extremes and sums, of which an average is one here. 16-bit floats stay rank 0's: no kernel computes any.
void combine(int type, void* to, const void* from, size_t size, int operation) {
  void (*const functions[])(void*, const void*, size_t, int) = {add<int8_t>,   add<uint8_t>, add<int32_t>,
                                                                add<uint32_t>, add<int64_t>, add<uint64_t>,
                                                                nullptr,       add<float>,   add<double>};
  if (type < 9 && functions[type]) functions[type](to, from, size, operation);
}

}  // namespace

// A communicator. Each rank has a slot of shared memory, in which it shows its data piece by piece.
struct ncclComm {
  static constexpr size_t kSlot = 1 << 20;
  struct Shared {
    std::atomic<int> arrived, round;
  };
  const int ranks, rank, device = current().device;
  const std::string name;
  Shared* shared = nullptr;
  int splits = 0;

  ncclComm(int ranks, int rank, const std::string& name) : ranks(ranks), rank(rank), name(name) {
    int file = shm_open(name.c_str(), O_CREAT | O_RDWR, 0600);
    size_t size = sizeof(Shared) + kSlot * size_t(ranks);
    if (file < 0 || ftruncate(file, off_t(size))) return;
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return;
    shared = static_cast<Shared*>(memory);
    if (meet()) shm_unlink(name.c_str());  // all have found it
  }

  char* slot(int of) { return reinterpret_cast<char*>(shared + 1) + kSlot * size_t(of); }

  bool meet() {
    static const char* text = getenv("STUB_GPU_NCCL_SECONDS");
    constexpr int kMicroseconds = 20;
    int patience = int((text ? atof(text) : 120) * 1e6 / kMicroseconds);
    if (!shared) return false;
    int round = shared->round;
    if (++shared->arrived == ranks) {
      shared->arrived = 0;
      ++shared->round;
      return true;
    }
    for (; shared->round == round; usleep(kMicroseconds))
      if (!patience--) return fprintf(stderr, "stub GPU: rank %d waits for the others in vain\n", rank), false;
    return true;
  }

  // Shows `size` bytes to the others, `read`s what they show, and waits until all have read.
  template <class Read>
  bool exchange(const void* mine, size_t size, Read read) {
    if (mine) memcpy(slot(rank), mine, size);
    if (!meet()) return false;
    read();
    return meet();
  }
};

// Counts a collective, and makes it piece by piece with `move(offset, size)`.
template <class Move>
static int collective(const char* name, size_t size, cudaStream_t stream, Move move) {
  bind_current();
  if (enqueue(stream, {Kind::collective, name, nullptr, nullptr, size}, true)) return kInvalidUsage;
  if (is_captured(stream) || size > copy_limit()) return kSuccess;
  for (size_t offset = 0; offset < size; offset += ncclComm::kSlot)
    if (!move(offset, std::min(ncclComm::kSlot, size - offset))) return kRemoteError;
  return kSuccess;
}
static int nothing_moves(const char* name, size_t size, cudaStream_t stream) {
  return collective(name, size, stream, [](size_t, size_t) { return true; });
}
static const char* at(const void* pointer, size_t offset) { return static_cast<const char*>(pointer) + offset; }
static char* at(void* pointer, size_t offset) { return static_cast<char*>(pointer) + offset; }

// ---- communicators -------------------------------------------------------------------------------------------------

EXPORT int ncclGetVersion(int* version) {  // the real library's, on which torch's code depends
  auto real = reinterpret_cast<int (*)(int*)>(dlsym(RTLD_NEXT, "ncclGetVersion"));
  return real ? real(version) : kSystemError;
}
EXPORT const char* ncclGetErrorString(int error) { return error ? "the stub GPU's ranks do not meet" : "no error"; }
EXPORT const char* ncclGetLastError(ncclComm*) { return ""; }
EXPORT int ncclGetUniqueId(UniqueId* id) {
  static std::atomic<int> number{0};
  *id = {};
  snprintf(id->name, sizeof id->name, "/stub_gpu-%d-%d", getpid(), ++number);
  return kSuccess;
}
EXPORT int ncclCommInitRank(ncclComm** comm, int ranks, UniqueId id, int rank) {
  *comm = new ncclComm(ranks, rank, id.name);
  return (*comm)->shared ? kSuccess : kSystemError;
}
EXPORT int ncclCommInitRankConfig(ncclComm** comm, int ranks, UniqueId id, int rank, void*) {
  return ncclCommInitRank(comm, ranks, id, rank);
}
EXPORT int ncclCommInitRankScalable(ncclComm** comm, int ranks, int rank, int, UniqueId* ids, void*) {
  return ncclCommInitRank(comm, ranks, *ids, rank);
}
EXPORT int ncclCommSplit(ncclComm* comm, int color, int key, ncclComm** part, void*) {
  int mine[2] = {color, key}, number = 0, rank = 0;
  bool met = comm->exchange(mine, sizeof mine, [&] {
    for (int other = 0; other < comm->ranks; ++other) {
      int theirs[2];
      memcpy(theirs, comm->slot(other), sizeof theirs);
      bool is_before = theirs[1] < key || (theirs[1] == key && other < comm->rank);
      number += theirs[0] == color;
      rank += theirs[0] == color && is_before;
    }
  });
  if (!met) return kRemoteError;
  std::string name = comm->name + "-" + std::to_string(++comm->splits) + "-" + std::to_string(color);
  *part = color < 0 ? nullptr : new ncclComm(number, rank, name);
  return kSuccess;
}
EXPORT int ncclCommCount(ncclComm* comm, int* count) { return *count = comm->ranks, kSuccess; }
EXPORT int ncclCommUserRank(ncclComm* comm, int* rank) { return *rank = comm->rank, kSuccess; }
EXPORT int ncclCommCuDevice(ncclComm* comm, int* device) { return *device = comm->device, kSuccess; }
EXPORT int ncclCommGetAsyncError(ncclComm*, int* error) { return *error = kSuccess; }
EXPORT int ncclRedOpCreatePreMulSum(int* operation, void*, int, int, ncclComm*) { return *operation = kSum; }

// ---- collectives ---------------------------------------------------------------------------------------------------

EXPORT int ncclReduce(const void* from, void* to, size_t number, int type, int operation, int root, ncclComm* comm,
                      cudaStream_t stream) {
  return collective(root < 0 ? "ncclAllReduce" : "ncclReduce", number * width(type), stream,
                    [&](size_t o, size_t size) {
                      return comm->exchange(at(from, o), size, [&] {
                        if (root >= 0 && root != comm->rank) return;
                        memcpy(at(to, o), comm->slot(0), size);
                        for (int other = 1; other < comm->ranks; ++other)
                          combine(type, at(to, o), comm->slot(other), size, operation);
                      });
                    });
}
EXPORT int ncclAllReduce(const void* from, void* to, size_t number, int type, int operation, ncclComm* comm,
                         cudaStream_t stream) {
  return ncclReduce(from, to, number, type, operation, -1, comm, stream);
}
EXPORT int ncclReduceScatter(const void* from, void* to, size_t number, int type, int operation, ncclComm* comm,
                             cudaStream_t stream) {
  size_t share = number * width(type);
  return collective("ncclReduceScatter", share, stream, [&](size_t o, size_t size) {
    std::vector<char> sum(size);  // the result may lie in what is still to be shown
    for (int owner = 0; owner < comm->ranks; ++owner) {
      bool met = comm->exchange(at(from, share * size_t(owner) + o), size, [&] {
        if (owner != comm->rank) return;
        memcpy(sum.data(), comm->slot(0), size);
        for (int other = 1; other < comm->ranks; ++other) combine(type, sum.data(), comm->slot(other), size, operation);
      });
      if (!met) return false;
    }
    memcpy(at(to, o), sum.data(), size);
    return true;
  });
}
EXPORT int ncclAllGather(const void* from, void* to, size_t number, int type, ncclComm* comm, cudaStream_t stream) {
  size_t share = number * width(type);
  return collective("ncclAllGather", share, stream, [&](size_t o, size_t size) {
    return comm->exchange(at(from, o), size, [&] {
      for (int other = 0; other < comm->ranks; ++other)
        memcpy(at(to, share * size_t(other) + o), comm->slot(other), size);
    });
  });
}
EXPORT int ncclBroadcast(const void* from, void* to, size_t number, int type, int root, ncclComm* comm,
                         cudaStream_t stream) {
  return collective("ncclBroadcast", number * width(type), stream, [&](size_t o, size_t size) {
    const char* shown = comm->rank == root ? at(from, o) : nullptr;
    return comm->exchange(shown, size, [&] { memcpy(at(to, o), comm->slot(root), size); });
  });
}
EXPORT int ncclBcast(void* buffer, size_t number, int type, int root, ncclComm* comm, cudaStream_t stream) {
  return ncclBroadcast(buffer, buffer, number, type, root, comm, stream);
}
EXPORT int ncclAlltoAll(const void*, void*, size_t number, int type, ncclComm* comm, cudaStream_t stream) {
  return nothing_moves("ncclAlltoAll", number * width(type) * size_t(comm->ranks), stream);
}
EXPORT int ncclSend(const void*, size_t number, int type, int, ncclComm*, cudaStream_t stream) {
  return nothing_moves("ncclSend", number * width(type), stream);
}
EXPORT int ncclRecv(void*, size_t number, int type, int, ncclComm*, cudaStream_t stream) {
  return nothing_moves("ncclRecv", number * width(type), stream);
}
