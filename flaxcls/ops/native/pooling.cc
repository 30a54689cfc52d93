// Max pooling and its gradient as targets of jax.ffi.
#include <algorithm>
#include <cstdint>
#include <string>

#include "buffers.h"
#include "max_pool.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace flaxcls {

using Sizes = xla::ffi::Span<const int64_t>;

// window, strides: of rows and columns. padding: top, bottom, left, right.
inline xla::ffi::Error ReadPool(xla::ffi::AnyBuffer map, Sizes window, Sizes strides,
                                Sizes padding, PoolShape* shape) {
  const auto wrong = [](const char* what) {
    return xla::ffi::Error::InvalidArgument(std::string("max_pool: ") + what);
  };
  const auto dimensions = map.dimensions();
  if (dimensions.size() != 4) return wrong("the map must be (N, H, W, C)");
  if (window.size() != 2 || strides.size() != 2 || padding.size() != 4) {
    return wrong("window and strides are two numbers, padding four");
  }
  const auto within = [](int64_t least, int64_t most) {
    return [=](int64_t n) { return n >= least && n <= most; };
  };
  constexpr int64_t kMost = int64_t{1} << 30;
  if (!std::all_of(window.begin(), window.end(), within(1, kMostPlaces)) ||
      window[0] * window[1] > kMostPlaces) {
    return wrong("the window must have 1 to 255 places");
  }
  if (!std::all_of(strides.begin(), strides.end(), within(1, kMost))) {
    return wrong("strides must be positive");
  }
  if (!std::all_of(padding.begin(), padding.end(), within(0, kMost))) {
    return wrong("padding must not be negative");
  }
  PoolAxis axes[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t size = dimensions[1 + i], free = size + padding[2 * i] + padding[2 * i + 1];
    const int64_t pooled = free < window[i] ? 0 : (free - window[i]) / strides[i] + 1;
    axes[i] = {size, pooled, window[i], strides[i], padding[2 * i]};
  }
  *shape = {dimensions[0], dimensions[3], axes[0], axes[1]};
  return xla::ffi::Error::Success();
}

inline xla::ffi::Error MaxPoolForwardHandler(xla::ffi::ThreadPool threads, xla::ffi::AnyBuffer x,
                                             xla::ffi::Result<xla::ffi::AnyBuffer> y,
                                             xla::ffi::Result<xla::ffi::AnyBuffer> winner,
                                             Sizes window, Sizes strides, Sizes padding) {
  PoolShape shape;
  if (auto error = ReadPool(x, window, strides, padding, &shape); error.failure()) return error;
  const auto type = x.element_type();
  const int64_t results = PooledElements(shape);
  if (!HaveSize(type, results, *y) || !HaveSize(xla::ffi::U8, results, *winner)) {
    return xla::ffi::Error::InvalidArgument("max_pool_forward: a type or shape does not fit");
  }
  return WithType(type, "max_pool_forward", [&](auto zero) {
    using T = decltype(zero);
    Tasks tasks(threads);
    MaxPoolForward(shape, static_cast<const T*>(x.untyped_data()),
                   static_cast<T*>(y->untyped_data()), winner->typed_data<uint8_t>(), tasks);
  });
}

inline xla::ffi::Error MaxPoolBackwardHandler(xla::ffi::ThreadPool threads,
                                              xla::ffi::AnyBuffer gradient,
                                              xla::ffi::AnyBuffer winner,
                                              xla::ffi::Result<xla::ffi::AnyBuffer> dx,
                                              Sizes window, Sizes strides, Sizes padding) {
  PoolShape shape;
  if (auto error = ReadPool(*dx, window, strides, padding, &shape); error.failure()) return error;
  const auto type = dx->element_type();
  const int64_t results = PooledElements(shape);
  if (!HaveSize(type, results, gradient) || !HaveSize(xla::ffi::U8, results, winner)) {
    return xla::ffi::Error::InvalidArgument("max_pool_backward: a type or shape does not fit");
  }
  return WithType(type, "max_pool_backward", [&](auto zero) {
    using T = decltype(zero);
    Tasks tasks(threads);
    MaxPoolBackward(shape, static_cast<const T*>(gradient.untyped_data()),
                    winner.typed_data<uint8_t>(), static_cast<T*>(dx->untyped_data()), tasks);
  });
}

}  // namespace flaxcls

XLA_FFI_DEFINE_HANDLER_SYMBOL(max_pool_forward, flaxcls::MaxPoolForwardHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Ret<xla::ffi::AnyBuffer>()  // y
                                  .Ret<xla::ffi::AnyBuffer>()  // winner
                                  .Attr<flaxcls::Sizes>("window")
                                  .Attr<flaxcls::Sizes>("strides")
                                  .Attr<flaxcls::Sizes>("padding"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(max_pool_backward, flaxcls::MaxPoolBackwardHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // gradient
                                  .Arg<xla::ffi::AnyBuffer>()  // winner
                                  .Ret<xla::ffi::AnyBuffer>()  // dx
                                  .Attr<flaxcls::Sizes>("window")
                                  .Attr<flaxcls::Sizes>("strides")
                                  .Attr<flaxcls::Sizes>("padding"));
