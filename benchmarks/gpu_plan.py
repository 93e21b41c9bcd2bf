"""What `benchmarks/gpu.py` runs, in order of importance.

A step that is not begun when its phase's share of the time is over waits until all other phases had their turn, so that
a slow phase does not leave the next ones without results. Imports nothing, since it runs before bbfast is built.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

MODELS = (
    "swin_tiny_patch4_window7_224",
    "mobilenetv3_large_100",
    "resnet50",
    "convnext_tiny",
    "efficientnet_b0",
    "regnety_016",
    "swin_base_patch4_window7_224",
    "resnext50_32x4d",
)
OPS = (
    "window_attention",
    "depthwise_conv_bn_act",
    "add_layer_norm",
    "mlp",
    "linear_act",
    "conv_bn_act",
    "batch_norm_act",
    "window_partition",
    "drop_path_add",
)
# A compiled provider takes tens of seconds before it runs; the modes that take minutes come at the end.
PROVIDERS = "eager,eager+sdpa,compile,compile+sdpa,bbfast,bbfast+compile,swapped"
QUICK_PROVIDERS = "eager,compile,bbfast"
LONG_PROVIDERS = f"{PROVIDERS},compile reduce-overhead,compile max-autotune,swapped+compile"
SECONDS_PER_PROVIDER = "1"
# Models that prepare at the same time; in training each keeps gigabytes of a GPU.
INFER_TOGETHER, TRAIN_TOGETHER = 5, 3
PREPARE_SECONDS = 150
# What the tests marked gpu are cut down to where minutes count: a size of windows, two models, the copies.
QUICK_TESTS = "32-7 or (test_evaluation and bfloat16-NHWC and (swin or mobilenetv3)) or test_window_partition"
SANITIZED_TESTS = "test_kernels_at_real_sizes and 32-7"


@dataclass
class Step:
    """One command of the run.

    Attributes:
        limit_s: it is stopped after so many seconds.
        until: share of the whole time after which the step is put off.
        needs: modules without which it is skipped.
        outcome: waiting, running, passed, failed, cut short (at a limit), interrupted, or skipped.
        reason: why it was skipped or cut short, or what it lacks.
        exit_status: the command's; negative where a signal ended it; None before it ended.
        log: file beside gpu.json.
    """

    name: str
    command: list[str]
    limit_s: float
    until: float = 1.0
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    outcome: str = "waiting"
    reason: str | None = None
    exit_status: int | None = None
    seconds: float | None = None
    log: str = ""


@dataclass(frozen=True)
class Planner:
    """Makes steps.

    Attributes:
        root: the source tree.
        build: where the package is built.
        folder: takes the results.
        gpu: False plans the same steps for a small run on the CPU.
        sanitizer: the program compute-sanitizer; None where there is none.
        processes: how many run tests at a time; more than one needs pytest-xdist.
    """

    root: Path
    build: Path
    folder: Path
    gpu: bool
    sanitizer: str | None = None
    processes: int = 1

    def steps(self, quick: bool) -> list[Step]:
        """Everything in the order in which it is begun if no phase takes longer than its share."""
        prepare = [
            Step(
                "build",
                [sys.executable, str(self.root / "setup.py"), "build", "--build-lib", str(self.build)],
                300,
            ),
            Step("info", [sys.executable, "-m", "bbfast", "info"], 60),
        ]
        steps = prepare + (self._quick() if quick else self._most_important() + self._rest())
        return list({step.name: step for step in steps}.values())

    def _quick(self) -> list[Step]:
        ops = [self.op(op) for op in OPS[:2]]
        return [
            self.tests("gpu", "gpu and not slow", "-k", QUICK_TESTS, *self._gpu_tests(), limit_s=50, until=0.7),
            self.together(MODELS[:2], "infer", QUICK_PROVIDERS),
            *ops,
        ]

    def _most_important(self) -> list[Step]:
        return [
            self.tests("gpu", "gpu and not slow", *self._gpu_tests(), limit_s=150, until=0.3),
            self.together(MODELS[:INFER_TOGETHER], "infer", until=0.6),
            self.together(MODELS[:TRAIN_TOGETHER], "train", until=0.72),
            *(self.model(model, "infer", "1,32", "bf16", PROVIDERS, until=0.8) for model in MODELS[:2]),
            *(self.op(op) for op in OPS),
        ]

    def _rest(self) -> list[Step]:
        others = sorted(
            path.stem.removeprefix("bench_")
            for path in (self.root / "benchmarks").glob("bench_*.py")
            if path.stem.removeprefix("bench_") not in OPS
        )
        of_ops = [str(self.root / "tests" / f"test_{op}.py") for op in OPS]
        steps = [
            self.together(MODELS[INFER_TOGETHER:], "infer"),
            self.together(MODELS[TRAIN_TOGETHER : 2 * TRAIN_TOGETHER], "train"),
            self.together(MODELS[2 * TRAIN_TOGETHER :], "train"),
            self.tests("ops", "not gpu and not slow and not thorough", *of_ops, limit_s=900),
            *(self.op(op) for op in others),
            *(self.model(model, "infer", "128", "bf16", LONG_PROVIDERS, limit_s=600) for model in MODELS[:4]),
            *(self.model(model, "infer", "1,32", "bf16", PROVIDERS) for model in MODELS[2:]),
            *(self.model(model, "infer", "128", "fp16,fp32", PROVIDERS) for model in MODELS),
            *(self.model(model, "train", "128", "fp16,fp32", PROVIDERS) for model in MODELS),
        ]
        return [*steps, self._sanitize()]

    # ---- one step --------------------------------------------------------------------------------------------

    def tests(self, name: str, marks: str, *more: str, limit_s: float, until: float = 1.0) -> Step:
        results = f"--junitxml={self.folder / f'tests-{name}.xml'}"
        together = ["-n", str(self.processes), "--dist", "worksteal"] if self.processes > 1 else []
        command = [*self._pytest(), "-q", *together, "-m", marks, results, *more]
        return Step(f"tests-{name}", command, limit_s, until, ("pytest",))

    def model(
        self, model: str, mode: str, batch: str, dtype: str, providers: str, until: float = 1.0, limit_s: float = 120
    ) -> Step:
        """One model in a process of its own: a kernel that crashes takes no other results with it."""
        device = "cuda"
        if not self.gpu:
            device, batch, dtype, providers = "cpu", "1", "fp32", "eager,bbfast"
        name = f"models-{mode}-{batch}-{dtype}-{model}".replace(",", "-")
        name += "-long" if providers == LONG_PROVIDERS else ""
        cases = len(batch.split(",")) * len(dtype.split(","))
        command = [sys.executable, "-m", "bbfast", "bench", model, "--mode", mode, "--batch", batch, "--dtype", dtype]
        command += ["--device", device, "--providers", providers, "--seconds", SECONDS_PER_PROVIDER]
        command += ["--json", str(self.folder / f"{name}.json")]
        return Step(name, command, limit_s * cases, until, ("timm",))

    def together(
        self, models: tuple[str, ...], mode: str, providers: str = PROVIDERS, until: float = 1.0, batch: str = "128"
    ) -> Step:
        """Several models at batch 128 in bf16: they compile at the same time and are measured in turns."""
        device, dtype = "cuda", "bf16"
        if not self.gpu:
            device, batch, dtype, providers = "cpu", "1", "fp32", "eager,bbfast"
        command = [sys.executable, "-m", "bbfast.benchmarks.together", *models, "--output", str(self.folder)]
        command += ["--prefix", f"models-{mode}-{batch}-{dtype}-", "--prepare-seconds", str(PREPARE_SECONDS), "--"]
        command += ["--mode", mode, "--batch", batch, "--dtype", dtype, "--device", device]
        command += ["--providers", providers, "--seconds", SECONDS_PER_PROVIDER]
        return Step(f"models-{mode}-{models[0]}", command, PREPARE_SECONDS + 30 * len(models), until, ("timm",))

    def op(self, op: str, until: float = 1.0) -> Step:
        command = [*self._pytest(), "-q", str(self.root / "benchmarks" / f"bench_{op}.py")]
        command += ["--benchmark-only", f"--benchmark-json={self.folder / f'ops-{op}.json'}"]
        return Step(f"ops-{op}", command, 90, until, ("pytest", "pytest_benchmark"))

    def _sanitize(self) -> Step:
        """A few kernels under memcheck, which finds reads and writes outside of tensors if torch caches no memory."""
        checked = [*self._pytest(), "-q", "-m", "gpu", "-k", SANITIZED_TESTS, *self._gpu_tests()]
        command = [self.sanitizer or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *checked]
        step = Step("sanitizer", command, 300, needs=("pytest",))
        step.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        if not self.sanitizer:
            step.outcome, step.reason = "skipped", "compute-sanitizer is not on PATH"
        return step

    def _gpu_tests(self) -> list[str]:
        """The files with tests marked gpu: to collect all the others takes a quarter of a minute."""
        files = sorted((self.root / "tests").glob("test_*.py"))
        return [str(path) for path in files if "pytest.mark.gpu" in path.read_text()]

    def _pytest(self) -> list[str]:
        config = self.root / "pyproject.toml"
        return [sys.executable, "-m", "pytest", f"--rootdir={self.root}", f"--config-file={config}"]
