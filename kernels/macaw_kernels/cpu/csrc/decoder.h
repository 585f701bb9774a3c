// A whole decoder-only transformer, one step in one call: embedding to logits, every layer's K/V into its pages.
//
// Covers the Llama shape and its relatives: RMS or layer norms before (and, for Gemma, after) attention and MLP, grouped
// heads, biases, norms of queries and keys, rotary embeddings by halves (whole or partial), gated or plain MLPs.
// Activations are float32; what goes into matrices and attention is rounded to bfloat16 where weights are that and
// the processor multiplies pairs of them.
#pragma once

#include "attention.h"
#include "linear.h"

namespace macaw {

enum Activation : int32_t { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

struct Norm {
  const float* weight;  // null: there is no such norm
  const float* bias;    // or null
};

struct Layer {
  PackedMatrix qkv;            // queries, keys, values one below the other
  PackedMatrix o, gate, up, down;  // gate.n == 0: the MLP is down(act(up(x)))
  Norm input_norm, post_attention_norm, mlp_norm, post_mlp_norm;  // the `post` ones go before the residual
  const float* q_norm;         // [head_dim], or [num_q_heads * head_dim] with qk_norm_whole; or null
  const float* k_norm;
  const float* sinks;          // [num_q_heads] or null
  void* k_pages;               // [num_pages, page_size, num_kv_heads, head_dim] of kv_dtype
  void* v_pages;
  float scale;                 // of the scores
  float soft_cap;              // 0: none
  int32_t rope;                // which table, -1: none
  int32_t kind;                // which of Step::attention, they differ in the window
};

struct Decoder {
  int64_t num_layers, hidden, intermediate, vocab;
  int32_t num_q_heads, num_kv_heads, head_dim, page_size;
  int32_t kv_dtype, embedding_dtype;
  int32_t layer_norm;          // 0: RMS norms
  int32_t qk_norm_whole;       // norms of queries and keys over all heads at once
  int32_t activation;
  int32_t rope_dim;            // leading elements of a head that are rotated
  float eps, embedding_scale, residual_scale, logit_scale, logit_soft_cap, reserved;
  const void* embedding;       // [vocab, hidden]
  const float* rope_cos[2];    // [max_model_len, rope_dim / 2]
  const float* rope_sin[2];
  Norm final_norm;
  PackedMatrix lm_head;
  const Layer* layers;
};

// Parts of a step, for those who want to know where its time goes.
enum Phase : int32_t { kRows, kQkv, kRotate, kAttend, kOutput, kInner, kDown, kLogits, kNumPhases };

struct Step {
  AttentionArgs attention[2];  // for each kind of layer: the plan's part, the heads and the window
  int64_t num_tokens;
  const int64_t* token_ids;    // [num_tokens]
  const int64_t* slots;        // [num_tokens]
  const int64_t* rows;         // [num_rows] tokens whose logits are wanted
  int64_t num_rows;
  float* logits;               // [num_rows, vocab]
  void* workspace;             // `macaw_decoder_workspace` bytes, aligned to 64
  int64_t attention_workspace; // of them for attention
  double* phase_s;             // [kNumPhases] seconds are added to; or null
};

}  // namespace macaw
