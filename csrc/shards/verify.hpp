// Reads a whole shard once and reports everything that is wrong with it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "shard.hpp"

namespace llm {

// The ids that every document begins and ends with.
struct Markers {
  std::uint32_t bos, eos;
};

// One line for each thing that is wrong with the shard; empty if it is whole. Checked are the header against the
// manifest, the checksum of every block, the range of every id, the order of the document starts, and that documents
// begin with BOS after an EOS, there and nowhere else. Needs 8 bytes of memory for each document.
std::vector<std::string> verify_shard(const ShardSpec& spec, const DatasetSpec& dataset, const Markers& markers);

// The document starts of a shard whose header, table and document index are whole; throws ShardError otherwise.
std::vector<std::uint64_t> document_starts(const ShardSpec& spec, const DatasetSpec& dataset);

}  // namespace llm
