"""Whether a provider's answer is right enough for its speed to count."""

from __future__ import annotations

import torch

Values = dict[str, torch.Tensor]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Rounding of a hundred layers in float32 stays below 1e-4 of the largest value; a wrong mask, shift, statistic or
# activation is off by 1e-2 and more. TF32 rounds like float16.
TOLERANCE_FP32 = 1e-3
TOLERANCE_TF32 = 2e-2
K = 4
# Beyond this share of the largest value eager itself tells nothing about what is right. Batch statistics of few pixels
# in bf16 already take a ResNet-50 to a third.
MAX_BASELINE_ERROR = 1.0


class WrongAnswerError(RuntimeError):
    """What a provider computes is not finite, or not what eager computes."""


class Judge:
    """Compares each provider's values with those of the baseline, which is judged first.

    In bf16 and fp16 the rule is the tests': with `|.|` the largest magnitude over a tensor,
    `|ours - exact| <= 2 |baseline - exact| + 4 eps |exact|`, where exact is eager in float32. A provider may round
    elsewhere than eager does, but not worse. In fp32 the baseline is the reference itself and its own error unknown,
    so the allowance is a fixed share of the largest value, larger where a GPU may round products to TF32.

    Args:
        dtype: one of `DTYPES`.
        on_gpu: whether TF32 may be at work.
        exact: values in float32; None where the baseline's are the reference.
    """

    def __init__(self, dtype: str, on_gpu: bool, exact: Values | None):
        self.eps = torch.finfo(DTYPES[dtype]).eps
        tf32 = on_gpu and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
        self.tolerance_fp32 = TOLERANCE_TF32 if tf32 else TOLERANCE_FP32
        self.exact = None if exact is None else _checked(exact)
        self.baseline: Values | None = None

    def __call__(self, values: Values) -> float:
        """Returns the largest difference to the baseline, relative to its largest value, in the first of the values.

        Raises:
            WrongAnswerError: values are not finite, or differ more than allowed.
        """
        values = _checked(values)
        if self.baseline is None:
            self._accept_baseline(values)
        if values.keys() != self.baseline.keys():
            raise WrongAnswerError(f"gives {', '.join(values)}, the baseline {', '.join(self.baseline)}")
        errors = {name: self._judge(name, value) for name, value in values.items()}
        return next(iter(errors.values()))

    def _accept_baseline(self, values: Values) -> None:
        name = next(iter(values))
        if self.exact is not None and (
            largest_difference(values[name], self.exact[name]) > MAX_BASELINE_ERROR * largest(self.exact[name])
        ):
            raise WrongAnswerError(f"{name}: too far from float32 to judge others by")
        self.baseline = values

    def _judge(self, name: str, value: torch.Tensor) -> float:
        baseline = self.baseline[name]
        if value.shape != baseline.shape:
            raise WrongAnswerError(f"{name}: shape {tuple(value.shape)}, the baseline's is {tuple(baseline.shape)}")
        difference = largest_difference(value, baseline)
        if self.exact is None:
            error, allowed = difference, self.tolerance_fp32 * largest(baseline)
        else:
            exact = self.exact[name]
            error = largest_difference(value, exact)
            allowed = 2 * largest_difference(baseline, exact) + K * self.eps * largest(exact)
        if error > allowed:
            raise WrongAnswerError(f"{name}: error {error:.3g}, allowed {allowed:.3g}")
        return difference / largest(baseline) if difference else 0.0


def _checked(values: Values) -> Values:
    """The values in float32 on the CPU, out of the way of who comes next."""
    for name, value in values.items():
        if not value.isfinite().all():
            raise WrongAnswerError(f"{name}: not finite")
    return {name: value.detach().float().cpu().clone() for name, value in values.items()}


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def largest_difference(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x - y).abs().max().item()
