"""Whatever a user can do wrong raises at the API and names the argument."""

import pytest
import torch
from cases import BY_NAME, make


def tensors(device, **changes):
    q, k, v, *_ = make(BY_NAME["gqa"], torch.float16, device)  # [2, 90, 6, 32], [2, 110, 2, 32]
    return {"q": q, "k": k, "v": v, **changes}


def zeros(*shape, dtype=torch.float16):
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


Q = (2, 9, 6, 32)
DENSE = [  # what changes, the exception, what its message says
    ("k dtype", {"k": zeros(2, 110, 2, 32, dtype=torch.float)}, TypeError, "one dtype.*float32"),
    ("q float64", {"q": zeros(*Q, dtype=torch.double)}, TypeError, "q must.*float64"),
    ("q int", {"q": zeros(*Q, dtype=torch.int)}, TypeError, "q must.*int32"),
    ("q complex", {"q": zeros(*Q, dtype=torch.cfloat)}, TypeError, "q must.*complex64"),
    ("q list", {"q": lambda d: [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
    ("q rank", {"q": zeros(90, 6, 32)}, ValueError, r"q must be 4-dimensional.*\(90, 6, 32\)"),
    ("batch", {"q": zeros(3, 90, 6, 32)}, ValueError, "k must have q's batch size 3, got 2"),
    ("heads", {"q": zeros(2, 90, 5, 32)}, ValueError, "multiple of k's, got 5 and 2"),
    ("no heads", {"q": zeros(2, 90, 0, 32)}, ValueError, "heads.*got 0 and 2"),
    ("head_dim", {"q": zeros(2, 90, 6, 48)}, ValueError, "k must have q's head_dim 48, got 32"),
    ("k, v lengths", {"v": zeros(2, 99, 2, 32)}, ValueError, "k and v must agree"),
    ("head_dim_v 0", {"v": zeros(2, 110, 2, 0)}, ValueError, "v's head_dim must.*got 0"),
    ("head_dim_v", {"v": zeros(2, 110, 2, 513)}, ValueError, "v's head_dim must.*512, got 513"),
    ("fp8", {"q": zeros(*Q, dtype=torch.float8_e5m2)}, NotImplementedError, "float8.*bfloat16"),
    ("fp8 q alone", {"q": zeros(*Q, dtype=torch.float8_e4m3fn)}, TypeError, "one dtype.*float8"),
    ("k on meta", {"k": lambda d: zeros(2, 110, 2, 32)("meta")}, ValueError, "one device.*meta"),
]


@pytest.mark.kernels_ci
@pytest.mark.parametrize(
    "changes, error, match", [row[1:] for row in DENSE], ids=[r[0] for r in DENSE]
)
def test_dense(kernel, device, changes, error, match):
    inputs = tensors(device, **{name: make_one(device) for name, make_one in changes.items()})
    with pytest.raises(error, match=match):
        kernel.flash_attn_func(**inputs)


OPTIONS = [  # tensors are made on the inputs' device
    ({"dropout_p": 1.0}, ValueError, "dropout_p.*got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p.*got -0.1"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p.*got nan"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number, got str"),
    ({"window_size": (1, 2, 3)}, ValueError, "window_size"),
    ({"window_size": 8}, ValueError, "window_size must be .left, right., got 8"),
    ({"window_size": (1.5, 2)}, TypeError, "window_size must be two integers"),
    ({"softcap": -1.0}, ValueError, "softcap.*got -1.0"),
    ({"softcap": float("inf")}, ValueError, "softcap.*finite, got inf"),
    ({"alibi_slopes": torch.ones(5)}, ValueError, r"alibi_slopes.*\(6,\) or \(2, 6\), got \(5,\)"),
    ({"alibi_slopes": torch.ones(3, 6)}, ValueError, "alibi_slopes.*got .3, 6."),
    ({"alibi_slopes": torch.ones(6).half()}, TypeError, "alibi_slopes.*float32, got.*float16"),
    ({"alibi_slopes": [1.0] * 6}, TypeError, "alibi_slopes must be a tensor, got list"),
    ({"alibi_slopes": torch.ones(6, device="meta")}, ValueError, "alibi_slopes.*device.*meta"),
    ({"s_aux": torch.ones(2)}, ValueError, "s_aux must have shape.*6.*got .2,."),
    ({"learnable_sink": torch.ones(6).int()}, TypeError, "learnable_sink.*int32"),
    ({"s_aux": torch.ones(6), "learnable_sink": torch.ones(6)}, ValueError, "one argument"),
    ({"attn_bias": torch.ones(90, 100)}, ValueError, r"attn_bias.*\[2, 6, 90, 110\].*\(90, 100\)"),
    ({"attn_bias": torch.ones(1, 2, 6, 90, 110)}, ValueError, "attn_bias must be broadcastable"),
    ({"attn_bias": torch.ones(90, 110).int()}, TypeError, "attn_bias.*boolean, got torch.int32"),
    ({"attn_bias": torch.ones(90, 110, device="meta")}, ValueError, "attn_bias.*device.*meta"),
    ({"causal_alignment": "top"}, ValueError, "causal_alignment must be one of.*got top"),
    ({"q_descale": torch.ones(1)}, ValueError, "q_descale is for float8.*float16"),
    ({"v_descale": torch.ones(1)}, ValueError, "v_descale is for float8.*float16"),
    ({"softmax_scale": "0.1"}, TypeError, "softmax_scale.*str"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite"),
    ({"softmax_scale": torch.ones(2)}, ValueError, "softmax_scale must be one number"),
]


@pytest.mark.parametrize("options, error, match", OPTIONS, ids=[str(row[0]) for row in OPTIONS])
def test_options(kernel, device, options, error, match):
    options = {
        name: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in options.items()
    }
    with pytest.raises(error, match=match):
        kernel.flash_attn_func(**tensors(device), **options)


NEUTRAL = (
    {"window_size": None},
    {"window_size": [-1, -1]},
    {"window_size": (None, None)},
    {"window_size": torch.tensor([-1, -1])},
    {"window_size": (-1, 0), "causal": True},
    {"s_aux": None, "attn_bias": None, "causal_alignment": "bottom-right"},
    {"dropout_p": 0, "softcap": 0, "deterministic": True},
)


@pytest.mark.parametrize("options", NEUTRAL, ids=str)
def test_neutral_options(kernel, device, options):
    inputs = tensors(device)
    want = kernel.flash_attn_func(**inputs, causal=options.get("causal", False))
    assert torch.equal(kernel.flash_attn_func(**inputs, **options), want)


INT, FLOAT = torch.int32, torch.float32
VARLEN = [
    ("length", {"cu_seqlens_k": zeros(4, dtype=INT)}, ValueError, "cu_seqlens_k.*got 4"),
    ("float", {"cu_seqlens_q": zeros(3, dtype=FLOAT)}, TypeError, "cu_seqlens_q.*float32"),
    ("list", {"cu_seqlens_q": lambda d: [0, 3]}, TypeError, "cu_seqlens_q.*list"),
    ("rank", {"cu_seqlens_q": zeros(1, 3, dtype=INT)}, ValueError, "cu_seqlens_q.*batch . 1"),
    ("none", {"cu_seqlens_q": zeros(0, dtype=INT)}, ValueError, "cu_seqlens_q.*batch . 1"),
    ("max str", {"max_seqlen_q": lambda d: "9"}, TypeError, "max_seqlen_q.*str"),
    ("max two", {"max_seqlen_k": zeros(2)}, ValueError, "max_seqlen_k"),
    ("q rank", {"q": zeros(1, 97, 2, 32)}, ValueError, "q must be 3-dimensional"),
    ("paged", {"block_table": zeros(2, 1, dtype=INT)}, ValueError, "k must be 4-dimensional"),
    ("seqused_k", {"seqused_k": zeros(3, dtype=INT)}, ValueError, "seqused_k.*batch.*got .3,."),
    ("leftpad_k", {"leftpad_k": zeros(2, dtype=FLOAT)}, TypeError, "leftpad_k.*float32"),
    ("seqused_q", {"seqused_q": lambda d: [3, 4]}, TypeError, "seqused_q.*list"),
    ("bias", {"attn_bias": zeros(64, 91)}, ValueError, "attn_bias.*2, 2, 64, 90"),
]


@pytest.mark.parametrize(
    "changes, error, match", [row[1:] for row in VARLEN], ids=[row[0] for row in VARLEN]
)
def test_varlen(kernel, device, changes, error, match):
    q, k, v, _, _, options = make(BY_NAME["varlen-full"], torch.float16, device)
    arguments = {"q": q, "k": k, "v": v, "max_seqlen_q": 64, "max_seqlen_k": 90}
    arguments.update({name: options[name] for name in ("cu_seqlens_q", "cu_seqlens_k")})
    arguments.update({name: make_one(device) for name, make_one in changes.items()})
    with pytest.raises(error, match=match):
        kernel.flash_attn_varlen_func(**arguments)


def test_packed_shapes(kernel, device):
    wrong = torch.zeros(2, 9, 2, 4, 32, device=device, dtype=torch.float16)
    with pytest.raises(ValueError, match="qkv must have shape"):
        kernel.flash_attn_qkvpacked_func(wrong)
    with pytest.raises(ValueError, match="kv must have shape"):
        kernel.flash_attn_varlen_kvpacked_func(wrong[0, :, 0], wrong[0, 0], None, None, 1, 1)
    with pytest.raises(ValueError, match="q must be .batch, heads"):
        kernel.flash_attention(wrong, wrong, wrong)


def test_foreign_tensors(kernel, device):
    """[40] Nested, vmapped and distributed tensors are told the way round."""
    q, k, v = tensors(device).values()
    nested = torch.nested.nested_tensor([q[0], q[1]], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="nested tensor.*flash_attn_varlen_func"):
        kernel.flash_attn_func(nested, nested, nested)
    with pytest.raises(NotImplementedError, match="fold the mapped dimension"):
        torch.vmap(lambda x: kernel.flash_attn_func(x, k, v))(torch.stack([q, q]))

    class DTensor(torch.Tensor):
        """Known by its name: torch.distributed need not be there."""

    with pytest.raises(NotImplementedError, match="to_local"):
        kernel.flash_attn_func(q.as_subclass(DTensor), k, v)


def test_bfloat16_needs_sm_80(module):
    """[29] Turing has no bfloat16."""
    config = module("flash_attention_kernel.config")
    with pytest.raises(TypeError, match="bfloat16.*sm_80.*sm_75"):
        config.choose("forward", "sm_75", torch.bfloat16, 64, 64, False)
    config.choose("forward", "sm_75", torch.float16, 64, 64, False)
