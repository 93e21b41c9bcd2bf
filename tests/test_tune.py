"""Measured launch configurations: looking them up, the files, the search for them, and `bbfast tune`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bbfast
from bbfast import env
from bbfast.cli import main

pytest.importorskip("triton")

from bbfast.commands import _tuning, tune
from bbfast.ops import _status
from bbfast.triton_kernels import (
    add_layer_norm,
    batch_norm_act,
    batch_statistics,
    conv_bn_act,
    depthwise_conv_bn_act,
    drop_path_add,
    linear_act,
    mlp,
    tuned,
    window_attention,
)

interpreted = pytest.mark.skipif(not env.TRITON_INTERPRET, reason="runs kernels on the CPU; see test_tune_gpu.py")

GPU = "Test GPU 80GB"
KEY = batch_statistics.Key("sum_partials", 100, 32)
BEST = batch_statistics.ReduceConfig(block_p=32, block_k=16, num_warps=2)


def entry(key=KEY, config=BEST, **changes):
    return tuned.Entry(**{"key": key, "config": config, "ms": 0.5, "heuristic_ms": 1.0, "versions": {}} | changes)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The user's folder and the package's, both empty; and a GPU, as far as look-ups can tell."""
    found = tmp_path / "user", tmp_path / "packaged"
    monkeypatch.setenv("BBFAST_TUNED_DIR", str(found[0]))
    monkeypatch.setattr(tuned, "PACKAGED", found[1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    for tunable in tuned.tunables().values():
        tunable.forget()
    yield found
    for tunable in tuned.tunables().values():
        tunable.forget()


ON_GPU = SimpleNamespace(is_cuda=True, get_device=lambda: 0)


def write(folder, *entries, name="batch_statistics", gpu=GPU):
    path = folder / tuned.file_name(name, GPU)
    tuned.write(path, gpu, {"driver": "1.2"}, entries)
    return path


def look_up(key=KEY):
    return batch_statistics.TUNABLE.config(ON_GPU, key, lambda: "heuristic's")


# ---- looking up --------------------------------------------------------------------------------------------


def test_without_files_the_heuristic_decides_once_per_key(folders):
    asked = []
    for _ in range(3):
        assert batch_statistics.TUNABLE.config(ON_GPU, KEY, lambda: asked.append(1) or "a config") == "a config"
    assert len(asked) == 1


def test_the_users_files_win_over_packaged_ones(folders):
    user, packaged = folders
    other = KEY._replace(num_columns=64)
    write(packaged, entry(config=batch_statistics.ReduceConfig(256, 8, 8)), entry(key=other))
    write(user, entry())
    assert look_up() == BEST and look_up(other) == BEST
    assert look_up(KEY._replace(num_partials=7)) == "heuristic's"


def test_where_nothing_was_quicker_the_heuristic_decides(folders):
    write(folders[0], entry(config=None))
    assert look_up() == "heuristic's"


def test_the_variable_turns_files_off(folders, monkeypatch):
    write(folders[0], entry())
    monkeypatch.setenv("BBFAST_TUNED", "0")
    assert look_up() == "heuristic's"
    batch_statistics.TUNABLE.forget()
    monkeypatch.setenv("BBFAST_TUNED", "no")
    with pytest.raises(ValueError, match="BBFAST_TUNED='no' is not allowed; use 0 or 1"):
        look_up()


def test_the_users_folder(monkeypatch):
    monkeypatch.setenv("BBFAST_TUNED_DIR", "/a/b")
    assert str(env.tuned_folder()) == "/a/b"
    monkeypatch.delenv("BBFAST_TUNED_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert str(env.tuned_folder()) == "/c/bbfast/tuned"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(env.tuned_folder()) == "/home/me/.cache/bbfast/tuned"


def test_nothing_is_looked_up_without_a_gpu(monkeypatch):
    def no_folders():
        raise AssertionError("a launch without a GPU looks for files")

    monkeypatch.setattr(tuned, "folders", no_folders)
    for x in (torch.ones(3, 5), torch.ones(3, 5, device="meta")):
        assert batch_statistics.TUNABLE.config(x, KEY, lambda: "heuristic's") == "heuristic's"


def test_fake_tensors_ask_for_the_gpu_of_the_moment(folders, monkeypatch):
    """As the report of compiled kernels does, for one GPU after another."""
    write(folders[0], entry())
    with FakeTensorMode():
        x = torch.empty(4, device="cuda")
    assert x.is_cuda
    for gpu, expected in ((GPU, BEST), ("another", "heuristic's"), (GPU, BEST)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None, gpu=gpu: gpu)
        assert batch_statistics.TUNABLE.config(x, KEY, lambda: "heuristic's") == expected


def test_choices_do_not_pile_up(folders, monkeypatch):
    monkeypatch.setattr(tuned, "MOST_CHOICES", 10)
    for size in range(1, 35):
        look_up(KEY._replace(num_partials=size))
    assert len(batch_statistics.TUNABLE._choices) <= 10


# ---- files -------------------------------------------------------------------------------------------------


def test_a_file_says_what_was_written(folders):
    entries = [entry(versions={"triton": "3.8"}), entry(key=KEY._replace(num_columns=3), config=None)]
    path = write(folders[0], *entries)
    assert tuned.read(path, batch_statistics.TUNABLE, GPU) == entries
    assert path.name == "batch_statistics.test-gpu-80gb.json"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text())["facts"] == {"driver": "1.2"}


def _change(*steps, value):
    def change(content):
        *outer, last = steps
        for step in outer:
            content = content[step]
        if value is KeyError:
            del content[last]
        else:
            content[last] = value

    return change


CONFIG = ("configs", 0, "config")


@pytest.mark.parametrize(
    "change, words",
    [
        (_change("gpu", value="Other"), "is for the GPU 'Other', but this is 'Test GPU 80GB'"),
        (_change("configs", value=KeyError), 'holds no {"gpu": ..., "configs": [...]}'),
        (_change("configs", 0, "ms", value=KeyError), "configs[0] must hold key, config, ms, heuristic_ms, versions"),
        (_change("configs", 0, "ms", value=0), "configs[0].ms=0 is not a time; allowed are numbers above 0"),
        (_change("configs", 0, "key", "colour", value=1), "configs[0].key has an unknown field 'colour'; allowed are"),
        (_change("configs", 0, "key", "kernel", value=1), "configs[0].key.kernel=1 is no str"),
        (_change("configs", 0, "key", "num_columns", value=True), "configs[0].key.num_columns=True is no int"),
        (_change(*CONFIG, "block", value=8), "unknown field 'block'; allowed are block_p, block_k, num_warps"),
        (_change(*CONFIG, "block_k", value=KeyError), "lacks the field 'block_k'; it must hold block_p, block_k"),
        (_change(*CONFIG, "block_k", value="8"), "configs[0].config.block_k='8' is no int"),
        (_change(*CONFIG, value=[]), "configs[0].config must be an object of block_p, block_k, num_warps"),
        (_change(*CONFIG, "block_k", value=12), "'num_columns': 32}: block_k=12; it must be a power of two"),
        (_change(*CONFIG, "block_k", value=0), "block_k=0; it must be at least 1"),
        (_change(*CONFIG, "block_k", value=1024), "a tile has up to 8192 elements"),
        (_change(*CONFIG, "num_warps", value=3), "num_warps=3; allowed are 1, 2, 4, 8, 16 and 32"),
    ],
)
def test_a_wrong_file_is_an_error_at_the_first_launch(change, words, folders):
    path = write(folders[0], entry())
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        look_up()
    assert f"launch configurations {path}: " in str(error.value) and words in str(error.value)


def test_a_torn_file_is_an_error(folders):
    path = write(folders[0], entry())
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"cannot be read: .*mend the file, measure it anew, or delete it"):
        look_up()


CONV_KEY = depthwise_conv_bn_act.Key("forward", 2, True, 8, 4, 64, 14, 14, 3, 3, 1, 1)
CONV = depthwise_conv_bn_act.LaunchConfig(16, 64, 7, 4, span=14)
ATTENTION_KEY = window_attention.Key("forward", 2, 64, 3, 49, 32, True, False)
ATTENTION = window_attention.Tile(64, 64, 1, 1, 32, 4, 2)
ROWS_KEY = add_layer_norm.Key("forward", 2, 3136, 96, 8, False, False)
ROWS = add_layer_norm.RowTile(16, 128, 4, 32)


@pytest.mark.parametrize(
    "module, key, config, changes, words",
    [
        (depthwise_conv_bn_act, CONV_KEY, CONV, {"block_t": 12}, "block_t=12; it must be a power of two"),
        (depthwise_conv_bn_act, CONV_KEY, CONV, {"block_c": 256}, "block_c=256; it must be a power of two up to 128"),
        (depthwise_conv_bn_act, CONV_KEY, CONV, {"span": 10}, "span=10; it must be a multiple of tile_s=7 up to 14"),
        (depthwise_conv_bn_act, CONV_KEY, CONV, {"span": 21}, "span=21; it must be a multiple of tile_s=7 up to 14"),
        (depthwise_conv_bn_act, CONV_KEY, CONV, {"images": 2}, "images=2; it must be up to the batch"),
        (depthwise_conv_bn_act, CONV_KEY, CONV, {"rows": 2}, "rows=2; it must be up to the kernel's rows"),
        (depthwise_conv_bn_act, CONV_KEY, CONV, {"max_registers": 256}, "max_registers=256; it must be up to 255"),
        (
            depthwise_conv_bn_act,
            CONV_KEY._replace(kernel="input_grad", stride_s=2),
            CONV,
            {},
            "tile_s=7; it must be up to 16, and for input_grad a multiple of the stride",
        ),
        (
            window_attention,
            ATTENTION_KEY,
            ATTENTION,
            {"block_q": 8},
            "block_q=8; it must be a power of two from 16 to 64",
        ),
        (
            window_attention,
            ATTENTION_KEY,
            ATTENTION,
            {"key_tiles": 2},
            "key_tiles=2; for 49 tokens and block_k=64 it is 1",
        ),
        (window_attention, ATTENTION_KEY, ATTENTION, {"block_q": 32, "query_tiles": 2}, "they must be the same"),
        (window_attention, ATTENTION_KEY, ATTENTION, {"block_d": 64}, "block_d=64; for heads of 32 channels it is 32"),
        (add_layer_norm, ROWS_KEY, ROWS, {"block_c": 64}, "block_c=64; for 96 channels it is 128"),
        (add_layer_norm, ROWS_KEY, ROWS, {"block_r": 3}, "block_r=3; it must be a power of two"),
    ],
)
def test_what_a_configuration_must_be(module, key, config, changes, words):
    if changes:
        assert module.TUNABLE.objection(key, config) is None
    assert words in module.TUNABLE.objection(key, replace(config, **changes))


# ---- the search, in a launcher of its own ------------------------------------------------------------------


class ToyKey(NamedTuple):
    size: int


@dataclass(frozen=True)
class ToyConfig:
    block: int
    num_warps: int = 4


TOY_KEY = ToyKey(100)
TOY = tuned.Tunable(
    "toy",
    ToyKey,
    ToyConfig,
    lambda key, config: tuned.halved_and_doubled(config, "block"),
    lambda key, config: f"block={config.block}; it must be up to 1024" if config.block > 1024 else None,
)


def toy_launcher(x, counter, scale):
    """2 x, unless the block is 4 (wrong), 8 (left unwritten at the end) or 256 (does not run)."""
    config = TOY.config(x, TOY_KEY, lambda: ToyConfig(32))
    counter += 1
    y = x.new_empty(x.shape)
    if config.block == 256:
        raise tuned_error()
    rows = slice(0, -1) if config.block == 8 else slice(None)
    y[rows] = x[rows] * (scale * 1.25 if config.block == 4 else scale)
    return y, None


def tuned_error():
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300000, 232448, "shared memory")


def toy_search(block_ms, gain_confirmed=True):
    """Searches the toy's configuration with made-up times; returns the result and the blocks that were timed."""
    x, counter = torch.randn(100, 7), torch.zeros(3)
    kept = tuple(_tuning._Kept.of(a) if isinstance(a, torch.Tensor) else a for a in (x, counter, 2.0))
    call = _tuning.Call(toy_launcher, kept, (("toy", TOY_KEY),))
    timed = []

    def timer(run):
        (y, _), used = run()
        timed.append(used["toy", TOY_KEY].block)
        assert torch.equal(y[:-1], 2 * x[:-1])
        return block_ms(timed[-1], timed)

    return _tuning.search(TOY, TOY_KEY, call, {}, timer), timed


def test_the_quickest_configuration_is_found_step_by_step():
    result, timed = toy_search(lambda block, _: {32: 1.0, 64: 0.9, 128: 0.5}.get(block, 2.0))
    assert result.config == ToyConfig(128) and (result.ms, result.heuristic_ms) == (0.5, 1.0)
    assert result.tried == 4 and timed[:4] == [32, 16, 64, 128]
    # 256 would have been next, but does not run; then the two best take turns.
    assert len(result.dropped) == 1 and "shared memory" in result.dropped[0]
    assert timed[4:] == [32, 128] * 5


def test_wrong_numbers_and_unwritten_outputs_are_dropped():
    result, timed = toy_search(lambda block, _: block / 32)  # the smaller, the quicker, says the timer
    assert result.config == ToyConfig(16)
    assert set(timed) == {16, 32, 64}
    assert len(result.dropped) == 1
    assert "ToyConfig(block=8" in result.dropped[0] and "differs by nan" in result.dropped[0]
    assert "differs" in _tuning._difference([torch.ones(3) * 1.25], [torch.ones(3)])
    assert _tuning._difference([torch.ones(3) + 1e-7], [torch.ones(3)]) is None


def test_a_gain_within_the_noise_is_none():
    result, _ = toy_search(lambda block, _: 0.98 if block == 64 else 1.0)
    assert result.config is None and result.ms == result.heuristic_ms == 1.0
    lucky, timed = toy_search(lambda block, timed: 0.5 if block == 64 and timed.count(64) == 1 else 1.0)
    assert lucky.config is None and timed.count(64) == 6


def test_spilling_kernels_are_dropped(monkeypatch):
    def launcher(x):
        TOY.config(x, TOY_KEY, lambda: ToyConfig(32))
        _tuning.JITFunction.run(None)
        return x.clone()

    call = _tuning.Call(launcher, (_tuning._Kept.of(torch.ones(4)),), ())
    for spills in (0, 2, 3):
        monkeypatch.setattr(_tuning.JITFunction, "run", lambda self, spills=spills: SimpleNamespace(n_spills=spills))
        expected, _ = _tuning._checked_run(call, {})
        assert _tuning._problem(call, {}, expected) == ("3 words spilled" if spills == 3 else None)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 5).t(),
        torch.randn(4, 1, 6).expand(4, 3, 6),
        torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)[:, 2:5],
        torch.randn(40, dtype=torch.float64).half()[3:].unfold(0, 5, 2),
        torch.tensor(2.0),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_repeated_calls_get_tensors_of_the_same_strides_and_alignment(x, kept, monkeypatch):
    monkeypatch.setattr(_tuning, "MOST_KEPT_ELEMENTS", 2**16 if kept else 0)
    description = _tuning._Kept.of(x)
    again, third = (description.tensor(torch.Generator().manual_seed(0)) for _ in range(2))
    assert (again.shape, again.stride(), again.dtype) == (x.shape, x.stride(), x.dtype)
    assert again.data_ptr() % 16 == x.data_ptr() % 16
    assert torch.equal(again, third) and torch.equal(again, x) == kept


# ---- candidates of the kernels -----------------------------------------------------------------------------


def _conv(stride, layout, backward):
    """A forward with the batch's statistics, or a backward, of fewer launches, with the running ones."""
    x, weight = torch.randn(2, 9, 5, 6).to(memory_format=layout), torch.randn(9, 1, 3, 3)
    tensors = (x, weight, None, *(torch.rand(9) for _ in range(4)))
    place = ((stride, stride), (1, 1, 1, 1), (1, 1))
    if not backward:
        depthwise_conv_bn_act.forward(*tensors, *place, True, 0.1, 1e-5, "hardswish", True)
        return
    grads = torch.randn(2, 9, *(-(-size // stride) for size in (5, 6))).to(memory_format=layout), torch.randn(2, 9)
    statistics = (None, None, *tensors[5:])
    depthwise_conv_bn_act.backward(*grads, *tensors[:5], *statistics, *place, False, 1e-5, "hardswish", True, True)


def _batch_norm(layout, training):
    x = torch.randn(2, 12, 5, 7).to(memory_format=layout)
    weight, bias, mean, var = (torch.rand(12) for _ in range(4))
    y, *statistics = batch_norm_act.forward(x, weight, bias, x, mean, var, training, 0.1, 1e-5, "relu")
    batch_norm_act.backward(y, x, weight, bias, x, *statistics, mean, var, training, 1e-5, "relu")


def _drop_path(layout, scaled):
    x = torch.randn(2, 12, 5, 7).to(memory_format=layout)
    scale, multiplier = torch.rand(12) if scaled else None, torch.tensor([0.0, 1.25])
    drop_path_add.forward(x, x, multiplier, scale)
    drop_path_add.backward(x, x, multiplier, scale, x.dtype)


def _layer_norm():
    x, weight, multiplier = torch.randn(2, 33, 24), torch.rand(24), torch.tensor([0.0, 1.25])
    total, norm, mean, rstd = add_layer_norm.forward(x, x, multiplier, weight, weight, weight, 1e-5, x.dtype, True)
    add_layer_norm.backward(
        total, x, norm, x, multiplier, weight, weight, weight, mean, rstd, x.dtype, x.dtype, True
    )  # fmt: skip


def _attention(window):
    qkv, table = torch.randn(1, window - 1, window, 3 * 16), torch.randn((2 * window - 1) ** 2, 1)
    config = (1, (window, window), (window // 2, 1), 0.25, "shift_then_pad", -100.0)
    y = window_attention.forward(qkv, table, torch.randn(48), *config)
    window_attention.backward(y, qkv, table, torch.randn(48), *config, True, True)


def _pointwise():
    x, weight = torch.randn(2, 40, 7, 9).half().to(memory_format=NHWC), torch.randn(72, 40, 1, 1).half()
    conv_bn_act.forward(x, weight, None, *[None] * 4, None, torch.rand(2, 40).half(), (1, 1), 1e-5, "silu")
    linear_act.forward(torch.randn(130, 24).half(), torch.randn(16, 24).half(), None, None, None, "gelu", torch.half)


def _mlp():
    weights, vector = torch.randn(2, 32, 24).half() / 5, torch.randn(24).half()
    layers = (weights[0], None, weights[1].t(), vector)
    for channels_of_norm in (vector, None):
        eps = None if channels_of_norm is None else 1e-5
        x = torch.randn(130, 24).half()
        mlp.forward(x, *layers, channels_of_norm, channels_of_norm, None, x, eps, "gelu", torch.half)


NHWC, NCHW = torch.channels_last, torch.contiguous_format
LAUNCHES = {
    "depthwise forward": lambda: _conv(1, NHWC, False),
    "depthwise forward strided": lambda: _conv(2, NCHW, False),
    "depthwise backward": lambda: _conv(1, NHWC, True),
    "depthwise backward strided": lambda: _conv(2, NCHW, True),
    "batch_norm_act": lambda: (_batch_norm(NHWC, True), _batch_norm(NCHW, False)),
    "drop_path_add": lambda: (_drop_path(NHWC, True), _drop_path(NCHW, False)),
    "add_layer_norm": _layer_norm,
    "mlp": _mlp,
    "pointwise": _pointwise,
    "window_attention": lambda: _attention(5),
    "window_attention of several tiles": lambda: _attention(7),
}


@interpreted
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough if "backward" in name or "several" in name else ())
        for name in LAUNCHES
    ],
)
def test_every_candidate_gives_the_numbers_of_the_heuristic(name):
    with _tuning.recorded_calls() as calls:
        LAUNCHES[name]()
    tunables, searched = tuned.tunables(), set()
    for call in calls:
        for place in call.places:
            tunable, key = tunables[place[0]], place[1]
            result = _tuning.search(tunable, key, call, {}, lambda run: 1.0)
            assert tunable.objection(key, result.heuristic) is None
            assert result.dropped == [] and result.tried >= 3, (place, result)
            searched.add(place)
    kernels = {(place[0], place[1].kernel) for place in searched}
    print(len(searched), "launches of", sorted(kernels))
    assert len(kernels) > 1 or (name in ("mlp", "pointwise") and len(searched) == 2)


# ---- many launches, and the command ------------------------------------------------------------------------


VERSIONS = {"bbfast": "1", "triton": "2"}


def _cheap_launches():
    """Two launches, and one of a second stage whose problem depends on the first stage's configuration."""
    x, weight = torch.randn(2, 70, 24), torch.rand(24)
    *_, mean, rstd = add_layer_norm.forward(x, None, None, None, weight, weight, 1e-5, x.dtype, True)
    add_layer_norm.backward(x, None, x, None, None, None, weight, weight, mean, rstd, x.dtype, None, True)


@pytest.fixture(scope="module")
def cheap_calls():
    with torch.inference_mode(), _tuning.recorded_calls() as calls:  # as the command runs models
        _cheap_launches()
    return calls


class MadeUpTimes:
    """Few programs are quick in the first stage; warps and the second stage make no difference."""

    def __init__(self, most=10**6):
        self.count, self.most = 0, most

    def __call__(self, run):
        self.count += 1
        if self.count > self.most:
            raise KeyboardInterrupt
        used = run()[1]
        return sum(config.programs for (name, _), config in used.items() if name == "add_layer_norm")


def _store(folder, versions=VERSIONS, again=False):
    return tune.Store(folder, GPU, {"driver": "1.2"}, versions, again=again)


@pytest.fixture
def few_candidates(monkeypatch):
    """So that the interpreter has less to do."""
    monkeypatch.setattr(_tuning, "CONFIRMING_ROUNDS", 2)
    for tunable, name in ((add_layer_norm.TUNABLE, "programs"), (batch_statistics.TUNABLE, "num_warps")):
        monkeypatch.setattr(tunable, "_neighbours", lambda _, config, name=name: tuned.halved_and_doubled(config, name))


@interpreted
def test_all_launches_of_the_calls_are_tuned_and_written(cheap_calls, few_candidates, tmp_path):
    store = _store(tmp_path)
    tune.tune(cheap_calls, store, timer=MadeUpTimes())
    rows = {key.kernel: (key, config) for (name, key), config in store.done.items() if name == "add_layer_norm"}
    # Three steps of halving, from 128 programs and from 8.
    assert {kernel: config.programs for kernel, (_, config) in rows.items()} == {"forward": 16, "backward": 1}
    # The second stage was tuned for the partial sums that the tuned first stage leaves: fewer than the heuristic's.
    (key,) = [key for name, key in store.done if name == "batch_statistics"]
    (untuned,) = [key for call in cheap_calls for name, key in call.places if name == "batch_statistics"]
    assert key.num_partials < untuned.num_partials and store.done["batch_statistics", key] is None
    # And it is all in the files.
    assert {path.name for path in tmp_path.iterdir()} == {
        tuned.file_name(name, GPU) for name in ("add_layer_norm", "batch_statistics")
    }
    assert _store(tmp_path).done == store.done
    assert add_layer_norm.TUNABLE.objection(*rows["backward"]) is None


@interpreted
def test_a_run_that_was_cut_short_goes_on(cheap_calls, few_candidates, tmp_path):
    whole = MadeUpTimes()
    tune.tune(cheap_calls, _store(tmp_path / "whole"), timer=whole)

    with pytest.raises(KeyboardInterrupt):
        tune.tune(cheap_calls, _store(tmp_path / "cut"), timer=MadeUpTimes(most=whole.count - 3))
    halfway = _store(tmp_path / "cut")
    assert 0 < len(halfway.done) < 3
    rest = MadeUpTimes()
    tune.tune(cheap_calls, halfway, timer=rest)
    assert 3 <= rest.count < whole.count and len(halfway.added) == 3 - len(_done_before(halfway))
    assert _store(tmp_path / "cut").done == _store(tmp_path / "whole").done

    nothing = MadeUpTimes()
    tune.tune(cheap_calls, _store(tmp_path / "cut"), timer=nothing)
    assert nothing.count == 0
    for store in (_store(tmp_path / "cut", again=True), _store(tmp_path / "cut", {"bbfast": "1", "triton": "3"})):
        assert store.done == {}


def _done_before(store):
    return set(store.done) - {(name, entry.key) for name, entry, _ in store.added}


@interpreted
def test_only_the_kernels_that_were_named_are_tuned(cheap_calls, few_candidates, tmp_path):
    store = _store(tmp_path)
    tune.tune(cheap_calls, store, ["batch_statistics"], timer=MadeUpTimes())
    assert {name for name, _ in store.done} == {"batch_statistics"}


@interpreted
def test_the_command(folders, few_candidates, monkeypatch, capsys):
    """All of it but the GPU: launches, files, table, a second run, and what `bbfast info` says then."""
    monkeypatch.setenv("COLUMNS", "200")
    ran = []
    monkeypatch.setattr(tune, "_require_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "facts", lambda device: {"driver": "1.2", **VERSIONS})
    monkeypatch.setattr(tune, "run_model", lambda *args: (ran.append(args), _cheap_launches()))
    monkeypatch.setattr(_tuning, "gpu_ms", MadeUpTimes())
    command = ["tune", "resnet18", "--batch", "2,4", "--dtype", "bf16,fp32", "--mode", "train"]
    assert main(command) == 0
    out = capsys.readouterr().out
    device = torch.device("cuda", 0)
    assert ran == [("resnet18", n, t, "train", device) for n in (2, 4) for t in (torch.bfloat16, torch.float32)]
    assert "programs 128 -> 16" in out and "programs 8 -> 1" in out and "the heuristic's" in out
    assert f"2 of 3 launches became quicker; files in {folders[0]}" in out

    done = _store(folders[0], VERSIONS | {"bbfast": bbfast.__version__}).done
    key = next(key for _, key in done if key.kernel == "forward")
    found = add_layer_norm.TUNABLE.config(ON_GPU, key, lambda: pytest.fail("there is a measured configuration"))
    assert found.programs == 16

    assert main(command) == 0
    assert "nothing to do: all launches are in" in capsys.readouterr().out

    _with_gpus(1, monkeypatch)
    assert main(["info"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert f"add_layer_norm 2 of 2 measured better on {GPU}, from {folders[0]}" in words

    monkeypatch.setattr(tune, "run_model", lambda *args: None)
    assert main(command) == 1
    assert "no Triton kernel ran in resnet18; `bbfast info` says why not" in capsys.readouterr().err


def _with_gpus(count, monkeypatch):
    """What `bbfast info` asks of GPUs."""
    properties = SimpleNamespace(name=GPU, major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(_status, "backend_status", lambda: [])


def test_info_tells_why_only_heuristics_decide(folders, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")

    def said():
        assert main(["info"]) == 0
        return capsys.readouterr().out

    _with_gpus(0, monkeypatch)
    assert "none: heuristics (no GPU)" in said()
    monkeypatch.setenv("BBFAST_TUNED", "0")
    assert "none: heuristics (BBFAST_TUNED=0)" in said()
    monkeypatch.setenv("BBFAST_TUNED", "1")
    _with_gpus(1, monkeypatch)
    assert "none: heuristics (nothing measured; see `bbfast tune`)" in said()
    write(folders[0], entry(config=replace(BEST, num_warps=3)))
    assert "unusable: launch configurations" in said()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_command_refuses_in_a_line(capsys):
    assert main(["tune", "resnet18"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "bbfast tune: needs the GPU that is tuned for; torch sees none (torch.cuda.is_available() is False)\n"
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--dtype", "bf16,int8"], "argument --dtype: 'int8' is not one of fp32, bf16, fp16"),
        (["--mode", "eval"], "argument --mode: 'eval' is not one of infer, train"),
        (["--batch", "8,0"], "argument --batch: '0' is not a whole number of at least 1"),
        (["--kernels", "conv"], "argument --kernels: 'conv' is not one of add_layer_norm, batch_norm_act"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", "resnet18", *arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_models_run_as_the_command_runs_them(monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")  # Triton's interpreter would take minutes
    seen = []
    forward = torch.nn.Linear.forward

    def noting(self, x):
        seen.append((x.shape[0], x.dtype, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", noting)
    with _tuning.recorded_calls() as calls:
        for mode in tune.MODES:
            tune.run_model("mobilenetv3_small_050", 2, torch.bfloat16, mode, torch.device("cpu"))
    assert (2, torch.bfloat16, False, False) in seen and any(row[0] == 2 and row[2:] == (True, True) for row in seen)
    assert calls == []
