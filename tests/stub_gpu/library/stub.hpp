// What the parts of the stub share. The stub has no queue and computes nothing: a call does its work before it returns.
// Device memory is host memory, a copy is a memmove, and a kernel is a name that is counted.
#pragma once
#include <driver_types.h>
#include <vector_types.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace stub {

// ---- counts (counts.cpp) -------------------------------------------------------------------------------------------

enum class Kind {
  kernel,  // launched through the runtime: torch's and cuDNN's
  triton,  // launched through the driver: Triton's
  product,
  memset,
  host_to_device,  // the host's memory is pinned here, and pageable in the next two
  device_to_host,
  pageable_to_device,
  device_to_pageable,
  device_to_device,
  host_to_host,
  collective,
  callback,
  graph,  // launches of a graph, by what is in it
  wait,   // the host waits for the device
  query,
  record,          // of an event
  wait_on_device,  // a stream waits for an event
  allocation,
  unknown,  // a call that the stub does not have
};
constexpr int kKinds = int(Kind::unknown) + 1;

void count(Kind kind, const std::string& name, size_t bytes = 0);
const char* name_of(Kind kind);

// ---- the device (runtime.cpp) --------------------------------------------------------------------------------------

constexpr int kMaxDevices = 16;
constexpr int kMajor = 9, kMinor = 0, kProcessors = 132, kSharedBytes = 227 << 10;  // an H100
constexpr const char* kDeviceName = "NVIDIA H100 80GB HBM3 (stub)";

int device_count();      // STUB_GPU_COUNT, at most what CUDA_VISIBLE_DEVICES names
size_t device_memory();  // bytes of each device, STUB_GPU_MEMORY

// The device of this thread. The driver's calls need one that was made current ("bound"); the runtime's bind theirs.
struct Current {
  int device = 0;
  bool bound = false;
};
Current& current();
int bind_current();

cudaError_t fail(cudaError_t error);  // keeps it for cudaGetLastError, and returns it
cudaError_t check_launch(dim3 grid, dim3 block, size_t shared);

// ---- memory (memory.cpp) -------------------------------------------------------------------------------------------

enum class Place { pageable, pinned, device };

struct Block {
  char* begin = nullptr;
  size_t size = 0;
  Place place = Place::pageable;
  int device = 0;
  bool mapped = false;  // by the stub; false for memory that was registered
};

void* allocate(size_t size, Place place);  // null if the device is full
bool release(void* pointer);
Block block_of(const void* pointer);  // one of size 0 for pageable memory
size_t copy_limit();                  // larger copies to a device are counted and not made

// ---- streams (streams.cpp) -----------------------------------------------------------------------------------------

// One piece of work: done at once, or kept as the node of a graph if its stream is captured.
struct Work {
  Kind kind;
  std::string name;
  void* to = nullptr;
  const void* from = nullptr;
  size_t size = 0;
  int value = 0;
  void (*function)(void*) = nullptr;
  void* argument = nullptr;
};

void do_work(const Work& work);  // memory.cpp

// `on_device`: refuses a stream of a device that is not current, as CUDA does for launches and not for copies.
cudaError_t enqueue(cudaStream_t stream, const Work& work, bool on_device);
bool is_captured(cudaStream_t stream);

// Whether a capture forbids this thread to allocate or to wait. Like CUDA's, the attempt spoils the capture.
bool spoils_capture();

}  // namespace stub

// The types behind CUDA's opaque handles.
struct CUgraph_st {
  std::vector<stub::Work> nodes;
};
struct CUgraphExec_st {
  std::vector<stub::Work> nodes;
  std::string contents;
};
namespace stub {
struct Capture {
  unsigned long long id;
  cudaGraph_t graph;
  std::vector<cudaStream_t> streams;  // the first is the one that began it
  bool is_global;                     // forbids waits and allocations to every thread, rather than to its own
  int64_t thread;
  bool spoiled = false;
};
}  // namespace stub
struct CUstream_st {
  int device = 0;
  int priority = 0;
  stub::Capture* capture = nullptr;
};
struct CUevent_st {
  int device = 0;
  unsigned flags = 0;
  bool recorded = false;
  double seconds = 0;
  unsigned long long capture = 0;  // the id of the capture that it was recorded in; 0: none
};
