// Two-phase attention over paged keys and values; see attention.cpp.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace macaw {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// One layer's attention. Rows are the step's tokens; see `macaw_kernels.AttentionPlan` for the arrays of the plan.
struct AttentionArgs {
  // The layer.
  const void* q;        // [num_tokens, num_q_heads, head_dim]
  const void* k_pages;  // [num_pages, page_size, num_kv_heads, head_dim]
  const void* v_pages;  // [num_pages, page_size, num_kv_heads, v_head_dim]
  void* out;            // [num_tokens, num_q_heads, v_head_dim]
  const float* sinks;   // [num_q_heads] or null
  float scale;
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
  // Memory that one step needs, `attention_workspace` bytes, aligned to 64.
  void* workspace;
};

int64_t attention_workspace(const AttentionArgs& args, int num_threads);

// Called by all threads of a team, which meet in it; the last meeting is left to the caller.
void attend(const AttentionArgs& args, const Team& team);

}  // namespace macaw
