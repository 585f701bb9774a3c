// Many queries against a block of keys: queries lie in the lanes, `kVecs` vectors of them, and keys are broadcast.
#pragma once

#include <cstdint>
#include <cstring>

#include "scores.h"

namespace macaw {

constexpr int kBlockKeys = kRegisters == 32 ? 48 : 24;
constexpr int kUnit = 2;  // vectors of queries that are computed together
constexpr int kPad = 8;   // value columns that a tile may go beyond a row
constexpr int kUnitLanes = kUnit * kLanes;

template <class T>
inline void copy(const T* from, int n, float* to) {
  int c = 0;
  for (; c + kLanes <= n; c += kLanes) store(to + c, load(from + c));
  for (; c < n; c++) to[c] = to_float(from[c]);
}

// A block of `n` keys' elements, row by row `stride` apart.
template <class T>
inline void copy_keys(const T* const* from, int n, int dim, int stride, float* to) {
  for (int j = 0; j < n; j++) copy(from[j], dim, to + j * stride);
}
inline void copy_keys(const bf16* const* from, int n, int dim, int stride, bf16* to) {
  for (int j = 0; j < n; j++) std::memcpy(to + j * stride, from[j], dim * sizeof(bf16));
}

// Their values, row by row; or of each two keys side by side.
template <class T>
inline void copy_values(const T* const* from, int n, int dim, int stride, float* to) {
  copy_keys(from, n, dim, stride, to);
}
inline void copy_values(const bf16* const* from, int n, int dim, int stride, bf16* to) {
  for (int j = 0; j < n; j += 2) {
    const bf16 *a = from[j], *b = from[j + 1 < n ? j + 1 : j];  // one alone has a neighbour of weight 0
    bf16* row = to + j * stride;
    int c = 0;
    for (; c + 2 * kLanes <= dim; c += 2 * kLanes) {
      VecU pairs[2];
      pair_up(a + c, b + c, pairs);
      std::memcpy(row + 2 * c, pairs, sizeof(pairs));
    }
    for (; c < dim; c++) row[2 * c] = a[c], row[2 * c + 1] = b[c];
  }
}

// s[key][lane] = sum_c q[c][lane] * k[key][c], `n` rounded up to a tile.
template <int kVecs, int kStride, class Q>
void multiply(const Q* q, const Q* k, int dim, int n, float* s) {
  constexpr int kKeys = kVecs == 1 || kRegisters == 32 ? 12 : 6;
  static_assert(kBlockKeys % kKeys == 0);
  for (int j = 0; j < n; j += kKeys) {
    Vec sums[kKeys][kVecs] = {};
    const Q* rows = k + j * kStride;
    for (int c = 0; c < dim; c += kPerLane<Q>) {
      decltype(operand<Q>(q)) b_q[kVecs];
      for (int v = 0; v < kVecs; v++) b_q[v] = operand<Q>(q + (c * kVecs + v * kPerLane<Q>) * kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kKeys; i++) {
        const auto b_k = splat_operand(rows + i * kStride + c);
        for (int v = 0; v < kVecs; v++) sums[i][v] = add_products(sums[i][v], b_q[v], b_k);
      }
    }
    for (int i = 0; i < kKeys; i++) {
      for (int v = 0; v < kVecs; v++) store(s + ((j + i) * kVecs + v) * kLanes, sums[i][v]);
    }
  }
}

// o[c][lane] = o[c][lane] * decay[lane] + sum_key p[key][lane] * v[key][c]
template <int kVecs, int kStride, class Q>
void accumulate(const Q* p, const Q* v, int dim, int n, const Vec* decay, float* o) {
  constexpr int kCols = kVecs == 1 || kRegisters == 32 ? 8 : 6;
  for (int c = 0; c < dim; c += kCols) {
    Vec sums[kCols][kVecs];
    for (int i = 0; i < kCols; i++) {
      for (int u = 0; u < kVecs; u++) sums[i][u] = load(o + ((c + i) * kVecs + u) * kLanes) * decay[u];
    }
    for (int j = 0; j < n; j += kPerLane<Q>) {
      decltype(operand<Q>(p)) b_p[kVecs];
      for (int u = 0; u < kVecs; u++) b_p[u] = operand<Q>(p + (j * kVecs + u * kPerLane<Q>) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kCols; i++) {
        const auto b_v = splat_operand(v + j * kStride + (c + i) * kPerLane<Q>);
        for (int u = 0; u < kVecs; u++) sums[i][u] = add_products(sums[i][u], b_p[u], b_v);
      }
    }
    for (int i = 0; i < kCols; i++) {
      for (int u = 0; u < kVecs; u++) store(o + ((c + i) * kVecs + u) * kLanes, sums[i][u]);
    }
  }
}

// Turn `n` keys' products `s` into weights `p` (which may lie in their place), against the maximum so far; `decay` is
// what older sums are worth then.
template <int kVecs, class Q>
void soften(float* s, Q* p, int64_t key, int n, const Scores& scores, const int32_t* first, const int32_t* end,
            float* top, float* total, Vec* decay) {
  const auto at = [&](int j, int u) { return s + (j * kVecs + u) * kLanes; };
  if (scores.soft_cap != 0) {
    for (int j = 0; j < n; j++)
      for (int u = 0; u < kVecs; u++) store(at(j, u), scores.capped(load(at(j, u))));
  }
  Vec highest[kVecs], base[kVecs], sum[kVecs];
  for (int u = 0; u < kVecs; u++) highest[u] = splat(-INFINITY);
  if (first) {
    for (int u = 0; u < kVecs; u++) {
      const VecI from = load_as<VecI>(first + u * kLanes), to = load_as<VecI>(end + u * kLanes);
      for (int j = 0; j < n; j++) {
        const VecI position = int32_t(key + j) - VecI{};
        store(at(j, u), (position >= from) & (position < to) ? load(at(j, u)) : splat(-INFINITY));
      }
    }
  }
  for (int j = 0; j < n; j++)
    for (int u = 0; u < kVecs; u++) highest[u] = max(highest[u], load(at(j, u)));
  for (int u = 0; u < kVecs; u++) {
    const Vec old = load(top + u * kLanes);
    highest[u] = max(old, highest[u] * scores.factor);
    store(top + u * kLanes, highest[u]);
    // A lane that has seen no key yet: all of its differences must be -inf, not NaN.
    base[u] = max(highest[u], splat(-1e30f));
    decay[u] = exp2_nonpositive(old - base[u]);
    sum[u] = load(total + u * kLanes) * decay[u];
  }
  const auto weight = [&](int j, int u) {
    const Vec w = exp2_nonpositive(load(at(j, u)) * scores.factor - base[u]);
    sum[u] += w;
    return w;
  };
  for (int j = 0; j < n; j += kPerLane<Q>) {
    for (int u = 0; u < kVecs; u++) {
      Q* to = p + (j * kVecs + u * kPerLane<Q>) * kLanes;
      if constexpr (kPerLane<Q> == 2) {
        const Vec a = weight(j, u);
        const VecU both = pair(a, j + 1 < n ? weight(j + 1, u) : Vec{});
        std::memcpy(to, &both, sizeof(both));
      } else {
        store(to, weight(j, u));
      }
    }
  }
  for (int u = 0; u < kVecs; u++) store(total + u * kLanes, sum[u]);
}

}  // namespace macaw
