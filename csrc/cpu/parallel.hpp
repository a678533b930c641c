// Threads for the CPU kernels: OpenMP's, whose pool is torch's own where torch was loaded first.

#pragma once

#include <cstdint>

namespace llm::cpu {

// task(arguments, i) for each i of 0 .. n - 1, on up to `threads` threads, the first ones first. What an i computes
// must not depend on the thread: then no bit of a result depends on their number.
template <typename Arguments>
void parallel(std::int64_t n, int threads, void (*task)(const Arguments&, std::int64_t), const Arguments& arguments) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t i = 0; i < n; ++i) task(arguments, i);
}

}  // namespace llm::cpu
