// Max pooling over height and width of (N, H, W, C). The forward pass keeps the place of each
// maximum, a byte, so that the backward pass reads neither map again.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

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

inline int64_t PooledElements(const PoolShape& shape) {
  return shape.examples * shape.rows.pooled * shape.columns.pooled * shape.channels;
}

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

}  // namespace flaxcls
