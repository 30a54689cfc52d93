// Runs the native BatchNorm and its gradients with everything that is fused with it; see driver.h.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "batchnorm_backward.h"
#include "batchnorm_forward.h"
#include "driver.h"
#include "tasks.h"

namespace {

using flaxcls::MapShape;

constexpr float kEpsilon = 1e-5f;

struct Case {
  MapShape shape;
  bool residual, relu, pool;
  int64_t threads;

  int64_t elements() const { return shape.pixels() * shape.channels; }
  int64_t results() const { return pool ? flaxcls::PooledElements(shape) : elements(); }
};

template <class T>
struct Inputs {
  explicit Inputs(const Case& c)
      : x(driver::Draw<T>(c.elements(), 1)),
        residual(driver::Draw<T>(c.residual ? c.elements() : 0, 2)),
        gradient(driver::Draw<T>(c.results(), 3)),
        scale(driver::Draw<float>(c.shape.channels, 4)),
        bias(driver::Draw<float>(c.shape.channels, 5)) {}

  std::vector<T> x, residual, gradient;
  std::vector<float> scale, bias;
};

// Maps of T, and numbers a channel; in the reference all are double.
template <class T, class Channel>
struct Results {
  std::vector<T> y, dx, dresidual;
  std::vector<Channel> mean, variance, dscale, dbias;
};

using Reference = Results<double, double>;

// Of the pooled pixel at `index`, the element of z that is first among the largest.
int64_t Winner(const MapShape& s, int64_t index, const std::vector<double>& z) {
  const int64_t c = index % s.channels, j = index / s.channels % (s.width / 2);
  const int64_t band = index / s.channels / (s.width / 2);
  const int64_t row = band / (s.height / 2) * s.height + band % (s.height / 2) * 2;
  int64_t best = -1;
  for (int64_t place = 0; place < 4; ++place) {
    const int64_t pixel = (row + place / 2) * s.width + 2 * j + place % 2;
    const int64_t at = pixel * s.channels + c;
    if (best < 0 || z[at] > z[best]) best = at;
  }
  return best;
}

template <class T>
Reference Exact(const Case& c, const Inputs<T>& in) {
  const int64_t channels = c.shape.channels, elements = c.elements();
  const double n = std::max<int64_t>(1, c.shape.pixels());
  Reference r;
  for (auto* sums : {&r.mean, &r.variance, &r.dscale, &r.dbias}) sums->resize(channels);
  for (int64_t i = 0; i < elements; ++i) r.mean[i % channels] += driver::Get(in.x[i]) / n;
  std::vector<double> xhat(elements), z(elements);
  for (int64_t i = 0; i < elements; ++i) {
    xhat[i] = driver::Get(in.x[i]) - r.mean[i % channels];
    r.variance[i % channels] += xhat[i] * xhat[i] / n;
  }
  for (int64_t i = 0; i < elements; ++i) {
    xhat[i] /= std::sqrt(r.variance[i % channels] + kEpsilon);
    z[i] = xhat[i] * in.scale[i % channels] + in.bias[i % channels];
    if (c.residual) z[i] += driver::Get(in.residual[i]);
  }
  r.y.resize(c.results());
  r.dresidual.resize(elements);
  for (int64_t i = 0; i < c.results(); ++i) {
    const int64_t from = c.pool ? Winner(c.shape, i, z) : i;
    const bool passes = !c.relu || z[from] > 0;
    r.y[i] = passes ? z[from] : 0;
    if (passes) r.dresidual[from] = driver::Get(in.gradient[i]);
  }
  for (int64_t i = 0; i < elements; ++i) {
    r.dscale[i % channels] += r.dresidual[i] * xhat[i];
    r.dbias[i % channels] += r.dresidual[i];
  }
  r.dx.resize(elements);
  for (int64_t i = 0; i < elements; ++i) {
    const int64_t k = i % channels;
    r.dx[i] = in.scale[k] / std::sqrt(r.variance[k] + kEpsilon) *
              (r.dresidual[i] - r.dbias[k] / n - xhat[i] * r.dscale[k] / n);
  }
  return r;
}

// What a fusion does not need is no memory at all.
template <class T>
Results<T, float> Native(const Case& c, const Inputs<T>& in) {
  const int64_t channels = c.shape.channels;
  const bool writes_dresidual = c.residual && (c.relu || c.pool);
  const bool reads_y = c.residual && c.relu && !c.pool;
  Results<T, float> r;
  r.y = driver::NaNs<T>(c.results());
  r.dx = driver::NaNs<T>(c.elements());
  r.dresidual = driver::NaNs<T>(writes_dresidual ? c.elements() : 0);
  for (auto* channel : {&r.mean, &r.variance, &r.dscale, &r.dbias}) {
    *channel = driver::NaNs<float>(channels);
  }
  auto mean_rest = driver::NaNs<float>(channels);
  std::vector<uint8_t> winner(c.pool ? c.results() : 0, 255);
  flaxcls::Tasks tasks(driver::WildPool{c.threads});
  flaxcls::WithFusion(c.residual, c.relu, c.pool, [&](auto fusion) {
    using F = decltype(fusion);
    flaxcls::BatchNormForward<F, T>(
        c.shape, kEpsilon,
        {in.x.data(), in.residual.data(), in.scale.data(), in.bias.data(), r.y.data(),
         r.mean.data(), mean_rest.data(), r.variance.data(), winner.data()},
        tasks);
    flaxcls::BatchNormBackward<F, T>(
        c.shape, kEpsilon,
        {in.x.data(), reads_y ? r.y.data() : nullptr, in.gradient.data(), winner.data(),
         in.scale.data(), in.bias.data(), r.mean.data(), mean_rest.data(), r.variance.data(),
         r.dx.data(), r.dresidual.data(), r.dscale.data(), r.dbias.data()},
        tasks);
  });
  // The batch's own statistics, given, make the same y.
  auto again = driver::NaNs<T>(c.results());
  flaxcls::WithFusion(c.residual, c.relu, c.pool, [&](auto fusion) {
    flaxcls::Normalize<decltype(fusion), T>(
        c.shape, kEpsilon,
        {in.x.data(), in.residual.data(), in.scale.data(), in.bias.data(), again.data(),
         r.mean.data(), mean_rest.data(), r.variance.data(), nullptr},
        tasks);
  });
  if (!again.empty() && std::memcmp(again.data(), r.y.data(), again.size() * sizeof(T)) != 0) {
    r.y = driver::NaNs<T>(c.results());
  }
  return r;
}

template <class T>
bool Check(const Case& c) {
  const Inputs<T> in(c);
  const Reference exact = Exact(c, in);
  const Results<T, float> ours = Native(c, in);
  const bool few = c.shape.pixels() < 8;  // the gradient is then nearly zero, and rounding all
  const double errors[] = {driver::Error(ours.y, exact.y),
                           driver::Error(ours.mean, exact.mean),
                           driver::Error(ours.variance, exact.variance),
                           few ? 0 : driver::Error(ours.dx, exact.dx),
                           driver::Error(ours.dresidual, exact.dresidual),
                           driver::Error(ours.dscale, exact.dscale),
                           driver::Error(ours.dbias, exact.dbias)};
  const double worst = *std::max_element(std::begin(errors), std::end(errors));
  if (worst <= 1e-5) return true;
  std::printf("%zu bytes, %d threads, %ldx%ldx%ldx%ld%s%s%s: errors", sizeof(T), int(c.threads),
              long(c.shape.examples), long(c.shape.height), long(c.shape.width),
              long(c.shape.channels), c.residual ? ", residual" : "", c.relu ? ", ReLU" : "",
              c.pool ? ", pool" : "");
  for (double error : errors) std::printf(" %.1e", error);
  std::printf("\n");
  return false;
}

// A shape with all fusions; `most_elements` bounds those of the map.
bool CheckAny(driver::Random& random, double most_elements) {
  for (;;) {
    // Rows of 257 and of 4100 channels are longer than those of several pixels may be.
    const MapShape shape = {
        random.OneOf({0, 1, 2, 3, 7}), random.Below(20), random.Below(20),
        random.OneOf({0, 1, 3, 5, 16, 17, 29, 48, 64, 70, 130, 257, 4100})};
    if (double(shape.pixels() * shape.channels) > most_elements) continue;
    const int64_t threads = random.OneOf({1, 2, 5});
    bool fine = true;
    for (int fusion = 0; fusion < 8; ++fusion) {
      const Case c = {shape, bool(fusion & 1), bool(fusion & 2), bool(fusion & 4), threads};
      fine &= Check<float>(c) & Check<flaxcls::BFloat16>(c);
    }
    return fine;
  }
}

}  // namespace

int main(int argc, char** argv) { return driver::Main(argc, argv, 30, 3e5, CheckAny); }
