// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78; RFC 3720, appendix B.4), the checksum of iSCSI and ext4.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llm {

// Extends `crc` (initially 0) by `size` bytes, with the CPU's own instruction if it has one.
std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc = 0);

// The same function from a table, for CPUs without the instruction.
std::uint32_t crc32c_table(const void* data, std::size_t size, std::uint32_t crc = 0);

// Returns what crc32c() uses on this CPU: "sse4.2", "armv8-crc" or "table".
const char* crc32c_implementation();

}  // namespace llm
