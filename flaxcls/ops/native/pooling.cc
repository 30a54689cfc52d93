// Max pooling over height and width of (N, H, W, C). The forward pass keeps the place of each
// maximum, a byte, so that the backward pass reads neither map again.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "buffers.h"
#include "tasks.h"
#include "vectors.h"

namespace flaxcls {

// One of the two axes: positions of the window on it.
struct PoolAxis {
  int64_t size, pooled;  // of the map and of the result
  int64_t window, stride, before;  // `before`: padding, which never wins

  int64_t start(int64_t position) const { return position * stride - before; }

  // The places begin ... end of a window at `position` that lie on the map.
  int64_t begin(int64_t position) const { return std::max<int64_t>(0, -start(position)); }
  int64_t end(int64_t position) const { return std::min(window, size - start(position)); }

  // The positions first ... last at which a window covers `pixel`.
  int64_t first(int64_t pixel) const {
    return std::max<int64_t>(0, CeilDiv(pixel + before - window + 1, stride));
  }
  int64_t last(int64_t pixel) const { return std::min(pooled - 1, (pixel + before) / stride); }
};

struct PoolShape {
  int64_t examples, channels;
  PoolAxis rows, columns;

  int64_t pixel(int64_t example, int64_t row, int64_t column) const {
    return ((example * rows.size + row) * columns.size + column) * channels;
  }
  int64_t pooled(int64_t example, int64_t row, int64_t column) const {
    return ((example * rows.pooled + row) * columns.pooled + column) * channels;
  }
  int32_t place(int64_t row, int64_t column) const { return row * columns.window + column; }
};

constexpr int64_t kMostPlaces = 255;  // in a window: a place is a byte ...
constexpr int32_t kNowhere = 255;     // ... and this one says that all of the window is padding

// The first maximum of one window, or a NaN where there is one.
template <class T>
void MaxOfWindow(const PoolShape& shape, int64_t example, int64_t i, int64_t j, const T* x, T* y,
                 uint8_t* winner) {
  const int64_t top = shape.rows.begin(i), bottom = shape.rows.end(i);
  const int64_t left = shape.columns.begin(j), right = shape.columns.end(j);
  const bool empty = top >= bottom || left >= right;
  const int64_t row = shape.rows.start(i), column = shape.columns.start(j);
  const int64_t result = shape.pooled(example, i, j);
  ForVectors(shape.channels, [&](int64_t channel, auto lanes) {
    Vector best = Broadcast(-INFINITY);
    Ints place_of_best = Ints{} + (empty ? kNowhere : shape.place(top, left));
    for (int64_t a = top; a < bottom; ++a) {
      for (int64_t b = left; b < right; ++b) {
        const Vector v = Load(x + shape.pixel(example, row + a, column + b) + channel, lanes);
        const Ints better = (v > best) | (v != v);
        best = better ? v : best;
        place_of_best = better ? Ints{} + shape.place(a, b) : place_of_best;
      }
    }
    Store(y + result + channel, best, lanes);
    StoreBytes(winner + result + channel, place_of_best, lanes);
  });
}

// The gradient of one pixel of x: those of the windows, one after the other, that it has won.
template <class T>
void GradientOfPixel(const PoolShape& shape, int64_t example, int64_t h, int64_t w,
                     const T* gradient, const uint8_t* winner, T* dx) {
  const int64_t top = shape.rows.first(h), bottom = shape.rows.last(h);
  const int64_t left = shape.columns.first(w), right = shape.columns.last(w);
  const int64_t pixel = shape.pixel(example, h, w);
  ForVectors(shape.channels, [&](int64_t channel, auto lanes) {
    Vector sum = {};
    for (int64_t i = top; i <= bottom; ++i) {
      for (int64_t j = left; j <= right; ++j) {
        const int64_t pooled = shape.pooled(example, i, j) + channel;
        const int32_t place = shape.place(h - shape.rows.start(i), w - shape.columns.start(j));
        const Vector g = Load(gradient + pooled, lanes);
        sum += LoadBytes(winner + pooled, lanes) == place ? g : Vector{};
      }
    }
    Store(dx + pixel + channel, sum, lanes);
  });
}

// Calls f(example, row) for all rows of all examples; each reads `elements` or so.
template <class Parallel, class F>
void ForRows(Parallel& parallel, int64_t examples, int64_t rows, int64_t elements, const F& f) {
  constexpr int64_t kElements = 32768;  // 10 us or so
  const int64_t grain = CeilDiv(kElements, std::max<int64_t>(1, elements));
  parallel.RunParts(examples * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / rows, i % rows);
  });
}

// parallel.RunParts(n, grain, f) calls f(begin, end) for parts of 0 ... n: Tasks, or a plain loop.
template <class T, class Parallel>
void MaxPoolForward(const PoolShape& shape, const T* x, T* y, uint8_t* winner,
                    Parallel& parallel) {
  const int64_t read = shape.rows.window * shape.columns.size * shape.channels;
  ForRows(parallel, shape.examples, shape.rows.pooled, read, [&](int64_t example, int64_t i) {
    for (int64_t j = 0; j < shape.columns.pooled; ++j) {
      MaxOfWindow(shape, example, i, j, x, y, winner);
    }
  });
}

template <class T, class Parallel>
void MaxPoolBackward(const PoolShape& shape, const T* gradient, const uint8_t* winner, T* dx,
                     Parallel& parallel) {
  const int64_t written = shape.columns.size * shape.channels;
  ForRows(parallel, shape.examples, shape.rows.size, written, [&](int64_t example, int64_t h) {
    for (int64_t w = 0; w < shape.columns.size; ++w) {
      GradientOfPixel(shape, example, h, w, gradient, winner, dx);
    }
  });
}

// ---- Handlers -----------------------------------------------------------------------------------

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

inline int64_t PooledElements(const PoolShape& shape) {
  return shape.examples * shape.rows.pooled * shape.columns.pooled * shape.channels;
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
