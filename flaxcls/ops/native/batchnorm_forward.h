// Batch normalisation (Ioffe and Szegedy 2015, algorithms 1 and 2), and in the same pass over
// memory what often follows it: adding a residual, ReLU, a 2x2 max pool of stride 2.
//
// Of a map x (pixels, C): mean and variance of each channel, then for each pixel
//     z = (x - mean) * slope + offset,    slope = scale / sqrt(variance + epsilon),
// and with the gradient d of z that of x is
//     dx = slope * (d - mean of d - xhat * mean of (d * xhat)),    xhat = (x - mean) / deviation.
// In training both directions read x twice: once for sums a channel, once for the pixels. Memory is what they
// wait for, so whatever is done to a number between its load and its store is free.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "channel_sums.h"
#include "vectors.h"

namespace flaxcls {

// What follows the normalisation, in this order.
template <bool residual, bool relu, bool pool>
struct Fusion {
  static constexpr bool kResidual = residual;
  static constexpr bool kRelu = relu;
  static constexpr bool kPool = pool;
};

// Calls f(Fusion<...>{}) for the fusion that is asked for.
template <class F>
void WithFusion(bool residual, bool relu, bool pool, const F& f) {
  const auto with = [](bool wanted, const auto& g) {
    wanted ? g(std::true_type{}) : g(std::false_type{});
  };
  with(residual, [&](auto r) {
    with(relu, [&](auto a) {
      with(pool, [&](auto p) {
        f(Fusion<decltype(r)::value, decltype(a)::value, decltype(p)::value>{});
      });
    });
  });
}

// T is float or BFloat16. Arrays that a fusion does not need are not touched.
template <class T>
struct BatchNormForwardArrays {
  const T* x;
  const T* residual;
  const float* scale;  // (C,), as all that follow but y and winner
  const float* bias;
  T* y;
  float* mean;       // these three are results in training, and given where it is over
  float* mean_rest;  // the mean is mean + mean_rest: see Normalizer
  float* variance;   // biased
  uint8_t* winner;   // of each pooled pixel the place of its maximum, or kNoWinner; or null
};

// The winner of a pool all of whose inputs ReLU has made zero: no gradient passes.
constexpr int32_t kNoWinner = 4;

inline int64_t PooledElements(const MapShape& shape) {
  return shape.examples * (shape.height / 2) * (shape.width / 2) * shape.channels;
}

// ---- Statistics ---------------------------------------------------------------------------------

// Near the mean of each channel: that of a few pixels, spread over the map.
template <class T>
std::vector<float> Origin(const T* x, const MapShape& shape) {
  const int64_t samples = std::min<int64_t>(16, shape.pixels());
  std::vector<float> origin(shape.channels);
  for (int64_t i = 0; i < samples; ++i) {
    const T* pixel = x + shape.pixels() * (2 * i + 1) / (2 * samples) * shape.channels;
    ForVectors(shape.channels, [&](int64_t c, auto lanes) {
      Store(&origin[c], Load(&origin[c], lanes) + Load(pixel + c, lanes) / float(samples), lanes);
    });
  }
  return origin;
}

// One pass: the variance is E[(x - origin)^2] - E[x - origin]^2, which loses nothing where the
// origin is a small part of a deviation from the mean. With origin 0 and mean 1000, deviation 1,
// float sums would leave two digits.
template <class T, class Parallel>
void Statistics(const MapShape& shape, const BatchNormForwardArrays<T>& arrays,
                Parallel& parallel) {
  const FlatMap flat(shape);
  const std::vector<float> near = Origin(arrays.x, shape);
  const std::vector<float> origin = Repeated(near, flat.width());
  const Parts parts(flat.rows(), shape.pixels() * shape.channels);
  const std::vector<double> totals = ChannelSums(
      parts, flat.width(), shape.channels, parallel,
      [&](ColumnSums& sums, int64_t begin, int64_t end) {
        flat.Visit(begin, end, [&](int64_t offset, int64_t rows, int64_t width) {
          sums.Add(rows, width, [&](int64_t row, int64_t column, auto lanes) {
            const Vector from_origin = Load(arrays.x + offset + row * width + column, lanes) -
                                       Load(&origin[column], lanes);
            return Two{from_origin, from_origin * from_origin};
          });
        });
      });
  const double n = std::max<int64_t>(1, shape.pixels());  // no pixels: mean 0, variance 0
  for (int64_t c = 0; c < shape.channels; ++c) {
    const double shift = totals[c] / n;
    const double mean = near[c] + shift;
    const double variance = totals[shape.channels + c] / n - shift * shift;
    arrays.mean[c] = mean;
    arrays.mean_rest[c] = mean - arrays.mean[c];
    arrays.variance[c] = variance < 0 ? 0 : variance;  // a NaN stays
  }
}

// z = (x - mean) * slope + offset, a channel. The mean is rounded to float, and what that leaves
// out is put into the offset: with mean 1000 and deviation 1 it is 3e-5 of z.
struct Normalizer {
  template <class Arrays>
  Normalizer(const Arrays& arrays, int64_t channels, int64_t width, float epsilon) {
    std::vector<float> slopes(channels), offsets(channels);
    for (int64_t c = 0; c < channels; ++c) {
      slopes[c] = arrays.scale[c] / std::sqrt(double{arrays.variance[c]} + epsilon);
      offsets[c] = arrays.bias[c] - double{arrays.mean_rest[c]} * slopes[c];
    }
    mean = Repeated({arrays.mean, arrays.mean + channels}, width);
    slope = Repeated(std::move(slopes), width);
    offset = Repeated(std::move(offsets), width);
  }

  template <class Lanes>
  Vector operator()(Vector x, int64_t column, Lanes lanes) const {
    return (x - Load(&mean[column], lanes)) * Load(&slope[column], lanes) +
           Load(&offset[column], lanes);
  }

  std::vector<float> mean, slope, offset;
};

// ---- Forward ------------------------------------------------------------------------------------

inline Vector Relu(Vector z) { return z < 0.0f ? Vector{} : z; }  // a NaN stays

// Rows begin ... end of the flat map: y = ReLU(z + residual).
template <class F, class T>
void NormalizeRows(const FlatMap& flat, int64_t begin, int64_t end, const Normalizer& normalize,
                   const BatchNormForwardArrays<T>& arrays) {
  flat.Visit(begin, end, [&](int64_t offset, int64_t rows, int64_t width) {
    for (int64_t i = offset; i < offset + rows * width; i += width) {
      ForVectors(width, [&](int64_t column, auto lanes) {
        Vector z = normalize(Load(arrays.x + i + column, lanes), column, lanes);
        if constexpr (F::kResidual) z += Load(arrays.residual + i + column, lanes);
        if constexpr (F::kRelu) z = Relu(z);
        Store(arrays.y + i + column, z, lanes);
      });
    }
  });
}

// Where a band of two rows of the map lies, and the four pixels of each of its pooled pixels.
struct Band {
  Band(const MapShape& shape, int64_t band) {
    const int64_t bands = CeilDiv(shape.height, 2), pooled_rows = shape.height / 2;
    const int64_t example = band / bands, row = band % bands;
    const int64_t c = shape.channels;
    whole = row < pooled_rows;
    columns = shape.width / 2;
    upper = (example * shape.height + 2 * row) * shape.width * c;
    row_size = shape.width * c;
    pooled = (example * pooled_rows + row) * columns * c;
    for (int64_t place = 0; place < 4; ++place) places[place] = place / 2 * row_size + place % 2 * c;
  }

  bool whole;          // otherwise it is the last row of an odd map, which no window covers
  int64_t columns;     // pooled pixels
  int64_t upper;       // offset of its first row in the map
  int64_t row_size;    // elements
  int64_t pooled;      // offset of its row in the pooled map
  int64_t places[4];   // offsets in the map from the upper left pixel of a window to its pixels
};

// y = the maximum of ReLU(z + residual) over windows, for one band.
template <class F, class T>
void NormalizeAndPool(const MapShape& shape, const Band& band, const Normalizer& normalize,
                      const BatchNormForwardArrays<T>& arrays) {
  const int64_t c = shape.channels;
  for (int64_t j = 0; j < band.columns; ++j) {
    const int64_t window = band.upper + 2 * j * c, pooled = band.pooled + j * c;
    ForVectors(c, [&](int64_t channel, auto lanes) {
      Vector best = {};
      Ints winner = {};
      for (int32_t place = 0; place < 4; ++place) {
        const int64_t at = window + band.places[place] + channel;
        Vector z = normalize(Load(arrays.x + at, lanes), channel, lanes);
        if constexpr (F::kResidual) z += Load(arrays.residual + at, lanes);
        if (place == 0) {
          best = z;
          continue;
        }
        const Ints better = (z > best) | (z != z);  // a NaN wins
        winner = better ? Ints{} + place : winner;
        best = better ? z : best;
      }
      if constexpr (F::kRelu) {
        winner = best > 0.0f ? winner : Ints{} + kNoWinner;
        best = Relu(best);
      }
      Store(arrays.y + pooled + channel, best, lanes);
      if (arrays.winner) StoreBytes(arrays.winner + pooled + channel, winner, lanes);
    });
  }
}

// y from the statistics in `arrays`.
// parallel.Run(n, f) calls f(0) ... f(n - 1): Tasks, or a plain loop.
template <class F, class T, class Parallel>
void Normalize(const MapShape& shape, float epsilon, const BatchNormForwardArrays<T>& arrays,
               Parallel& parallel) {
  if (shape.channels == 0) return;
  const FlatMap flat(shape);
  const int64_t width = F::kPool ? shape.channels : flat.width();
  const Normalizer normalize(arrays, shape.channels, width, epsilon);
  const int64_t elements = shape.pixels() * shape.channels;
  const Parts parts(F::kPool ? shape.bands() : flat.rows(), elements);
  parts.Run(parallel, [&](int64_t, int64_t begin, int64_t end) {
    if constexpr (F::kPool) {
      for (int64_t i = begin; i < end; ++i) {
        const Band band(shape, i);
        if (band.whole) NormalizeAndPool<F>(shape, band, normalize, arrays);
      }
    } else {
      NormalizeRows<F>(flat, begin, end, normalize, arrays);
    }
  });
}

// The statistics of x, and y from them.
template <class F, class T, class Parallel>
void BatchNormForward(const MapShape& shape, float epsilon,
                      const BatchNormForwardArrays<T>& arrays, Parallel& parallel) {
  if (shape.channels == 0) return;
  Statistics(shape, arrays, parallel);
  Normalize<F>(shape, epsilon, arrays, parallel);
}

}  // namespace flaxcls
