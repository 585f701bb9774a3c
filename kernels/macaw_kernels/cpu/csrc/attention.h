// Two-phase attention over paged keys and values; see attention.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"

namespace macaw {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// A block of query rows with one KV head against a range of keys. Empty ranges are allowed.
struct AttentionTask {
  int64_t rows;                // own: the first row; shared: index of the first into `shared_rows`
  int64_t first_key, end_key;  // positions
  int64_t state;               // slot of the first row's attention state, or -1: the rows go straight to `out`
  int32_t num_rows, sequence, kv_head, shared;
  int32_t num_heads;           // KV heads from `kv_head` on, of `task_heads`; 0: one, and more queries than that is for
};

// Which tasks a plan comes to, the long ones first, and which states make up a row. The same for all layers.
struct AttentionSchedule {
  std::vector<AttentionTask> tasks;
  std::vector<int64_t> row_starts;  // [num_tokens + 1] into slots; a row without any is written by its task
  std::vector<int64_t> slots;
  int64_t num_slots = 0;
};

// One layer's attention. Rows are the step's tokens; see `macaw_kernels.AttentionPlan` for the arrays of the plan.
struct AttentionArgs {
  // The layer.
  const void* q;        // [num_tokens, num_q_heads, head_dim]
  const void* k_pages;  // [num_pages, page_size, num_kv_heads, head_dim]
  const void* v_pages;  // [num_pages, page_size, num_kv_heads, v_head_dim]
  void* out;            // [num_tokens, num_q_heads, v_head_dim]
  int64_t q_row_stride, q_head_stride;      // in elements; the last axis is dense
  int64_t out_row_stride, out_head_stride;
  const float* sinks;   // [num_q_heads] or null
  float scale;          // positive
  float soft_cap;       // 0: none
  int64_t window;       // 0: none
  int32_t q_dtype;      // of q and out
  int32_t kv_dtype;
  int32_t num_q_heads, num_kv_heads, head_dim, v_head_dim, page_size;
  // The plan.
  int64_t num_tokens, batch, table_width, num_shared;
  const int64_t* positions;     // [num_tokens]
  const int64_t* block_tables;  // [batch, table_width]
  const int64_t* query_starts;  // [batch + 1]
  const int64_t* context_lens;  // [batch]
  const int64_t* own_starts;    // [batch]
  const int64_t* shared_table;  // [num_shared] whose block table holds the pages
  const int64_t* shared_start;  // [num_shared] position of the first key
  const int64_t* shared_len;    // [num_shared] number of keys
  const int64_t* shared_row_starts;  // [num_shared + 1] into shared_rows
  const int64_t* shared_rows;        // ascending within an item
  const AttentionSchedule* schedule;
  // `attention_workspace` bytes, aligned to 64; the first 256 must be 0 before the first use, and are after each.
  void* workspace;
};

// Whether products are of pairs of bfloat16: depends on dtypes, dims and processor.
bool multiplies_pairs(const AttentionArgs& args);

// The most rows that one task takes.
int64_t task_rows(const AttentionArgs& args);

// KV heads that one task takes of rows with few queries: their keys lie side by side, and reading them head by head
// would wait for memory at every one. 0 if there are too many queries, or they see different keys.
int64_t task_heads(const AttentionArgs& args, int64_t num_rows, bool shared);

// What the layers of a step have in common, from the plan's part of the arguments, their heads and dims and the
// window. Any number of threads may run it; for `num_threads` the work is divided evenly.
AttentionSchedule make_schedule(const AttentionArgs& args, int num_threads);

// Bytes: one float32 state (v_head_dim + 1 per query head) for each row of a shared item, for each row of a sequence
// that has shared items or whose keys are split; and below 1 MiB per thread at head dims up to 256.
int64_t attention_workspace(const AttentionArgs& args, int num_threads);

// Called by all threads of a team, which may meet in it once; the last meeting is left to the caller.
void attend(const AttentionArgs& args, const Team& team);

}  // namespace macaw
