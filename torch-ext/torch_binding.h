#pragma once

// Operator schemas, shared by every backend. The implementations are Python (ops.py), so this
// extension needs nothing of CUDA, ROCm or XPU. PROBLEM names the fields of AttentionProblem
// (problem.py) in their order; a test holds the two equal.
#define PROBLEM                                                                  \
  "Tensor q, Tensor k, Tensor v, "                                               \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "                                 \
  "Tensor? seqused_q, Tensor? seqused_k, Tensor? leftpad_k, "                    \
  "Tensor? block_table, Tensor? cache_batch_idx, "                               \
  "Tensor? attn_bias, Tensor? alibi_slopes, Tensor? s_aux, Tensor? rng_state, "  \
  "Tensor? descale, "                                                            \
  "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, "  \
  "bool top_left, float softcap, float dropout_p, "                              \
  "SymInt num_splits, bool batch_invariant, bool deterministic, SymInt max_seqlen_q"

#define ROTARY                                                                             \
  "Tensor cos, Tensor sin, Tensor? cu_seqlens, Tensor? offsets, SymInt offset, "           \
  "bool interleaved, bool conjugate"
