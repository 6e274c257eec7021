"""Ten lines: load the package, attend, differentiate."""

import torch
from kernels import get_kernel

flash_attention = get_kernel("org/flash-attention", version=1)
device = "cuda" if torch.cuda.is_available() else "cpu"
q = torch.randn(2, 1024, 8, 64, device=device, dtype=torch.float16, requires_grad=True)
k, v = (torch.randn(2, 1024, 2, 64, device=device, dtype=torch.float16) for _ in "kv")
out = flash_attention.flash_attn_func(q, k, v, causal=True)  # 8 query heads on 2 KV heads
out.sum().backward()
print(out.shape, q.grad.norm())
