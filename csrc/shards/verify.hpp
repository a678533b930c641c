// Reads a whole shard once and reports all its errors.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "shard.hpp"

namespace llm {

// The ids that every document begins and ends with.
struct Markers {
  std::uint32_t bos, eos;
  bool in_text;  // whether a text can hold them too
};

// Returns one line per error in the shard; empty if there is none. It checks the header against the manifest, the
// checksum of every block, the range of every id, the order of the document starts, and that BOS and EOS occur only at
// the boundaries of documents. Needs 8 bytes of memory per document.
std::vector<std::string> verify_shard(const ShardSpec& spec, const DatasetSpec& dataset, const Markers& markers);

// Returns the document starts of a shard; throws ShardError if header, table or document index is damaged.
std::vector<std::uint64_t> document_starts(const ShardSpec& spec, const DatasetSpec& dataset);

}  // namespace llm
