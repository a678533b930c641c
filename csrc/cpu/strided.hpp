// Tensors with a contiguous last dimension, such as slices of wider tensors. Strides are in elements.

#pragma once

#include <cstdint>

namespace llm::cpu {

// Row r begins at (r / heads) * outer + (r % heads) * inner.
struct Rows {
  const void* data;
  std::int64_t heads, outer, inner;

  template <typename T>
  const T* row(std::int64_t r) const {
    return static_cast<const T*>(data) + r / heads * outer + r % heads * inner;
  }
};

// [B, S, H, D]
struct Heads {
  const void* data;
  std::int64_t batch, token, head;

  template <typename T>
  const T* at(std::int64_t b, std::int64_t s, std::int64_t h) const {
    return static_cast<const T*>(data) + b * batch + s * token + h * head;
  }
};

}  // namespace llm::cpu
