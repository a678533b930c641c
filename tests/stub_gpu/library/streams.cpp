// Streams, events, captures and graphs.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "stub.hpp"

namespace stub {
namespace {

std::mutex& lock() {
  static auto* mutex = new std::mutex;
  return *mutex;
}
std::vector<Capture*>& captures() {  // those that go on; under lock()
  static auto* all = new std::vector<Capture*>;
  return *all;
}
thread_local cudaStreamCaptureMode t_mode = cudaStreamCaptureModeGlobal;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
int64_t thread_id() { return syscall(SYS_gettid); }

CUstream_st* default_streams() {
  static auto* streams = [] {
    auto* all = new CUstream_st[kMaxDevices];
    for (int i = 0; i < kMaxDevices; ++i) all[i].device = i;
    return all;
  }();
  return streams;
}
// The handles 0, 1 and 2 are default streams of the current device.
cudaStream_t resolve(cudaStream_t stream) {
  return uintptr_t(stream) <= 2 ? default_streams() + current().device : stream;
}

// Whether the host may wait. A null stream stands for all of them.
cudaError_t wait(cudaStream_t stream, Kind kind, const char* name) {
  bind_current();
  {
    std::lock_guard guard(lock());
    Capture* hit = stream ? stream->capture : captures().empty() ? nullptr : captures().front();
    if (hit) return hit->spoiled = true, fail(cudaErrorStreamCaptureUnsupported);
  }
  if (spoils_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  count(kind, name);
  return cudaSuccess;
}
cudaError_t wait(cudaEvent_t event, Kind kind, const char* name) {
  if (event->capture) return fail(cudaErrorCapturedEvent);
  if (spoils_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  count(kind, name);
  return cudaSuccess;
}

std::string summary(const std::vector<Work>& nodes) {
  size_t numbers[kKinds] = {};
  for (const Work& node : nodes) ++numbers[int(node.kind)];
  std::string text = std::to_string(nodes.size()) + " nodes";
  for (int kind = 0; kind < kKinds; ++kind)
    if (numbers[kind]) text += ", " + std::to_string(numbers[kind]) + " " + name_of(Kind(kind));
  return text;
}

}  // namespace

bool is_captured(cudaStream_t stream) {
  std::lock_guard guard(lock());
  return resolve(stream)->capture;
}

bool spoils_capture() {
  if (t_mode == cudaStreamCaptureModeRelaxed) return false;
  std::lock_guard guard(lock());
  for (Capture* capture : captures()) {
    bool is_own = capture->thread == thread_id();
    if (is_own || (capture->is_global && t_mode == cudaStreamCaptureModeGlobal)) return capture->spoiled = true;
  }
  return false;
}

cudaError_t enqueue(cudaStream_t handle, const Work& work, bool on_device) {
  cudaStream_t stream = resolve(handle);
  if (on_device && stream->device != current().device) return fail(cudaErrorInvalidResourceHandle);
  {
    std::lock_guard guard(lock());
    if (Capture* capture = stream->capture) {
      if (capture->spoiled) return fail(cudaErrorStreamCaptureInvalidated);
      capture->graph->nodes.push_back(work);
      return cudaSuccess;
    }
  }
  count(work.kind, work.name, work.size);
  do_work(work);
  return cudaSuccess;
}

}  // namespace stub

using namespace stub;

// ---- streams -------------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  *stream = new CUstream_st{bind_current(), priority};
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = resolve(stream)->priority;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return wait(resolve(stream), Kind::query, "cudaStreamQuery");
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return wait(resolve(stream), Kind::wait, "cudaStreamSynchronize");
}
EXPORT cudaError_t cudaDeviceSynchronize() { return wait(cudaStream_t(nullptr), Kind::wait, "cudaDeviceSynchronize"); }
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void*), void* argument) {
  Work work{Kind::callback, "cudaLaunchHostFunc"};
  work.function = function;
  work.argument = argument;
  return enqueue(stream, work, false);
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, void (*function)(cudaStream_t, cudaError_t, void*),
                                         void* argument, unsigned) {
  count(Kind::callback, "cudaStreamAddCallback");
  function(stream, cudaSuccess, argument);
  return cudaSuccess;
}

// ---- events --------------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = new CUevent_st{bind_current(), flags};
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned) {
  bind_current();
  cudaStream_t stream = resolve(handle);
  if (event->device != stream->device) return fail(cudaErrorInvalidResourceHandle);
  count(Kind::record, "cudaEventRecord");
  std::lock_guard guard(lock());
  event->recorded = true;
  event->seconds = now();
  event->capture = stream->capture ? stream->capture->id : 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) { return wait(event, Kind::query, "cudaEventQuery"); }
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait(event, Kind::wait, "cudaEventSynchronize"); }
EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  bool is_timed = !((begin->flags | end->flags) & cudaEventDisableTiming);
  if (!begin->recorded || !end->recorded || !is_timed) return fail(cudaErrorInvalidResourceHandle);
  *milliseconds = float(1e3 * (end->seconds - begin->seconds));  // of the host
  return cudaSuccess;
}

// Waiting for an event of a capture draws a stream into that capture.
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  bind_current();
  cudaStream_t stream = resolve(handle);
  count(Kind::wait_on_device, "cudaStreamWaitEvent");
  std::lock_guard guard(lock());
  if (!event->recorded) return cudaSuccess;
  if (!event->capture) {
    if (stream->capture) return stream->capture->spoiled = true, fail(cudaErrorStreamCaptureIsolation);
    return cudaSuccess;
  }
  auto is_its = [&](Capture* capture) { return capture->id == event->capture; };
  auto found = std::find_if(captures().begin(), captures().end(), is_its);
  if (found == captures().end()) return fail(cudaErrorCapturedEvent);
  if (stream == default_streams() + stream->device)
    return (*found)->spoiled = true, fail(cudaErrorStreamCaptureImplicit);
  if (stream->capture && stream->capture != *found) return fail(cudaErrorStreamCaptureMerge);
  if (!stream->capture) (*found)->streams.push_back(stream);
  stream->capture = *found;
  return cudaSuccess;
}

// ---- captures ------------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, t_mode);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t handle, cudaGraph_t graph, const void*, const void*,
                                                 size_t, cudaStreamCaptureMode mode) {
  static unsigned long long ids = 0;
  cudaStream_t stream = resolve(handle);
  std::lock_guard guard(lock());
  if (stream == default_streams() + stream->device) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return fail(cudaErrorIllegalState);
  int64_t thread = mode == cudaStreamCaptureModeRelaxed ? 0 : thread_id();
  stream->capture = new Capture{++ids, graph, {stream}, mode == cudaStreamCaptureModeGlobal, thread};
  captures().push_back(stream->capture);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return cudaStreamBeginCaptureToGraph(stream, new CUgraph_st, nullptr, nullptr, 0, mode);
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  cudaStream_t stream = resolve(handle);
  std::lock_guard guard(lock());
  *graph = nullptr;
  Capture* capture = stream->capture;
  if (!capture) return fail(cudaErrorIllegalState);
  if (capture->streams.front() != stream) return fail(cudaErrorStreamCaptureUnmatched);
  captures().erase(std::find(captures().begin(), captures().end(), capture));
  for (cudaStream_t each : capture->streams) each->capture = nullptr;
  if (capture->spoiled) return fail(cudaErrorStreamCaptureInvalidated);
  *graph = capture->graph;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t** needs,
                                            const cudaGraphEdgeData** edges, size_t* number) {
  cudaStream_t stream = resolve(handle);
  std::lock_guard guard(lock());
  Capture* capture = stream->capture;
  *status = !capture           ? cudaStreamCaptureStatusNone
            : capture->spoiled ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? capture->graph : nullptr;
  if (needs) *needs = nullptr;
  if (edges) *edges = nullptr;
  if (number) *number = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

// ---- graphs --------------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* number) {
  for (size_t i = 0; nodes && i < std::min(*number, graph->nodes.size()); ++i)
    nodes[i] = reinterpret_cast<cudaGraphNode_t>(&graph->nodes[i]);
  *number = graph->nodes.size();
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* number) {
  *number = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* instance, cudaGraph_t graph, unsigned long long) {
  *instance = new CUgraphExec_st{graph->nodes, summary(graph->nodes)};
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t instance) { return delete instance, cudaSuccess; }
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t stream) {
  bind_current();
  if (cudaError_t error = enqueue(stream, {Kind::graph, instance->contents}, false)) return error;
  for (const Work& node : instance->nodes) do_work(node);  // uncounted: it costs the host nothing
  return cudaSuccess;
}
