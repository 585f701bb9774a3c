// A few queries that see the same keys of one KV head, such as the query heads of one row: decode. Keys and values are
// read from their pages as they are.
//
// With so few queries the elements of a key are the lanes, and its products with each query are summed up in the end,
// eight or sixteen keys at a time. Each element of K and V is loaded and converted once for all queries. In pairs
// (simd.h), two neighbouring elements of a key share a lane, and then the values of two neighbouring keys.
#pragma once

#include <algorithm>

#include "scores.h"

namespace macaw {

constexpr int kMaxRowQueries = 8;

// Online softmax over blocks of keys for `kQueries` queries; dims that are multiples of kWidth.
template <class KV, class Q, int kQueries>
struct SingleRow {
  static constexpr int kKeys = 32;  // of a block
  static constexpr int kWidth = kPerLane<Q> * kLanes;
  static constexpr int kCols = kQueries == 1 ? 8 : kQueries <= 3 ? 4 : kQueries * 2 <= kRegisters - 4 ? 2 : kPerLane<Q>;

  int head_dim, v_head_dim;
  const Q* q;  // [kQueries][head_dim]
  float* o;    // [kQueries][v_head_dim]
  float (*products)[kKeys];  // [kQueries], of one block
  Q (*weights)[kKeys];       // likewise
  Scores scores{1, 0};
  float top[kQueries];
  Vec total[kQueries];

  void start() {
    std::fill_n(top, kQueries, -1e30f);
    std::fill_n(total, kQueries, Vec{});
    std::fill_n(o, kQueries * v_head_dim, 0.0f);
  }

  // Take the next `n` keys, whose rows start `k_offset` and `v_offset` elements behind `k` and `v`; these go on to a
  // multiple of kLanes with keys that may be read and do not count.
  void step(const KV* const* k, int k_offset, const KV* const* v, int v_offset, int n) {
    for (int j = 0; j < n; j += kLanes) multiply(k + j, k_offset, j);
    float decay[kQueries];
    for (int m = 0; m < kQueries; m++) decay[m] = soften(m, n);
    int c = 0;
    for (; c + kCols * kLanes <= v_head_dim; c += kCols * kLanes) accumulate<kCols>(v, v_offset, n, c, decay);
    for (; c < v_head_dim; c += kWidth) accumulate<kPerLane<Q>>(v, v_offset, n, c, decay);
  }

 private:
  void multiply(const KV* const* k, int offset, int at) {
    Vec sums_of[kQueries][kLanes];
    for (int j = 0; j < kLanes; j++) {
      Vec dot[kQueries] = {};
      for (int c = 0; c < head_dim; c += kWidth) {
        const auto b_k = operand<Q>(k[j] + offset + c);
#pragma GCC unroll 8
        for (int m = 0; m < kQueries; m++) dot[m] = add_products(dot[m], b_k, operand<Q>(q + m * head_dim + c));
      }
      for (int m = 0; m < kQueries; m++) sums_of[m][j] = dot[m];
    }
    for (int m = 0; m < kQueries; m++) macaw::store(products[m] + at, sums(sums_of[m]));
  }

  // Products to weights; returns what older sums are worth against the new maximum.
  float soften(int m, int n) {
    float* s = products[m];
    const int end = (n + kLanes - 1) / kLanes * kLanes;
    if (scores.soft_cap != 0) {
      for (int j = 0; j < end; j += kLanes) macaw::store(s + j, scores.capped(load(s + j)));
    }
    for (int j = n; j < end; j++) s[j] = -INFINITY;
    Vec highest = load(s);
    for (int j = kLanes; j < end; j += kLanes) highest = max(highest, load(s + j));
    const float old = top[m];
    top[m] = std::max(old, max_of(highest) * scores.factor);
    const Vec decay = exp2_nonpositive(splat(old - top[m]));
    total[m] *= decay;
    for (int j = 0; j < end; j += kLanes) {
      const Vec weight = exp2_nonpositive(load(s + j) * scores.factor - splat(top[m]));
      macaw::store(weights[m] + j, weight);
      total[m] += weight;
    }
    return decay[0];
  }

  template <int kVecs>
  void accumulate(const KV* const* v, int offset, int n, int c, const float* decay) {
    Vec sum[kQueries][kVecs];
    for (int m = 0; m < kQueries; m++) {
      for (int i = 0; i < kVecs; i++) sum[m][i] = load(o + m * v_head_dim + c + i * kLanes) * splat(decay[m]);
    }
    for (int j = 0; j < n; j += kPerLane<Q>) {
      decltype(operand<Q>(q)) b_v[kVecs];
      for (int i = 0; i < kVecs; i += kPerLane<Q>) {
        const int at = offset + c + i * kLanes;
        if constexpr (kPerLane<Q> == 2) {
          pair_up(v[j] + at, v[j + 1] + at, b_v + i);
        } else {
          b_v[i] = load(v[j] + at);
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < kQueries; m++) {
        const auto weight = splat_operand(weights[m] + j);
        for (int i = 0; i < kVecs; i++) sum[m][i] = add_products(sum[m][i], weight, b_v[i]);
      }
    }
    for (int m = 0; m < kQueries; m++) {
      for (int i = 0; i < kVecs; i++) macaw::store(o + m * v_head_dim + c + i * kLanes, sum[m][i]);
    }
  }
};

}  // namespace macaw
