#include <torch/csrc/stable/library.h>

#include "registration.h"
#include "torch_binding.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, m) {
  m.def("fwd(" PROBLEM ") -> (Tensor out, Tensor lse)");
  // The gradients of q, k, v (pack 1), of q, kv (pack 2) or of qkv (pack 3), then of those of
  // attn_bias, alibi_slopes, s_aux that are wanted.
  m.def("bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, int pack, bool[3] wanted, " PROBLEM
        ") -> Tensor[]");
  // Rotary embedding; offsets (batch,) int32 and offset: the first positions. rotary_ is in place.
  m.def("rotary(Tensor x, " ROTARY ") -> Tensor");
  m.def("rotary_(Tensor(a!) x, " ROTARY ") -> ()");
  m.def("probs(Tensor lse, SymInt max_seqlen_q, SymInt max_seqlen_k, " PROBLEM ") -> Tensor");
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
