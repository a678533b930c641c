// Counts of the calls, and what Python (../counts.py) asks of them.
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "stub.hpp"

namespace stub {
namespace {

constexpr const char* kNames[kKinds] = {"kernel",
                                        "triton",
                                        "product",
                                        "memset",
                                        "host_to_device",
                                        "device_to_host",
                                        "pageable_to_device",
                                        "device_to_pageable",
                                        "device_to_device",
                                        "host_to_host",
                                        "collective",
                                        "callback",
                                        "graph",
                                        "wait",
                                        "query",
                                        "record",
                                        "wait_on_device",
                                        "allocation",
                                        "unknown"};

struct Counts {
  std::mutex lock;
  std::map<std::string, std::pair<size_t, size_t>> calls[kKinds];  // by name: number, bytes
  void (*on_wait)(const char*) = nullptr;
};

Counts& counts() {  // never destroyed, because libraries call in from their destructors
  static auto* all = new Counts;
  return *all;
}

std::string quoted(const std::string& mangled) {
  int failed = 1;
  char* text = mangled.rfind("_Z", 0) == 0 ? abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &failed) : nullptr;
  std::string out = "\"";
  for (const char* c = failed ? mangled.c_str() : text; *c; ++c) {
    if (*c == '"' || *c == '\\') out += '\\';
    out += *c;
  }
  free(text);
  return out + '"';
}

}  // namespace

const char* name_of(Kind kind) { return kNames[int(kind)]; }

void count(Kind kind, const std::string& name, size_t bytes) {
  Counts& all = counts();
  void (*report)(const char*) = nullptr;
  {
    std::lock_guard guard(all.lock);
    auto& [number, total] = all.calls[int(kind)][name];
    number += 1;
    total += bytes;
    if (kind == Kind::wait || kind == Kind::pageable_to_device || kind == Kind::device_to_pageable)
      report = all.on_wait;
  }
  if (report) report((std::string(name_of(kind)) + " " + name).c_str());  // outside the lock: it may call back
}

}  // namespace stub

using namespace stub;

EXPORT void stub_gpu_reset() {
  std::lock_guard guard(counts().lock);
  for (auto& calls : counts().calls) calls.clear();
}

// All counts as JSON, {kind: {name: [number, bytes]}}, in memory that stays valid until the next call.
EXPORT const char* stub_gpu_counts() {
  static auto* text = new std::string;
  std::lock_guard guard(counts().lock);
  *text = "{";
  for (int kind = 0; kind < kKinds; ++kind) {
    *text += std::string(kind ? "," : "") + '"' + kNames[kind] + "\":{";
    const char* separator = "";
    for (auto& [name, entry] : counts().calls[kind]) {
      *text += separator + quoted(name) + ":[" + std::to_string(entry.first) + "," + std::to_string(entry.second) + "]";
      separator = ",";
    }
    *text += "}";
  }
  *text += "}";
  return text->c_str();
}

// Calls `report` at each wait of the host and at each copy from or to pageable memory, in the thread that makes it.
EXPORT void stub_gpu_on_wait(void (*report)(const char*)) {
  std::lock_guard guard(counts().lock);
  counts().on_wait = report;
}
