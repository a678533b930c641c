// Memory and copies. A device's memory is mapped and not touched, so 80 GB "on the device" cost the host nothing until
// something is copied there.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "stub.hpp"

namespace stub {
namespace {

constexpr size_t kPage = 4096;

struct Blocks {
  std::mutex lock;
  std::map<const char*, Block> by_begin;
  size_t used[kMaxDevices] = {};
};
Blocks& blocks() {
  static auto* all = new Blocks;
  return *all;
}

// Gives whole pages of zeroes back to the host instead of writing them.
void fill(char* begin, int value, size_t size) {
  if (value == 0 && size >= 4 * kPage) {
    char* first = begin + (kPage - uintptr_t(begin) % kPage) % kPage;
    size_t whole = size_t(begin + size - first) / kPage * kPage;
    if (madvise(first, whole, MADV_DONTNEED) == 0) {
      memset(begin, 0, size_t(first - begin));
      memset(first + whole, 0, size_t(begin + size - first) - whole);
      return;
    }
  }
  if (size <= copy_limit()) memset(begin, value, size);
}

cudaError_t allocate_into(void** pointer, size_t size, Place place, const char* name) {
  bind_current();
  *pointer = nullptr;
  if (spoils_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  count(Kind::allocation, name, size);
  if (size) *pointer = allocate(size, place);
  return size && !*pointer ? fail(cudaErrorMemoryAllocation) : cudaSuccess;
}

cudaError_t release_checked(void* pointer, const char* name) {
  bind_current();
  if (!pointer) return cudaSuccess;
  if (spoils_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  count(Kind::allocation, name);
  return release(pointer) ? cudaSuccess : fail(cudaErrorInvalidValue);
}

// The kind of a copy, by where the memory lies. An error if the caller says otherwise.
cudaError_t kind_of_copy(const void* to, const void* from, cudaMemcpyKind said, Kind* kind) {
  Place target = block_of(to).place, source = block_of(from).place;
  bool to_device = target == Place::device, from_device = source == Place::device;
  bool says_to = said == cudaMemcpyHostToDevice || said == cudaMemcpyDeviceToDevice;
  bool says_from = said == cudaMemcpyDeviceToHost || said == cudaMemcpyDeviceToDevice;
  bool is_wrong = (says_to && target == Place::pageable) || (says_from && source == Place::pageable) ||
                  (!says_to && to_device) || (!says_from && from_device);
  if (said != cudaMemcpyDefault && is_wrong) return fail(cudaErrorInvalidValue);
  if (to_device && from_device)
    *kind = Kind::device_to_device;
  else if (to_device)
    *kind = source == Place::pinned ? Kind::host_to_device : Kind::pageable_to_device;
  else if (from_device)
    *kind = target == Place::pinned ? Kind::device_to_host : Kind::device_to_pageable;
  else
    *kind = Kind::host_to_host;
  return cudaSuccess;
}

}  // namespace

size_t copy_limit() {
  static const char* text = getenv("STUB_GPU_COPY_LIMIT");
  static const size_t limit = text ? strtoull(text, nullptr, 10) : size_t(64) << 20;
  return limit;
}

void* allocate(size_t size, Place place) {
  size = (std::max<size_t>(size, 1) + 511) / 512 * 512;
  int device = current().device;
  std::lock_guard guard(blocks().lock);
  size_t& used = blocks().used[device];
  if (place == Place::device && used + size > device_memory()) return nullptr;
  void* begin = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (begin == MAP_FAILED) return nullptr;
  if (place == Place::device) used += size;
  char* at = static_cast<char*>(begin);
  blocks().by_begin[at] = {at, size, place, device, true};
  return begin;
}

bool release(void* pointer) {
  std::lock_guard guard(blocks().lock);
  auto found = blocks().by_begin.find(static_cast<char*>(pointer));
  if (found == blocks().by_begin.end()) return false;
  Block block = found->second;
  blocks().by_begin.erase(found);
  if (block.place == Place::device) blocks().used[block.device] -= block.size;
  if (block.mapped) munmap(block.begin, block.size);
  return true;
}

Block block_of(const void* pointer) {
  auto at = static_cast<const char*>(pointer);
  std::lock_guard guard(blocks().lock);
  auto after = blocks().by_begin.upper_bound(at);
  if (after == blocks().by_begin.begin()) return {};
  const Block& block = std::prev(after)->second;
  return at < block.begin + block.size ? block : Block{};
}

void do_work(const Work& work) {
  switch (work.kind) {
    case Kind::memset:
      return fill(static_cast<char*>(work.to), work.value, work.size);
    case Kind::host_to_device:
    case Kind::pageable_to_device:
    case Kind::device_to_device:
      if (work.size > copy_limit()) return;  // nothing reads it, and the host's memory is small
      [[fallthrough]];
    case Kind::device_to_host:
    case Kind::device_to_pageable:
    case Kind::host_to_host:
      memmove(work.to, work.from, work.size);
      return;
    case Kind::callback:
      return work.function(work.argument);
    default:
      return;  // a computation
  }
}

}  // namespace stub

using namespace stub;

EXPORT cudaError_t cudaMalloc(void** pointer, size_t size) {
  return allocate_into(pointer, size, Place::device, "cudaMalloc");
}
EXPORT cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t) {
  return allocate_into(pointer, size, Place::device, "cudaMallocAsync");
}
EXPORT cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  return allocate_into(pointer, size, Place::pinned, "cudaHostAlloc");
}
EXPORT cudaError_t cudaFree(void* pointer) { return release_checked(pointer, "cudaFree"); }
EXPORT cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release_checked(pointer, "cudaFreeAsync"); }
EXPORT cudaError_t cudaFreeHost(void* pointer) { return release_checked(pointer, "cudaFreeHost"); }

EXPORT cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  count(Kind::allocation, "cudaHostRegister", size);
  char* begin = static_cast<char*>(pointer);
  std::lock_guard guard(blocks().lock);
  blocks().by_begin[begin] = {begin, size, Place::pinned, bind_current(), false};
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostUnregister(void* pointer) { return release_checked(pointer, "cudaHostUnregister"); }

EXPORT cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  int device = bind_current();
  std::lock_guard guard(blocks().lock);
  *total = device_memory();
  *available = *total - blocks().used[device];
  return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  Block block = block_of(pointer);
  *attributes = {};
  attributes->hostPointer = const_cast<void*>(pointer);
  attributes->device = -2;
  if (!block.size) return attributes->type = cudaMemoryTypeUnregistered, cudaSuccess;
  attributes->type = block.place == Place::device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  attributes->device = block.device;
  attributes->devicePointer = const_cast<void*>(pointer);
  if (block.place == Place::device) attributes->hostPointer = nullptr;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind said, cudaStream_t stream) {
  bind_current();
  Kind kind{};
  if (size == 0) return cudaSuccess;
  if (cudaError_t error = kind_of_copy(to, from, said, &kind)) return error;
  return enqueue(stream, {kind, "cudaMemcpyAsync", to, from, size}, false);
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind said) {
  if (spoils_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  if (block_of(to).place != Place::device || block_of(from).place != Place::device) count(Kind::wait, "cudaMemcpy");
  return cudaMemcpyAsync(to, from, size, said, nullptr);
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
}
EXPORT cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind said, cudaStream_t stream) {
  for (size_t row = 0; row < height; ++row) {
    auto target = static_cast<char*>(to) + row * to_pitch;
    auto source = static_cast<const char*>(from) + row * from_pitch;
    if (cudaError_t error = cudaMemcpyAsync(target, source, width, said, stream)) return error;
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t stream) {
  bind_current();
  if (size == 0) return cudaSuccess;
  if (!block_of(pointer).size) return fail(cudaErrorInvalidValue);
  return enqueue(stream, {Kind::memset, "cudaMemset", pointer, nullptr, size, value}, false);
}
EXPORT cudaError_t cudaMemset(void* pointer, int value, size_t size) {
  return cudaMemsetAsync(pointer, value, size, nullptr);
}
