"""Populations: configurations drawn from one space, what they cost and, once trained, their errors, as JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bbfast.design_space._complexity import complexity
from bbfast.design_space._configs import Config, config_from_dict


@dataclass
class Population:
    """Models of one space, to be trained alike.

    Attributes:
        space: the space's name.
        models: per model its `config`, `parameters`, `flops`, `activations` and, once trained, its `error`.
        settings: whatever else was decided for all of them: seed, flops, image_size, epochs.
    """

    space: str
    models: list[dict]
    settings: dict = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        space: str,
        configs: Sequence[Config],
        image_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        **settings,
    ) -> Population:
        """Untrained models, with what they cost; the costs' arguments are those of `complexity`."""
        size = {"image_size": image_size, "num_classes": num_classes, "in_chans": in_chans}
        models = [{"config": config.to_dict(), **asdict(complexity(config, **size))} for config in configs]
        return cls(space, models, {**size, **settings})

    @property
    def configs(self) -> list[Config]:
        return [config_from_dict(model["config"]) for model in self.models]

    @property
    def errors(self) -> list[float]:
        """One per model.

        Raises:
            ValueError: a model has none, or one that is no number.
        """
        errors = []
        for index, model in enumerate(self.models):
            error = model.get("error")
            if error is None:
                raise ValueError(
                    f"models[{index}] has no error; build and train the configurations, and write their errors there"
                )
            if not isinstance(error, (int, float)) or isinstance(error, bool):
                raise ValueError(f"models[{index}] has the error {error!r}, which is no number")
            errors.append(error)
        return errors

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Population:
        """Reads what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such JSON; the message names the file.
        """
        try:
            values = json.loads(Path(path).read_text())
        except ValueError as error:  # no JSON, or no text at all
            raise ValueError(f"{path} is not JSON: {error}") from error
        known = isinstance(values, dict) and isinstance(values.get("space"), str)
        known = known and isinstance(values.get("models"), list) and isinstance(values.get("settings", {}), dict)
        if not known or not all(isinstance(model, dict) for model in values["models"]):
            raise ValueError(f"{path} holds no population: an object with space (a name), models and settings")
        return cls(values["space"], values["models"], values.get("settings", {}))
