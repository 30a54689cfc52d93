// The CPU's vectors of floats, and the sizes of tiles that keep their sums in registers.
#pragma once

#include <cstdint>
#include <cstring>

// Parts of vectors are loaded and stored by mask; without, by memcpy, all of which the address
// sanitizer checks. It does not see what a mask leaves in.
#if defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(FLAXCLS_NO_MASKS)
#define FLAXCLS_MASKS
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
#if defined(FLAXCLS_MASKS)
  return _mm512_maskz_loadu_ps((1u << n) - 1, p);
#else
  if (n == kLanes) return Load(p);
  Vector v = {};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
#endif
}

inline void StoreFirst(float* p, Vector v, int64_t n) {
#if defined(FLAXCLS_MASKS)
  _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
#else
  if (n == kLanes) return Store(p, v);
  std::memcpy(p, &v, n * sizeof(float));
#endif
}

inline Vector Broadcast(float x) { return x - Vector{}; }

// A vector of whole numbers; as the result of a comparison, -1 where it holds and 0 elsewhere.
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

struct BFloat16 {
  uint16_t bits;
};

// How much of a vector is meant: all of it, or its first n lanes (of what is loaded, the others
// are 0). A function that takes either is compiled for both.
struct AllLanes {};
struct FirstLanes {
  int64_t n;
};

// Calls f(begin, lanes) for consecutive vectors that cover 0 ... n.
template <class F>
inline void ForVectors(int64_t n, F&& f) {
  int64_t begin = 0;
  for (; begin + kLanes <= n; begin += kLanes) f(begin, AllLanes{});
  if (begin < n) f(begin, FirstLanes{n - begin});
}

namespace lanes {

template <class Bits>
inline Bits Load(const void* p, AllLanes) {
  Bits bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

template <class Bits>
inline void Store(void* p, Bits bits, AllLanes) {
  std::memcpy(p, &bits, sizeof bits);
}

// Without masks memcpy becomes a call: a map of 29 channels then takes three times as long.
template <class Bits>
inline Bits Load(const void* p, FirstLanes lanes) {
  Bits bits = {};
#if defined(FLAXCLS_MASKS)
  const uint32_t mask = (uint32_t{1} << lanes.n) - 1;
  if constexpr (sizeof bits == 64) bits = Bits(_mm512_maskz_loadu_epi32(mask, p));
  if constexpr (sizeof bits == 32) bits = Bits(_mm256_maskz_loadu_epi16(mask, p));
  if constexpr (sizeof bits == 16) bits = Bits(_mm_maskz_loadu_epi8(mask, p));
#else
  std::memcpy(&bits, p, lanes.n * (sizeof bits / kLanes));
#endif
  return bits;
}

template <class Bits>
inline void Store(void* p, Bits bits, FirstLanes lanes) {
#if defined(FLAXCLS_MASKS)
  const uint32_t mask = (uint32_t{1} << lanes.n) - 1;
  if constexpr (sizeof bits == 64) _mm512_mask_storeu_epi32(p, mask, __m512i(bits));
  if constexpr (sizeof bits == 32) _mm256_mask_storeu_epi16(p, mask, __m256i(bits));
  if constexpr (sizeof bits == 16) _mm_mask_storeu_epi8(p, mask, __m128i(bits));
#else
  std::memcpy(p, &bits, lanes.n * (sizeof bits / kLanes));
#endif
}

typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes * sizeof(uint8_t))));

}  // namespace lanes

template <class Lanes>
inline Vector Load(const float* p, Lanes some) {
  return lanes::Load<Vector>(p, some);
}

template <class Lanes>
inline void Store(float* p, Vector v, Lanes some) {
  lanes::Store(p, v, some);
}

// bfloat16 is the upper half of a float.
template <class Lanes>
inline Vector Load(const BFloat16* p, Lanes some) {
  const auto halves = lanes::Load<lanes::Halves>(p, some);
  return Vector(__builtin_convertvector(halves, lanes::Words) << 16);
}

// Rounds to the nearest, of two to the even one. A NaN stays one: rounding could carry into the
// exponent, and its upper half alone may be that of infinity.
template <class Lanes>
inline void Store(BFloat16* p, Vector v, Lanes some) {
  const lanes::Words bits = lanes::Words(v);
  const lanes::Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const lanes::Words nan = (bits >> 16) | 0x40;
  const lanes::Words narrow = v == v ? rounded : nan;
  lanes::Store(p, __builtin_convertvector(narrow, lanes::Halves), some);
}

template <class Lanes>
inline Ints LoadBytes(const uint8_t* p, Lanes some) {
  return __builtin_convertvector(lanes::Load<lanes::Bytes>(p, some), Ints);
}

template <class Lanes>
inline void StoreBytes(uint8_t* p, Ints v, Lanes some) {
  lanes::Store(p, __builtin_convertvector(v, lanes::Bytes), some);
}

// Lane i is lane indices[i] of a and b side by side; one instruction where `indices` are constants.
inline Vector Shuffle(Vector a, Vector b, Ints indices) {
#if defined(__clang__)
  Vector shuffled;
  for (int i = 0; i < kLanes; ++i) {
    shuffled[i] = indices[i] < kLanes ? a[indices[i]] : b[indices[i] - kLanes];
  }
  return shuffled;
#else
  return __builtin_shuffle(a, b, indices);
#endif
}

// Transposes a square of kLanes vectors: swaps its off-diagonal quarters, then those of each
// quarter, and so on: 64 shuffles for 16 x 16. The gradient of the input of 512 to 512 channels on
// 2x2 maps, which reads the kernel so, takes 7.7 ms instead of 12 with a plain loop.
template <int kSide = kLanes / 2>
inline void Transpose(Vector* rows) {
  Ints first, second;
  for (int i = 0; i < kLanes; ++i) {
    first[i] = i & kSide ? kLanes + i - kSide : i;
    second[i] = i & kSide ? kLanes + i : i + kSide;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kSide) continue;
    const Vector a = rows[i], b = rows[i + kSide];
    rows[i] = Shuffle(a, b, first);
    rows[i + kSide] = Shuffle(a, b, second);
  }
  if constexpr (kSide > 1) Transpose<kSide / 2>(rows);
}

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

}  // namespace flaxcls
