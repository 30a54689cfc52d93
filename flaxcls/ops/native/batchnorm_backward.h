// The gradients of batch normalisation in training and of what is fused with it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "batchnorm_forward.h"
#include "channel_sums.h"
#include "vectors.h"

namespace flaxcls {

template <class T>
struct BatchNormBackwardArrays {
  const T* x;
  const T* y;  // needed for residual and ReLU without pool
  const T* gradient;
  const uint8_t* winner;
  const float* scale;
  const float* bias;
  const float* mean;
  const float* mean_rest;
  const float* variance;
  T* dx;
  T* dresidual;  // written if there is a residual and ReLU or pool; otherwise it is the gradient
  float* dscale;
  float* dbias;
};

// The gradient of z at element i of the map, without a pool. ReLU's mask is computed again from x;
// with a residual, which would have to be read again, it is taken from y.
template <class F, class T, class Lanes>
inline Vector GradientOfZ(const BatchNormBackwardArrays<T>& arrays, const Normalizer& normalize,
                          Vector x, int64_t i, int64_t column, Lanes lanes) {
  const Vector gradient = Load(arrays.gradient + i, lanes);
  if constexpr (!F::kRelu) {
    return gradient;
  } else if constexpr (F::kResidual) {
    return Load(arrays.y + i, lanes) > 0.0f ? gradient : Vector{};
  } else {
    return normalize(x, column, lanes) > 0.0f ? gradient : Vector{};
  }
}

// Sums a channel of d, the gradient of z, and of d * (x - mean).
template <class F, class T, class Parallel>
std::vector<double> GradientSums(const MapShape& shape, const Normalizer& normalize,
                                 const BatchNormBackwardArrays<T>& arrays, Parallel& parallel) {
  const FlatMap flat(shape);
  const Parts parts(flat.rows(), shape.pixels() * shape.channels);
  return ChannelSums(
      parts, flat.width(), shape.channels, parallel,
      [&](ColumnSums& sums, int64_t begin, int64_t end) {
        flat.Visit(begin, end, [&](int64_t offset, int64_t rows, int64_t width) {
          sums.Add(rows, width, [&](int64_t row, int64_t column, auto lanes) {
            const int64_t i = offset + row * width + column;
            const Vector x = Load(arrays.x + i, lanes);
            const Vector d = GradientOfZ<F>(arrays, normalize, x, i, column, lanes);
            return Two{d, d * (x - Load(&normalize.mean[column], lanes))};
          });
        });
      });
}

// The same of a pooled map: d is not zero at the winners alone.
template <class T, class Parallel>
std::vector<double> PooledGradientSums(const MapShape& shape, const Normalizer& normalize,
                                       const BatchNormBackwardArrays<T>& arrays,
                                       Parallel& parallel) {
  const int64_t c = shape.channels;
  const Parts parts(shape.bands(), shape.pixels() * c);
  return ChannelSums(
      parts, c, c, parallel, [&](ColumnSums& sums, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Band band(shape, i);
          if (!band.whole) continue;
          sums.Add(band.columns, c, [&](int64_t column, int64_t channel, auto lanes) {
            const T* x = arrays.x + band.upper + 2 * column * c + channel;
            const int64_t pooled = band.pooled + column * c + channel;
            const Ints winner = LoadBytes(arrays.winner + pooled, lanes);
            const Vector gradient = Load(arrays.gradient + pooled, lanes);
            Vector of_winner = Load(x, lanes);
            for (int32_t place = 1; place < 4; ++place) {
              of_winner = winner == place ? Load(x + band.places[place], lanes) : of_winner;
            }
            const Vector d = winner == kNoWinner ? Vector{} : gradient;
            return Two{d, d * (of_winner - Load(&normalize.mean[channel], lanes))};
          });
        }
      });
}

// dx = slope * d - tilt * (x - mean) - constant, a channel.
struct InputGradient {
  // sums: of d and of d * (x - mean); writes dscale and dbias too.
  template <class T>
  InputGradient(const BatchNormBackwardArrays<T>& arrays, const Normalizer& normalize,
                std::vector<double> sums, const MapShape& shape, int64_t width, float epsilon)
      : normalize(normalize) {
    const double n = std::max<int64_t>(1, shape.pixels());
    std::vector<float> tilts(shape.channels), constants(shape.channels);
    for (int64_t c = 0; c < shape.channels; ++c) {
      const double rest = arrays.mean_rest[c], of_z = sums[c];
      const double inverse = 1 / std::sqrt(double{arrays.variance[c]} + epsilon);
      const double dscale = (sums[shape.channels + c] - rest * of_z) * inverse;
      const double slope = arrays.scale[c] * inverse, tilt = slope * inverse * dscale / n;
      arrays.dscale[c] = dscale;
      arrays.dbias[c] = of_z;
      tilts[c] = tilt;
      constants[c] = slope * of_z / n - tilt * rest;
    }
    tilt = Repeated(std::move(tilts), width);
    constant = Repeated(std::move(constants), width);
  }

  template <class Lanes>
  Vector operator()(Vector x, Vector d, int64_t column, Lanes lanes) const {
    return Load(&normalize.slope[column], lanes) * d - Load(&constant[column], lanes) -
           Load(&tilt[column], lanes) * (x - Load(&normalize.mean[column], lanes));
  }

  const Normalizer& normalize;
  std::vector<float> tilt, constant;
};

template <class F, class T>
void InputGradientOfRows(const FlatMap& flat, int64_t begin, int64_t end, const InputGradient& dx,
                         const BatchNormBackwardArrays<T>& arrays) {
  flat.Visit(begin, end, [&](int64_t offset, int64_t rows, int64_t width) {
    for (int64_t row = offset; row < offset + rows * width; row += width) {
      ForVectors(width, [&](int64_t column, auto lanes) {
        const int64_t i = row + column;
        const Vector x = Load(arrays.x + i, lanes);
        const Vector d = GradientOfZ<F>(arrays, dx.normalize, x, i, column, lanes);
        if constexpr (F::kResidual && F::kRelu) Store(arrays.dresidual + i, d, lanes);
        Store(arrays.dx + i, dx(x, d, column, lanes), lanes);
      });
    }
  });
}

// `pixels` of the map from element `begin` on that no window covers.
template <class F, class T>
void InputGradientOfUncovered(int64_t begin, int64_t pixels, int64_t channels,
                              const InputGradient& dx, const BatchNormBackwardArrays<T>& arrays) {
  for (int64_t i = begin; i < begin + pixels * channels; i += channels) {
    ForVectors(channels, [&](int64_t channel, auto lanes) {
      const Vector x = Load(arrays.x + i + channel, lanes);
      Store(arrays.dx + i + channel, dx(x, Vector{}, channel, lanes), lanes);
      if constexpr (F::kResidual) Store(arrays.dresidual + i + channel, Vector{}, lanes);
    });
  }
}

template <class F, class T>
void InputGradientOfBand(const MapShape& shape, const Band& band, const InputGradient& dx,
                         const BatchNormBackwardArrays<T>& arrays) {
  const int64_t c = shape.channels;
  if (!band.whole) return InputGradientOfUncovered<F>(band.upper, shape.width, c, dx, arrays);
  for (int64_t j = 0; j < band.columns; ++j) {
    const int64_t window = band.upper + 2 * j * c, pooled = band.pooled + j * c;
    ForVectors(c, [&](int64_t channel, auto lanes) {
      const Ints winner = LoadBytes(arrays.winner + pooled + channel, lanes);
      const Vector gradient = Load(arrays.gradient + pooled + channel, lanes);
      for (int32_t place = 0; place < 4; ++place) {
        const int64_t i = window + band.places[place] + channel;
        const Vector d = winner == place ? gradient : Vector{};
        if constexpr (F::kResidual) Store(arrays.dresidual + i, d, lanes);
        Store(arrays.dx + i, dx(Load(arrays.x + i, lanes), d, channel, lanes), lanes);
      }
    });
  }
  if (shape.width % 2 == 0) return;
  for (const int64_t row : {band.upper, band.upper + band.row_size}) {
    InputGradientOfUncovered<F>(row + band.row_size - c, 1, c, dx, arrays);
  }
}

template <class F, class T, class Parallel>
void BatchNormBackward(const MapShape& shape, float epsilon,
                       const BatchNormBackwardArrays<T>& arrays, Parallel& parallel) {
  if (shape.channels == 0) return;
  const FlatMap flat(shape);
  const Normalizer normalize(arrays, shape.channels, flat.width(), epsilon);
  std::vector<double> sums;
  if constexpr (F::kPool) {
    sums = PooledGradientSums(shape, normalize, arrays, parallel);
  } else {
    sums = GradientSums<F>(shape, normalize, arrays, parallel);
  }
  const InputGradient dx(arrays, normalize, std::move(sums), shape, flat.width(), epsilon);
  const Parts parts(F::kPool ? shape.bands() : flat.rows(), shape.pixels() * shape.channels);
  parts.Run(parallel, [&](int64_t, int64_t begin, int64_t end) {
    if constexpr (F::kPool) {
      for (int64_t i = begin; i < end; ++i) {
        InputGradientOfBand<F>(shape, Band(shape, i), dx, arrays);
      }
    } else {
      InputGradientOfRows<F>(flat, begin, end, dx, arrays);
    }
  });
}

}  // namespace flaxcls
