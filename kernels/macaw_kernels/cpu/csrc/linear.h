// Linear layers over weights packed for streaming: y[m][n] = sum_k a[m][k] * w[n][k], summed in float32.
//
// A panel holds kPanel outputs, so that one pass over it gives kPanel columns of y. With bfloat16 weights the values of
// two neighbouring k lie side by side in 32 bits: the even one becomes a float by a shift, the odd one by a mask; or,
// where inputs are bfloat16 too, both are multiplied and summed at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "parallel.h"
#include "simd.h"

namespace macaw {

enum WeightType : int32_t { kWeightFloat32 = 0, kWeightBFloat16 = 1, kWeightInt8 = 2 };

constexpr int kPanel = 2 * kLanes;                       // outputs of a panel: two vectors
constexpr int kTileRows = kRegisters == 32 ? 12 : 6;     // rows of a tile: its sums fill most registers
constexpr int64_t kBlockRows = 8 * kTileRows;            // rows whose inputs stay in the cache while panels go by

struct PackedMatrix {
  int32_t type;
  int32_t reserved;
  int64_t n, k;         // k even
  const void* panels;   // float32, int8: [n / kPanel][k][kPanel]; bfloat16: [n / kPanel][k / 2][kPanel][2]; zeros after n
  const float* scales;  // int8: [n rounded up to kPanel]
  const float* bias;    // [n rounded up to kPanel] or null

  int64_t num_panels() const { return (n + kPanel - 1) / kPanel; }
};

// A tile of a product: `rows` rows by one panel, the `part`th of `parts` that the panel is read for.
struct Place {
  int64_t row, panel;
  int rows, part, parts;
};

// Asks for the next panel while this one is multiplied, each tile for its share: memory works as arithmetic does.
struct Ahead {
  const char* at;
  int parts;

  template <int kBytes>  // that a step of this panel reads
  void step() {
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += kBytes / parts;
  }
};

// The sums of one tile.
struct Tile {
  Vec sums[kTileRows][2];
};

template <int kRows>
inline void add_tile(const Vec (*from)[2], Vec (*sums)[2]) {
  for (int r = 0; r < kRows; r++) {
    sums[r][0] += from[r][0];
    sums[r][1] += from[r][1];
  }
}

template <int kRows, class W>  // float32, int8
inline void multiply(const W* w, int64_t k, const float* a, int64_t lda, Ahead ahead, Vec (*sums)[2]) {
  for (int64_t i = 0; i < k; i++, w += kPanel) {
    ahead.step<kPanel * sizeof(W)>();
    const Vec w0 = load(w), w1 = load(w + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const Vec x = splat(a[r * lda + i]);
      sums[r][0] += x * w0;
      sums[r][1] += x * w1;
    }
  }
}

// Few rows have few sums: every other step gets sums of its own, or each addition would wait for the one before.
constexpr bool has_two_sums(int rows) { return rows <= 3; }

template <int kRows>
inline void multiply(const bf16* w, int64_t k, const float* a, int64_t lda, Ahead ahead, Vec (*sums)[2]) {
  constexpr bool kSplit = has_two_sums(kRows);
  Vec more[kSplit ? kRows : 1][2] = {};
  Vec(*odd)[2] = kSplit ? more : sums;
  for (int64_t i = 0; i < k; i += 2, w += 2 * kPanel) {
    ahead.step<4 * kPanel>();
    const VecU p0 = load_as<VecU>(w), p1 = load_as<VecU>(w + 2 * kLanes);
    const Vec e0 = of_bits(p0 << 16), e1 = of_bits(p1 << 16);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const Vec x = splat(a[r * lda + i]);
      sums[r][0] += x * e0;
      sums[r][1] += x * e1;
    }
    const Vec o0 = of_bits(p0 & 0xffff0000u), o1 = of_bits(p1 & 0xffff0000u);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const Vec x = splat(a[r * lda + i + 1]);
      odd[r][0] += x * o0;
      odd[r][1] += x * o1;
    }
  }
  if constexpr (kSplit) add_tile<kRows>(more, sums);
}

template <int kRows>
inline void multiply(const bf16* w, int64_t k, const bf16* a, int64_t lda, Ahead ahead, Vec (*sums)[2]) {
  constexpr bool kSplit = has_two_sums(kRows);
  Vec more[kSplit ? kRows : 1][2] = {};
  const auto step = [&](int64_t i, Vec(*to)[2]) {
    ahead.step<4 * kPanel>();
    const VecU w0 = load_as<VecU>(w + i * kPanel), w1 = load_as<VecU>(w + i * kPanel + 2 * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const VecU x = splat_operand(a + r * lda + i);
      to[r][0] = add_products(to[r][0], x, w0);
      to[r][1] = add_products(to[r][1], x, w1);
    }
  };
  int64_t i = 0;
  if constexpr (kSplit) {
    for (; i + 4 <= k; i += 4) {
      step(i, sums);
      step(i + 2, more);
    }
    add_tile<kRows>(more, sums);
  }
  for (; i < k; i += 2) step(i, sums);
}

template <class W, class A, int kRows>
void multiply_tile(const W* w, int64_t k, const A* a, int64_t lda, Ahead ahead, Tile& tile) {
  Vec sums[kRows][2] = {};
  multiply<kRows>(w, k, a, lda, ahead, sums);
  for (int r = 0; r < kRows; r++) {
    tile.sums[r][0] = sums[r][0];
    tile.sums[r][1] = sums[r][1];
  }
}

// The sums at a place, scaled, with the bias; rows of `a` are `lda` apart. Only bfloat16 weights take bfloat16.
void tile_of(const PackedMatrix& matrix, const Place& place, const float* a, int64_t lda, Tile& tile);
void tile_of(const PackedMatrix& matrix, const Place& place, const bf16* a, int64_t lda, Tile& tile);

// Call `done(place)` for every tile of [num_rows] x [matrix.n]; shared out over the team by `counter`.
template <class Done>
void for_each_tile(const PackedMatrix& matrix, int64_t num_rows, Counter& counter,
                   const Team& team, const Done& done) {
  const int64_t num_panels = matrix.num_panels();
  const int64_t chunk = std::max<int64_t>(1, num_panels / (3 * team.num_threads));
  const int64_t chunks = (num_panels + chunk - 1) / chunk;
  const int64_t blocks = (num_rows + kBlockRows - 1) / kBlockRows;
  for (int64_t task; (task = counter.next()) < blocks * chunks;) {
    const int64_t first_row = task / chunks * kBlockRows, end_row = std::min(num_rows, first_row + kBlockRows);
    const int64_t first = task % chunks * chunk, end = std::min(num_panels, first + chunk);
    // Tiles of about the same height: a low one does not hide how long an addition takes.
    const int64_t tiles = (end_row - first_row + kTileRows - 1) / kTileRows;
    const int64_t tile_rows = (end_row - first_row + tiles - 1) / tiles;
    for (int64_t panel = first; panel < end; panel++) {
      Place place{first_row, panel, 0, 0, int(tiles)};
      for (; place.row < end_row; place.row += tile_rows, place.part++) {
        place.rows = int(std::min(tile_rows, end_row - place.row));
        done(place);
      }
    }
  }
}

// The first `count` values of two vectors to out.
template <class E>
inline void store_panel(E* out, const Vec* v, int64_t count) {
  if (count >= kPanel) {
    store(out, v[0]);
    store(out + kLanes, v[1]);
  } else {
    for (int64_t i = 0; i < count; i++) store_one(out + i, v[i / kLanes][i % kLanes]);
  }
}

}  // namespace macaw
