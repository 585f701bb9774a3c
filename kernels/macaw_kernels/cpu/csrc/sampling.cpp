// Choosing tokens from logits: the most likely one, or by the inverse of the cumulative distribution.

#include <algorithm>
#include <utility>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace macaw {
namespace {

struct SampleRow {
  double temperature;    // 0: the most likely token
  double top_p, min_p;   // 1, 0: off
  double u;              // in [0, 1): where in the distribution
  int64_t top_k;         // 0: off
  const uint32_t* mask;  // one bit per token, 1 where it is allowed; or null
};

constexpr int64_t kBlock = 1024;

struct Scratch {
  std::vector<float> logits, p;
  std::vector<double> mass;
  std::vector<std::pair<float, int64_t>> kept;
};

float largest(const float* x, int64_t n) {
  Vec top = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) top = max(top, load(x + i));
  float best = max_of(top);
  for (; i < n; i++) best = std::max(best, x[i]);
  return best;
}

bool has_nan(const float* x, int64_t n) {
  VecI found = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i);
    found |= (VecI)(v != v);
  }
  bool any = false;
  for (int j = 0; j < kLanes; j++) any |= found[j] != 0;
  for (; i < n; i++) any |= x[i] != x[i];
  return any;
}

// p = exp((x - top) / temperature), and the mass of each block of kBlock; returns the whole.
double exponentiate(const float* x, int64_t n, float top, float temperature, Scratch& s) {
  s.p.resize(n + kLanes);
  s.mass.clear();
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    Vec sums = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const Vec p = exp((load(x + i) - top) / temperature);
      store(&s.p[i], p);
      sums += p;
    }
    double mass = sum(sums);
    for (; i < end; i++) {
      s.p[i] = exp(splat((x[i] - top) / temperature))[0];
      mass += s.p[i];
    }
    s.mass.push_back(mass);
    total += mass;
  }
  return total;
}

// The first token whose cumulative mass is over `target`; the last one with any mass, should rounding pass it by.
int64_t find(const Scratch& s, int64_t n, double target) {
  double before = 0;
  int64_t last = 0;
  for (int64_t block = 0; block < int64_t(s.mass.size()); block++) {
    if (before + s.mass[block] <= target) {
      before += s.mass[block];
      if (s.mass[block] > 0) last = block;
      continue;
    }
    last = block;
    double within = before;
    for (int64_t i = block * kBlock; i < std::min(n, (block + 1) * kBlock); i++) {
      within += s.p[i];
      if (within > target && s.p[i] > 0) return i;
    }
    break;
  }
  for (int64_t i = std::min(n, (last + 1) * kBlock) - 1; i >= 0; i--)
    if (s.p[i] > 0) return i;
  return 0;
}

// Top-k, then top-p, then min-p, as transformers orders them; among equals the smaller token id is the more likely.
//
// Sorting a vocabulary takes longer than all the rest. So tokens are counted by the leading bits of their mass first,
// and only those that may stay are sorted.
int64_t filtered(const SampleRow& row, int64_t n, double total, Scratch& s) {
  constexpr int kShift = 19, kBuckets = 1 << (32 - kShift);
  const auto bucket_of = [](float p) {
    uint32_t bits;
    std::memcpy(&bits, &p, 4);
    return int(bits >> kShift);
  };
  std::vector<int64_t> counts(kBuckets);
  std::vector<double> masses(kBuckets);
  for (int64_t i = 0; i < n; i++) {
    const int bucket = bucket_of(s.p[i]);
    counts[bucket]++;
    masses[bucket] += s.p[i];
  }
  int cut = bucket_of(1.0f);
  int64_t count = counts[cut];
  double mass = masses[cut];
  const auto enough = [&] {
    if (row.top_k > 0) return count >= row.top_k;
    if (row.top_p < 1) return mass >= row.top_p * total * (1 + 1e-6);
    return false;
  };
  const int least = std::max(1, bucket_of(float(row.min_p)));
  while (cut > least && !enough()) {
    cut--;
    count += counts[cut];
    mass += masses[cut];
  }
  s.kept.clear();
  for (int64_t i = 0; i < n; i++)
    if (bucket_of(s.p[i]) >= cut && s.p[i] > 0) s.kept.emplace_back(s.p[i], i);
  std::sort(s.kept.begin(), s.kept.end(),
            [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
  if (row.top_k > 0) {
    s.kept.resize(std::min<int64_t>(s.kept.size(), row.top_k));
    total = 0;
    for (const auto& [p, token] : s.kept) total += p;
  }
  size_t keep = 0;
  double kept = 0;
  for (; keep < s.kept.size(); keep++) {
    const float p = s.kept[keep].first;
    if (keep > 0 && ((row.top_p < 1 && kept >= row.top_p * total * (1 - 1e-6)) || p < row.min_p * s.kept[0].first)) break;
    kept += p;
  }
  double within = 0;
  for (size_t i = 0; i < keep; i++) {
    within += s.kept[i].first;
    if (within > row.u * kept) return s.kept[i].second;
  }
  return s.kept[keep - 1].second;
}

int64_t choose(const float* x, int64_t n, const SampleRow& row, Scratch& s) {
  if (has_nan(x, n)) return -1;
  if (row.mask) {
    s.logits.resize(n);
    for (int64_t i = 0; i < n; i++) s.logits[i] = row.mask[i / 32] >> (i % 32) & 1 ? x[i] : -INFINITY;
    x = s.logits.data();
  }
  const float top = largest(x, n);
  if (!std::isfinite(top)) return -1;
  const float temperature = float(row.temperature);
  if (temperature <= 0) return std::find(x, x + n, top) - x;
  const double total = exponentiate(x, n, top, temperature, s);
  if (row.top_k > 0 || row.top_p < 1 || row.min_p > 0) return filtered(row, n, total, s);
  return find(s, n, row.u * total);
}

}  // namespace
}  // namespace macaw

using namespace macaw;

// One token for each row of `logits` [num_rows, vocab]; -1 where a logit is NaN, or no token has any chance.
extern "C" __attribute__((visibility("default"))) void macaw_sample(const float* logits, int64_t vocab, int64_t num_rows,
                                                                    const SampleRow* rows, int64_t* tokens,
                                                                    int32_t num_threads) {
  Counter counter;
  run_team(int(std::min<int64_t>(num_threads, num_rows)), [&](const Team&) {
    thread_local Scratch scratch;
    for (int64_t row; (row = counter.next()) < num_rows;)
      tokens[row] = choose(logits + row * vocab, vocab, rows[row], scratch);
  });
}
