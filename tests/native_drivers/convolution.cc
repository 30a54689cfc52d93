// Runs the native convolution and both its gradients by every algorithm; see driver.h.
#include <cmath>
#include <cstdio>
#include <vector>

#include "driver.h"
#include "passes.h"

namespace {

using flaxcls::Algorithm;
using flaxcls::Geometry;

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

bool Check(const Geometry& g, int64_t threads) {
  const int64_t x_size = g.n * g.h * g.w * g.c, y_size = g.n * g.out_h * g.out_w * g.o;
  const int64_t kernel_size = g.kernel_h * g.kernel_w * g.c / g.groups * g.o;
  const auto x = driver::Draw<float>(x_size, 1), kernel = driver::Draw<float>(kernel_size, 2),
             dy = driver::Draw<float>(y_size, 3);
  std::vector<double> y_true(y_size), dx_true(x_size), dk_true(kernel_size);
  ForProducts(g, [&](int64_t i, int64_t k, int64_t o) {
    y_true[o] += double(x[i]) * kernel[k];
    dx_true[i] += double(dy[o]) * kernel[k];
    dk_true[k] += double(dy[o]) * x[i];
  });
  bool fine = true;
  for (Algorithm algorithm : {Algorithm::kDirect, Algorithm::kSmallMaps, Algorithm::kWinograd2,
                              Algorithm::kWinograd4}) {
    if (algorithm > Algorithm::kSmallMaps && !flaxcls::SuitsWinograd(g, algorithm)) continue;
    auto y = driver::NaNs<float>(y_size), dx = driver::NaNs<float>(x_size),
         dk = driver::NaNs<float>(kernel_size);
    flaxcls::Tasks tasks(driver::WildPool{threads});
    flaxcls::ConvForward(tasks, algorithm, g, x.data(), kernel.data(), y.data());
    flaxcls::ConvInputGradient(tasks, algorithm, g, dy.data(), kernel.data(), dx.data());
    flaxcls::ConvKernelGradient(tasks, algorithm, g, x.data(), dy.data(), dk.data());
    const double errors[] = {driver::Error(y, y_true), driver::Error(dx, dx_true),
                             driver::Error(dk, dk_true)};
    const double most = algorithm == Algorithm::kWinograd4 ? 2e-5 : 1e-5;
    if (errors[0] <= 1e-5 && errors[1] <= 1e-5 && errors[2] <= most) continue;
    fine = false;
    std::printf("algorithm %d, %d threads, x %ldx%ldx%ldx%ld, kernel %ldx%ld to %ld, strides %ld "
                "%ld, padding %ld %ld, groups %ld: errors %.1e %.1e %.1e\n",
                int(algorithm), int(threads), long(g.n), long(g.h), long(g.w), long(g.c),
                long(g.kernel_h), long(g.kernel_w), long(g.o), long(g.stride_h), long(g.stride_w),
                long(g.top), long(g.left), long(g.groups), errors[0], errors[1], errors[2]);
  }
  return fine;
}

// `most_products` bounds those of the whole output.
bool CheckAny(driver::Random& random, double most_products) {
  const std::vector<int64_t> kernels = {1, 2, 3, 5, 7, 11};
  const std::vector<int64_t> channels = {1, 3, 5, 16, 17, 48, 64, 70, 130};
  for (;;) {
    Geometry g;
    g.n = random.OneOf({0, 1, 2, 3, 7});
    g.h = 1 + random.Below(20);
    g.w = 1 + random.Below(20);
    const int64_t square = random.OneOf({0, 0, 3, 5});  // what Winograd takes
    g.kernel_h = square ? square : random.OneOf(kernels);
    g.kernel_w = square ? square : random.OneOf(kernels);
    g.stride_h = square ? 1 : 1 + random.Below(3);
    g.stride_w = square ? 1 : 1 + random.Below(4);
    g.groups = random.OneOf({1, 1, 1, 2, 3});
    g.c = g.groups * random.OneOf(channels);
    g.o = g.groups * random.OneOf(channels);
    g.top = random.Below(g.kernel_h + 1);
    g.left = random.Below(g.kernel_w + 1);
    const int64_t free_h = g.h + g.top + random.Below(g.kernel_h + 1) - g.kernel_h;
    const int64_t free_w = g.w + g.left + random.Below(g.kernel_w + 1) - g.kernel_w;
    if (free_h < 0 || free_w < 0) continue;
    g.out_h = free_h / g.stride_h + 1;
    g.out_w = free_w / g.stride_w + 1;
    const double products = double(g.n * g.out_h * g.out_w) * (g.kernel_h * g.kernel_w) *
                            (g.c / g.groups * g.o);
    if (products <= most_products) return Check(g, random.OneOf({1, 2, 5}));
  }
}

}  // namespace

int main(int argc, char** argv) { return driver::Main(argc, argv, 60, 3e6, CheckAny); }
