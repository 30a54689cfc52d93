// Winograd's convolution for 3x3 and 5x5 kernels and steps of 1: F(m x m, r x r) of Lavin, Gray:
// Fast Algorithms for Convolutional Neural Networks (2016), https://arxiv.org/abs/1509.09308,
// computes tiles of m x m outputs with (m + r - 1)^2 multiplications, not m^2 r^2: for r = 3 2.25
// times fewer with m = 2 and 4 times with m = 4, for r = 5 2.8 times with m = 2. With V the
// transformed inputs, U the transformed kernel and M the transformed outputs, each of the
// (m + r - 1)^2 points is a matrix product of its own:
//   M[point] (tiles, outputs) = V[point] (tiles, inputs) @ U[point] (inputs, outputs)
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "direct.h"
#include "geometry.h"
#include "scratch.h"
#include "tasks.h"
#include "tiles.h"

namespace flaxcls {

// The 1-D transforms B^T (of inputs), G (of the kernel) and A^T (of products) of the paper, and the
// transposes of G and A^T, by which gradients run backwards, for m outputs and r taps.
template <int m, int r>
struct Sizes {
  static constexpr int kOutputs = m, kTaps = r;
  static constexpr int kSide = m + r - 1;  // of the inputs of a tile, and of its points
};

// Points 0, 1, -1 and infinity.
struct F2x3 : Sizes<2, 3> {
  static void Input(const Vector* d, Vector* v) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }
  static void Kernel(const Vector* g, Vector* u) {
    const Vector even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  }
  static void KernelTransposed(const Vector* u, Vector* g) {
    const Vector even = 0.5f * (u[1] + u[2]);
    g[0] = u[0] + even;
    g[1] = 0.5f * (u[1] - u[2]);
    g[2] = even + u[3];
  }
  static void Output(const Vector* p, Vector* y) {
    y[0] = p[0] + (p[1] + p[2]);
    y[1] = (p[1] - p[2]) + p[3];
  }
  static void OutputTransposed(const Vector* y, Vector* p) {
    p[0] = y[0];
    p[1] = y[0] + y[1];
    p[2] = y[0] - y[1];
    p[3] = y[1];
  }
};

// Points 0, a, -a, b, -b and infinity. The paper's a = 1, b = 2 give errors 3 to 4 times larger: of
// points around 1 in size the powers, and so the sums that cancel, stay small.
template <int m, int r>
struct SixPoints : Sizes<m, r> {
  static_assert(m + r == 7);
  static constexpr float a = 0.625f, b = 1.5f;  // exact in binary, and so are their powers here
  static constexpr float a2 = a * a, b2 = b * b, a3 = a2 * a, b3 = b2 * b;
  static constexpr float scale_0 = 1 / (a2 * b2);
  static constexpr float scale_a = 1 / (2 * a2 * (a2 - b2));
  static constexpr float scale_b = 1 / (2 * b2 * (b2 - a2));

  static void Input(const Vector* d, Vector* v) {
    const Vector even_a = d[4] - b2 * d[2], odd_a = a * d[3] - (a * b2) * d[1];
    const Vector even_b = d[4] - a2 * d[2], odd_b = b * d[3] - (b * a2) * d[1];
    v[0] = d[4] + ((a2 * b2) * d[0] - (a2 + b2) * d[2]);
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = d[5] + ((a2 * b2) * d[1] - (a2 + b2) * d[3]);
  }
};

struct F4x3 : SixPoints<4, 3> {
  static void Kernel(const Vector* g, Vector* u) {
    const Vector even_a = scale_a * (g[0] + a2 * g[2]), odd_a = (scale_a * a) * g[1];
    const Vector even_b = scale_b * (g[0] + b2 * g[2]), odd_b = (scale_b * b) * g[1];
    u[0] = scale_0 * g[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g[2];
  }
  static void KernelTransposed(const Vector* u, Vector* g) {
    const Vector even_a = scale_a * (u[1] + u[2]), odd_a = scale_a * (u[1] - u[2]);
    const Vector even_b = scale_b * (u[3] + u[4]), odd_b = scale_b * (u[3] - u[4]);
    g[0] = scale_0 * u[0] + (even_a + even_b);
    g[1] = a * odd_a + b * odd_b;
    g[2] = a2 * even_a + (b2 * even_b + u[5]);
  }
  static void Output(const Vector* p, Vector* y) {
    const Vector even_a = p[1] + p[2], odd_a = p[1] - p[2];
    const Vector even_b = p[3] + p[4], odd_b = p[3] - p[4];
    y[0] = p[0] + (even_a + even_b);
    y[1] = a * odd_a + b * odd_b;
    y[2] = a2 * even_a + b2 * even_b;
    y[3] = a3 * odd_a + (b3 * odd_b + p[5]);
  }
  static void OutputTransposed(const Vector* y, Vector* p) {
    const Vector even_a = y[0] + a2 * y[2], odd_a = a * y[1] + a3 * y[3];
    const Vector even_b = y[0] + b2 * y[2], odd_b = b * y[1] + b3 * y[3];
    p[0] = y[0];
    p[1] = even_a + odd_a;
    p[2] = even_a - odd_a;
    p[3] = even_b + odd_b;
    p[4] = even_b - odd_b;
    p[5] = y[3];
  }
};

struct F2x5 : SixPoints<2, 5> {
  static constexpr float a4 = a2 * a2, b4 = b2 * b2;

  static void Kernel(const Vector* g, Vector* u) {
    const Vector even_a = scale_a * (g[0] + (a2 * g[2] + a4 * g[4]));
    const Vector even_b = scale_b * (g[0] + (b2 * g[2] + b4 * g[4]));
    const Vector odd_a = scale_a * (a * g[1] + a3 * g[3]);
    const Vector odd_b = scale_b * (b * g[1] + b3 * g[3]);
    u[0] = scale_0 * g[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g[4];
  }
  static void KernelTransposed(const Vector* u, Vector* g) {
    const Vector even_a = scale_a * (u[1] + u[2]), odd_a = scale_a * (u[1] - u[2]);
    const Vector even_b = scale_b * (u[3] + u[4]), odd_b = scale_b * (u[3] - u[4]);
    g[0] = scale_0 * u[0] + (even_a + even_b);
    g[1] = a * odd_a + b * odd_b;
    g[2] = a2 * even_a + b2 * even_b;
    g[3] = a3 * odd_a + b3 * odd_b;
    g[4] = a4 * even_a + (b4 * even_b + u[5]);
  }
  static void Output(const Vector* p, Vector* y) {
    y[0] = p[0] + ((p[1] + p[2]) + (p[3] + p[4]));
    y[1] = a * (p[1] - p[2]) + (b * (p[3] - p[4]) + p[5]);
  }
  static void OutputTransposed(const Vector* y, Vector* p) {
    const Vector odd_a = a * y[1], odd_b = b * y[1];
    p[0] = y[0];
    p[1] = y[0] + odd_a;
    p[2] = y[0] - odd_a;
    p[3] = y[0] + odd_b;
    p[4] = y[0] - odd_b;
    p[5] = y[1];
  }
};

using OneDimension = void (*)(const Vector*, Vector*);

// Applies a 1-D transform of `ins` values to `outs` along both axes: load(i, j) gives a value, and
// store(i, j, value) takes one.
template <OneDimension transform, int ins, int outs, class Load, class Store>
inline __attribute__((always_inline)) void TwoDimensions(const Load& load, const Store& store) {
  Vector half[outs][ins];
#pragma GCC unroll 8
  for (int j = 0; j < ins; ++j) {
    Vector from[ins], to[outs];
    for (int i = 0; i < ins; ++i) from[i] = load(i, j);
    transform(from, to);
    for (int i = 0; i < outs; ++i) half[i][j] = to[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < outs; ++i) {
    Vector to[outs];
    transform(half[i], to);
    for (int j = 0; j < outs; ++j) store(i, j, to[j]);
  }
}

// A matrix (rows, channels) for each point, its columns in blocks: data[block][point][row][column].
class Panels {
 public:
  Panels(const Blocks& blocks, int64_t points, int64_t rows)
      : blocks(blocks), rows_(rows), points_(points) {}

  int64_t floats() const {
    return points_ * (rows_ * blocks.all_width() + kStagger * blocks.count());
  }
  int64_t Point(int64_t block) const { return rows_ * blocks.width(block) + kStagger; }
  float* At(float* data, int64_t block, int64_t point = 0) const {
    return data + points_ * (rows_ * blocks.first(block) + kStagger * block) +
           point * Point(block);
  }

  Blocks blocks;

 private:
  static constexpr int64_t kStagger = 16;  // a cache line, or all points would share one cache set
  int64_t rows_, points_;
};

// The square tiles of the outputs of a convolution.
template <class F>
struct WinogradTiles {
  static constexpr int kPoints = F::kSide * F::kSide;

  explicit WinogradTiles(int64_t n, int64_t out_h, int64_t out_w)
      : down(CeilDiv(out_h, F::kOutputs)),
        across(CeilDiv(out_w, F::kOutputs)),
        count(n * down * across) {}

  struct Place {
    int64_t image, y, x;  // of the first output
  };
  Place At(int64_t tile) const {
    const int64_t in_image = tile % (down * across);
    return {tile / (down * across), in_image / across * F::kOutputs,
            in_image % across * F::kOutputs};
  }

  int64_t down, across, count;
};

// Transforms a square of pixels, those outside the image taken as zeros, from the pixel at (y, x):
// for all its channels, to row `row` of `panels`.
template <OneDimension transform, int ins, int outs>
__attribute__((noinline)) void TransformSquare(const Images<const float>& images, int64_t image,
                                               int64_t y, int64_t x, const float* zeros,
                                               const Panels& panels, int64_t row, float* data) {
  const Blocks& blocks = panels.blocks;
  const bool inside = y >= 0 && x >= 0 && y + ins <= images.h && x + ins <= images.w;
  const float* pixels[ins][ins];
  if (!inside) {
    for (int64_t i = 0; i < ins; ++i) {
      for (int64_t j = 0; j < ins; ++j) {
        const bool exists = y + i >= 0 && y + i < images.h && x + j >= 0 && x + j < images.w;
        pixels[i][j] = exists ? images.At(image, y + i, x + j) : zeros;
      }
    }
  }
  for (int64_t block = 0; block < blocks.count(); ++block) {
    float* to = panels.At(data, block) + row * blocks.width(block);
    const int64_t point = panels.Point(block);
    for (int64_t v = 0; v < blocks.width(block); v += kLanes) {
      const int64_t channel = blocks.first(block) + v;
      const int64_t n = std::min<int64_t>(kLanes, blocks.all_channels() - channel);
      const auto store = [&](int i, int j, Vector value) {
        Store(to + v + (i * outs + j) * point, value);
      };
      if (inside) {
        const float* from = images.data + image * images.image + y * images.row +
                            x * images.pixel + channel;
        TwoDimensions<transform, ins, outs>(
            [&](int i, int j) { return LoadFirst(from + i * images.row + j * images.pixel, n); },
            store);
      } else {
        TwoDimensions<transform, ins, outs>(
            [&](int i, int j) { return LoadFirst(pixels[i][j] + channel, n); }, store);
      }
    }
  }
}

// Tiles [begin, end) to rows [row, row + end - begin) of V.
template <class F>
void TransformInputs(const Images<const float>& in, int64_t top, int64_t left,
                     const WinogradTiles<F>& tiles, int64_t begin, int64_t end,
                     const std::vector<float>& zeros, const Panels& panels, int64_t row, float* v) {
  for (int64_t tile = begin; tile < end; ++tile, ++row) {
    const auto place = tiles.At(tile);
    TransformSquare<F::Input, F::kSide, F::kSide>(in, place.image, place.y - top,
                                                       place.x - left, zeros.data(), panels, row,
                                                       v);
  }
}

// The gradients of the outputs of tiles [begin, end), to rows from `row` on.
template <class F>
void TransformOutputGradients(const Images<const float>& dy, const WinogradTiles<F>& tiles,
                              int64_t begin, int64_t end, const std::vector<float>& zeros,
                              const Panels& panels, int64_t row, float* d) {
  for (int64_t tile = begin; tile < end; ++tile, ++row) {
    const auto place = tiles.At(tile);
    TransformSquare<F::OutputTransposed, F::kOutputs, F::kSide>(dy, place.image, place.y, place.x,
                                                              zeros.data(), panels, row, d);
  }
}

// kernel[:, :, first : first + count, block of outputs] to `count` rows of U.
template <class F>
__attribute__((noinline)) void TransformKernel(const Kernel<const float>& kernel, int64_t first,
                                               int64_t count, const Blocks& outputs, int64_t block,
                                               int64_t point, float* u) {
  const int64_t width = outputs.width(block);
  constexpr int kTaps = F::kTaps;
  alignas(64) float taps[kTaps * kTaps][kLanes * kLanes];
  for (int64_t in = 0; in < count; in += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, count - in);
    for (int64_t v = 0; v < width; v += kLanes) {
      for (int64_t t = 0; t < kTaps * kTaps; ++t) {
        PackKernel(kernel, t / kTaps, t % kTaps, first + in, rows, outputs.first(block) + v, kLanes,
                   taps[t]);
      }
      for (int64_t row = 0; row < rows; ++row) {
        float* to = u + (in + row) * width + v;
        TwoDimensions<F::Kernel, kTaps, F::kSide>(
            [&](int i, int j) { return Load(taps[i * kTaps + j] + row * kLanes); },
            [&](int i, int j, Vector value) { Store(to + (i * F::kSide + j) * point, value); });
      }
    }
  }
}

// Rows of M, one block of outputs, to the outputs of tiles [begin, end).
template <class F>
__attribute__((noinline)) void TransformOutputs(const float* sums, int64_t point,
                                                const WinogradTiles<F>& tiles, int64_t begin,
                                                int64_t end, const Blocks& outputs, int64_t block,
                                                const Images<float>& out) {
  const int64_t width = outputs.width(block);
  for (int64_t tile = begin; tile < end; ++tile, sums += width) {
    const auto place = tiles.At(tile);
    const int64_t rows = std::min<int64_t>(F::kOutputs, out.h - place.y);
    const int64_t columns = std::min<int64_t>(F::kOutputs, out.w - place.x);
    float* to = out.At(place.image, place.y, place.x) + outputs.first(block);
    for (int64_t v = 0; v < width; v += kLanes) {
      const int64_t n = v + kLanes < width ? kLanes : outputs.last(block);
      const auto load = [&](int i, int j) { return Load(sums + (i * F::kSide + j) * point + v); };
      if (rows == F::kOutputs && columns == F::kOutputs) {
        TwoDimensions<F::Output, F::kSide, F::kOutputs>(load, [&](int i, int j, Vector value) {
          StoreFirst(to + i * out.row + j * out.pixel + v, value, n);
        });
      } else {
        TwoDimensions<F::Output, F::kSide, F::kOutputs>(load, [&](int i, int j, Vector value) {
          if (i < rows && j < columns) StoreFirst(to + i * out.row + j * out.pixel + v, value, n);
        });
      }
    }
  }
}

// sums (rows, width) (+)= in (rows, channels) @ weights (channels, width).
inline void MultiplyPoint(const float* in, int64_t in_width, int64_t channels,
                          const float* weights, int64_t width, int64_t rows, float* sums,
                          bool add) {
  const int64_t no_offset = 0;
  Product product;
  product.taps = &no_offset;
  product.tap_count = 1;
  product.depth = channels;
  product.weights = weights;
  product.last = kLanes;
  product.add = add;
  Multiply(rows, width / kLanes, product, [&](int64_t i) { return in + i * in_width; },
           [&](int64_t i) { return sums + i * width; });
}

// Up to this size U, or its gradient, is kept whole and blocks of tiles pass by it; beyond, a group
// of tiles is kept and blocks of U pass by. 128 to 128 channels on 16x16 maps, GFLOP/s counted as
// direct: 287 and 175 forward, 212 and 240 the kernel's gradient, which reads and writes its sums.
constexpr int64_t kMostWeightsKept = 128 * 128;
constexpr int64_t kMostGradientsKept = 64 * 128;

constexpr int64_t kTileBlockFloats = 56 << 10;  // of V and M for a block of tiles: in the L2 cache
constexpr int64_t kGroupTiles = 128;            // M is 1.2 MB: 455 tiles are a fifth slower
constexpr int64_t kGroupFloats = 4 << 20;       // of V and D for a group

// Into how many shares to cut each of `tasks` tasks so that all threads have work, at most `most`.
inline int64_t SharesOfTask(int64_t tasks, int64_t threads, int64_t most) {
  if (tasks % threads == 0) return 1;
  return std::clamp<int64_t>(CeilDiv(2 * threads, tasks), 1, std::max<int64_t>(1, most));
}

inline int64_t TilesOfGroup(int64_t floats_of_tile) {
  return std::clamp<int64_t>(kGroupFloats / floats_of_tile, 24, kGroupTiles);
}

// A block of tiles at a time goes through all three steps while it is in cache, as U is too.
template <class F>
void ConvolveTileBlocks(Tasks& tasks, const Convolution& conv, const WinogradTiles<F>& tiles) {
  constexpr int kPoints = WinogradTiles<F>::kPoints;
  const Blocks inputs(conv.kernel.inputs), outputs(conv.kernel.outputs);
  const std::vector<float> zeros(inputs.all_width());

  const Panels u(outputs, kPoints, conv.kernel.inputs);
  const Scratch kernel(u.floats());
  tasks.Run(outputs.count() * inputs.count(), [&](int64_t i) {
    const int64_t o = i / inputs.count(), c = i % inputs.count();
    TransformKernel<F>(conv.kernel, inputs.first(c), inputs.channels(c), outputs, o, u.Point(o),
                       u.At(kernel.data(), o) + inputs.first(c) * outputs.width(o));
  });

  const int64_t fit = kTileBlockFloats / (kPoints * (inputs.all_width() + outputs.width(0)));
  const int64_t most = std::clamp<int64_t>(fit, 12, 96) / 12 * 12;  // whole register tiles
  const int64_t blocks = std::clamp(2 * tasks.threads(), CeilDiv(tiles.count, most), tiles.count);
  tasks.Run(std::min(blocks, 4 * tasks.threads()), [&](int64_t task) {
    const int64_t parts = std::min(blocks, 4 * tasks.threads());
    const Panels v(inputs, kPoints, CeilDiv(tiles.count, blocks));
    const Panels p(Blocks(outputs.width(0)), kPoints, CeilDiv(tiles.count, blocks));
    const Scratch in(v.floats()), products(p.floats());
    for (int64_t b = blocks * task / parts; b < blocks * (task + 1) / parts; ++b) {
      const int64_t begin = tiles.count * b / blocks, end = tiles.count * (b + 1) / blocks;
      TransformInputs<F>(conv.in, conv.top, conv.left, tiles, begin, end, zeros, v, 0, in.data());
      for (int64_t o = 0; o < outputs.count(); ++o) {
        const int64_t width = outputs.width(o);
        for (int64_t point = 0; point < kPoints; ++point) {
          for (int64_t c = 0; c < inputs.count(); ++c) {
            MultiplyPoint(v.At(in.data(), c, point), inputs.width(c), inputs.channels(c),
                          u.At(kernel.data(), o, point) + inputs.first(c) * width, width,
                          end - begin, p.At(products.data(), 0, point), c > 0);
          }
        }
        TransformOutputs<F>(products.data(), p.Point(0), tiles, begin, end, outputs, o, conv.out);
      }
    }
  });
}

// A block of U at a time meets a group of tiles: U, 4 times the kernel for F(4, 3), is never stored.
template <class F>
void ConvolveTileGroups(Tasks& tasks, const Convolution& conv, const WinogradTiles<F>& tiles) {
  constexpr int kPoints = WinogradTiles<F>::kPoints;
  const Blocks inputs(conv.kernel.inputs), outputs(conv.kernel.outputs);
  const std::vector<float> zeros(inputs.all_width());
  const int64_t groups = CeilDiv(tiles.count, TilesOfGroup(kPoints * inputs.all_width()));
  const Panels v(inputs, kPoints, CeilDiv(tiles.count, groups));
  const Scratch in(v.floats());
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = tiles.count * group / groups;
    const int64_t rows = tiles.count * (group + 1) / groups - first;
    tasks.RunParts(rows, 1, [&](int64_t begin, int64_t end) {
      TransformInputs<F>(conv.in, conv.top, conv.left, tiles, first + begin, first + end, zeros, v,
                         begin, in.data());
    });
    const int64_t shares = SharesOfTask(outputs.count(), tasks.threads(), rows / 24);
    tasks.Run(outputs.count() * shares, [&](int64_t task) {
      const int64_t o = task / shares, share = task % shares, width = outputs.width(o);
      const int64_t begin = rows * share / shares, end = rows * (share + 1) / shares;
      const Panels u(Blocks(width), kPoints, inputs.width(0));
      const Panels p(Blocks(width), kPoints, end - begin);
      const Scratch kernel(u.floats()), products(p.floats());
      for (int64_t c = 0; c < inputs.count(); ++c) {
        TransformKernel<F>(conv.kernel, inputs.first(c), inputs.channels(c), outputs, o, u.Point(0),
                           kernel.data());
        for (int64_t point = 0; point < kPoints; ++point) {
          MultiplyPoint(v.At(in.data(), c, point) + begin * inputs.width(c), inputs.width(c),
                        inputs.channels(c), u.At(kernel.data(), 0, point), width, end - begin,
                        p.At(products.data(), 0, point), c > 0);
        }
      }
      TransformOutputs<F>(products.data(), p.Point(0), tiles, first + begin, first + end, outputs,
                          o, conv.out);
    });
  }
}

template <class F>
void ConvolveWinograd(Tasks& tasks, const Convolution& conv) {
  if (conv.out.empty()) return;
  if (conv.kernel.inputs == 0) return FillZeros(conv.out);
  const WinogradTiles<F> tiles(conv.out.n, conv.out.h, conv.out.w);
  if (conv.kernel.inputs * conv.kernel.outputs <= kMostWeightsKept) {
    ConvolveTileBlocks<F>(tasks, conv, tiles);
  } else {
    ConvolveTileGroups<F>(tasks, conv, tiles);
  }
}

// sums (channels, width) (+)= V^T @ D at one point: for each tile, where its row of V and of D is.
inline void AddPoint(const float* in, const std::vector<int64_t>& in_offsets, int64_t channels,
                     const float* dy, const std::vector<int64_t>& dy_offsets, int64_t width,
                     float* sums, bool add) {
  constexpr int64_t kTilesAtOnce = 128;  // 32 KiB of D stay in the L1 cache
  OuterProduct product;
  product.x = in;
  product.y = dy;
  product.sums = sums;
  product.sums_row = width;
  product.last = kLanes;
  const int64_t rows = in_offsets.size();
  for (int64_t begin = 0; begin < rows; begin += kTilesAtOnce) {
    product.x_offsets = in_offsets.data() + begin;
    product.y_offsets = dy_offsets.data() + begin;
    product.count = std::min(kTilesAtOnce, rows - begin);
    product.add = add || begin > 0;
    AddOuterProducts(channels, width / kLanes, product);
  }
}

inline std::vector<int64_t> Multiples(int64_t of, int64_t count) {
  std::vector<int64_t> multiples(count);
  for (int64_t i = 0; i < count; ++i) multiples[i] = i * of;
  return multiples;
}

// The gradient of U, `rows` rows from input channel `first` on, to that of the kernel. `sums` are
// its parts, to be added in this order.
template <class F>
__attribute__((noinline)) void TransformKernelGradient(const std::vector<const float*>& sums,
                                                       int64_t point, int64_t rows, int64_t first,
                                                       const Blocks& outputs, int64_t block,
                                                       const Kernel<float>& kernel, bool add) {
  const int64_t width = outputs.width(block);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t v = 0; v < width; v += kLanes) {
      const int64_t n = v + kLanes < width ? kLanes : outputs.last(block);
      TwoDimensions<F::KernelTransposed, F::kSide, F::kTaps>(
          [&](int i, int j) {
            const int64_t at = (i * F::kSide + j) * point + row * width + v;
            Vector sum = Load(sums[0] + at);
            for (size_t s = 1; s < sums.size(); ++s) sum += Load(sums[s] + at);
            return sum;
          },
          [&](int i, int j, Vector value) {
            float* to = kernel.At(i, j, first + row, outputs.first(block) + v);
            StoreFirst(to, add ? LoadFirst(to, n) + value : value, n);
          });
    }
  }
}

// Each thread sums the gradient of all of U, in its cache, over blocks of tiles.
template <class F>
void KernelGradientTileBlocks(Tasks& tasks, const KernelGradient& gradient,
                              const WinogradTiles<F>& tiles) {
  constexpr int kPoints = WinogradTiles<F>::kPoints;
  const Blocks inputs(gradient.kernel.inputs), outputs(gradient.kernel.outputs);
  const std::vector<float> zeros(std::max(inputs.all_width(), outputs.all_width()));
  const int64_t fit = kTileBlockFloats / (kPoints * (inputs.all_width() + outputs.all_width()));
  const int64_t blocks = CeilDiv(tiles.count, std::clamp<int64_t>(fit, 24, 96));
  const int64_t parts = std::min(tasks.threads(), blocks);
  const int64_t most = CeilDiv(tiles.count, blocks);

  const Panels u(outputs, kPoints, gradient.kernel.inputs);
  const Scratch sums(parts * u.floats());
  tasks.Run(parts, [&](int64_t part) {
    const Panels v(inputs, kPoints, most), d(outputs, kPoints, most);
    const Scratch in(v.floats()), dy(d.floats());
    float* sum = sums.data() + part * u.floats();
    const int64_t first_block = blocks * part / parts;
    for (int64_t b = first_block; b < blocks * (part + 1) / parts; ++b) {
      const int64_t begin = tiles.count * b / blocks, end = tiles.count * (b + 1) / blocks;
      TransformInputs<F>(gradient.in, gradient.top, gradient.left, tiles, begin, end, zeros, v, 0,
                         in.data());
      TransformOutputGradients<F>(gradient.out, tiles, begin, end, zeros, d, 0, dy.data());
      for (int64_t o = 0; o < outputs.count(); ++o) {
        const int64_t width = outputs.width(o);
        const auto dy_offsets = Multiples(width, end - begin);
        for (int64_t c = 0; c < inputs.count(); ++c) {
          const auto in_offsets = Multiples(inputs.width(c), end - begin);
          for (int64_t point = 0; point < kPoints; ++point) {
            AddPoint(v.At(in.data(), c, point), in_offsets, inputs.channels(c),
                     d.At(dy.data(), o, point), dy_offsets, width,
                     u.At(sum, o, point) + inputs.first(c) * width, b > first_block);
          }
        }
      }
    }
  });

  tasks.Run(outputs.count() * inputs.count(), [&](int64_t i) {
    const int64_t o = i / inputs.count(), c = i % inputs.count();
    std::vector<const float*> summands;
    for (int64_t part = 0; part < parts; ++part) {
      summands.push_back(u.At(sums.data() + part * u.floats(), o) +
                         inputs.first(c) * outputs.width(o));
    }
    TransformKernelGradient<F>(summands, u.Point(o), inputs.channels(c), inputs.first(c), outputs,
                               o, gradient.kernel, false);
  });
}

// The gradient of U, a block at a time, over a group of tiles; that of the kernel sums the groups.
template <class F>
void KernelGradientTileGroups(Tasks& tasks, const KernelGradient& gradient,
                              const WinogradTiles<F>& tiles) {
  constexpr int kPoints = WinogradTiles<F>::kPoints;
  const Blocks inputs(gradient.kernel.inputs), outputs(gradient.kernel.outputs);
  const std::vector<float> zeros(std::max(inputs.all_width(), outputs.all_width()));
  const int64_t groups = CeilDiv(
      tiles.count, TilesOfGroup(kPoints * (inputs.all_width() + outputs.all_width())));
  const int64_t most = CeilDiv(tiles.count, groups);
  const Panels v(inputs, kPoints, most), d(outputs, kPoints, most);
  const Scratch in(v.floats()), dy(d.floats());
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = tiles.count * group / groups;
    const int64_t rows = tiles.count * (group + 1) / groups - first;
    tasks.RunParts(rows, 1, [&](int64_t begin, int64_t end) {
      TransformInputs<F>(gradient.in, gradient.top, gradient.left, tiles, first + begin,
                         first + end, zeros, v, begin, in.data());
      TransformOutputGradients<F>(gradient.out, tiles, first + begin, first + end, zeros, d, begin,
                                  dy.data());
    });
    const int64_t squares = outputs.count() * inputs.count();
    const int64_t shares = SharesOfTask(squares, tasks.threads(), inputs.channels(0) / kTileRows);
    tasks.Run(squares * shares, [&](int64_t task) {
      const int64_t square = task / shares, share = task % shares;
      const int64_t o = square / inputs.count(), c = square % inputs.count();
      const int64_t begin = inputs.channels(c) * share / shares;
      const int64_t channels = inputs.channels(c) * (share + 1) / shares - begin;
      const int64_t width = outputs.width(o);
      const Panels u(Blocks(width), kPoints, channels);
      const Scratch sums(u.floats());
      const auto in_offsets = Multiples(inputs.width(c), rows);
      const auto dy_offsets = Multiples(width, rows);
      for (int64_t point = 0; point < kPoints; ++point) {
        AddPoint(v.At(in.data(), c, point) + begin, in_offsets, channels,
                 d.At(dy.data(), o, point), dy_offsets, width, u.At(sums.data(), 0, point), false);
      }
      TransformKernelGradient<F>({sums.data()}, u.Point(0), channels, inputs.first(c) + begin,
                                 outputs, o, gradient.kernel, group > 0);
    });
  }
}

template <class F>
void KernelGradientWinograd(Tasks& tasks, const KernelGradient& gradient) {
  if (gradient.kernel.inputs * gradient.kernel.outputs == 0) return;
  if (gradient.out.empty()) return FillZeros(gradient.kernel);
  const WinogradTiles<F> tiles(gradient.out.n, gradient.out.h, gradient.out.w);
  if (gradient.kernel.inputs * gradient.kernel.outputs <= kMostGradientsKept) {
    KernelGradientTileBlocks<F>(tasks, gradient, tiles);
  } else {
    KernelGradientTileGroups<F>(tasks, gradient, tiles);
  }
}

}  // namespace flaxcls
