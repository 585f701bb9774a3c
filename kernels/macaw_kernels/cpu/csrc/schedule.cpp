// From a plan to tasks that threads take one after the other.

#include <algorithm>
#include <numeric>

#include "attention.h"
#include "simd.h"

namespace macaw {

namespace {

constexpr int64_t kTasksPerThread = 3;  // the threads of a step end at about the same time
constexpr int64_t kMinRowLanes = 64;    // queries of a task: fewer do not pay for converting keys and values
constexpr int64_t kMinSplitKeys = 192;  // keys of a task: fewer do not pay for another state

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows that attend one range of keys: a shared item, or a sequence's own keys.
struct Item {
  int64_t rows, num_rows, first_key, end_key;
  int32_t sequence, shared;

  int64_t lanes(int64_t group) const { return div_up(num_rows * group, kLanes) * kLanes; }
  int64_t num_keys() const { return end_key - first_key; }
};

// What no row's window shows is left out.
Item clip(Item item, const AttentionArgs& args) {
  if (!args.window) return item;
  const int64_t* rows = args.shared_rows + item.rows;
  int64_t first = INT64_MAX;
  for (int64_t i = 0; i < item.num_rows; i++) {
    first = std::min(first, args.positions[item.shared ? rows[i] : item.rows + i]);
  }
  item.first_key = std::min(item.end_key, std::max(item.first_key, first - args.window + 1));
  return item;
}

std::vector<Item> items_of(const AttentionArgs& args) {
  std::vector<Item> items;
  for (int64_t i = 0; i < args.num_shared; i++) {
    const int64_t rows = args.shared_row_starts[i], start = args.shared_start[i];
    items.push_back(clip({rows, args.shared_row_starts[i + 1] - rows, start, start + args.shared_len[i],
                          int32_t(args.shared_table[i]), 1}, args));
  }
  for (int64_t i = 0; i < args.batch; i++) {
    const int64_t rows = args.query_starts[i];
    items.push_back(clip({rows, args.query_starts[i + 1] - rows, args.own_starts[i], args.context_lens[i],
                          int32_t(i), 0}, args));
  }
  return items;
}

}  // namespace

AttentionSchedule make_schedule(const AttentionArgs& args, int num_threads) {
  const int64_t group = args.num_q_heads / args.num_kv_heads, max_rows = task_rows(args);
  const std::vector<Item> items = items_of(args);
  int64_t total = 0;
  for (const Item& item : items) total += item.lanes(group) * item.num_keys() * args.num_kv_heads;
  const int64_t target = std::max<int64_t>(1, total / (kTasksPerThread * num_threads));

  AttentionSchedule schedule;
  std::vector<int64_t> num_states(args.num_tokens + 1, 0);
  std::vector<std::pair<int64_t, int64_t>> states;  // (row, slot)
  for (int64_t i = 0; i < args.num_shared; i++) {
    if (!items[i].num_keys()) continue;
    for (int64_t j = 0; j < items[i].num_rows; j++) num_states[args.shared_rows[items[i].rows + j] + 1]++;
  }
  for (const Item& item : items) {
    const int64_t keys = item.num_keys();
    if (!keys || !item.num_rows) continue;
    // Rows are divided first: that makes no states.
    int64_t rows = max_rows;
    if (num_threads > 1) rows = std::clamp<int64_t>(std::max(kMinRowLanes, target / keys) / group, 1, max_rows);
    const int64_t blocks = div_up(item.num_rows, rows);
    rows = div_up(item.num_rows, blocks);
    const int64_t together = task_heads(args, rows, item.shared), heads = std::max<int64_t>(1, together);
    int64_t splits = 1;
    if (num_threads > 1) {
      const int64_t cost = div_up(rows * group, kLanes) * kLanes * keys * heads;
      splits = std::clamp<int64_t>((cost + target / 2) / target, 1, std::max<int64_t>(1, keys / kMinSplitKeys));
      if (splits > num_threads) splits -= splits % num_threads;
    }
    const bool direct = !item.shared && splits == 1 && !num_states[item.rows + 1];
    for (int64_t split = 0; split < splits; split++) {
      const int64_t first = item.first_key + keys * split / splits, end = item.first_key + keys * (split + 1) / splits;
      for (int64_t row = 0; row < item.num_rows; row += rows) {
        const int64_t n = std::min(rows, item.num_rows - row);
        for (int64_t head = 0; head < args.num_kv_heads; head += heads) {
          const int64_t count = together ? std::min(heads, args.num_kv_heads - head) : 0;
          schedule.tasks.push_back({item.rows + row, first, end, direct ? -1 : schedule.num_slots + row, int32_t(n),
                                    item.sequence, int32_t(head), item.shared, int32_t(count)});
        }
      }
      if (direct) continue;
      for (int64_t row = 0; row < item.num_rows; row++) {
        states.push_back({item.shared ? args.shared_rows[item.rows + row] : item.rows + row, schedule.num_slots + row});
      }
      schedule.num_slots += item.num_rows;
    }
  }
  std::stable_sort(schedule.tasks.begin(), schedule.tasks.end(), [&](const AttentionTask& a, const AttentionTask& b) {
    return a.num_rows * (a.end_key - a.first_key) > b.num_rows * (b.end_key - b.first_key);
  });

  schedule.row_starts.assign(args.num_tokens + 1, 0);
  for (const auto& [row, slot] : states) schedule.row_starts[row + 1]++;
  std::partial_sum(schedule.row_starts.begin(), schedule.row_starts.end(), schedule.row_starts.begin());
  std::vector<int64_t> next(schedule.row_starts.begin(), schedule.row_starts.end() - 1);
  schedule.slots.resize(states.size());
  for (const auto& [row, slot] : states) schedule.slots[next[row]++] = slot;
  return schedule;
}

}  // namespace macaw
