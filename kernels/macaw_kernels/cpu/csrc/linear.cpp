#include "linear.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace macaw {

namespace {

template <class W, class A, int... kRows>
void dispatch(int rows, const W* w, int64_t k, const A* a, int64_t lda, Ahead ahead, Tile& tile,
              std::integer_sequence<int, kRows...>) {
  using Function = void (*)(const W*, int64_t, const A*, int64_t, Ahead, Tile&);
  static constexpr Function table[] = {multiply_tile<W, A, kRows + 1>...};
  table[rows - 1](w, k, a, lda, ahead, tile);
}

template <class W, class A>
void typed_tile(const PackedMatrix& m, const Place& place, const A* a, int64_t lda, Tile& tile) {
  const int64_t size = m.k * kPanel;  // of a panel
  const W *w = static_cast<const W*>(m.panels) + place.panel * size, *next = w + size;
  const Ahead ahead{reinterpret_cast<const char*>(next + size * place.part / place.parts), place.parts};
  dispatch(place.rows, w, m.k, a + place.row * lda, lda, ahead, tile, std::make_integer_sequence<int, kTileRows>());
}

void scale_and_shift(const PackedMatrix& m, const Place& place, Tile& tile) {
  if (m.scales) {
    const Vec s0 = load(m.scales + place.panel * kPanel), s1 = load(m.scales + place.panel * kPanel + kLanes);
    for (int r = 0; r < place.rows; r++) {
      tile.sums[r][0] *= s0;
      tile.sums[r][1] *= s1;
    }
  }
  if (m.bias) {
    const Vec b0 = load(m.bias + place.panel * kPanel), b1 = load(m.bias + place.panel * kPanel + kLanes);
    for (int r = 0; r < place.rows; r++) {
      tile.sums[r][0] += b0;
      tile.sums[r][1] += b1;
    }
  }
}

// Ask for large pages under memory that is not touched yet: weights are read end to end at each step, and with small
// pages the prefetcher stops at every one of them.
void want_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kLarge = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) / kLarge * kLarge;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

void tile_of(const PackedMatrix& m, const Place& place, const float* a, int64_t lda, Tile& tile) {
  switch (m.type) {
    case kWeightBFloat16: typed_tile<bf16>(m, place, a, lda, tile); break;
    case kWeightInt8: typed_tile<int8_t>(m, place, a, lda, tile); break;
    default: typed_tile<float>(m, place, a, lda, tile);
  }
  scale_and_shift(m, place, tile);
}

void tile_of(const PackedMatrix& m, const Place& place, const bf16* a, int64_t lda, Tile& tile) {
  typed_tile<bf16>(m, place, a, lda, tile);
  scale_and_shift(m, place, tile);
}

}  // namespace macaw

using namespace macaw;

#define MACAW_EXPORT extern "C" __attribute__((visibility("default")))

MACAW_EXPORT int32_t macaw_panel() { return kPanel; }

// Pack `w` [n, k], float32 or (source_bf16) bfloat16, into panels of `type`. For int8 `scales` is written: the largest
// magnitude of an output's weights is 127.
MACAW_EXPORT void macaw_pack(int32_t source_bf16, const void* w, int32_t type, int64_t n, int64_t k, void* panels,
                             float* scales) {
  const auto at = [&](int64_t i, int64_t j) {
    return source_bf16 ? to_float(static_cast<const bf16*>(w)[i * k + j]) : static_cast<const float*>(w)[i * k + j];
  };
  const int64_t padded = (n + kPanel - 1) / kPanel * kPanel;
  want_large_pages(panels, padded * k * (type == kWeightFloat32 ? 4 : type == kWeightBFloat16 ? 2 : 1));
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < padded; row++) {
    const int64_t panel = row / kPanel, lane = row % kPanel;
    float scale = 1;
    if (type == kWeightInt8) {
      float top = 0;
      if (row < n)
        for (int64_t j = 0; j < k; j++) top = std::max(top, std::fabs(at(row, j)));
      scale = top > 0 ? top / 127 : 1;
      scales[row] = scale;
    }
    for (int64_t j = 0; j < k; j++) {
      const float x = row < n ? at(row, j) : 0;
      const int64_t base = panel * k * kPanel;
      if (type == kWeightBFloat16) {
        store_one(static_cast<bf16*>(panels) + base + (j / 2 * kPanel + lane) * 2 + j % 2, x);
      } else if (type == kWeightInt8) {
        static_cast<int8_t*>(panels)[base + j * kPanel + lane] = int8_t(std::lrintf(x / scale));
      } else {
        static_cast<float*>(panels)[base + j * kPanel + lane] = x;
      }
    }
  }
}

// y [num_rows, n] = a [num_rows, k] by the matrix; rows of `a` are `lda` apart, those of `y` `ldy`.
template <class A>
void linear(const PackedMatrix& matrix, const A* a, int64_t lda, int64_t num_rows, float* y, int64_t ldy,
            int32_t num_threads) {
  Counter counter;
  run_team(num_threads, [&](const Team& team) {
    for_each_tile(matrix, num_rows, counter, team, [&](const Place& at) {
      Tile tile;
      tile_of(matrix, at, a, lda, tile);
      for (int r = 0; r < at.rows; r++)
        store_panel(y + (at.row + r) * ldy + at.panel * kPanel, tile.sums[r], matrix.n - at.panel * kPanel);
    });
  });
}

// Whether inputs of bfloat16 weights are better bfloat16.
MACAW_EXPORT int32_t macaw_pair_products() { return kPairProducts; }

// `a_bf16`: whether `a` is bfloat16, which only bfloat16 weights take, and not float32.
MACAW_EXPORT void macaw_linear(const PackedMatrix* matrix, int32_t a_bf16, const void* a, int64_t lda, int64_t num_rows,
                               float* y, int64_t ldy, int32_t num_threads) {
  if (a_bf16) {
    linear(*matrix, static_cast<const bf16*>(a), lda, num_rows, y, ldy, num_threads);
  } else {
    linear(*matrix, static_cast<const float*>(a), lda, num_rows, y, ldy, num_threads);
  }
}
