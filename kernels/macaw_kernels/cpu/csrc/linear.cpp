#include "linear.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace macaw {

namespace {

template <class W, int... kRows>
void dispatch(const W* w, int64_t k, const float* a, int64_t lda, int rows, Tile& tile,
              std::integer_sequence<int, kRows...>) {
  using Function = void (*)(const W*, int64_t, const float*, int64_t, Tile&);
  static constexpr Function table[] = {multiply_tile<W, kRows + 1>...};
  table[rows - 1](w, k, a, lda, tile);
}

template <class W>
void typed_tile(const PackedMatrix& m, int64_t panel, const float* a, int64_t lda, int rows, Tile& tile) {
  const W* w = static_cast<const W*>(m.panels) + panel * m.k * kPanel;
  dispatch(w, m.k, a, lda, rows, tile, std::make_integer_sequence<int, kTileRows>());
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

void tile_of(const PackedMatrix& m, int64_t panel, const float* a, int64_t lda, int rows, Tile& tile) {
  switch (m.type) {
    case kWeightBFloat16: typed_tile<bf16>(m, panel, a, lda, rows, tile); break;
    case kWeightInt8: typed_tile<int8_t>(m, panel, a, lda, rows, tile); break;
    default: typed_tile<float>(m, panel, a, lda, rows, tile);
  }
  if (m.scales) {
    const Vec s0 = load(m.scales + panel * kPanel), s1 = load(m.scales + panel * kPanel + kLanes);
    for (int r = 0; r < rows; r++) {
      tile.sums[r][0] *= s0;
      tile.sums[r][1] *= s1;
    }
  }
  if (m.bias) {
    const Vec b0 = load(m.bias + panel * kPanel), b1 = load(m.bias + panel * kPanel + kLanes);
    for (int r = 0; r < rows; r++) {
      tile.sums[r][0] += b0;
      tile.sums[r][1] += b1;
    }
  }
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
MACAW_EXPORT void macaw_linear(const PackedMatrix* matrix, const float* a, int64_t lda, int64_t num_rows, float* y,
                               int64_t ldy, int32_t num_threads) {
  Counter counter;
  run_team(num_threads, [&](const Team& team) {
    for_each_tile(*matrix, num_rows, counter, team, [&](int64_t row, int rows, int64_t panel) {
      Tile tile;
      tile_of(*matrix, panel, a + row * lda, lda, rows, tile);
      for (int r = 0; r < rows; r++)
        store_panel(y + (row + r) * ldy + panel * kPanel, tile.sums[r], matrix->n - panel * kPanel);
    });
  });
}
