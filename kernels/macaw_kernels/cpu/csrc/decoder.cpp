#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <type_traits>

#define MACAW_EXPORT extern "C" __attribute__((visibility("default")))

namespace macaw {
namespace {

// -- memory ----------------------------------------------------------------------------------------------------

constexpr int kCountersPerLayer = 4;  // matrix products that are shared out tile by tile

// A: what matrices are multiplied with, float or bf16.
template <class A>
struct Buffers {
  float *x, *qkv, *branch;
  A *normed, *q, *attended, *inner;
  Counter* counters;
  void* attention;
  int64_t bytes;
};

template <class A>
Buffers<A> lay_out(const Decoder& d, const Step& s, void* base) {
  const int64_t t = s.num_tokens, q = int64_t(d.num_q_heads) * d.head_dim;
  const int64_t qkv = q + 2 * int64_t(d.num_kv_heads) * d.head_dim;
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* at = static_cast<char*>(base) + used;
    used += (bytes + 63) / 64 * 64;
    return at;
  };
  const auto floats = [&](int64_t n) { return reinterpret_cast<float*>(take(4 * n)); };
  const auto inputs = [&](int64_t n) { return reinterpret_cast<A*>(take(int64_t(sizeof(A)) * n)); };
  Buffers<A> b;
  b.x = floats(t * d.hidden);
  b.normed = inputs(std::max(t, s.num_rows) * d.hidden);
  b.qkv = floats(t * qkv);
  b.q = inputs(t * q);
  b.attended = inputs(t * q);
  b.inner = inputs(t * d.intermediate);
  b.branch = floats(t * d.hidden);
  b.counters = reinterpret_cast<Counter*>(take(int64_t(sizeof(Counter)) * (kCountersPerLayer * d.num_layers + 1)));
  b.attention = take(s.attention_workspace);
  b.bytes = used;
  return b;
}

// -- rows ------------------------------------------------------------------------------------------------------

// Sum of f(x[i]), f for vectors and numbers alike; some sums at a time, for an addition takes some cycles.
template <class F>
float sum_over(const float* x, int64_t n, const F& f) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; j++) sums[j] += f(load(x + i + j * kLanes));
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; i++) total += f(x[i]);
  return total;
}

template <class E>
void normalize(const float* x, const Norm& norm, int64_t n, bool layer_norm, float eps, E* out) {
  const float mean = layer_norm ? sum_over(x, n, [](auto v) { return v; }) / float(n) : 0;
  const float squares = sum_over(x, n, [&](auto v) { return (v - mean) * (v - mean); });
  const float factor = 1 / std::sqrt(squares / float(n) + eps);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec y = (load(x + i) - mean) * factor * load(norm.weight + i);
    store(out + i, norm.bias ? y + load(norm.bias + i) : y);
  }
  for (; i < n; i++) store_one(out + i, (x[i] - mean) * factor * norm.weight[i] + (norm.bias ? norm.bias[i] : 0));
}

template <class E>
void embed(const E* row, float scale, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = to_float(row[i]) * scale;
}

// Rotate pairs (i, i + half): (a, b) -> (a cos - b sin, b cos + a sin), Su et al., RoFormer; halves as in GPT-NeoX.
void rotate(float* x, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

template <class E>
void copy_to(E* out, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  for (; i < n; i++) store_one(out + i, x[i]);
}

Vec activate(Vec x, int32_t kind) {
  switch (kind) {
    case kSilu: return x / (1.0f + exp(-x));
    case kGeluTanh: {
      const Vec z = 0.7978845608028654f * (x + 0.044715f * x * x * x);
      return x - x / (exp(2.0f * z) + 1.0f);  // x/2 (1 + tanh z)
    }
    case kRelu: return max(x, Vec{});
    default: {
      for (int i = 0; i < kLanes; i++) x[i] = 0.5f * x[i] * (1 + std::erf(x[i] * 0.70710678f));
      return x;
    }
  }
}

// -- the phases of a layer; between any two of them the team meets -----------------------------------------------

template <class A>
class Forward {
 public:
  Forward(const Decoder& d, const Step& s, const Buffers<A>& b, const Team& team)
      : d_(d), s_(s), b_(b), team_(team), num_tokens_(s.num_tokens) {}

  void run() {
    clear_counters();
    each_row([&](int64_t row) {
      embed_token(row);
      if (d_.num_layers) norm_row(row, d_.layers[0].input_norm);
    });
    meet(kRows);
    for (int64_t i = 0; i < d_.num_layers; i++) {
      const Layer& layer = d_.layers[i];
      Counter* counters = b_.counters + i * kCountersPerLayer;
      project_qkv(layer, counters[0]);
      meet(kQkv);
      rotate_and_store(layer);
      meet(kRotate);
      attend_layer(layer);
      meet(kAttend);
      add_product(layer.o, b_.attended, q_width(), layer.post_attention_norm.weight != nullptr, counters[1]);
      meet(kOutput);
      each_row([&](int64_t row) {
        add_branch(row, layer.post_attention_norm);
        norm_row(row, layer.mlp_norm);
      });
      meet(kRows);
      inner(layer, counters[2]);
      meet(kInner);
      add_product(layer.down, b_.inner, d_.intermediate, layer.post_mlp_norm.weight != nullptr, counters[3]);
      meet(kDown);
      const bool last = i + 1 == d_.num_layers;
      each_row([&](int64_t row) {
        add_branch(row, layer.post_mlp_norm);
        if (!last) norm_row(row, d_.layers[i + 1].input_norm);
      });
      meet(kRows);
    }
    for (int64_t i = team_.thread; i < s_.num_rows; i += team_.num_threads)
      normalize(b_.x + s_.rows[i] * d_.hidden, d_.final_norm, d_.hidden, d_.layer_norm, d_.eps, b_.normed + i * d_.hidden);
    meet(kRows);
    logits(b_.counters[kCountersPerLayer * d_.num_layers]);
    if (s_.phase_s) meet(kLogits);
  }

 private:
  int64_t q_width() const { return int64_t(d_.num_q_heads) * d_.head_dim; }
  int64_t kv_width() const { return int64_t(d_.num_kv_heads) * d_.head_dim; }
  int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
  // The end of a phase.
  void meet(Phase phase) {
    team_.barrier->wait();
    if (!s_.phase_s || team_.thread != 0) return;
    const auto now = std::chrono::steady_clock::now();
    s_.phase_s[phase] += std::chrono::duration<double>(now - begin_).count();
    begin_ = now;
  }

  void clear_counters() const {
    if (team_.thread != 0) return;
    for (int64_t i = 0; i <= kCountersPerLayer * d_.num_layers; i++) new (b_.counters + i) Counter();
    std::memset(b_.attention, 0, 256);
  }

  template <class Work>
  void each_row(const Work& work) const {
    for (int64_t row = team_.thread; row < num_tokens_; row += team_.num_threads) work(row);
  }

  void embed_token(int64_t row) const {
    const int64_t at = s_.token_ids[row] * d_.hidden;
    float* x = b_.x + row * d_.hidden;
    if (d_.embedding_dtype == kBFloat16) {
      embed(static_cast<const bf16*>(d_.embedding) + at, d_.embedding_scale, d_.hidden, x);
    } else {
      embed(static_cast<const float*>(d_.embedding) + at, d_.embedding_scale, d_.hidden, x);
    }
  }

  void norm_row(int64_t row, const Norm& norm) const {
    const float* x = b_.x + row * d_.hidden;
    A* out = b_.normed + row * d_.hidden;
    if (norm.weight) {
      normalize(x, norm, d_.hidden, d_.layer_norm, d_.eps, out);
    } else {
      copy_to(out, x, d_.hidden);
    }
  }

  void project_qkv(const Layer& layer, Counter& counter) const {
    for_each_tile(layer.qkv, num_tokens_, counter, team_, [&](const Place& at) {
      Tile tile;
      tile_of(layer.qkv, at, b_.normed, d_.hidden, tile);
      const int64_t column = at.panel * kPanel;
      for (int r = 0; r < at.rows; r++)
        store_panel(b_.qkv + (at.row + r) * qkv_width() + column, tile.sums[r], qkv_width() - column);
    });
  }

  void rotate_and_store(const Layer& layer) const {
    const int heads = d_.num_q_heads + 2 * d_.num_kv_heads;
    if (d_.qk_norm_whole && layer.q_norm) {
      each_row([&](int64_t row) {
        float* q = b_.qkv + row * qkv_width();
        normalize(q, {layer.q_norm, nullptr}, q_width(), false, d_.eps, q);
        normalize(q + q_width(), {layer.k_norm, nullptr}, kv_width(), false, d_.eps, q + q_width());
        for (int head = 0; head < heads; head++) rotate_and_store_head(layer, row, head, nullptr);
      });
      return;
    }
    for (int64_t unit = team_.thread; unit < num_tokens_ * heads; unit += team_.num_threads) {
      const int head = int(unit % heads);
      rotate_and_store_head(layer, unit / heads, head, head < d_.num_q_heads ? layer.q_norm : layer.k_norm);
    }
  }

  void rotate_and_store_head(const Layer& layer, int64_t row, int head, const float* norm) const {
    const int dim = d_.head_dim, kv_head = head - d_.num_q_heads;
    float* x = b_.qkv + row * qkv_width() + int64_t(head) * dim;
    if (kv_head < d_.num_kv_heads) {  // a query or a key
      if (norm) normalize(x, {norm, nullptr}, dim, false, d_.eps, x);
      if (layer.rope >= 0) {
        const int half = d_.rope_dim / 2;
        const int64_t at = s_.attention[0].positions[row] * half;
        rotate(x, d_.rope_cos[layer.rope] + at, d_.rope_sin[layer.rope] + at, half);
      }
    }
    if (kv_head < 0) {
      return copy_to(b_.q + row * q_width() + int64_t(head) * dim, x, dim);
    }
    const bool value = kv_head >= d_.num_kv_heads;
    const int64_t at = (s_.slots[row] * d_.num_kv_heads + (value ? kv_head - d_.num_kv_heads : kv_head)) * dim;
    void* pages = value ? layer.v_pages : layer.k_pages;
    if (d_.kv_dtype == kBFloat16) {
      copy_to(static_cast<bf16*>(pages) + at, x, dim);
    } else {
      copy_to(static_cast<float*>(pages) + at, x, dim);
    }
  }

  void attend_layer(const Layer& layer) const {
    AttentionArgs args = s_.attention[layer.kind];
    args.q = b_.q;
    args.k_pages = layer.k_pages;
    args.v_pages = layer.v_pages;
    args.out = b_.attended;
    args.q_row_stride = args.out_row_stride = q_width();
    args.q_head_stride = args.out_head_stride = d_.head_dim;
    args.sinks = layer.sinks;
    args.scale = layer.scale;
    args.soft_cap = layer.soft_cap;
    args.q_dtype = std::is_same_v<A, bf16> ? kBFloat16 : kFloat32;
    args.kv_dtype = d_.kv_dtype;
    args.workspace = b_.attention;
    attend(args, team_);
  }

  // Into the residual; or into `branch` when a norm comes between.
  void add_product(const PackedMatrix& matrix, const A* a, int64_t lda, bool to_branch, Counter& counter) const {
    for_each_tile(matrix, num_tokens_, counter, team_, [&](const Place& at) {
      Tile tile;
      tile_of(matrix, at, a, lda, tile);
      const int64_t column = at.panel * kPanel, count = d_.hidden - column;
      for (int r = 0; r < at.rows; r++) {
        const int64_t place = (at.row + r) * d_.hidden + column;
        if (!to_branch) {
          float* x = b_.x + place;
          for (int64_t i = 0; i < std::min<int64_t>(count, kPanel); i += kLanes) {
            Vec& sum = tile.sums[r][i / kLanes];
            if (count - i >= kLanes) {
              sum = load(x + i) + d_.residual_scale * sum;
            } else {
              for (int j = 0; j < count - i; j++) sum[j] = x[i + j] + d_.residual_scale * sum[j];
            }
          }
        }
        store_panel((to_branch ? b_.branch : b_.x) + place, tile.sums[r], count);
      }
    });
  }

  void add_branch(int64_t row, const Norm& norm) const {
    if (!norm.weight) return;
    float *x = b_.x + row * d_.hidden, *branch = b_.branch + row * d_.hidden;
    normalize(branch, norm, d_.hidden, d_.layer_norm, d_.eps, branch);
    for (int64_t i = 0; i < d_.hidden; i++) x[i] += d_.residual_scale * branch[i];
  }

  void inner(const Layer& layer, Counter& counter) const {
    const bool gated = layer.gate.n != 0;
    for_each_tile(layer.up, num_tokens_, counter, team_, [&](const Place& at) {
      Tile up, gate;
      tile_of(layer.up, at, b_.normed, d_.hidden, up);
      if (gated) tile_of(layer.gate, at, b_.normed, d_.hidden, gate);
      const int64_t column = at.panel * kPanel;
      for (int r = 0; r < at.rows; r++) {
        for (int i = 0; i < 2; i++) {
          Vec& x = up.sums[r][i];
          x = gated ? x * activate(gate.sums[r][i], d_.activation) : activate(x, d_.activation);
        }
        store_panel(b_.inner + (at.row + r) * d_.intermediate + column, up.sums[r], d_.intermediate - column);
      }
    });
  }

  void logits(Counter& counter) const {
    for_each_tile(d_.lm_head, s_.num_rows, counter, team_, [&](const Place& at) {
      Tile tile;
      tile_of(d_.lm_head, at, b_.normed, d_.hidden, tile);
      const int64_t column = at.panel * kPanel;
      for (int r = 0; r < at.rows; r++) {
        for (Vec& sum : tile.sums[r]) {
          sum *= d_.logit_scale;
          if (d_.logit_soft_cap != 0) {
            for (int i = 0; i < kLanes; i++) sum[i] = d_.logit_soft_cap * std::tanh(sum[i] / d_.logit_soft_cap);
          }
        }
        store_panel(s_.logits + (at.row + r) * d_.vocab + column, tile.sums[r], d_.vocab - column);
      }
    });
  }

  const Decoder& d_;
  const Step& s_;
  const Buffers<A>& b_;
  const Team& team_;
  const int64_t num_tokens_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace
}  // namespace macaw

using namespace macaw;

namespace {

bool takes_bf16(const Decoder& d) { return kPairProducts && d.lm_head.type == kWeightBFloat16; }

template <class A>
void forward(const Decoder& d, const Step& s, int num_threads) {
  const Buffers<A> buffers = lay_out<A>(d, s, s.workspace);
  run_team(num_threads, [&](const Team& team) { Forward<A>(d, s, buffers, team).run(); });
}

}  // namespace

MACAW_EXPORT int64_t macaw_decoder_workspace(const Decoder* decoder, const Step* step) {
  return takes_bf16(*decoder) ? lay_out<bf16>(*decoder, *step, nullptr).bytes
                              : lay_out<float>(*decoder, *step, nullptr).bytes;
}

MACAW_EXPORT void macaw_decoder_forward(const Decoder* decoder, const Step* step, int32_t num_threads) {
  (takes_bf16(*decoder) ? forward<bf16> : forward<float>)(*decoder, *step, num_threads);
}
