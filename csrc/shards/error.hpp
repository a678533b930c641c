// Errors of files, with the message that the user reads. bindings.cpp turns each into its Python exception.
#pragma once

#include <stdexcept>
#include <string>

namespace llm {

// A shard that cannot be used: llm.errors.UserError. The message names the file, the reason and the way out.
class ShardError : public std::runtime_error {
 public:
  ShardError(const std::string& path, const std::string& reason) : std::runtime_error(path + ": " + reason) {}
};

// A system call that failed while writing: OSError with errno and file name.
class WriteError : public std::runtime_error {
 public:
  WriteError(int error, const std::string& path) : std::runtime_error(path), error(error), path(path) {}

  int error;
  std::string path;
};

}  // namespace llm
