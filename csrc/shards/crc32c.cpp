#include "crc32c.hpp"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace llm {
namespace {

using Crc = std::uint32_t (*)(const void*, std::size_t, std::uint32_t);

using Table = std::array<std::uint32_t, 256>;

// table[b]: the CRC of byte b. One look-up per byte is slow, but only CPUs from before 2008 need it.
constexpr Table make_table() {
  Table table{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78u : 0u);
    table[byte] = crc;
  }
  return table;
}

constexpr Table kTable = make_table();

// The loop for both instruction sets: `step8` and `step1` take the running value and eight bytes or one byte.
#define LLM_CRC32C_LOOP(step8, step1)                                   \
  const unsigned char* bytes = static_cast<const unsigned char*>(data); \
  crc = ~crc;                                                           \
  for (; size >= 8; size -= 8, bytes += 8) {                            \
    std::uint64_t word;                                                 \
    std::memcpy(&word, bytes, 8);                                       \
    crc = static_cast<std::uint32_t>(step8(crc, word));                 \
  }                                                                     \
  for (; size > 0; --size, ++bytes) crc = step1(crc, *bytes);           \
  return ~crc

#if defined(__x86_64__)

constexpr const char* kHardware = "sse4.2";

__attribute__((target("sse4.2"))) std::uint32_t crc32c_hardware(const void* data, std::size_t size, std::uint32_t crc) {
  LLM_CRC32C_LOOP(_mm_crc32_u64, _mm_crc32_u8);
}

bool has_hardware() { return __builtin_cpu_supports("sse4.2"); }

#elif defined(__aarch64__) && defined(__linux__)

constexpr const char* kHardware = "armv8-crc";

__attribute__((target("+crc"))) std::uint32_t crc32c_hardware(const void* data, std::size_t size, std::uint32_t crc) {
  LLM_CRC32C_LOOP(__crc32cd, __crc32cb);
}

bool has_hardware() { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }

#else

constexpr const char* kHardware = "table";
constexpr Crc crc32c_hardware = nullptr;

bool has_hardware() { return false; }

#endif
#undef LLM_CRC32C_LOOP

Crc choose() {
  static const Crc chosen = has_hardware() ? crc32c_hardware : crc32c_table;
  return chosen;
}

}  // namespace

std::uint32_t crc32c_table(const void* data, std::size_t size, std::uint32_t crc) {
  const unsigned char* bytes = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; size > 0; --size, ++bytes) crc = (crc >> 8) ^ kTable[(crc ^ *bytes) & 0xff];
  return ~crc;
}

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc) { return choose()(data, size, crc); }

const char* crc32c_implementation() { return choose() == crc32c_table ? "table" : kHardware; }

}  // namespace llm
