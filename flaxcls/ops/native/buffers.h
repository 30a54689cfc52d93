// What the handlers of operators ask of XLA's buffers.
#pragma once

#include <cstdint>
#include <exception>
#include <string>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace flaxcls {

// A buffer that an operator does not read may be of any size.
inline bool HasSize(xla::ffi::AnyBuffer buffer, xla::ffi::DataType type, int64_t elements) {
  return buffer.element_type() == type && int64_t(buffer.element_count()) == elements;
}

template <class... Buffers>
bool HaveSize(xla::ffi::DataType type, int64_t elements, Buffers... buffers) {
  return (HasSize(buffers, type, elements) && ...);
}

// Calls f(T{}) for x of float32 or bfloat16, and turns what is wrong into XLA's error.
template <class F>
xla::ffi::Error WithType(xla::ffi::DataType type, const char* name, const F& f) {
  try {
    if (type == xla::ffi::DataType::F32) {
      f(float{});
    } else if (type == xla::ffi::DataType::BF16) {
      f(BFloat16{});
    } else {
      return xla::ffi::Error::InvalidArgument(std::string(name) + ": float32 or bfloat16 only");
    }
  } catch (const std::exception& error) {  // no memory
    return xla::ffi::Error::Internal(std::string(name) + ": " + error.what());
  }
  return xla::ffi::Error::Success();
}

}  // namespace flaxcls
