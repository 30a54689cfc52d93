// Runs the native max pool and its gradient; see driver.h.
#include <cmath>
#include <cstdio>
#include <vector>

#include "driver.h"
#include "max_pool.h"
#include "tasks.h"

namespace {

using flaxcls::PoolAxis;
using flaxcls::PoolShape;

// The place of the first maximum of each window, the maximum, and the gradient of x.
struct Reference {
  template <class T>
  Reference(const PoolShape& s, const std::vector<T>& x, const std::vector<T>& dy)
      : winner(dy.size()), y(dy.size()), dx(x.size()) {
    for (int64_t n = 0; n < s.examples; ++n)
      for (int64_t i = 0; i < s.rows.pooled; ++i)
        for (int64_t j = 0; j < s.columns.pooled; ++j)
          for (int64_t c = 0; c < s.channels; ++c) Window(s, n, i, j, c, x, dy);
  }

  template <class T>
  void Window(const PoolShape& s, int64_t n, int64_t i, int64_t j, int64_t c,
              const std::vector<T>& x, const std::vector<T>& dy) {
    const int64_t result = s.pooled(n, i, j) + c;
    int64_t from = -1;
    winner[result] = flaxcls::kNowhere;
    y[result] = -INFINITY;
    for (int64_t place = 0; place < s.rows.window * s.columns.window; ++place) {
      const int64_t h = i * s.rows.stride - s.rows.before + place / s.columns.window;
      const int64_t w = j * s.columns.stride - s.columns.before + place % s.columns.window;
      if (h < 0 || h >= s.rows.size || w < 0 || w >= s.columns.size) continue;
      const double value = driver::Get(x[s.pixel(n, h, w) + c]);
      if (from >= 0 && value <= y[result]) continue;
      from = s.pixel(n, h, w) + c;
      winner[result] = place;
      y[result] = value;
    }
    if (from >= 0) dx[from] += driver::Get(dy[result]);
  }

  std::vector<uint8_t> winner;
  std::vector<double> y, dx;
};

template <class T>
bool Check(const PoolShape& s, int64_t threads) {
  const int64_t x_size = s.pixel(s.examples, 0, 0), y_size = flaxcls::PooledElements(s);
  const auto x = driver::Draw<T>(x_size, 1), dy = driver::Draw<T>(y_size, 2);
  auto y = driver::NaNs<T>(y_size), dx = driver::NaNs<T>(x_size);
  std::vector<uint8_t> winner(y_size, 254);
  flaxcls::Tasks tasks(driver::WildPool{threads});
  flaxcls::MaxPoolForward(s, x.data(), y.data(), winner.data(), tasks);
  flaxcls::MaxPoolBackward(s, dy.data(), winner.data(), dx.data(), tasks);

  const Reference reference(s, x, dy);
  bool fine = winner == reference.winner && driver::Error(dx, reference.dx) <= 1e-5;
  for (int64_t i = 0; i < y_size; ++i) fine &= driver::Get(y[i]) == reference.y[i];
  if (!fine) {
    std::printf("%zu bytes, %d threads, x %ldx%ldx%ldx%ld, window %ldx%ld, strides %ld %ld, "
                "padding %ld %ld\n",
                sizeof(T), int(threads), long(s.examples), long(s.rows.size), long(s.columns.size),
                long(s.channels), long(s.rows.window), long(s.columns.window), long(s.rows.stride),
                long(s.columns.stride), long(s.rows.before), long(s.columns.before));
  }
  return fine;
}

PoolAxis DrawAxis(driver::Random& random) {
  const int64_t size = random.Below(16), window = random.OneOf({1, 2, 2, 3, 3, 5, 15});
  const int64_t stride = 1 + random.Below(4), before = random.Below(window + 1);
  const int64_t free = size + before + random.Below(window + 1) - window;
  return {size, free < 0 ? 0 : free / stride + 1, window, stride, before};
}

// `most_work` bounds the numbers that all windows read.
bool CheckAny(driver::Random& random, double most_work) {
  for (;;) {
    const PoolShape s = {random.OneOf({0, 1, 2, 3, 7}),
                         random.OneOf({0, 1, 3, 5, 16, 17, 29, 48, 64, 130}), DrawAxis(random),
                         DrawAxis(random)};
    const int64_t places = s.rows.window * s.columns.window;
    if (double(flaxcls::PooledElements(s) * places) > most_work) continue;
    const int64_t threads = random.OneOf({1, 2, 5});
    return Check<float>(s, threads) & Check<flaxcls::BFloat16>(s, threads);
  }
}

}  // namespace

int main(int argc, char** argv) { return driver::Main(argc, argv, 200, 1e6, CheckAny); }
