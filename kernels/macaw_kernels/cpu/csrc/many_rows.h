// Many queries against a block of keys: queries lie in the lanes, `kVecs` vectors of them, and keys are broadcast.
#pragma once

#include <cstdint>

#include "simd.h"

namespace macaw {

constexpr float kLog2e = 1.44269504088896341f;
constexpr int kBlockKeys = 24;
constexpr int kUnit = 2;  // vectors of queries that are computed together
constexpr int kPad = 8;   // value columns that a tile may go beyond a row
constexpr int kUnitLanes = kUnit * kLanes;

template <class T>
inline void copy(const T* from, int n, float* to) {
  int c = 0;
  for (; c + kLanes <= n; c += kLanes) store(to + c, load(from + c));
  for (; c < n; c++) to[c] = to_float(from[c]);
}

// s[key][lane] = sum_c q[c][lane] * k[key][c], `n` rounded up to a tile.
template <int kVecs, int kStride>
void scores(const float* q, const float* k, int dim, int n, float* s) {
  constexpr int kKeys = kVecs == 1 || kRegisters == 32 ? 12 : 6;
  static_assert(kBlockKeys % kKeys == 0);
  for (int j = 0; j < n; j += kKeys) {
    Vec sums[kKeys][kVecs] = {};
    const float* rows = k + j * kStride;
    for (int c = 0; c < dim; c++) {
      Vec b_q[kVecs];
      for (int v = 0; v < kVecs; v++) b_q[v] = load(q + (c * kVecs + v) * kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kKeys; i++) {
        const Vec b_k = splat(rows[i * kStride + c]);
        for (int v = 0; v < kVecs; v++) sums[i][v] += b_q[v] * b_k;
      }
    }
    for (int i = 0; i < kKeys; i++) {
      for (int v = 0; v < kVecs; v++) store(s + ((j + i) * kVecs + v) * kLanes, sums[i][v]);
    }
  }
}

// o[c][lane] = o[c][lane] * decay[lane] + sum_key p[key][lane] * v[key][c]
template <int kVecs, int kStride>
void accumulate(const float* p, const float* v, int dim, int n, const Vec* decay, float* o) {
  constexpr int kCols = kVecs == 1 || kRegisters == 32 ? 8 : 6;
  for (int c = 0; c < dim; c += kCols) {
    Vec sums[kCols][kVecs];
    for (int i = 0; i < kCols; i++) {
      for (int u = 0; u < kVecs; u++) sums[i][u] = load(o + ((c + i) * kVecs + u) * kLanes) * decay[u];
    }
    for (int j = 0; j < n; j++) {
      Vec b_p[kVecs];
      for (int u = 0; u < kVecs; u++) b_p[u] = load(p + (j * kVecs + u) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kCols; i++) {
        const Vec b_v = splat(v[j * kStride + c + i]);
        for (int u = 0; u < kVecs; u++) sums[i][u] += b_p[u] * b_v;
      }
    }
    for (int i = 0; i < kCols; i++) {
      for (int u = 0; u < kVecs; u++) store(o + ((c + i) * kVecs + u) * kLanes, sums[i][u]);
    }
  }
}

// s := cap * tanh(s / cap), from base e to base 2.
inline Vec capped(Vec s, float cap) {
  const Vec e = exp(s * (2 / cap));
  return (1.0f - 2.0f / (e + 1.0f)) * (cap * kLog2e);
}

// Turn `n` keys' scores into weights, against the maximum so far; `decay` is what older sums are worth then.
template <int kVecs>
void soften(float* s, int64_t key, int n, float soft_cap, const int32_t* first, const int32_t* end, float* top,
            float* total, Vec* decay) {
  const Vec lowest = splat(-INFINITY);
  for (int u = 0; u < kVecs; u++) {
    float* column = s + u * kLanes;
    const Vec old = load(top + u * kLanes);
    Vec highest = old;
    if (soft_cap != 0) {
      for (int j = 0; j < n; j++) store(column + j * kVecs * kLanes, capped(load(column + j * kVecs * kLanes), soft_cap));
    }
    if (first) {
      const VecI from = load_as<VecI>(first + u * kLanes), to = load_as<VecI>(end + u * kLanes);
      for (int j = 0; j < n; j++) {
        const VecI at = int32_t(key + j) - VecI{};
        const Vec x = (at >= from) & (at < to) ? load(column + j * kVecs * kLanes) : lowest;
        store(column + j * kVecs * kLanes, x);
        highest = max(highest, x);
      }
    } else {
      for (int j = 0; j < n; j++) highest = max(highest, load(column + j * kVecs * kLanes));
    }
    store(top + u * kLanes, highest);
    // A lane that has seen no key yet: all of its differences must be -inf, not NaN.
    const Vec base = max(highest, splat(-1e30f));
    decay[u] = exp2_nonpositive(old - base);
    Vec sum = load(total + u * kLanes) * decay[u];
    for (int j = 0; j < n; j++) {
      const Vec weight = exp2_nonpositive(load(column + j * kVecs * kLanes) - base);
      store(column + j * kVecs * kLanes, weight);
      sum += weight;
    }
    store(total + u * kLanes, sum);
  }
}

}  // namespace macaw
