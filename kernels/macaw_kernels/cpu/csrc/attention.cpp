// Two-phase attention over paged keys and values.
//
// For queries q_i, i a pair of a row and a query head of one KV head, and the keys j that row sees:
//
//     s_ij = q_i . k_j * scale,   o_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij)
//
// A task takes its keys in blocks that stay in the L1 cache, copied once for all of its queries, with the running
// maximum and sum of online softmax. Queries lie in the lanes of vectors: a key's elements are broadcast, so that
// nothing is ever summed across a vector, and rows of any number and any group size fill the lanes alike. Products are
// of float32; or of bfloat16 in pairs where queries and pages are that, and the processor can: then weights are
// rounded to it, too. Exponents are to base 2 inside; log2(e) goes with the scale.

#include "attention.h"

#include <algorithm>
#include <climits>
#include <new>

#include "many_rows.h"
#include "simd.h"
#include "single_row.h"

namespace macaw {

namespace {

constexpr int kMaxTaskHeads = 16;
constexpr int64_t kTaskBlockBytes = 64 << 10;  // keys and values of a block of all heads of a task

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int row_stride(const AttentionArgs& args) {
  const int dim = std::max(args.head_dim, args.v_head_dim);
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

int64_t num_lanes(const AttentionArgs& args) {
  return round_up(task_rows(args) * (args.num_q_heads / args.num_kv_heads), kUnitLanes);
}

// What the threads share at the start of the workspace.
struct Shared {
  Counter tasks, rows;
  alignas(64) std::atomic<int> done{0};
};
static_assert(sizeof(Shared) <= 256, "as attention.h says");

// One thread's memory; Q: what is multiplied, with pairs of it in the place of an element (simd.h).
template <class Q>
struct Scratch {
  Q* q;               // [units][head_dim][kUnitLanes]
  float* o;           // [units][v_head_dim][kUnitLanes]
  float *top, *total; // [lanes] of online softmax
  int32_t *first, *end;  // [lanes] the keys that each sees
  Q *k, *v;           // [kBlockKeys][row_stride]
  float* s;           // [kBlockKeys][kUnitLanes]

  // Lay the arrays out in memory, all of them aligned to 64 bytes; returns how many floats that is.
  int64_t layout(float* memory, const AttentionArgs& args) {
    const int64_t n = num_lanes(args), stride = row_stride(args);
    int64_t used = 0;
    const auto take = [&](auto*& array, int64_t size) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory + used);
      used += round_up(size, 16);
    };
    take(q, n * args.head_dim);
    take(o, n * (args.v_head_dim + kPad));
    take(top, n);
    take(total, n);
    take(first, n);
    take(end, n);
    take(k, kBlockKeys * stride);
    take(v, kBlockKeys * stride + kPad);
    take(s, kBlockKeys * kUnitLanes);
    return used;
  }
};

// States: `o` normalised, and the base-2 logarithm of the sum of exponentials; o means nothing where that is -inf.
struct States {
  float* o;    // [slots, num_q_heads, v_head_dim]
  float* lse;  // [slots, num_q_heads]
};

// Sizes of the workspace's parts, in floats: what is shared, the states, and the threads' scratch.
struct Sizes {
  int64_t shared, o, lse, scratch;

  explicit Sizes(const AttentionArgs& args) {
    const int64_t num_states = args.schedule->num_slots * args.num_q_heads;
    shared = 256 / sizeof(float);
    o = round_up(num_states * args.v_head_dim, 16);
    lse = round_up(num_states, 16);
    scratch = Scratch<float>().layout(nullptr, args);  // pairs need no more
  }
};

// A block of a task's keys and values: where their rows are.
template <class T, int kKeys>
struct Block {
  const T *k[2 * kKeys], *v[2 * kKeys];
  int n;  // of this block

  // Those from `key` on; the ones of the next block are asked for already, or with `ahead` these.
  void find(const AttentionArgs& args, const AttentionTask& task, int64_t key, int64_t end, bool ahead = false) {
    const int both = int(std::min<int64_t>(ahead ? kKeys : 2 * kKeys, end - key));
    n = ahead ? 0 : std::min(both, kKeys);
    const int64_t* table = args.block_tables + task.sequence * args.table_width;
    const T* k_pages = static_cast<const T*>(args.k_pages);
    const T* v_pages = static_cast<const T*>(args.v_pages);
    int64_t i_page = key / args.page_size, offset = key % args.page_size;
    for (int i = 0; i < both; i++) {
      const int64_t row = (table[i_page] * args.page_size + offset) * args.num_kv_heads + task.kv_head;
      k[i] = k_pages + row * args.head_dim;
      v[i] = v_pages + row * args.v_head_dim;
      if (++offset == args.page_size) offset = 0, i_page++;
    }
    for (int i = n; i < both; i++) {
      const int heads = std::max(1, task.num_heads);
      for (int c = 0; c < heads * args.head_dim; c += 64 / sizeof(T)) __builtin_prefetch(k[i] + c);
      for (int c = 0; c < heads * args.v_head_dim; c += 64 / sizeof(T)) __builtin_prefetch(v[i] + c);
    }
  }
};

// A unit of queries against a block of keys.
template <int kVecs, int kStride, class Q>
void step(const AttentionArgs& args, const Scratch<Q>& b, int64_t unit, int64_t key, int n, bool masked) {
  const int64_t lane = unit * kUnitLanes;
  Vec decay[kVecs];
  Q* weights = reinterpret_cast<Q*>(b.s);
  multiply<kVecs, kStride>(b.q + lane * args.head_dim, b.k, args.head_dim, n, b.s);
  soften<kVecs>(b.s, weights, key, n, Scores(args.scale, args.soft_cap), masked ? b.first + lane : nullptr,
                b.end + lane, b.top + lane, b.total + lane, decay);
  accumulate<kVecs, kStride>(weights, b.v, args.v_head_dim, n, decay, b.o + lane * (args.v_head_dim + kPad));
}

// A task's queries, lane by lane.
struct Lanes {
  const AttentionArgs& args;
  const AttentionTask& task;
  int group = args.num_q_heads / args.num_kv_heads;
  int count = task.num_rows * group;
  int vecs = (count + kLanes - 1) / kLanes;

  int64_t row(int lane) const {
    const int64_t i = task.rows + lane / group;
    return task.shared ? args.shared_rows[i] : i;
  }
  int head(int lane) const { return task.kv_head * group + lane % group; }
  // Where a lane's elements are in `q` and `o`: the last unit may be one vector wide.
  int width(int lane) const { return lane / kUnitLanes * kUnit + 1 == vecs ? kLanes : kUnitLanes; }
};

template <class Q>
void spread(const Q* from, int n, int width, float* to) {
  if (width == 1) {  // known to be so, the loop becomes vectors
    for (int c = 0; c < n; c++) to[c] = to_float(from[c]);
  } else {
    for (int c = 0; c < n; c++) to[c * width] = to_float(from[c]);
  }
}
inline void spread(const bf16* from, int n, int width, bf16* to) {
  for (int c = 0; c < n; c += 2) std::memcpy(to + c * width, from + c, 2 * sizeof(bf16));
}

// to[c * width] = the elements of lane i's query, or the pairs of them.
template <class Q>
void load_query(const Lanes& lanes, int i, Q* to, int width) {
  const AttentionArgs& args = lanes.args;
  const int64_t at = lanes.row(i) * args.q_row_stride + lanes.head(i) * args.q_head_stride;
  if constexpr (kPerLane<Q> == 1) {
    if (args.q_dtype == kFloat32) return spread(static_cast<const float*>(args.q) + at, args.head_dim, width, to);
  }
  spread(static_cast<const bf16*>(args.q) + at, args.head_dim, width, to);
}

template <class Q>
void load_queries(const Lanes& lanes, const Scratch<Q>& b) {
  const AttentionArgs& args = lanes.args;
  for (int i = 0; i < lanes.vecs * kLanes; i++) {
    const int width = lanes.width(i);
    Q* to = b.q + i / kUnitLanes * kUnitLanes * args.head_dim + i % kUnitLanes * kPerLane<Q>;
    b.top[i] = -INFINITY;
    b.total[i] = 0;
    if (i >= lanes.count) {  // sees what the last one sees, and is never looked at
      load_query(lanes, lanes.count - 1, to, width);
      b.first[i] = b.first[i - 1];
      b.end[i] = b.end[i - 1];
      continue;
    }
    load_query(lanes, i, to, width);
    const int64_t position = args.positions[lanes.row(i)];
    const int64_t visible = args.window ? position - args.window + 1 : 0;
    b.first[i] = int32_t(std::max(lanes.task.first_key, visible));
    b.end[i] = int32_t(std::min(lanes.task.end_key, position + 1));
  }
  std::fill_n(b.o, round_up(lanes.count, kUnitLanes) * (args.v_head_dim + kPad), 0.0f);
}

template <class Q>
void write_row(Q* to, const float* from, int width, int n, float factor) {
  if (width == 1) {
    for (int c = 0; c < n; c++) store_one(to + c, from[c] * factor);
  } else {
    for (int c = 0; c < n; c++) store_one(to + c, from[c * width] * factor);
  }
}

// Write lane i's result; its columns are `width` apart.
void write(const Lanes& lanes, int i, float top, float total, const float* o, int width, const States& states) {
  const AttentionArgs& args = lanes.args;
  const int head = lanes.head(i), dim = args.v_head_dim;
  if (lanes.task.state >= 0) {
    const int64_t state = (lanes.task.state + i / lanes.group) * args.num_q_heads + head;
    states.lse[state] = total > 0 ? top + std::log2(total) : -INFINITY;
    return write_row(states.o + state * dim, o, width, dim, 1 / total);
  }
  float factor = 1;
  if (args.sinks) {
    const float sink = args.sinks[head] * kLog2e, highest = std::max(sink, top);
    factor = std::exp2(top - highest);
    total = total * factor + std::exp2(sink - highest);
  }
  const int64_t at = lanes.row(i) * args.out_row_stride + head * args.out_head_stride;
  if (args.q_dtype == kBFloat16) return write_row(static_cast<bf16*>(args.out) + at, o, width, dim, factor / total);
  write_row(static_cast<float*>(args.out) + at, o, width, dim, factor / total);
}

template <class KV, class Q, int kQueries>
void run_single_row(const AttentionArgs& args, const AttentionTask& task, const Scratch<Q>& b, const States& states) {
  using Row = SingleRow<KV, Q, kQueries>;
  AttentionTask of_head[kMaxTaskHeads];
  Row heads[kMaxTaskHeads];
  const Scores scores(args.scale, args.soft_cap);
  float products[kQueries][Row::kKeys];
  Q weights[kQueries][Row::kKeys];
  for (int h = 0; h < task.num_heads; h++) {
    of_head[h] = task;
    of_head[h].kv_head += h;
    Q* q = b.q + h * kQueries * args.head_dim;
    for (int i = 0; i < kQueries; i++) load_query({args, of_head[h]}, i, q + i * args.head_dim, 1);
    float* o = b.o + h * kQueries * args.v_head_dim;
    heads[h] = Row{args.head_dim, args.v_head_dim, q, o, products, weights, scores, {}, {}};
    heads[h].start();
  }
  Block<KV, Row::kKeys> block;
  const int64_t position = args.positions[Lanes{args, task}.row(0)], end = std::min(task.end_key, position + 1);
  int64_t key = task.first_key;
  if (args.window) key = std::max(key, position - args.window + 1);
  for (; key < end; key += block.n) {
    block.find(args, task, key, end);
    for (int i = block.n; i % kLanes; i++) block.k[i] = block.k[block.n - 1], block.v[i] = block.v[block.n - 1];
    for (int h = 0; h < task.num_heads; h++) {
      heads[h].step(block.k, h * args.head_dim, block.v, h * args.v_head_dim, block.n);
    }
  }
  for (int h = 0; h < task.num_heads; h++) {
    for (int i = 0; i < kQueries; i++) {
      write({args, of_head[h]}, i, heads[h].top[i], sum(heads[h].total[i]), heads[h].o + i * args.v_head_dim, 1, states);
    }
  }
}

template <class KV, class Q, int kQueries = kMaxRowQueries>
void run_single_row_of(const AttentionArgs& args, const AttentionTask& task, const Scratch<Q>& b,
                       const States& states) {
  if constexpr (kQueries > 0) {
    if (Lanes{args, task}.count == kQueries) return run_single_row<KV, Q, kQueries>(args, task, b, states);
    run_single_row_of<KV, Q, kQueries - 1>(args, task, b, states);
  }
}

template <class KV, int kStride, class Q>
void run_rows(const Lanes& lanes, const Scratch<Q>& b, const States& states) {
  const AttentionArgs& args = lanes.args;
  load_queries(lanes, b);
  const int padded = lanes.vecs * kLanes;
  const int64_t first = *std::min_element(b.first, b.first + padded), end = *std::max_element(b.end, b.end + padded);
  Block<KV, kBlockKeys> block;
  for (int64_t key = first; key < end; key += block.n) {
    block.find(args, lanes.task, key, end);
    copy_keys(block.k, block.n, args.head_dim, kStride, b.k);
    copy_values(block.v, block.n, args.v_head_dim, kStride, b.v);
    for (int lane = 0, unit = 0; lane < padded; lane += kUnitLanes, unit++) {
      const int width = std::min(kUnitLanes, padded - lane);
      const auto [first_min, first_max] = std::minmax_element(b.first + lane, b.first + lane + width);
      const auto [end_min, end_max] = std::minmax_element(b.end + lane, b.end + lane + width);
      if (key >= *end_max || key + block.n <= *first_min) continue;
      const bool masked = key < *first_max || key + block.n > *end_min;
      const int visible = int(std::min<int64_t>(block.n, *end_max - key));
      if (width == kUnitLanes) {
        step<kUnit, kStride>(args, b, unit, key, visible, masked);
      } else {
        step<1, kStride>(args, b, unit, key, visible, masked);
      }
    }
  }
  for (int i = 0; i < lanes.count; i++) {
    const float* o = b.o + i / kUnitLanes * kUnitLanes * (args.v_head_dim + kPad) + i % kUnitLanes;
    write(lanes, i, b.top[i], b.total[i], o, lanes.width(i), states);
  }
}

// Ask for the first keys and values of a task that someone will soon take: short ones are over before memory answers.
template <class KV>
void prefetch(const AttentionArgs& args, const AttentionTask& task) {
  Block<KV, kBlockKeys> block;
  block.find(args, task, task.first_key, task.end_key, true);
}

template <class KV, class Q>
void run_task(const AttentionArgs& args, const AttentionTask& task, const Scratch<Q>& b, const States& states) {
  if (task.num_heads) return run_single_row_of<KV>(args, task, b, states);
  const Lanes lanes{args, task};
  switch (row_stride(args)) {
    case 64: return run_rows<KV, 64>(lanes, b, states);
    case 128: return run_rows<KV, 128>(lanes, b, states);
    default: return run_rows<KV, 256>(lanes, b, states);
  }
}

// out[row] := the merge of the row's states, the sink as one more key without a value.
void merge_row(const AttentionArgs& args, int64_t row, const States& states, float* o) {
  const AttentionSchedule& schedule = *args.schedule;
  const int64_t begin = schedule.row_starts[row], end = schedule.row_starts[row + 1];
  if (begin == end) return;
  for (int head = 0; head < args.num_q_heads; head++) {
    float top = args.sinks ? args.sinks[head] * kLog2e : -INFINITY;
    for (int64_t i = begin; i < end; i++) top = std::max(top, states.lse[schedule.slots[i] * args.num_q_heads + head]);
    float total = args.sinks ? std::exp2(args.sinks[head] * kLog2e - top) : 0.0f;
    std::fill_n(o, args.v_head_dim, 0.0f);
    for (int64_t i = begin; i < end; i++) {
      const int64_t state = schedule.slots[i] * args.num_q_heads + head;
      const float weight = std::exp2(states.lse[state] - top);
      if (weight == 0) continue;  // and its `o` may be NaN
      total += weight;
      const float* from = states.o + state * args.v_head_dim;
      for (int c = 0; c < args.v_head_dim; c++) o[c] += weight * from[c];
    }
    const int64_t at = row * args.out_row_stride + head * args.out_head_stride;
    if (args.q_dtype == kBFloat16) {
      write_row(static_cast<bf16*>(args.out) + at, o, 1, args.v_head_dim, 1 / total);
    } else {
      write_row(static_cast<float*>(args.out) + at, o, 1, args.v_head_dim, 1 / total);
    }
  }
}

}  // namespace

int64_t task_rows(const AttentionArgs& args) {
  const int64_t lanes = std::clamp<int64_t>(32768 / (args.head_dim + args.v_head_dim), 2 * kUnitLanes, 256);
  return std::max<int64_t>(1, lanes / (args.num_q_heads / args.num_kv_heads));
}

bool multiplies_pairs(const AttentionArgs& args) {
  const bool whole_vectors = args.head_dim % (2 * kLanes) == 0 && args.v_head_dim % (2 * kLanes) == 0;
  return kPairProducts && args.q_dtype == kBFloat16 && args.kv_dtype == kBFloat16 && whole_vectors;
}

int64_t task_heads(const AttentionArgs& args, int64_t num_rows, bool shared) {
  const int64_t queries = num_rows * (args.num_q_heads / args.num_kv_heads), dims = args.head_dim + args.v_head_dim;
  const bool alike = num_rows == 1 || (shared && !args.window);  // all see the same keys
  const bool whole_vectors = args.head_dim % kLanes == 0 && args.v_head_dim % kLanes == 0;
  if (!alike || queries > kMaxRowQueries || !whole_vectors) return 0;
  const int64_t most = std::min<int64_t>({args.num_kv_heads, kMaxTaskHeads, num_lanes(args) / queries});
  return std::clamp<int64_t>(kTaskBlockBytes / (32 * 2 * dims), 1, most);
}

int64_t attention_workspace(const AttentionArgs& args, int num_threads) {
  const Sizes sizes(args);
  return sizeof(float) * (sizes.shared + sizes.o + sizes.lse + num_threads * sizes.scratch);
}

template <class KV, class Q>
void run_tasks(const AttentionArgs& args, const Team& team, float* memory, Counter& counter, const States& states) {
  const AttentionSchedule& schedule = *args.schedule;
  Scratch<Q> scratch;
  scratch.layout(memory, args);
  const int64_t num_tasks = int64_t(schedule.tasks.size());
  for (int64_t i = counter.next(); i < num_tasks; i = counter.next()) {
    if (i + team.num_threads < num_tasks) prefetch<KV>(args, schedule.tasks[i + team.num_threads]);
    run_task<KV>(args, schedule.tasks[i], scratch, states);
  }
}

void attend(const AttentionArgs& args, const Team& team) {
  const AttentionSchedule& schedule = *args.schedule;
  const Sizes sizes(args);
  Shared& shared = *static_cast<Shared*>(args.workspace);
  float* memory = static_cast<float*>(args.workspace) + sizes.shared;
  const States states{memory, memory + sizes.o};
  float* scratch = memory + sizes.o + sizes.lse + team.thread * sizes.scratch;

  const auto run = multiplies_pairs(args)        ? run_tasks<bf16, bf16>
                   : args.kv_dtype == kBFloat16 ? run_tasks<bf16, float>
                                                : run_tasks<float, float>;
  run(args, team, scratch, shared.tasks, states);
  if (schedule.num_slots) {
    team.barrier->wait();
    for (int64_t row = shared.rows.next(); row < args.num_tokens; row = shared.rows.next()) {
      merge_row(args, row, states, scratch);
    }
  }
  // The last to leave makes the counters ready: nobody looks at them any more, and the next use is after a meeting.
  if (shared.done.fetch_add(1, std::memory_order_acq_rel) + 1 == team.num_threads) {
    shared.tasks.reset();
    shared.rows.reset();
    shared.done.store(0, std::memory_order_relaxed);
  }
}

}  // namespace macaw

#define MACAW_EXPORT extern "C" __attribute__((visibility("default")))

MACAW_EXPORT macaw::AttentionSchedule* macaw_attention_schedule(const macaw::AttentionArgs* args, int num_threads) {
  return new macaw::AttentionSchedule(macaw::make_schedule(*args, num_threads));
}

MACAW_EXPORT void macaw_attention_schedule_free(macaw::AttentionSchedule* schedule) { delete schedule; }

MACAW_EXPORT int64_t macaw_attention_workspace(const macaw::AttentionArgs* args, int num_threads) {
  return macaw::attention_workspace(*args, num_threads);
}

MACAW_EXPORT void macaw_attend(const macaw::AttentionArgs* args, int num_threads) {
  macaw::run_team(num_threads, [&](const macaw::Team& team) { macaw::attend(*args, team); });
}
