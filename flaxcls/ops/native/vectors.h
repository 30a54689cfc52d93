// The CPU's vectors of floats, and the sizes of tiles that keep their sums in registers.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace flaxcls {

#if defined(__AVX512F__)
constexpr int kLanes = 16;        // floats in a vector
constexpr int kTileVectors = 4;   // vectors side by side in a tile of sums ...
constexpr int kTileRows = 6;      // ... and rows: 24 of the 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kTileVectors = 2;   // 12 of 16 registers
constexpr int kTileRows = 6;
#else                             // NEON, SSE
constexpr int kLanes = 4;
constexpr int kTileVectors = 4;
constexpr int kTileRows = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

inline Vector Load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);  // unaligned; one instruction
  return v;
}

inline void Store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

// The first n of kLanes floats; the others are 0. With AVX-512 as fast as Load and Store.
inline Vector LoadFirst(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps((1u << n) - 1, p);
#else
  if (n == kLanes) return Load(p);
  Vector v = {};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
#endif
}

inline void StoreFirst(float* p, Vector v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
#else
  if (n == kLanes) return Store(p, v);
  std::memcpy(p, &v, n * sizeof(float));
#endif
}

inline Vector Broadcast(float x) { return x - Vector{}; }

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

}  // namespace flaxcls
