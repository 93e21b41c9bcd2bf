"""Tiny results folders for the tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path

FACTS = {"started": "2030-01-01T00:00:00+00:00", "commit": "c" * 40, "dirty": False, "gpu": "Test GPU", "torch": "9.9"}


def model_row(provider: str, ms: float | None, spread: float = 0.01, failure: str | None = None) -> dict:
    """A row of models.json whose quantiles lie `spread` of the median apart."""
    if ms is None:
        return {"provider": provider, "p20_ms": None, "p50_ms": None, "p80_ms": None, "failure": failure}
    times = {"p20_ms": ms * (1 - spread / 2), "p50_ms": ms, "p80_ms": ms * (1 + spread / 2)}
    return {
        "provider": provider,
        **times,
        "images_per_s": 8000 / ms,
        "peak_mib": 100.0,
        "max_error": 1e-4,
        "failure": None,
    }


def write_models(folder: Path, models: dict[str, list[dict]], facts: dict = FACTS, name: str = "models.json") -> None:
    """Writes inference in bf16 at batch 8."""
    results = [
        {"model": model, "mode": "infer", "batch": 8, "image_size": 224, "dtype": "bf16", "rows": rows}
        for model, rows in models.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"facts": facts, "results": results}))


def op_benchmark(provider: str, seconds: list[float], shape: str = "2x4x4x8", **more) -> dict:
    """An entry of ops.json as pytest-benchmark writes it, with its single rounds."""
    info = {"op": "window_attention", "shape": shape, "direction": "forward", "provider": provider, "dtype": "bfloat16"}
    info |= {"moved_bytes": 2e6, "gbps": 1500.0, "copy_gbps": 3000.0, "floor_ms": 0.5, "backend": None, **more}
    ordered = sorted(seconds)
    median = ordered[len(ordered) // 2]
    return {"extra_info": info, "stats": {"median": median, "q1": ordered[0], "q3": ordered[-1], "data": seconds}}


def write_ops(folder: Path, benchmarks: list[dict], failures: list[dict] = (), facts: dict = FACTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine_info": {"facts": facts}, "benchmarks": benchmarks, "failures": list(failures)}
    (folder / "ops.json").write_text(json.dumps(content))
