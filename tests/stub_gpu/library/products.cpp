// cuBLAS and cuDNN: a product is counted. What is not here, missing.py generates.
#include <cstring>

#include "stub.hpp"

using namespace stub;

namespace {

struct Handle {  // of cuBLAS, cuBLASLt and cuDNN
  cudaStream_t stream = nullptr;
  int pointer_mode = 0, math_mode = 0;
};

constexpr int kFailed = 13;  // CUBLAS_STATUS_EXECUTION_FAILED

int compute(Kind kind, cudaStream_t stream, const char* name) {
  bind_current();
  return enqueue(stream, {kind, name}, true) ? kFailed : 0;
}

}  // namespace

extern "C" int stub_gpu_blas(Handle* handle, const char* name) { return compute(Kind::product, handle->stream, name); }

EXPORT int cublasCreate_v2(Handle** handle) { return *handle = new Handle, 0; }
EXPORT int cublasDestroy_v2(Handle* handle) { return delete handle, 0; }
EXPORT int cublasSetStream_v2(Handle* handle, cudaStream_t stream) { return handle->stream = stream, 0; }
EXPORT int cublasGetStream_v2(Handle* handle, cudaStream_t* stream) { return *stream = handle->stream, 0; }
EXPORT int cublasSetPointerMode_v2(Handle* handle, int mode) { return handle->pointer_mode = mode, 0; }
EXPORT int cublasGetPointerMode_v2(Handle* handle, int* mode) { return *mode = handle->pointer_mode, 0; }
EXPORT int cublasSetMathMode(Handle* handle, int mode) { return handle->math_mode = mode, 0; }
EXPORT int cublasGetMathMode(Handle* handle, int* mode) { return *mode = handle->math_mode, 0; }
EXPORT size_t cublasLtGetVersion() { return 130100; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* result,
                                          int* found) {
  memset(result, 0, 96);  // a cublasLtMatmulHeuristicResult_t that succeeds and needs no workspace
  return *found = 1, 0;
}
EXPORT int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*,
                          void*, void*, void*, const void*, void*, size_t, cudaStream_t stream) {
  return compute(Kind::product, stream, "cublasLtMatmul");
}

// cuDNN's graphs, which torch's scaled_dot_product_attention uses: each has one engine. torch calls the rest of the
// real library.
EXPORT int cudnnCreate(Handle** handle) { return *handle = new Handle, 0; }
EXPORT int cudnnDestroy(Handle* handle) { return delete handle, 0; }
EXPORT int cudnnSetStream(Handle* handle, cudaStream_t stream) { return handle->stream = stream, 0; }
EXPORT int cudnnGetStream(Handle* handle, cudaStream_t* stream) { return *stream = handle->stream, 0; }
EXPORT int cudnnBackendCreateDescriptor(int, void** descriptor) { return *descriptor = new int(0), 0; }
EXPORT int cudnnBackendDestroyDescriptor(int* descriptor) { return delete descriptor, 0; }
EXPORT int cudnnBackendSetAttribute(void*, int, int, int64_t, const void*) { return 0; }
EXPORT int cudnnBackendFinalize(void*) { return 0; }
EXPORT int cudnnBackendGetAttribute(void*, int attribute, int type, int64_t room, int64_t* number, void* value) {
  constexpr int kInt64 = 3, kNumericalNote = 11, kBehaviourNote = 19, kInt32 = 23, kChar = 24, kResults = 202;
  bool is_note = type == kNumericalNote || type == kBehaviourNote;
  if (number) *number = !is_note && (room > 0 || attribute == kResults || type == kChar);
  size_t width = type == kInt64 ? 8 : type == kInt32 ? 4 : type == kChar ? 1 : 0;
  if (room > 0 && value) memset(value, 0, width);  // no workspace, no shared memory
  return 0;
}
EXPORT int cudnnBackendExecute(Handle* handle, void*, void*) {
  return compute(Kind::kernel, handle->stream, "cudnnBackendExecute");
}
