"""Whether a foreign function is the code that an adapter was written for.

A fast class does what a foreign forward does, so it may take its place only where that forward is the one that was
read. Every function that an adapter relies on stands in `sources/<library>.json` with a hash of its source, for each
version of the library whose source was compared. Comments, docstrings and white space do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import json
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from importlib import resources

from torch import nn

_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENCODING, tokenize.ENDMARKER)


def fingerprint(function) -> str:
    """Hash of what `function`'s source says, 16 hexadecimal digits.

    Raises:
        OSError: there is no source.
        AttributeError: not a Python function.
    """
    # Of its code, not of what it wraps: a patch that calls itself a wrapper is a patch.
    return fingerprint_of_source(inspect.getsource(function.__code__))


def fingerprint_of_source(source: str) -> str:
    """`fingerprint` of a function whose text is `source`."""
    source = textwrap.dedent(source)
    docstring = _docstring_lines(source)
    words = []
    for kind, text, line in _tokens(source):
        if kind in _LAYOUT or (kind == tokenize.STRING and line in docstring):
            continue
        # An indent is a word of its own, whatever its width.
        words.append(text if text.strip() else tokenize.tok_name[kind])
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def _tokens(source: str) -> Iterator[tuple[int, str, int]]:
    """(kind, text, first line) of each token, an f-string being one, as it was before Python 3.12 took them apart."""
    lines = source.splitlines(keepends=True)
    outermost, depth = None, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        if name in ("FSTRING_START", "TSTRING_START"):
            outermost = token if depth == 0 else outermost
            depth += 1
        elif name in ("FSTRING_END", "TSTRING_END"):
            depth -= 1
            if depth == 0:
                yield tokenize.STRING, _between(lines, outermost.start, token.end), outermost.start[0]
        elif depth == 0:
            yield token.type, token.string, token.start[0]


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text from one place (line from 1, column from 0) to another."""
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return "".join([lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]])


def _docstring_lines(source: str) -> range:
    (function,) = ast.parse(source).body
    if not isinstance(function, ast.FunctionDef):  # a line with a lambda in it
        return range(0)
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return range(first.lineno, first.end_lineno + 1)
    return range(0)


@functools.cache
def known_sources(library: str) -> dict[str, dict[str, list[str]]]:
    """For each function by its qualified name: the hashes it may have, and the versions that have them."""
    file = resources.files("bbfast.swap").joinpath("sources", f"{library}.json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@functools.cache
def objection_to(name: str, function) -> str | None:
    """Why `function`, which stands under the qualified `name`, is not what was read; None if it is."""
    if (maker := _maker_of(function)) is not None:
        return objection_to(maker, _resolve(maker)) or objection_to(name, function.__wrapped__)
    library = name.partition(".")[0]
    known = known_sources(library).get(name)
    if known is None:
        return f"{name} is not a function that any adapter was written for"
    try:
        found = fingerprint(function)
    except (OSError, AttributeError, SyntaxError, tokenize.TokenError) as error:
        return f"the source of {name} cannot be read, so nobody knows what it does ({error})"
    if found in known:
        return None
    versions = sorted({version for versions in known.values() for version in versions}, key=by_number)
    return f"{name} is not the code of {library} {_enumerate(versions)}: it was patched, or this is another version"


# Functions that adapters rely on in releases other than the installed one; see `of_other_releases`.
_of_other_releases: set[str] = set()


def of_other_releases(*names: str) -> None:
    """Says that functions of these qualified names were read, too, in releases that have them."""
    _of_other_releases.update(names)


def names_of_other_releases() -> frozenset[str]:
    return frozenset(_of_other_releases)


# Functions that put a wrapper around the forwards of classes; see `knows_wrappers_of`.
_wrapper_makers: list[str] = []


def knows_wrappers_of(name: str) -> None:
    """Says that a wrapper which the function of this qualified name puts around a forward leaves what it does alone.

    What was read is then that function's code and the wrapped forward's.
    """
    _wrapper_makers.append(name)


def wrapper_makers() -> tuple[str, ...]:
    return tuple(_wrapper_makers)


def _maker_of(function) -> str | None:
    """The function known to make wrappers which has made `function`, if one has."""
    made = getattr(function, "__code__", None)
    for name in _wrapper_makers:
        code = getattr(_resolve(name), "__code__", None)
        if code is not None and made in code.co_consts:
            return name
    return None


# torch's forwards as they were when bbfast was imported: later ones are somebody's patch.
_torch_forwards: dict[type[nn.Module], object] = {}


def remember_torch_forward(cls: type[nn.Module]) -> None:
    owner = _owner_of_forward(cls)
    _torch_forwards[owner] = owner.forward


def methods_read(cls: type[nn.Module], relies_on: tuple[str, ...]) -> tuple[str, ...]:
    """Names of methods of `cls` among functions by qualified name: who replaces one on an instance wants his own."""
    classes = {f"{each.__module__}.{each.__qualname__}" for each in cls.__mro__}
    return tuple(name for owner, _, name in (read.rpartition(".") for read in relies_on) if owner in classes)


def replaced_methods(module: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Why what this instance runs is not what was read, if somebody replaced one of these methods on it."""
    return [
        f"has a {name} of its own (somebody replaced it on the instance)" for name in names if name in module.__dict__
    ]


def objections_to_code(cls: type[nn.Module], relies_on: tuple[str, ...]) -> list[str]:
    """Why what instances of `cls` run is not what was read: their forward, and functions by qualified name."""
    functions = ((name, _resolve(name)) for name in relies_on)
    # A function that is not there is called by no code that was read: where it was, the caller was another.
    objections = [_objection_to_forward(cls), *(objection_to(name, found) for name, found in functions if found)]
    return [objection for objection in objections if objection]


def _objection_to_forward(cls: type[nn.Module]) -> str | None:
    """Why `cls.forward`, inherited or its own, is not what was read; None if it is."""
    owner = _owner_of_forward(cls)
    if owner.__module__.startswith("bbfast."):
        return None
    if owner in _torch_forwards:
        patched = owner.forward is not _torch_forwards[owner]
        return f"{owner.__name__}.forward was replaced after bbfast was imported" if patched else None
    return objection_to(forward_name(cls), owner.forward)


def forward_name(cls: type[nn.Module]) -> str:
    """Qualified name of the forward that instances of `cls` run."""
    owner = _owner_of_forward(cls)
    return f"{owner.__module__}.{owner.__qualname__}.forward"


def _owner_of_forward(cls: type[nn.Module]) -> type:
    return next(base for base in cls.__mro__ if "forward" in base.__dict__)


def by_number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _enumerate(versions: list[str]) -> str:
    return versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"


def _resolve(name: str):
    """The function of this qualified name, in a module that is imported already; None if it is not there."""
    module_name = name
    while module_name not in sys.modules:
        module_name = module_name.rpartition(".")[0]
    found = sys.modules[module_name]
    for attribute in name[len(module_name) + 1 :].split("."):
        found = getattr(found, attribute, None)
    return found
