// The CUDA driver (libcuda), as Triton's launcher, Inductor's and torch call it. A CUresult has a cudaError_t's
// numbers.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "stub.hpp"

using namespace stub;

extern "C" {  // the runtime's, which are the same
const char* cudaGetErrorString(cudaError_t);
const char* cudaGetErrorName(cudaError_t);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*);
}

namespace {

constexpr int kNoDevice = 100, kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500, kNotSupported = 801;

struct Function {
  std::string name;
  int device;
};

int launch(const Function* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  if (!current().bound) return kInvalidContext;
  if (cudaError_t error = check_launch(grid, block, shared)) return error;
  if (function->device != current().device) return kInvalidHandle;
  return enqueue(stream, {Kind::triton, function->name}, true);
}

int not_supported() {
  count(Kind::unknown, "a function of the driver that was asked for by name");
  return kNotSupported;
}

// The newest version of a function of this library, or one that answers "not supported".
void* function_named(const char* symbol) {
  Dl_info self;
  dladdr(reinterpret_cast<void*>(&not_supported), &self);
  void* library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  for (const char* suffix : {"_v3", "_v2", ""})
    if (void* found = dlsym(library, (std::string(symbol) + suffix).c_str())) return found;
  return reinterpret_cast<void*>(&not_supported);
}

}  // namespace

EXPORT int cuInit(unsigned) { return device_count() ? 0 : kNoDevice; }
EXPORT int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
EXPORT int cuGetErrorString(int error, const char** text) { return *text = cudaGetErrorString(cudaError_t(error)), 0; }
EXPORT int cuGetErrorName(int error, const char** text) { return *text = cudaGetErrorName(cudaError_t(error)), 0; }
EXPORT int cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* status) {
  *function = function_named(symbol);
  if (status) *status = 0;
  return 0;
}
EXPORT int cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* status) {
  *function = function_named(symbol);
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
EXPORT int cuGetExportTable(const void** table, const void*) { return *table = nullptr, kNotFound; }

// ---- devices and contexts: a context is its device's number plus one
// -------------------------------------------------

EXPORT int cuDeviceGetCount(int* count) { return *count = device_count(), 0; }
EXPORT int cuDeviceGet(int* device, int index) { return *device = index, index < device_count() ? 0 : 101; }
EXPORT int cuDeviceGetName(char* text, int size, int) { return snprintf(text, size_t(size), "%s", kDeviceName), 0; }
EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = device_memory(), 0; }
EXPORT int cuDeviceGetUuid(char* uuid, int device) {
  memset(uuid, 0, 16);
  uuid[15] = char(device + 1);
  return 0;
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, cudaDeviceAttr(attribute), device);
}
EXPORT int cuCtxGetCurrent(uintptr_t* context) {
  return *context = current().bound ? uintptr_t(current().device) + 1 : 0, 0;
}
EXPORT int cuCtxSetCurrent(uintptr_t context) {
  current().bound = context;
  if (context) current().device = int(context) - 1;
  return 0;
}
EXPORT int cuCtxPushCurrent_v2(uintptr_t context) { return cuCtxSetCurrent(context); }
EXPORT int cuCtxPopCurrent_v2(uintptr_t* context) { return context ? cuCtxGetCurrent(context) : 0; }
EXPORT int cuCtxGetDevice(int* device) { return *device = current().device, current().bound ? 0 : kInvalidContext; }
EXPORT int cuCtxSynchronize() { return cudaDeviceSynchronize(); }
EXPORT int cuDevicePrimaryCtxRetain(uintptr_t* context, int device) { return *context = uintptr_t(device) + 1, 0; }
EXPORT int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = current().bound && current().device == device;
  return 0;
}

// ---- modules and launches ------------------------------------------------------------------------------------------

EXPORT int cuModuleLoadData(void** module, const void*) {  // its functions are found by any name
  if (!current().bound) return kInvalidContext;
  if (spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  return *module = reinterpret_cast<void*>(uintptr_t(current().device) + 1), 0;
}
EXPORT int cuModuleLoadDataEx(void** module, const void* image, unsigned, void*, void*) {
  return cuModuleLoadData(module, image);
}
EXPORT int cuModuleLoad(void** module, const char*) { return cuModuleLoadData(module, nullptr); }
EXPORT int cuModuleUnload(void*) { return 0; }
EXPORT int cuModuleGetFunction(Function** function, uintptr_t module, const char* name) {
  return *function = new Function{name, int(module) - 1}, 0;
}
EXPORT int cuFuncGetAttribute(int* value, int attribute, Function*) {
  // The most threads a program; shared, constant and local bytes; registers; versions of the code.
  constexpr int values[] = {1024, 0, 0, 0, 64, 90, 90};
  return *value = attribute < 7 ? values[attribute] : 0, 0;
}
EXPORT int cuFuncSetAttribute(Function*, int, int) { return 0; }
EXPORT int cuFuncSetCacheConfig(Function*, int) { return 0; }
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function*, int, size_t) { return *blocks = 2, 0; }
EXPORT int cuOccupancyMaxActiveClusters(int* clusters, Function*, const void*) { return *clusters = 16, 0; }
EXPORT int cuTensorMapEncodeTiled(void* map, ...) { return memset(map, 0, 128), 0; }

EXPORT int cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, cudaStream_t stream, void**, void**) {
  return launch(f, dim3{gx, gy, gz}, dim3{bx, by, bz}, shared, stream);
}
EXPORT int cuLaunchCooperativeKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                     unsigned bz, unsigned shared, cudaStream_t stream, void**) {
  return launch(f, dim3{gx, gy, gz}, dim3{bx, by, bz}, shared, stream);
}
struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  cudaStream_t stream;
  void* attributes;
  unsigned number;
};
EXPORT int cuLaunchKernelEx(const LaunchConfig* c, Function* f, void**, void**) {
  dim3 grid{c->grid[0], c->grid[1], c->grid[2]}, block{c->block[0], c->block[1], c->block[2]};
  return launch(f, grid, block, c->shared, c->stream);
}

// ---- memory --------------------------------------------------------------------------------------------------------

// Triton asks this for every pointer that it is given. A pageable one has no address on the device.
EXPORT int cuPointerGetAttribute(void* value, int attribute, uintptr_t pointer) {
  constexpr int kDevicePointer = 3, kHostPointer = 4, kOrdinal = 9;
  Block block = block_of(reinterpret_cast<void*>(pointer));
  if (!block.size) return cudaErrorInvalidValue;
  if (attribute == kOrdinal) return *static_cast<int*>(value) = block.device, 0;
  bool is_address = attribute == kDevicePointer || attribute == kHostPointer;
  return is_address ? (*static_cast<uintptr_t*>(value) = pointer, 0) : not_supported();
}
EXPORT int cuMemsetD32Async(uintptr_t pointer, unsigned value, size_t number, cudaStream_t stream) {
  void* to = reinterpret_cast<void*>(pointer);
  return enqueue(stream, {Kind::memset, "cuMemsetD32Async", to, nullptr, 4 * number, int(value & 255)}, false);
}
EXPORT int cuStreamSynchronize(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
EXPORT int cuStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamIsCapturing(stream, status);
}

// The profiler goes on without the device when its interface, CUPTI, answers with errors (missing.py).
EXPORT int cuptiGetResultString(int, const char** text) { return *text = "the stub GPU has no CUPTI", 0; }
