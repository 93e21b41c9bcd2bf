"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before anything imports them."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU, or the CPU through Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed() -> int:
    """Fresh random inputs in each run; `BBFAST_TEST_SEED=N` repeats one (pytest prints N where a test fails)."""
    value = int(os.environ.get("BBFAST_TEST_SEED", random.randrange(2**31)))
    print(f"BBFAST_TEST_SEED={value}")
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def fresh_warnings():
    """Each test sees each fallback's warning anew."""
    from bbfast import dispatch

    dispatch.forget_choices()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
