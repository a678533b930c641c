// Threads for the CPU kernels: OpenMP's. If torch was loaded first, they are torch's own pool.

#pragma once

#include <cstdint>

namespace llm::cpu {

// Calls task(arguments, i) for each i in 0 .. n - 1, on up to `threads` threads, in increasing order of i. The result
// of an i must not depend on the thread, so that no bit depends on the number of threads.
template <typename Arguments>
void parallel(std::int64_t n, int threads, void (*task)(const Arguments&, std::int64_t), const Arguments& arguments) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t i = 0; i < n; ++i) task(arguments, i);
}

}  // namespace llm::cpu
