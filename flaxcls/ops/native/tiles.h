// Tiles of sums that stay in registers: the two matrix products under every convolution.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vectors.h"

namespace flaxcls {

constexpr int kMostRows = 8;  // each has a pointer of its own, and x86 has 16 registers for them

constexpr int TileRows(int vectors) {
  return std::min(kMostRows, kTileRows * kTileVectors / vectors);
}

// Channels in blocks of at most kTileVectors vectors, as even as can be: with 16 lanes, 80 channels
// are 48 + 32. Blocks are as wide as whole vectors, and none is wider than the first; the last
// vector may hold fewer channels.
class Blocks {
 public:
  explicit Blocks(int64_t channels)
      : channels_(channels),
        vectors_(CeilDiv(channels, kLanes)),
        count_(CeilDiv(vectors_, kTileVectors)) {}

  int64_t count() const { return count_; }
  int64_t all_channels() const { return channels_; }
  int64_t all_width() const { return vectors_ * kLanes; }
  int64_t first(int64_t i) const { return CeilDiv(vectors_ * i, count_) * kLanes; }
  int64_t width(int64_t i) const { return first(i + 1) - first(i); }
  int64_t vectors(int64_t i) const { return width(i) / kLanes; }
  int64_t channels(int64_t i) const { return std::min(channels_, first(i + 1)) - first(i); }
  int64_t last(int64_t i) const { return channels(i) - width(i) + kLanes; }  // in the last vector

 private:
  int64_t channels_, vectors_, count_;
};

// Calls f(std::integral_constant<int, vectors>), for 1 <= vectors <= kTileVectors.
template <int kVectors = kTileVectors, class F>
inline void WithVectors(int64_t vectors, const F& f) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return WithVectors<kVectors - 1>(vectors, f);
  }
  f(std::integral_constant<int, kVectors>());
}

// sums[r][:] (+)= sum over taps t and k < depth of rows[r][taps[t] + k] * weights[t][k][:].
struct Product {
  const float* rows[kMostRows];
  float* sums[kMostRows];
  const int64_t* taps;
  int64_t tap_count;
  int64_t depth;
  const float* weights;  // (tap_count, depth, vectors * kLanes)
  int64_t last;          // floats to write of the last vector of sums
  bool add;              // to what `sums` holds
};

template <int kRows, int kVectors>
__attribute__((noinline)) void MultiplyTile(const Product& p) {
  Vector sums[kRows][kVectors];
  const int64_t edge = (kVectors - 1) * kLanes;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors - 1; ++v) {
      sums[r][v] = p.add ? Load(p.sums[r] + v * kLanes) : Vector{};
    }
    sums[r][kVectors - 1] = p.add ? LoadFirst(p.sums[r] + edge, p.last) : Vector{};
  }
  const float* weights = p.weights;
  for (int64_t t = 0; t < p.tap_count; ++t) {
    const float* x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = p.rows[r] + p.taps[t];
    for (int64_t k = 0; k < p.depth; ++k, weights += kVectors * kLanes) {
      Vector w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) w[v] = Load(weights + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vector value = Broadcast(x[r][k]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] += value * w[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors - 1; ++v) Store(p.sums[r] + v * kLanes, sums[r][v]);
    StoreFirst(p.sums[r] + edge, sums[r][kVectors - 1], p.last);
  }
}

// MultiplyTile for 1 <= rows <= TileRows(kVectors).
template <int kVectors, int kRows = TileRows(kVectors)>
inline void MultiplyFew(int64_t rows, const Product& p) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return MultiplyFew<kVectors, kRows - 1>(rows, p);
  }
  MultiplyTile<kRows, kVectors>(p);
}

// The product of any number of rows: row(i) is where row i reads, and sum(i) where it adds.
template <class Row, class Sum>
inline void Multiply(int64_t rows, int64_t vectors, Product product, const Row& row,
                     const Sum& sum) {
  WithVectors(vectors, [&](auto kVectors) {
    constexpr int kRows = TileRows(kVectors);
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - i);
      for (int64_t r = 0; r < count; ++r) {
        product.rows[r] = row(i + r);
        product.sums[r] = sum(i + r);
      }
      MultiplyFew<kVectors>(count, product);
    }
  });
}

// sums[r][:] (+)= sum over i < count of x[x_offsets[i] + r] * y[y_offsets[i]][:].
struct OuterProduct {
  const float* x;
  const float* y;
  const int64_t* x_offsets;
  const int64_t* y_offsets;
  int64_t count;
  float* sums;
  int64_t sums_row;  // floats from one row of sums to the next
  int64_t last;      // floats to read and write of the last vector
  bool add;          // to what `sums` holds
};

// What the products add up to is added to `sums` last: a sum of sums loses fewer digits than one of
// all products (the kernel's gradient by F(2x2, 5x5) over 3136 tiles: 1.0e-5 becomes
// 2.1e-6).
template <int kRows, int kVectors>
__attribute__((noinline)) void OuterTile(const OuterProduct& p) {
  Vector sums[kRows][kVectors] = {};
  const int64_t edge = (kVectors - 1) * kLanes;
  for (int64_t i = 0; i < p.count; ++i) {
    const float* x = p.x + p.x_offsets[i];
    const float* y = p.y + p.y_offsets[i];
    Vector w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors - 1; ++v) w[v] = Load(y + v * kLanes);
    w[kVectors - 1] = LoadFirst(y + edge, p.last);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector value = Broadcast(x[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] += value * w[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float* row = p.sums + r * p.sums_row;
    if (p.add) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors - 1; ++v) sums[r][v] += Load(row + v * kLanes);
      sums[r][kVectors - 1] += LoadFirst(row + edge, p.last);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors - 1; ++v) Store(row + v * kLanes, sums[r][v]);
    StoreFirst(row + edge, sums[r][kVectors - 1], p.last);
  }
}

// OuterTile for 1 <= rows <= TileRows(kVectors).
template <int kVectors, int kRows = TileRows(kVectors)>
inline void OuterFew(int64_t rows, const OuterProduct& p) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return OuterFew<kVectors, kRows - 1>(rows, p);
  }
  OuterTile<kRows, kVectors>(p);
}

// The outer products of any number of rows, in tiles as even as can be: 9 rows of 6 are 5 + 4.
inline void AddOuterProducts(int64_t rows, int64_t vectors, OuterProduct product) {
  const float* x = product.x;
  float* sums = product.sums;
  WithVectors(vectors, [&](auto kVectors) {
    const int64_t tiles = CeilDiv(rows, TileRows(kVectors));
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = rows * i / tiles;
      product.x = x + begin;
      product.sums = sums + begin * product.sums_row;
      OuterFew<kVectors>(rows * (i + 1) / tiles - begin, product);
    }
  });
}

}  // namespace flaxcls
