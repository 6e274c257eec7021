#include <torch/csrc/stable/library.h>

#include "registration.h"
#include "torch_binding.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, m) {
  m.def("fwd(" PROBLEM ") -> (Tensor out, Tensor lse)");
  // The gradients of q, k, v (pack 1), of q, kv (pack 2) or of qkv (pack 3), then of those of
  // attn_bias, alibi_slopes, s_aux that are wanted.
  m.def("bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, int pack, bool[3] wanted, " PROBLEM
        ") -> Tensor[]");
  // New keys and values into a cache, in place; -> the lengths then, and q turned (or nothing).
  m.def("append(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor? cos, Tensor? sin, Tensor? cu_seqlens, Tensor cache_seqlens, Tensor? block_table, "
        "Tensor? cache_batch_idx, bool interleaved, bool turn_each) -> (Tensor seqused, Tensor q)");
  // Partial results [splits, ...] merged by their lse.
  m.def("combine(Tensor out_partial, Tensor lse_partial, ScalarType dtype) -> "
        "(Tensor out, Tensor lse)");
  // Rotary embedding; offsets (batch,) int32 and offset: the first positions. rotary_ is in place.
  m.def("rotary(Tensor x, " ROTARY ") -> Tensor");
  m.def("rotary_(Tensor(a!) x, " ROTARY ") -> ()");
  m.def("probs(Tensor lse, SymInt rows, SymInt cols, " PROBLEM ") -> Tensor");
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
