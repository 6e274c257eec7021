#include <torch/csrc/stable/library.h>

#include "registration.h"
#include "torch_binding.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, m) {
  m.def("fwd(" PROBLEM ") -> (Tensor out, Tensor lse)");
  m.def("bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " PROBLEM
        ") -> (Tensor dq, Tensor dk, Tensor dv)");
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
