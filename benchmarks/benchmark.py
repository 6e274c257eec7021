"""The Hub's benchmark: `kernels benchmark .` here, or with the repository's name."""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class DenseBenchmark(Benchmark):
    """flash_attn_func, verified against SDPA's math backend."""

    seed = 42

    def prepare(self, batch, seqlen, nheads, nheads_k, head_dim, causal):
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self.causal = causal
        self.q = torch.randn(batch, seqlen, nheads, head_dim, device=self.device, dtype=dtype)
        self.k, self.v = (
            torch.randn(batch, seqlen, nheads_k, head_dim, device=self.device, dtype=dtype)
            for _ in range(2)
        )

    def run(self):
        self.out = self.kernel.flash_attn_func(self.q, self.k, self.v, causal=self.causal)

    def reference(self) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2).float() for t in (self.q, self.k, self.v))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return out.transpose(1, 2).to(self.q.dtype)

    def setup_small(self):
        self.prepare(2, 128, 8, 8, 64, causal=False)

    def setup_causal(self):
        self.prepare(4, 512, 8, 8, 64, causal=True)

    def setup_gqa(self):
        self.prepare(2, 1024, 16, 4, 128, causal=True)

    benchmark_small = benchmark_causal = benchmark_gqa = run
    verify_small = verify_causal = verify_gqa = reference


class VarlenBenchmark(Benchmark):
    """flash_attn_varlen_func on sequences of unlike lengths."""

    seed = 42
    LENGTHS = (17, 300, 64, 511, 128)

    def setup_varlen(self):
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self.q, self.k, self.v = (
            torch.randn(sum(self.LENGTHS), 8, 64, device=self.device, dtype=dtype) for _ in range(3)
        )
        ends = torch.tensor([0, *self.LENGTHS]).cumsum(0)
        self.cu_seqlens = ends.to(self.device, torch.int32)

    def benchmark_varlen(self):
        cu, longest = self.cu_seqlens, max(self.LENGTHS)
        self.out = self.kernel.flash_attn_varlen_func(
            self.q, self.k, self.v, cu, cu, longest, longest, causal=True
        )

    def verify_varlen(self) -> torch.Tensor:
        parts = []
        for q, k, v in zip(*(t.float().split(self.LENGTHS) for t in (self.q, self.k, self.v))):
            heads_first = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True)
            parts.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(parts).to(self.q.dtype)
