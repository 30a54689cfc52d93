// Shapes of a convolution, and views of images and kernels: every pass is a convolution of views.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace flaxcls {

// Floats of a 2-D map of channels, by strides: groups, sub-grids and transposed kernels are views.
template <class Float>
struct Images {
  Float* data;
  int64_t n, h, w, c;
  int64_t image, row, pixel;  // floats from one image, row and pixel to the next

  Float* At(int64_t i, int64_t y, int64_t x) const {
    return data + i * image + y * row + x * pixel;
  }
  bool empty() const { return n <= 0 || h <= 0 || w <= 0 || c <= 0; }
};

template <class Float>
struct Kernel {
  Float* data;
  int64_t h, w, inputs, outputs;
  int64_t row, column, input, output;  // strides in floats; rows and columns may run backwards

  Float* At(int64_t y, int64_t x, int64_t in, int64_t out) const {
    return data + y * row + x * column + in * input + out * output;
  }
  Kernel Transposed() const { return {data, h, w, outputs, inputs, row, column, output, input}; }
  Kernel Flipped() const {
    return {At(h - 1, w - 1, 0, 0), h, w, inputs, outputs, -row, -column, input, output};
  }
};

// out[i, y, x, :] = sum over kernel rows a and columns b of
//   in[i, step_h * y + a - top, step_w * x + b - left, :] @ kernel[a, b],
// where `in` is zero outside. `top` and `left` may be negative.
struct Convolution {
  Images<const float> in;
  Kernel<const float> kernel;
  Images<float> out;
  int64_t step_h, step_w;
  int64_t top, left;
};

// kernel[a, b] = sum over i, y and x of in[i, step_h * y + a - top, step_w * x + b - left]^T @
// out[i, y, x], of the shapes of a Convolution.
struct KernelGradient {
  Images<const float> in;
  Images<const float> out;
  Kernel<float> kernel;
  int64_t step_h, step_w;
  int64_t top, left;
};

inline void FillZeros(const Images<float>& out) {
  for (int64_t i = 0; i < out.n; ++i) {
    for (int64_t y = 0; y < out.h; ++y) {
      for (int64_t x = 0; x < out.w; ++x) std::fill_n(out.At(i, y, x), out.c, 0.0f);
    }
  }
}

inline void FillZeros(const Kernel<float>& kernel) {
  for (int64_t y = 0; y < kernel.h; ++y) {
    for (int64_t x = 0; x < kernel.w; ++x) {
      for (int64_t in = 0; in < kernel.inputs; ++in) {
        std::fill_n(kernel.At(y, x, in, 0), kernel.outputs, 0.0f);
      }
    }
  }
}

// to[i][j] = from[j][i] for i < rows and j < columns, both at most kLanes; rows of `from` and `to`
// are so many floats apart.
inline void CopyTransposed(const float* from, int64_t from_row, int64_t rows, int64_t columns,
                           float* to, int64_t to_row) {
  if (rows == kLanes && columns == kLanes) {
    Vector square[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = Load(from + i * from_row);
    Transpose(square);
    for (int i = 0; i < kLanes; ++i) Store(to + i * to_row, square[i]);
    return;
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) to[i * to_row + j] = from[j * from_row + i];
  }
}

// Copies kernel[y, x, in : in + count, out : out + width] to `packed` (count, width), with zeros
// for outputs beyond the kernel's.
inline void PackKernel(const Kernel<const float>& kernel, int64_t y, int64_t x, int64_t in,
                       int64_t count, int64_t out, int64_t width, float* packed) {
  const int64_t outputs = std::min(width, kernel.outputs - out);
  const float* from = kernel.At(y, x, in, out);
  if (kernel.output == 1) {
    for (int64_t a = 0; a < count; ++a) {
      for (int64_t b = 0; b < width; b += kLanes) {
        const int64_t n = std::clamp<int64_t>(outputs - b, 0, kLanes);
        Store(packed + a * width + b, LoadFirst(from + a * kernel.input + b, n));
      }
    }
    return;
  }
  if (outputs % kLanes != 0) std::memset(packed, 0, count * width * sizeof(float));
  for (int64_t a = 0; a < count; a += kLanes) {
    for (int64_t b = 0; b < width; b += kLanes) {
      const int64_t rows = std::min<int64_t>(kLanes, count - a);
      const int64_t columns = std::clamp<int64_t>(outputs - b, 0, kLanes);
      CopyTransposed(from + a * kernel.input + b * kernel.output, kernel.output, rows, columns,
                     packed + a * width + b, width);
    }
  }
}

}  // namespace flaxcls
