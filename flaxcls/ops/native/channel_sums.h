// Sums over the pixels of a map of channels, fast and to nearly the last digit of a float.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace flaxcls {

struct MapShape {
  int64_t examples, height, width, channels;

  int64_t pixels() const { return examples * height * width; }
  int64_t bands() const { return examples * CeilDiv(height, 2); }  // pairs of rows, or one row
};

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

}  // namespace flaxcls
