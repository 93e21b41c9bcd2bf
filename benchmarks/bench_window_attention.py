"""`window_attention` against timm's eager path, SDPA, compiled flex_attention and torch.compile.

    pytest benchmarks/bench_window_attention.py --benchmark-only

Swin-T's stages 1 to 4 at batch 128 and Swin-B-384's stages 1 and 4 at batch 32, in bfloat16, forward and forward with
backward, on a GPU; without one Swin-T's stages at batch 8 in float32, forward only, against eager and SDPA. Each
benchmark's extra_info holds its peak memory beyond its inputs (on a GPU), what its tensors must move at least (qkv and
y; with gradients those too), the resulting GB/s and, for the kernels, their backend and the largest difference to eager
in fp32. A provider that cannot run a shape fails with its own error rather than silently.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bbfast import dispatch
from bbfast.ops import window_attention
from bbfast.reference.window_attention import Windows, relative_position_index
from bbfast.reference.window_attention import window_attention as reference

# batch, size, channels, heads, window, shift
SHAPES = {
    "swin_tiny stage 1": (128, 56, 96, 3, 7, 3),
    "swin_tiny stage 2": (128, 28, 192, 6, 7, 3),
    "swin_tiny stage 3": (128, 14, 384, 12, 7, 3),
    "swin_tiny stage 4": (128, 7, 768, 24, 7, 0),
    "swin_base 384 stage 1": (32, 96, 128, 4, 12, 6),
    "swin_base 384 stage 4": (32, 12, 1024, 32, 12, 0),
}
PROVIDERS = ("eager", "compile", "sdpa efficient", "sdpa math", "flex", "kernels")
CPU_PROVIDERS = ("eager", "sdpa math", "kernels")
CPU_BATCH = 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


class Attention:
    """One shape's inputs, and every provider as a function of (qkv, table)."""

    def __init__(self, batch, size, channels, heads, window, shift):
        self.heads, self.window, self.shift = heads, (window, window), (shift, shift)
        self.scale = (channels // heads) ** -0.5
        self.windows = Windows(size, size, self.window, self.shift, "shift_then_pad")
        self.index = relative_position_index(self.window, DEVICE)
        self.masked = self.windows.masked_pairs(DEVICE)
        self.qkv = torch.randn(batch, size, size, 3 * channels, device=DEVICE, dtype=DTYPE)
        self.table = torch.randn((2 * window - 1) ** 2, heads, device=DEVICE, dtype=DTYPE)
        self.grad_y = torch.randn(batch, size, size, channels, device=DEVICE, dtype=DTYPE)

    def kernels(self, qkv, table):
        config = {"num_heads": self.heads, "window_size": self.window, "shift_size": self.shift}
        return window_attention(qkv, table, **config)

    def eager(self, qkv, table):
        """timm's default: roll, partition, product, bias, mask, softmax, product, reverse, roll."""
        return reference(qkv, table, None, self.heads, self.window, self.shift, self.scale, "shift_then_pad", -100.0)

    def sdpa(self, qkv, table):
        """timm's fused path: bias and mask become one tensor."""
        q, k, v = self._partition(qkv)
        mask = table[self.index].permute(2, 0, 1)[None]
        if self.masked is not None:
            shift_mask = torch.where(self.masked, -100.0, 0.0).to(mask.dtype)
            mask = (mask + shift_mask[:, None]).repeat(len(q) // len(shift_mask), 1, 1, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(len(q), -1, -1, -1).contiguous())
        return self._reverse(out)

    def flex(self, qkv, table):
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self._partition(qkv)
        bias, masked = table[self.index].permute(2, 0, 1), self.masked

        def score(score, window, head, query, key):
            score = score + bias[head, query, key]
            if masked is None:
                return score
            return score + torch.where(masked[window % len(masked), query, key], -100.0, 0.0)

        return self._reverse(flex_attention(q, k, v, score_mod=score))

    def _partition(self, qkv):
        windows = self.windows.partition(qkv, None)
        return windows.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _reverse(self, out):
        return self.windows.reverse(out.transpose(1, 2).flatten(2))[0]


def _provider(name, attention, monkeypatch):
    if name == "kernels":
        reasons = dispatch.triton_unavailable_reasons(attention.qkv) if DEVICE.type == "cuda" else []
        if reasons:
            pytest.skip("; ".join(reasons))
        monkeypatch.setenv("BBFAST_STRICT", "1")
        return attention.kernels
    if name.startswith("sdpa"):
        backend = {"efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}[name.split()[1]]

        def run(qkv, table):
            with sdpa_kernel(backend):
                return attention.sdpa(qkv, table)

        return run
    torch.compiler.reset()
    return {
        "eager": lambda: attention.eager,
        "compile": lambda: torch.compile(attention.eager),
        "flex": lambda: torch.compile(attention.flex),
    }[name]()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_window_attention(benchmark, provider, shape, backward, monkeypatch):
    batch, *rest = SHAPES[shape]
    if DEVICE.type == "cpu":
        if backward or provider not in CPU_PROVIDERS or not shape.startswith("swin_tiny"):
            pytest.skip("timed on a GPU only; torch.cuda.is_available() is False")
        batch = CPU_BATCH
    attention = Attention(batch, *rest)
    function = _provider(provider, attention, monkeypatch)
    leaves = [tensor.requires_grad_(backward) for tensor in (attention.qkv, attention.table)]

    def run():
        y = function(*leaves)
        if backward:
            torch.autograd.grad(y, leaves, attention.grad_y)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"window_attention {shape} {'with backward' if backward else 'forward'}"
    run()
    if DEVICE.type == "cuda":
        benchmark.extra_info["peak_mib"] = _peak_bytes(run) / 2**20
    benchmark.pedantic(run, rounds=30, iterations=1, warmup_rounds=5)

    qkv_bytes, y_bytes = attention.qkv.nbytes, attention.grad_y.nbytes
    moved = qkv_bytes + y_bytes + (2 * qkv_bytes + y_bytes if backward else 0)
    benchmark.extra_info["moved_bytes"] = moved
    if benchmark.stats:  # there are none where --benchmark-disable is set
        benchmark.extra_info["gbps"] = moved / benchmark.stats.stats.median / 1e9
    if provider == "kernels":
        benchmark.extra_info["backend"] = dispatch.last_choices()["window_attention"].backend
        with torch.no_grad():
            exact = attention.eager(attention.qkv.float(), attention.table.float())
            benchmark.extra_info["max_error"] = (function(*leaves).float() - exact).abs().max().item()


def _peak_bytes(run):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before
