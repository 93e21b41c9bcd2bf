"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before anything imports them."""

import gc
import os
import random
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def patch_language_once_per_launch() -> None:
    """Halves the time of interpreted kernels, which Triton's interpreter spends on repeating itself.

    It replaces the builtins of triton.language by its own when a kernel is launched, and once more in each call of a
    device function, where it finds them replaced. Once per launch and module that the functions come from will do.
    """
    from triton.runtime import interpreter

    run, patch, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def run_anew(*args, **kwargs):
        patched.clear()
        return run(*args, **kwargs)

    def patch_once(function):
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = run_anew, patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_language_once_per_launch()


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU, or the CPU through Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def reference_backend(monkeypatch):
    """For tests that compare whole models: on plain torch, since the kernels have their own tests."""
    monkeypatch.setenv("BBFAST_BACKEND", "torch")


@pytest.fixture
def one_thread():
    """For tests whose batches and maps are so small that threads would mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Fresh random inputs in each run; `BBFAST_TEST_SEED=N` repeats one (pytest prints N where a test fails)."""
    value = int(os.environ.get("BBFAST_TEST_SEED", random.randrange(2**31)))
    print(f"BBFAST_TEST_SEED={value}")
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def fresh_compiler():
    """What one test compiled counts toward no other's limit of recompilations."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def fresh_warnings():
    """Each test sees each fallback's warning anew."""
    from bbfast import dispatch

    dispatch.forget_choices()


# Files of minutes, which would leave one of two processes idle if the other came to them last. They come first, and
# processes without work take from the end (--dist worksteal), so that what is built for a whole file stays with one.
LONG = ("test_packaging.py", "test_compiled_kernels.py")


@pytest.fixture(scope="session", autouse=True)
def lasting_objects():
    """What all the imports left behind is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
