#pragma once

// Operator schemas, shared by every backend. The implementations are Python (ops.py), so this
// extension needs nothing of CUDA, ROCm or XPU. PROBLEM names the fields of AttentionProblem
// (problem.py) in their order; a test holds the two equal.
#define PROBLEM               \
  "Tensor q, Tensor k, Tensor v, " \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, " \
  "float softmax_scale, bool causal"
