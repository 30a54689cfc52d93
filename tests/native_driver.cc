// Runs the native convolutions without Python, for sanitizers, against plain loops in double:
//   g++ -std=c++17 -O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=all
//     -Iflaxcls/ops/native tests/native_driver.cc -o driver -pthread && ./driver
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "passes.h"

namespace {

using flaxcls::Algorithm;
using flaxcls::Geometry;

// A thread for each piece of work: slow, and as wild an order as can be.
struct WildPool {
  int64_t num_threads() const { return threads; }
  void Schedule(std::function<void()> work) { std::thread(std::move(work)).detach(); }
  int64_t threads;
};

std::vector<float> Draw(int64_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& value : values) value = normal(generator);
  return values;
}

// Calls f(x index, kernel index, y index) for each product of the convolution.
template <class F>
void ForProducts(const Geometry& g, const F& f) {
  const int64_t inputs = g.c / g.groups, outputs = g.o / g.groups;
  for (int64_t n = 0; n < g.n; ++n)
    for (int64_t y = 0; y < g.out_h; ++y)
      for (int64_t x = 0; x < g.out_w; ++x)
        for (int64_t a = 0; a < g.kernel_h; ++a)
          for (int64_t b = 0; b < g.kernel_w; ++b) {
            const int64_t h = y * g.stride_h + a - g.top, w = x * g.stride_w + b - g.left;
            if (h < 0 || h >= g.h || w < 0 || w >= g.w) continue;
            for (int64_t c = 0; c < inputs; ++c)
              for (int64_t o = 0; o < g.o; ++o)
                f(((n * g.h + h) * g.w + w) * g.c + o / outputs * inputs + c,
                  ((a * g.kernel_w + b) * inputs + c) * g.o + o,
                  ((n * g.out_h + y) * g.out_w + x) * g.o + o);
          }
}

double Error(const std::vector<float>& result, const std::vector<double>& reference) {
  double worst = 0, largest = 1e-30;
  for (size_t i = 0; i < result.size(); ++i) {
    if (!(std::abs(result[i]) < 1e30)) return 1e30;
    worst = std::max(worst, std::abs(result[i] - reference[i]));
    largest = std::max(largest, std::abs(reference[i]));
  }
  return worst / largest;
}

bool Check(const Geometry& g, Algorithm algorithm, int64_t threads) {
  const int64_t x_size = g.n * g.h * g.w * g.c, y_size = g.n * g.out_h * g.out_w * g.o;
  const int64_t kernel_size = g.kernel_h * g.kernel_w * g.c / g.groups * g.o;
  const std::vector<float> x = Draw(x_size, 1), kernel = Draw(kernel_size, 2), dy = Draw(y_size, 3);
  std::vector<double> y_true(y_size), dx_true(x_size), dk_true(kernel_size);
  ForProducts(g, [&](int64_t i, int64_t k, int64_t o) {
    y_true[o] += double(x[i]) * kernel[k];
    dx_true[i] += double(dy[o]) * kernel[k];
    dk_true[k] += double(dy[o]) * x[i];
  });
  std::vector<float> y(y_size, NAN), dx(x_size, NAN), dk(kernel_size, NAN);
  flaxcls::Tasks tasks(WildPool{threads});
  flaxcls::ConvForward(tasks, algorithm, g, x.data(), kernel.data(), y.data());
  flaxcls::ConvInputGradient(tasks, algorithm, g, dy.data(), kernel.data(), dx.data());
  flaxcls::ConvKernelGradient(tasks, algorithm, g, x.data(), dy.data(), dk.data());
  const double errors[] = {Error(y, y_true), Error(dx, dx_true), Error(dk, dk_true)};
  const double most = algorithm == Algorithm::kWinograd4 ? 2e-5 : 1e-5;
  const bool fine = errors[0] <= 1e-5 && errors[1] <= 1e-5 && errors[2] <= most;
  if (!fine) {
    std::printf("algorithm %d, %d threads, x %ldx%ldx%ldx%ld, kernel %ldx%ld to %ld, strides %ld "
                "%ld, padding %ld %ld, groups %ld: errors %.1e %.1e %.1e\n",
                int(algorithm), int(threads), long(g.n), long(g.h), long(g.w), long(g.c),
                long(g.kernel_h), long(g.kernel_w), long(g.o), long(g.stride_h), long(g.stride_w),
                long(g.top), long(g.left), long(g.groups), errors[0], errors[1], errors[2]);
  }
  return fine;
}

template <class T>
T OneOf(std::mt19937& generator, const std::vector<T>& values) {
  return values[generator() % values.size()];
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 300;
  std::mt19937 generator(argc > 2 ? std::atoi(argv[2]) : 0);
  int wrong = 0, checked = 0;
  while (checked < count) {
    Geometry g;
    g.n = OneOf<int64_t>(generator, {0, 1, 2, 3, 7});
    g.h = 1 + generator() % 20;
    g.w = 1 + generator() % 20;
    const bool square = generator() % 2;
    g.kernel_h = square ? 3 : OneOf<int64_t>(generator, {1, 2, 3, 5, 7, 11});
    g.kernel_w = square ? 3 : OneOf<int64_t>(generator, {1, 2, 3, 5, 7, 11});
    g.stride_h = square ? 1 : 1 + generator() % 3;
    g.stride_w = square ? 1 : 1 + generator() % 4;
    g.groups = OneOf<int64_t>(generator, {1, 1, 1, 2, 3});
    g.c = g.groups * OneOf<int64_t>(generator, {1, 3, 5, 16, 17, 48, 64, 70, 130});
    g.o = g.groups * OneOf<int64_t>(generator, {1, 3, 5, 16, 17, 48, 64, 70, 130});
    g.top = generator() % (g.kernel_h + 1);
    g.left = generator() % (g.kernel_w + 1);
    const int64_t bottom = generator() % (g.kernel_h + 1), right = generator() % (g.kernel_w + 1);
    if (g.h + g.top + bottom < g.kernel_h || g.w + g.left + right < g.kernel_w) continue;
    g.out_h = (g.h + g.top + bottom - g.kernel_h) / g.stride_h + 1;
    g.out_w = (g.w + g.left + right - g.kernel_w) / g.stride_w + 1;
    const int64_t threads = OneOf<int64_t>(generator, {1, 2, 5});
    for (Algorithm algorithm : {Algorithm::kDirect, Algorithm::kSmallMaps, Algorithm::kWinograd2,
                                Algorithm::kWinograd4}) {
      const bool winograd = algorithm > Algorithm::kSmallMaps;
      if (winograd && !flaxcls::SuitsWinograd(g)) continue;
      wrong += !Check(g, algorithm, threads);
    }
    ++checked;
  }
  std::printf("%d shapes, %d wrong\n", checked, wrong);
  return wrong != 0;
}
