// Vectors of the machine's own width (AVX-512, AVX2, else SSE/NEON by the compiler), and bfloat16.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace macaw {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

// Whether pairs of bfloat16 products are one instruction: inputs are then better bfloat16 than float32.
#if defined(__AVX512BF16__)
constexpr bool kPairProducts = true;
#else
constexpr bool kPairProducts = false;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));
typedef int8_t VecB __attribute__((vector_size(kLanes)));

struct bf16 {
  uint16_t bits;
};

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline Vec splat(float x) { return x - Vec{}; }
inline VecU bits_of(Vec x) { return load_as<VecU>(&x); }
inline Vec of_bits(VecU x) { return load_as<Vec>(&x); }

inline Vec load(const float* p) { return load_as<Vec>(p); }
inline Vec load(const bf16* p) {
  // By name, because GCC 12 converts halves of the vector and joins them.
#if defined(__AVX512F__)
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return of_bits(load_as<VecU>(&wide) << 16);
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return of_bits(load_as<VecU>(&wide) << 16);
#else
  return of_bits(__builtin_convertvector(load_as<VecH>(p), VecU) << 16);
#endif
}
// The compiler widens bytes one by one; the instructions do it in one go.
inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(__builtin_convertvector(load_as<VecB>(p), VecI), Vec);
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
// Round to nearest even. NaN may become another NaN, or infinity where all of its set bits are low ones.
inline void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
  VecU u = bits_of(v);
  VecH h = __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, VecH);
#endif
  std::memcpy(p, &h, sizeof(h));
}

// Operands of sums of products: float32 one by one, bfloat16 in pairs, two neighbours in the 32 bits of each lane.
template <class E>
constexpr int kPerLane = 4 / sizeof(E);
template <class E, class T>
inline auto operand(const T* p) {
  if constexpr (kPerLane<E> == 2) {
    static_assert(sizeof(T) == 2);
    return load_as<VecU>(p);
  } else {
    return load(p);
  }
}
inline Vec splat_operand(const float* p) { return splat(*p); }
inline VecU splat_operand(const bf16* p) { return load_as<uint32_t>(p) - VecU{}; }
inline Vec add_products(Vec sum, Vec a, Vec b) { return sum + a * b; }
inline Vec add_products(Vec sum, VecU a, VecU b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return sum + of_bits(a << 16) * of_bits(b << 16) + of_bits(a & 0xffff0000u) * of_bits(b & 0xffff0000u);
#endif
}

// Pairs (a, b), rounded to nearest; finite numbers only.
inline VecU pair(Vec a, Vec b) { return ((bits_of(a) + 0x8000) >> 16) | ((bits_of(b) + 0x8000) & 0xffff0000u); }
// Pairs (a[i], b[i]) of the 2 * kLanes elements from a and b on, in two vectors.
inline void pair_up(const bf16* a, const bf16* b, VecU* out) {
#if defined(__AVX512BW__)
  static constexpr auto kOrder = [] {
    struct { alignas(64) uint16_t of[2][32]; } order{};
    for (int i = 0; i < 32; i++) order.of[i / 16][i % 16 * 2] = uint16_t(i), order.of[i / 16][i % 16 * 2 + 1] = uint16_t(32 + i);
    return order;
  }();
  const __m512i x = load_as<__m512i>(a), y = load_as<__m512i>(b);
  for (int i = 0; i < 2; i++) out[i] = (VecU)_mm512_permutex2var_epi16(x, load_as<__m512i>(kOrder.of[i]), y);
#else
  for (int i = 0; i < 2; i++)
    out[i] = __builtin_convertvector(load_as<VecH>(a + i * kLanes), VecU) |
             (__builtin_convertvector(load_as<VecH>(b + i * kLanes), VecU) << 16);
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(bf16* p, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  p->bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float sum(Vec v) {
  float s = 0;
  for (int i = 0; i < kLanes; i++) s += v[i];
  return s;
}
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline float max_of(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; i++) m = v[i] > m ? v[i] : m;
  return m;
}

#if defined(__clang__)
#define MACAW_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MACAW_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif

// Lane i of the result is the sum of the lanes of v[i]: pairs of vectors are folded into one, again and again.
inline Vec sums(const Vec (&v)[kLanes]) {
  Vec quad[kLanes / 4];  // each 128 bits of it: sums over those 128 bits of 4 vectors
  for (int i = 0; i < kLanes / 4; i++) {
    const Vec* x = v + 4 * i;
#if defined(__AVX512F__)
    const auto even = [](Vec a, Vec b) { return MACAW_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29); };
    const auto odd = [](Vec a, Vec b) { return MACAW_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31); };
    const auto low = [](Vec a, Vec b) { return MACAW_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29); };
    const auto high = [](Vec a, Vec b) { return MACAW_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31); };
#elif defined(__AVX2__)
    const auto even = [](Vec a, Vec b) { return MACAW_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13); };
    const auto odd = [](Vec a, Vec b) { return MACAW_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15); };
    const auto low = [](Vec a, Vec b) { return MACAW_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13); };
    const auto high = [](Vec a, Vec b) { return MACAW_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15); };
#else
    const auto even = [](Vec a, Vec b) { return MACAW_SHUFFLE(a, b, 0, 4, 1, 5); };
    const auto odd = [](Vec a, Vec b) { return MACAW_SHUFFLE(a, b, 2, 6, 3, 7); };
    const auto low = [](Vec a, Vec b) { return MACAW_SHUFFLE(a, b, 0, 1, 4, 5); };
    const auto high = [](Vec a, Vec b) { return MACAW_SHUFFLE(a, b, 2, 3, 6, 7); };
#endif
    const Vec first = even(x[0], x[1]) + odd(x[0], x[1]), second = even(x[2], x[3]) + odd(x[2], x[3]);
    quad[i] = low(first, second) + high(first, second);
  }
#if defined(__AVX512F__)
  const auto halves = [](Vec a, Vec b) {
    return MACAW_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           MACAW_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const Vec a = halves(quad[0], quad[1]), b = halves(quad[2], quad[3]);
  return MACAW_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         MACAW_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif defined(__AVX2__)
  return MACAW_SHUFFLE(quad[0], quad[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         MACAW_SHUFFLE(quad[0], quad[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  return quad[0];
#endif
}

// exp by 2^n * 2^f, f in [-1/2, 1/2], with a polynomial of degree 6: relative error below 3e-7.
// 0 below -87.3 (so also for -inf), the largest float's neighbourhood above 88.
inline Vec exp(Vec x) {
  const Vec zero = {};
  Vec y = min(max(x, splat(-87.33f)), splat(88.37f)) * 1.44269504088896341f;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec shifted = y + magic;
  Vec n = shifted - magic;
  Vec f = (y - n) * 0.693147180559945309f;
  Vec p = splat(1.0f / 720);
  p = p * f + (1.0f / 120);
  p = p * f + (1.0f / 24);
  p = p * f + (1.0f / 6);
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  VecU e = bits_of(shifted) << 23;
  Vec r = of_bits(bits_of(p) + e);
  return x < splat(-87.33f) ? zero : r;
}

// 2^x for x <= 0: relative error below 3e-7, 0 below -126 (so also for -inf).
inline Vec exp2_nonpositive(Vec x) {
#if defined(__AVX512F__)
  const Vec n = (Vec)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, 0);
  const Vec f = x - n;
#else
  const Vec magic = splat(12582912.0f);
  const Vec shifted = max(x, splat(-126.0f)) + magic;
  const Vec f = max(x, splat(-126.0f)) - (shifted - magic);
#endif
  Vec p = splat(1.5403530393381606e-4f);
  p = p * f + 1.3333558146428443e-3f;
  p = p * f + 9.618129107628477e-3f;
  p = p * f + 5.550410866482158e-2f;
  p = p * f + 2.402265069591007e-1f;
  p = p * f + 6.931471805599453e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
  return (Vec)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)n);
#else
  const Vec r = of_bits(bits_of(p) + (bits_of(shifted) << 23));
  return x < splat(-126.0f) ? Vec{} : r;
#endif
}

}  // namespace macaw
