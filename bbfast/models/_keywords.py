"""Which keywords a function that makes a model takes, so that a typo is named before anything is made."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import get_type_hints


def check_keywords(model_name: str, given: Iterable[str], build: Callable, others: Iterable[str] = ()) -> None:
    """Raises TypeError if there is a keyword that `build` does not take.

    Args:
        given: the keywords. others: some that are taken elsewhere, to be named where they are meant.
    """
    accepted = accepted_keywords(build)
    if accepted is None:  # then Python says it
        return
    for name in given:
        if name not in accepted:
            close = difflib.get_close_matches(name, accepted | set(others), n=1, cutoff=0.75)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(sorted(accepted))}"
            raise TypeError(f"{model_name} takes no argument {name!r}; {hint}")


@functools.cache
def accepted_keywords(build: Callable) -> frozenset[str] | None:
    """The keywords of `build`; where it passes `**arguments` on, also those of the class that it says it returns.

    Returns:
        None where they cannot be known.
    """
    parameters = inspect.signature(build).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return frozenset(names)
    function = build.func if isinstance(build, functools.partial) else build
    made = None if inspect.isclass(function) else get_type_hints(function).get("return")
    if not inspect.isclass(made):
        return None
    of_class = accepted_keywords(made)
    if of_class is None:
        return None
    # What a class cannot do without is given by the function.
    required = {p.name for p in inspect.signature(made).parameters.values() if p.default is p.empty}
    return frozenset(names | (of_class - required))
