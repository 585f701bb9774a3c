// Linear layers over weights packed for streaming: y[m][n] = sum_k a[m][k] * w[n][k], summed in float32.
//
// A panel holds kPanel outputs, so that one pass over it gives kPanel columns of y. With bfloat16 weights the values of
// two neighbouring k lie side by side in 32 bits: the even one becomes a float by a shift, the odd one by a mask.
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

// The sums of one tile: `rows` rows by one panel.
struct Tile {
  Vec sums[kTileRows][2];
};

template <int kRows, class W>  // float32, int8
inline void multiply(const W* w, int64_t k, const float* a, int64_t lda, Vec (*sums)[2]) {
  for (int64_t i = 0; i < k; i++, w += kPanel) {
    const Vec w0 = load(w), w1 = load(w + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const Vec x = splat(a[r * lda + i]);
      sums[r][0] += x * w0;
      sums[r][1] += x * w1;
    }
  }
}

template <int kRows>
inline void multiply(const bf16* w, int64_t k, const float* a, int64_t lda, Vec (*sums)[2]) {
  // Few rows have few sums: the odd k get sums of their own, or each addition would wait for the one before.
  constexpr bool kSplit = kRows <= 3;
  Vec odd[kSplit ? kRows : 1][2] = {};
  for (int64_t i = 0; i < k; i += 2, w += 2 * kPanel) {
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
      if constexpr (kSplit) {
        odd[r][0] += x * o0;
        odd[r][1] += x * o1;
      } else {
        sums[r][0] += x * o0;
        sums[r][1] += x * o1;
      }
    }
  }
  if constexpr (kSplit) {
    for (int r = 0; r < kRows; r++) {
      sums[r][0] += odd[r][0];
      sums[r][1] += odd[r][1];
    }
  }
}

template <class W, int kRows>
void multiply_tile(const W* w, int64_t k, const float* a, int64_t lda, Tile& tile) {
  Vec sums[kRows][2] = {};
  multiply<kRows>(w, k, a, lda, sums);
  for (int r = 0; r < kRows; r++) {
    tile.sums[r][0] = sums[r][0];
    tile.sums[r][1] = sums[r][1];
  }
}

// Sums of `rows` (1 .. kTileRows) rows by panel `panel`, scaled, with the bias.
void tile_of(const PackedMatrix& matrix, int64_t panel, const float* a, int64_t lda, int rows, Tile& tile);

// Call `done(row, rows, panel)` for every tile of [num_rows] x [matrix.n]; shared out over the team by `counter`.
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
      for (int64_t row = first_row; row < end_row; row += tile_rows) {
        done(row, int(std::min(tile_rows, end_row - row)), panel);
      }
    }
  }
}

// The first `count` values of two vectors to out.
inline void store_panel(float* out, const Vec* v, int64_t count) {
  if (count >= kPanel) {
    store(out, v[0]);
    store(out + kLanes, v[1]);
  } else {
    for (int64_t i = 0; i < count; i++) out[i] = v[i / kLanes][i % kLanes];
  }
}

}  // namespace macaw
