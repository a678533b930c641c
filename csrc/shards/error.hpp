// Errors of files, with the message for the user. bindings.cpp converts each to a Python exception.
#pragma once

#include <stdexcept>
#include <string>

namespace llm {

// A shard that cannot be used: llm.errors.UserError. The message has the file, the reason and what to do.
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
