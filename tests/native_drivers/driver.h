// What the drivers of the native operators share. Each runs one operator without Python, for
// sanitizers, on random shapes and against plain loops in double:
//   g++ -std=c++17 -O1 -g1 -march=native -fsanitize=address,undefined -fno-sanitize-recover=all
//     -DFLAXCLS_NO_MASKS -Iflaxcls/ops/native tests/native_drivers/pooling.cc -o driver -pthread
//   ./driver [shapes] [seed] [most work for a shape: 1e8 for maps as of real networks]
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "vectors.h"

namespace driver {

// A thread for each piece of work: slow, and as wild an order as can be.
class WildPool {
 public:
  explicit WildPool(int64_t threads) : threads_(threads) {}

  int64_t num_threads() const { return threads_; }

  void Schedule(std::function<void()> work) {
    ++working_;
    std::thread([work = std::move(work)]() mutable {
      work();
      work = nullptr;
      --working_;
    }).detach();
  }

  // Those that came too late to find work left are waited for too.
  static void Wait() {
    while (working_ > 0) std::this_thread::yield();
  }

 private:
  static inline std::atomic<int64_t> working_{0};
  int64_t threads_;
};

class Random {
 public:
  explicit Random(unsigned seed) : generator_(seed) {}

  int64_t Below(int64_t n) { return generator_() % n; }
  int64_t OneOf(const std::vector<int64_t>& values) { return values[Below(values.size())]; }

 private:
  std::mt19937 generator_;
};

inline void Set(float* to, float value) { *to = value; }
inline void Set(flaxcls::BFloat16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits = bits >> 16;
}

inline double Get(float value) { return value; }
inline double Get(flaxcls::BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class T>
std::vector<T> Draw(int64_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& value : values) Set(&value, normal(generator));
  return values;
}

// For results: whatever is not written is found.
template <class T>
std::vector<T> NaNs(int64_t n) {
  std::vector<T> values(n);
  for (T& value : values) Set(&value, NAN);
  return values;
}

// The largest error, relative to the largest of the reference; of bfloat16 what is more than the
// rounding of each number.
template <class T>
double Error(const std::vector<T>& result, const std::vector<double>& reference) {
  const double rounding = sizeof(T) == 2 ? 1.0 / 256 : 0.0;
  double worst = 0, largest = 1e-30;
  for (size_t i = 0; i < result.size(); ++i) {
    const double value = Get(result[i]);
    if (!(std::abs(value) < 1e30)) return 1e30;
    worst = std::max(worst, std::abs(value - reference[i]) - rounding * std::abs(reference[i]));
    largest = std::max(largest, std::abs(reference[i]));
  }
  return worst / largest;
}

// Calls check(random, most_work), whether one more shape is right, for as many shapes as are asked
// for; returns the exit code.
template <class Check>
int Main(int argc, char** argv, int shapes, double most_work, const Check& check) {
  if (argc > 1) shapes = std::atoi(argv[1]);
  Random random(argc > 2 ? std::atoi(argv[2]) : 0);
  if (argc > 3) most_work = std::atof(argv[3]);
  int wrong = 0;
  for (int i = 0; i < shapes; ++i) wrong += !check(random, most_work);
  WildPool::Wait();
  std::printf("%d shapes, %d wrong\n", shapes, wrong);
  return wrong != 0;
}

}  // namespace driver
