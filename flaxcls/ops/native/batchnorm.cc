// Batch normalisation in training (Ioffe and Szegedy 2015, algorithm 1), and in the same pass over
// memory what often follows it: adding a residual, ReLU, a 2x2 max pool of stride 2.
//
// Of a map x (pixels, C): mean and variance of each channel, then for each pixel
//     z = (x - mean) * slope + offset,    slope = scale / sqrt(variance + epsilon),
// and with the gradient d of z that of x is
//     dx = slope * (d - mean of d - xhat * mean of (d * xhat)),    xhat = (x - mean) / deviation.
// Both directions read x twice: once for sums a channel, once for the pixels. Memory is what they
// wait for, so whatever is done to a number between its load and its store is free.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "buffers.h"
#include "tasks.h"
#include "vectors.h"

namespace flaxcls {

// What follows the normalisation, in this order.
template <bool residual, bool relu, bool pool>
struct Fusion {
  static constexpr bool kResidual = residual;
  static constexpr bool kRelu = relu;
  static constexpr bool kPool = pool;
};

struct MapShape {
  int64_t examples, height, width, channels;

  int64_t pixels() const { return examples * height * width; }
  int64_t bands() const { return examples * CeilDiv(height, 2); }  // pairs of rows, or one row
};

// T is float or BFloat16. Arrays that a fusion does not need are not touched.
template <class T>
struct BatchNormForwardArrays {
  const T* x;
  const T* residual;
  const float* scale;  // (C,), as all that follow but y and winner
  const float* bias;
  T* y;
  float* mean;
  float* mean_rest;  // the mean is mean + mean_rest: see Normalizer
  float* variance;   // biased
  uint8_t* winner;   // of each pooled pixel the place of its maximum, or kNoWinner
};

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

// The winner of a pool all of whose inputs ReLU has made zero: no gradient passes.
constexpr int32_t kNoWinner = 4;

// ---- Sums a channel -----------------------------------------------------------------------------

// The map as rows of equal width in which a column always belongs to the same channel: several
// pixels a row where the channels do not fill vectors. A map of 3 channels is read in whole vectors
// so, 16 pixels at a time. The last row may be short.
class FlatMap {
 public:
  explicit FlatMap(const MapShape& shape)
      : elements_(shape.pixels() * shape.channels), width_(RowWidth(shape.channels)) {}

  int64_t width() const { return width_; }
  int64_t rows() const { return CeilDiv(elements_, width_); }

  // Calls f(offset, rows, width) for the whole rows of begin ... end, and for the short one.
  template <class F>
  void Visit(int64_t begin, int64_t end, F&& f) const {
    const int64_t whole = elements_ / width_;
    if (begin < whole) f(begin * width_, std::min(end, whole) - begin, width_);
    if (end > whole) f(whole * width_, int64_t{1}, elements_ - whole * width_);
  }

 private:
  static int64_t RowWidth(int64_t channels) {
    constexpr int64_t kShortest = 4 * kLanes, kLongest = 4096;  // all coefficients stay in L1
    const int64_t width = std::lcm(channels, kShortest);
    if (width <= kLongest) return width;
    const int64_t vectors = std::lcm<int64_t>(channels, kLanes);
    return vectors <= kLongest ? vectors : channels;
  }

  int64_t elements_, width_;
};

// Values a channel, repeated along a row.
inline std::vector<float> Repeated(std::vector<float> channels, int64_t width) {
  const size_t c = channels.size();
  channels.resize(width);
  for (size_t i = c; i < channels.size(); ++i) channels[i] = channels[i - c];
  return channels;
}

struct Two {
  Vector first, second;
};

// Sums of two quantities a column: in float over short runs of rows, then in double a channel.
class ColumnSums {
 public:
  // totals: two for each channel, the first of all channels and then the second.
  ColumnSums(int64_t width, int64_t channels, double* totals)
      : width_(width), channels_(channels), totals_(totals), runs_(2 * width) {}
  ~ColumnSums() { Flush(); }
  ColumnSums(const ColumnSums&) = delete;
  ColumnSums& operator=(const ColumnSums&) = delete;

  // Adds terms(row, column, lanes), a Two, of all rows and the first `width` columns.
  template <class Terms>
  void Add(int64_t rows, int64_t width, const Terms& terms) {
    int64_t row = 0;
    for (; row + kTogether <= rows; row += kTogether) AddRows<kTogether>(row, width, terms);
    for (; row < rows; ++row) AddRows<1>(row, width, terms);
  }

 private:
  // Together the rows load and store the sums once: 512 channels would not fit the registers.
  static constexpr int64_t kTogether = 8;
  // Float sums of so few terms are off by 1e-7 or so; more would be cheaper by under 1 %.
  static constexpr int64_t kRun = 128;

  template <int64_t kRows, class Terms>
  void AddRows(int64_t row, int64_t width, const Terms& terms) {
    float* firsts = runs_.data();
    float* seconds = firsts + width_;
    ForVectors(width, [&](int64_t column, auto lanes) {
      Vector first = Load(firsts + column, lanes), second = Load(seconds + column, lanes);
      for (int64_t r = 0; r < kRows; ++r) {
        const Two two = terms(row + r, column, lanes);
        first += two.first;
        second += two.second;
      }
      Store(firsts + column, first, lanes);
      Store(seconds + column, second, lanes);
    });
    if ((pending_ += kRows) >= kRun) Flush();
  }

  void Flush() {
    for (int64_t quantity = 0; quantity < 2; ++quantity) {
      float* run = runs_.data() + quantity * width_;
      double* totals = totals_ + quantity * channels_;
      for (int64_t column = 0; column < width_; column += channels_) {
        for (int64_t c = 0; c < channels_; ++c) totals[c] += run[column + c];
      }
    }
    std::fill(runs_.begin(), runs_.end(), 0.0f);
    pending_ = 0;
  }

  int64_t width_, channels_, pending_ = 0;
  double* totals_;
  std::vector<float> runs_;
};

// Splits 0 ... units into parts that depend on nothing but the size, so that the result does not
// depend on the threads either, and calls f(part, begin, end).
class Parts {
 public:
  Parts(int64_t units, int64_t elements)
      : units_(units), count_(std::clamp<int64_t>(elements / kElements, 1, kMost)) {}

  int64_t count() const { return count_; }

  template <class Parallel, class F>
  void Run(Parallel& parallel, const F& f) const {
    parallel.Run(count_, [&](int64_t i) {
      const int64_t begin = units_ * i / count_, end = units_ * (i + 1) / count_;
      if (begin < end) f(i, begin, end);
    });
  }

 private:
  static constexpr int64_t kElements = 32768;  // 10 us or so
  static constexpr int64_t kMost = 64;

  int64_t units_, count_;
};

// Two totals a channel of what add(sums, begin, end) adds for parts of the map, (2, C).
template <class Parallel, class F>
std::vector<double> ChannelSums(const Parts& parts, int64_t width, int64_t channels,
                                Parallel& parallel, const F& add) {
  std::vector<double> totals(parts.count() * 2 * channels);
  parts.Run(parallel, [&](int64_t part, int64_t begin, int64_t end) {
    ColumnSums sums(width, channels, totals.data() + part * 2 * channels);
    add(sums, begin, end);
  });
  for (int64_t part = 1; part < parts.count(); ++part) {
    for (int64_t i = 0; i < 2 * channels; ++i) totals[i] += totals[part * 2 * channels + i];
  }
  totals.resize(2 * channels);
  return totals;
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
      StoreBytes(arrays.winner + pooled + channel, winner, lanes);
    });
  }
}

// parallel.Run(n, f) calls f(0) ... f(n - 1): Tasks, or a plain loop.
template <class F, class T, class Parallel>
void BatchNormForward(const MapShape& shape, float epsilon,
                      const BatchNormForwardArrays<T>& arrays, Parallel& parallel) {
  if (shape.channels == 0) return;
  Statistics(shape, arrays, parallel);
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

// ---- Backward -----------------------------------------------------------------------------------

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

// ---- Handlers -----------------------------------------------------------------------------------

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

// The shape of x (..., C); height and width are 1 where a pool does not ask for them.
inline xla::ffi::Error ReadShape(xla::ffi::AnyBuffer x, bool pool, MapShape* shape) {
  const auto dimensions = x.dimensions();
  if (dimensions.size() < 2 || (pool && dimensions.size() != 4)) {
    return xla::ffi::Error::InvalidArgument("batch_norm: x must be (..., C), (N, H, W, C) to pool");
  }
  *shape = {1, 1, 1, dimensions.back()};
  if (pool) {
    *shape = {dimensions[0], dimensions[1], dimensions[2], dimensions[3]};
  } else {
    for (size_t i = 0; i + 1 < dimensions.size(); ++i) shape->examples *= dimensions[i];
  }
  return xla::ffi::Error::Success();
}

inline int64_t PooledElements(const MapShape& shape) {
  return shape.examples * (shape.height / 2) * (shape.width / 2) * shape.channels;
}

inline xla::ffi::Error BatchNormForwardHandler(
    xla::ffi::ThreadPool pool_of_threads, xla::ffi::AnyBuffer x, xla::ffi::AnyBuffer residual,
    xla::ffi::AnyBuffer scale, xla::ffi::AnyBuffer bias, xla::ffi::Result<xla::ffi::AnyBuffer> y,
    xla::ffi::Result<xla::ffi::AnyBuffer> mean, xla::ffi::Result<xla::ffi::AnyBuffer> mean_rest,
    xla::ffi::Result<xla::ffi::AnyBuffer> variance, xla::ffi::Result<xla::ffi::AnyBuffer> winner,
    bool add, bool relu, bool pool, float epsilon) {
  MapShape shape;
  if (auto error = ReadShape(x, pool, &shape); error.failure()) return error;
  const auto type = x.element_type();
  const int64_t elements = x.element_count(), results = pool ? PooledElements(shape) : elements;
  if (!HaveSize(xla::ffi::F32, shape.channels, scale, bias, *mean, *mean_rest, *variance) ||
      !HaveSize(type, results, *y) || (add && !HaveSize(type, elements, residual)) ||
      (pool && !HaveSize(xla::ffi::U8, results, *winner))) {
    return xla::ffi::Error::InvalidArgument("batch_norm_forward: a type or shape does not fit");
  }
  return WithType(type, "batch_norm_forward", [&](auto zero) {
    using T = decltype(zero);
    const BatchNormForwardArrays<T> arrays = {
        static_cast<const T*>(x.untyped_data()),    static_cast<const T*>(residual.untyped_data()),
        scale.typed_data<float>(),                  bias.typed_data<float>(),
        static_cast<T*>(y->untyped_data()),         mean->typed_data<float>(),
        mean_rest->typed_data<float>(),             variance->typed_data<float>(),
        static_cast<uint8_t*>(winner->untyped_data()),
    };
    Tasks tasks(pool_of_threads);
    WithFusion(add, relu, pool, [&](auto fusion) {
      BatchNormForward<decltype(fusion)>(shape, epsilon, arrays, tasks);
    });
  });
}

inline xla::ffi::Error BatchNormBackwardHandler(
    xla::ffi::ThreadPool pool_of_threads, xla::ffi::AnyBuffer x, xla::ffi::AnyBuffer y,
    xla::ffi::AnyBuffer gradient, xla::ffi::AnyBuffer winner, xla::ffi::AnyBuffer scale,
    xla::ffi::AnyBuffer bias, xla::ffi::AnyBuffer mean, xla::ffi::AnyBuffer mean_rest,
    xla::ffi::AnyBuffer variance, xla::ffi::Result<xla::ffi::AnyBuffer> dx,
    xla::ffi::Result<xla::ffi::AnyBuffer> dresidual, xla::ffi::Result<xla::ffi::AnyBuffer> dscale,
    xla::ffi::Result<xla::ffi::AnyBuffer> dbias, bool add, bool relu, bool pool, float epsilon) {
  MapShape shape;
  if (auto error = ReadShape(x, pool, &shape); error.failure()) return error;
  const auto type = x.element_type();
  const int64_t elements = x.element_count(), results = pool ? PooledElements(shape) : elements;
  if (!HaveSize(xla::ffi::F32, shape.channels, scale, bias, mean, mean_rest, variance, *dscale,
                *dbias) ||
      !HaveSize(type, elements, *dx) || !HaveSize(type, results, gradient) ||
      (add && relu && !pool && !HaveSize(type, elements, y)) ||
      (add && (relu || pool) && !HaveSize(type, elements, *dresidual)) ||
      (pool && !HaveSize(xla::ffi::U8, results, winner))) {
    return xla::ffi::Error::InvalidArgument("batch_norm_backward: a type or shape does not fit");
  }
  return WithType(type, "batch_norm_backward", [&](auto zero) {
    using T = decltype(zero);
    const BatchNormBackwardArrays<T> arrays = {
        static_cast<const T*>(x.untyped_data()),
        static_cast<const T*>(y.untyped_data()),
        static_cast<const T*>(gradient.untyped_data()),
        static_cast<const uint8_t*>(winner.untyped_data()),
        scale.typed_data<float>(),
        bias.typed_data<float>(),
        mean.typed_data<float>(),
        mean_rest.typed_data<float>(),
        variance.typed_data<float>(),
        static_cast<T*>(dx->untyped_data()),
        static_cast<T*>(dresidual->untyped_data()),
        dscale->typed_data<float>(),
        dbias->typed_data<float>(),
    };
    Tasks tasks(pool_of_threads);
    WithFusion(add, relu, pool, [&](auto fusion) {
      BatchNormBackward<decltype(fusion)>(shape, epsilon, arrays, tasks);
    });
  });
}

}  // namespace flaxcls

XLA_FFI_DEFINE_HANDLER_SYMBOL(batch_norm_forward, flaxcls::BatchNormForwardHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // residual
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Arg<xla::ffi::AnyBuffer>()  // bias
                                  .Ret<xla::ffi::AnyBuffer>()  // y
                                  .Ret<xla::ffi::AnyBuffer>()  // mean
                                  .Ret<xla::ffi::AnyBuffer>()  // mean_rest
                                  .Ret<xla::ffi::AnyBuffer>()  // variance
                                  .Ret<xla::ffi::AnyBuffer>()  // winner
                                  .Attr<bool>("residual")
                                  .Attr<bool>("relu")
                                  .Attr<bool>("pool")
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(batch_norm_backward, flaxcls::BatchNormBackwardHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // y
                                  .Arg<xla::ffi::AnyBuffer>()  // gradient
                                  .Arg<xla::ffi::AnyBuffer>()  // winner
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Arg<xla::ffi::AnyBuffer>()  // bias
                                  .Arg<xla::ffi::AnyBuffer>()  // mean
                                  .Arg<xla::ffi::AnyBuffer>()  // mean_rest
                                  .Arg<xla::ffi::AnyBuffer>()  // variance
                                  .Ret<xla::ffi::AnyBuffer>()  // dx
                                  .Ret<xla::ffi::AnyBuffer>()  // dresidual
                                  .Ret<xla::ffi::AnyBuffer>()  // dscale
                                  .Ret<xla::ffi::AnyBuffer>()  // dbias
                                  .Attr<bool>("residual")
                                  .Attr<bool>("relu")
                                  .Attr<bool>("pool")
                                  .Attr<float>("epsilon"));
