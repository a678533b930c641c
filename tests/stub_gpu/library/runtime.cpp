// The CUDA runtime (libcudart) without memory and streams: errors, devices and kernels.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "stub.hpp"

namespace stub {
namespace {

constexpr int kDriverVersion = 13000;

size_t number_from(const char* variable, size_t otherwise) {
  const char* text = getenv(variable);
  return text && *text ? strtoull(text, nullptr, 10) : otherwise;
}

thread_local cudaError_t t_last = cudaSuccess;

struct Kernels {
  std::mutex lock;
  std::unordered_map<const void*, std::string> names;  // by the address of the function on the host
};
Kernels& kernels() {
  static auto* all = new Kernels;
  return *all;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  bind_current();
  if (cudaError_t error = check_launch(grid, block, shared)) return fail(error);
  std::string name = "a kernel that was not registered";
  {
    std::lock_guard guard(kernels().lock);
    auto found = kernels().names.find(kernel);
    if (found != kernels().names.end()) name = found->second;
  }
  return enqueue(stream, {Kind::kernel, name}, true);
}

}  // namespace

int device_count() {
  static const int count = [] {
    int all = std::min(kMaxDevices, int(number_from("STUB_GPU_COUNT", 1)));
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) return all;
    if (!*visible || *visible == '-') return 0;
    return std::min(all, 1 + int(std::count(visible, visible + strlen(visible), ',')));
  }();
  return count;
}

size_t device_memory() {
  static const size_t bytes = number_from("STUB_GPU_MEMORY", size_t(81079) << 20);
  return bytes;
}

Current& current() {
  thread_local Current of_this_thread;
  return of_this_thread;
}

int bind_current() {
  current().bound = true;
  return current().device;
}

cudaError_t fail(cudaError_t error) {
  t_last = error;
  return error;
}

cudaError_t check_launch(dim3 grid, dim3 block, size_t shared) {
  bool is_empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
  bool is_large = grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || block.z > 64 ||
                  uint64_t(block.x) * block.y * block.z > 1024;
  if (is_empty || is_large) return cudaErrorInvalidConfiguration;
  return shared > kSharedBytes ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace stub

using namespace stub;

// ---- errors and versions -------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaGetLastError() { return std::exchange(t_last, cudaSuccess); }
EXPORT cudaError_t cudaPeekAtLastError() { return t_last; }

static const struct {
  cudaError_t error;
  const char *name, *text;
} kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported (the stub GPU does not have it)"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported", "not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated", "an earlier call has spoiled the capture"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation", "dependency on uncaptured work"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit", "a default stream depends on a capture"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent", "the event was last recorded in a capture"},
};
EXPORT const char* cudaGetErrorName(cudaError_t error) {
  for (auto& each : kErrors)
    if (each.error == error) return each.name;
  return "cudaErrorUnknown";
}
EXPORT const char* cudaGetErrorString(cudaError_t error) {
  for (auto& each : kErrors)
    if (each.error == error) return each.text;
  return "unknown error";
}
EXPORT cudaError_t cudaDriverGetVersion(int* version) { return *version = kDriverVersion, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return *version = kDriverVersion, cudaSuccess; }

// ---- devices -------------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return *count ? cudaSuccess : fail(cudaErrorNoDevice);
}
EXPORT cudaError_t cudaGetDevice(int* device) { return *device = current().device, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice);
  current() = {device, true};
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, size_t(size), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 1, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = reinterpret_cast<cudaMemPool_t>(1);  // a name: nothing looks behind it
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  return *static_cast<uint64_t*>(value) = 0, cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice);
  *p = {};
  snprintf(p->name, sizeof p->name, "%s", kDeviceName);
  p->uuid.bytes[15] = char(device + 1);
  p->pciBusID = device + 1;
  p->totalGlobalMem = device_memory();
  p->major = kMajor;
  p->minor = kMinor;
  p->multiProcessorCount = kProcessors;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = kSharedBytes;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->reservedSharedMemPerBlock = 1 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = INT32_MAX;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->totalConstMem = 64 << 10;
  p->memPitch = INT32_MAX;
  p->textureAlignment = 512;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->asyncEngineCount = 3;
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->cooperativeLaunch = 1;
  p->streamPrioritiesSupported = p->managedMemory = p->hostRegisterSupported = p->clusterLaunch = 1;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
  const std::unordered_map<int, int> values = {
      {cudaDevAttrMaxThreadsPerBlock, p.maxThreadsPerBlock},
      {cudaDevAttrMaxBlockDimX, p.maxThreadsDim[0]},
      {cudaDevAttrMaxBlockDimY, p.maxThreadsDim[1]},
      {cudaDevAttrMaxBlockDimZ, p.maxThreadsDim[2]},
      {cudaDevAttrMaxGridDimX, p.maxGridSize[0]},
      {cudaDevAttrMaxGridDimY, p.maxGridSize[1]},
      {cudaDevAttrMaxGridDimZ, p.maxGridSize[2]},
      {cudaDevAttrMaxSharedMemoryPerBlock, int(p.sharedMemPerBlock)},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, int(p.sharedMemPerBlockOptin)},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, int(p.sharedMemPerMultiprocessor)},
      {cudaDevAttrReservedSharedMemoryPerBlock, int(p.reservedSharedMemPerBlock)},
      {cudaDevAttrTotalConstantMemory, int(p.totalConstMem)},
      {cudaDevAttrWarpSize, p.warpSize},
      {cudaDevAttrMaxRegistersPerBlock, p.regsPerBlock},
      {cudaDevAttrMaxRegistersPerMultiprocessor, p.regsPerMultiprocessor},
      {cudaDevAttrMultiProcessorCount, p.multiProcessorCount},
      {cudaDevAttrMaxThreadsPerMultiProcessor, p.maxThreadsPerMultiProcessor},
      {cudaDevAttrMaxBlocksPerMultiprocessor, p.maxBlocksPerMultiProcessor},
      {cudaDevAttrComputeCapabilityMajor, p.major},
      {cudaDevAttrComputeCapabilityMinor, p.minor},
      {cudaDevAttrL2CacheSize, p.l2CacheSize},
      {cudaDevAttrGlobalMemoryBusWidth, p.memoryBusWidth},
      {cudaDevAttrClockRate, 1980000},        // kHz
      {cudaDevAttrMemoryClockRate, 2619000},  // kHz
      {cudaDevAttrAsyncEngineCount, p.asyncEngineCount},
      {cudaDevAttrPciBusId, p.pciBusID},
      {cudaDevAttrCanMapHostMemory, 1},
      {cudaDevAttrConcurrentKernels, 1},
      {cudaDevAttrUnifiedAddressing, 1},
      {cudaDevAttrStreamPrioritiesSupported, 1},
      {cudaDevAttrManagedMemory, 1},
      {cudaDevAttrCooperativeLaunch, 1},
      {cudaDevAttrHostRegisterSupported, 1},
  };
  auto found = values.find(int(attribute));
  *value = found == values.end() ? 0 : found->second;
  return cudaSuccess;
}

// ---- kernels -------------------------------------------------------------------------------------------------------

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                                   int*) {
  std::lock_guard guard(kernels().lock);
  kernels().names[host] = name;
}
EXPORT cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  static std::mutex lock;
  static std::unordered_map<const void*, void*> variables;  // nothing needs their size: one page holds each
  std::lock_guard guard(lock);
  void*& memory = variables[symbol];
  if (!memory) memory = allocate(1 << 16, Place::device);
  return *pointer = memory, cudaSuccess;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
static thread_local std::vector<Configuration> t_configurations;
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  t_configurations.push_back({grid, block, shared, stream});
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, cudaStream_t* stream) {
  Configuration last = t_configurations.back();
  t_configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *stream = last.stream;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(const void** kernel, const void* host) { return *kernel = host, cudaSuccess; }
EXPORT cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared,
                                    cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
EXPORT cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared,
                                      cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared,
                                               cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel, void**) {
  return launch(kernel, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 10 * kMajor + kMinor;
  attributes->maxDynamicSharedSizeBytes = kSharedBytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t) {
  return *blocks = std::max(1, 1024 / std::max(1, threads)), cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel, int threads,
                                                                          size_t shared, unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared);
}
EXPORT cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void*, void*, void**, unsigned, void*, void**,
                                       unsigned) {
  *library = reinterpret_cast<cudaLibrary_t>(1);
  return cudaSuccess;
}
EXPORT cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char* name) {
  auto* handle = new std::string(name);
  std::lock_guard guard(kernels().lock);
  kernels().names[handle] = name;
  *kernel = reinterpret_cast<cudaKernel_t>(handle);
  return cudaSuccess;
}
