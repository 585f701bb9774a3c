// From the products of queries and keys to base-2 exponents of the softmax.
#pragma once

#include "simd.h"

namespace macaw {

constexpr float kLog2e = 1.44269504088896341f;

// An exponent is `factor` times a product; or, with a soft cap, times what `capped` makes of it.
struct Scores {
  float scale, soft_cap, factor;

  // `scale` is positive; `soft_cap` 0: none.
  Scores(float scale, float soft_cap)
      : scale(scale), soft_cap(soft_cap), factor(kLog2e * (soft_cap != 0 ? 1 : scale)) {}

  // cap * tanh(x * scale / cap)
  Vec capped(Vec x) const {
    const Vec e = exp(x * (2 * scale / soft_cap));
    return (1.0f - 2.0f / (e + 1.0f)) * soft_cap;
  }
};

}  // namespace macaw
