"""Writes `sources/<library>.json`: which versions of a library have the code that the adapters were written for.

    python -m bbfast.swap.record_sources timm 1.0.31 path/to/site-packages [--accept]

compares every function that the adapters rely on with the source of that version, which need not be installed or
importable: an unpacked wheel will do. A function whose code is known from another version is recorded; one that
differs is named, and recorded only with --accept, which is for who has read it and found that the fast class does the
same.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
from pathlib import Path

from bbfast.swap import _fast, _fingerprint, _fold, _lending


def names_read(library: str) -> list[str]:
    """Qualified names of all functions of `library` that adapters rely on."""
    for foreign, adapter in _fast.ADAPTERS.items():
        if foreign.partition(".")[0] == library:
            importlib.import_module(foreign)
            importlib.import_module(adapter)
    code = [(foreign, fast.relies_on) for foreign, fast in _fast.fast_classes().items()] + _lending.code_read()
    code += _fold.code_read()
    names = {name for cls, relies_on in code for name in (_fingerprint.forward_name(cls), *relies_on)}
    names.update(_fingerprint.wrapper_makers(), _fingerprint.names_of_other_releases())
    return sorted(name for name in names if name.partition(".")[0] == library)


def source_of(name: str, root: Path) -> str | None:
    """Text of the function with this qualified name in the packages under `root`, decorators included."""
    *parents, attribute = name.split(".")
    for depth in range(len(parents), 0, -1):
        stem = root.joinpath(*parents[:depth])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return _find(path.read_text(encoding="utf-8"), [*parents[depth:], attribute])
    return None


def _find(text: str, path: list[str]) -> str | None:
    node = ast.parse(text)
    for name in path:
        defined = [child for child in node.body if getattr(child, "name", None) == name]
        if not defined:
            return None
        node = defined[-1]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "".join(text.splitlines(keepends=True)[first - 1 : node.end_lineno])


def record(library: str, version: str, root: Path, accept: bool) -> list[str]:
    """Updates the file; returns the names whose code is not known, or is not there."""
    path = Path(_fingerprint.__file__).with_name("sources") / f"{library}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    unknown = []
    for name in names_read(library):
        text = source_of(name, root)
        if text is None:
            unknown.append(f"{name} is not there")
            continue
        found = _fingerprint.fingerprint_of_source(text)
        versions = known.setdefault(name, {})
        if found not in versions and not accept:
            unknown.append(f"{name} differs: {found}")
            continue
        versions[found] = sorted({*versions.get(found, []), version}, key=_fingerprint.by_number)
    known = {name: hashes for name, hashes in sorted(known.items()) if hashes}
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return unknown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="timm, torchvision or transformers")
    parser.add_argument("version", help="the version that lies there")
    parser.add_argument("root", type=Path, help="the folder that holds the library's folder")
    parser.add_argument("--accept", action="store_true", help="record code that differs, too: it was read")
    args = parser.parse_args()
    if not (args.root / args.library).is_dir():
        parser.error(f"{args.root} holds no {args.library}")
    for line in record(args.library, args.version, args.root, args.accept):
        print(line)


if __name__ == "__main__":
    main()
