"""Training parity: a small GPT on Python's own sources, with our attention and with SDPA's.

    python benchmarks/train.py --csv benchmarks/results/FILE.csv [--figure FILE.png]

6 layers, d 384, 6 heads, bytes of the standard library, bfloat16 autocast, one seed: the same
weights and batches for each attention. SDPA's math in float32 is the reference; its flash and
cuDNN kernels stand beside ours for speed. Prints the mean loss of the last 50 steps and tokens per
second.
"""

import argparse
import csv
import math
import random
import sysconfig
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from peers import load_kernel
from run import environment
from tabulate import tabulate
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LAYERS, DIM, HEADS = 6, 384, 6


def ours(kernel, q, k, v):
    return kernel.flash_attn_func(q, k, v, causal=True)


def sdpa(backend, dtype, q, k, v):
    heads_first = (t.transpose(1, 2).to(dtype) for t in (q, k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True)
    return out.transpose(1, 2).to(q.dtype)


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.proj = nn.Linear(DIM, DIM, bias=False)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x):
        batch, seqlen, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, seqlen, 3, HEADS, DIM // HEADS)
        x = x + self.proj(self.attention(*qkv.unbind(2)).reshape(batch, seqlen, DIM))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, attention, seqlen):
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, DIM), nn.Embedding(seqlen, DIM)
        self.blocks = nn.ModuleList(Block(attention) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def corpus() -> torch.Tensor:
    """The standard library's sources, in an order of our own."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    return torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in paths)), dtype=torch.uint8)


def train(attention, text, args, device):
    """-> (losses, tokens per second, of the second half of the steps)"""
    torch.manual_seed(0)
    model = GPT(attention, args.seqlen).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for step in range(args.steps):
        if step == args.steps // 2:
            torch.cuda.synchronize()
            start = perf_counter()
        rate = min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        first = torch.randint(len(text) - args.seqlen - 1, (args.batch,), generator=draw)
        rows = first[:, None] + torch.arange(args.seqlen + 1)
        tokens = text[rows.to(device)].long()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    torch.cuda.synchronize()
    rate = (args.steps - args.steps // 2) * args.batch * args.seqlen / (perf_counter() - start)
    return torch.stack(losses).tolist(), rate


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--csv", type=Path, help="write the losses here")
    parser.add_argument("--figure", type=Path, help="draw them here")
    args = parser.parse_args()
    device = torch.device("cuda")
    text = corpus().to(device)
    attentions = {
        "math, float32": partial(sdpa, SDPBackend.MATH, torch.float32),
        "ours": partial(ours, load_kernel()),
        "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION, torch.bfloat16),
        "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION, torch.bfloat16),
    }
    losses, rows = {}, []
    for name, attention in attentions.items():
        losses[name], rate = train(attention, text, args, device)
        last = sum(losses[name][-50:]) / 50
        against = last / (sum(losses["math, float32"][-50:]) / 50) - 1
        rows.append((name, f"{last:.4f}", f"{100 * against:+.2f} %", f"{rate:,.0f}"))
    print(", ".join(f"{k} {v}" for k, v in environment(device).items()))
    print(tabulate(rows, ("attention", "loss", "against math", "tokens/s")))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("step", *losses))
            writer.writerows(zip(range(args.steps), *losses.values()))
    if args.figure:
        draw_losses(losses, args.figure)


def draw_losses(losses, path):
    import matplotlib.pyplot as plt

    for name, values in losses.items():
        plt.plot(values, label=name, linewidth=0.8)
    plt.yscale("log")
    plt.xlabel("step")
    plt.ylabel("loss, nats per byte")
    plt.legend()
    plt.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
