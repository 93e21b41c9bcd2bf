"""What a plan, a swap or a restoration did to each block of a model, and why not to the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field

STATUSES = ("swapped", "already swapped", "folded", "skipped", "restored")


@dataclass(frozen=True)
class SwapRow:
    """One block.

    Attributes:
        path: where it is in the model, as in `model.get_submodule(path)`; "" for the model itself.
        old: its class before, with the module that defines it.
        new: its class afterwards; "" where it was left alone.
        status: one of `STATUSES`; in a plan, what `swap` would make of it.
        reason: why it was skipped; "" otherwise.
    """

    path: str
    old: str
    new: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class SwapReport:
    """The rows of all blocks that have a fast class or might be expected to, in the model's order.

    Attributes:
        rows: a `SwapRow` each.
        dry_run: whether this is a plan, and the model was left as it was.
        notes: what concerns no block alone, such as an adapter that does not fit the installed library.
    """

    rows: tuple[SwapRow, ...]
    dry_run: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def totals(self) -> dict[str, int]:
        """Number of rows of each status."""
        counts = Counter(row.status for row in self.rows)
        return {status: counts[status] for status in STATUSES if counts[status]}

    @property
    def swapped(self) -> tuple[SwapRow, ...]:
        return tuple(row for row in self.rows if row.status == "swapped")

    @property
    def skipped(self) -> tuple[SwapRow, ...]:
        return tuple(row for row in self.rows if row.status == "skipped")

    def to_dict(self) -> dict:
        """Rows, totals and notes as plain dicts, lists, strings and numbers, for logs."""
        return {
            "dry_run": self.dry_run,
            "totals": self.totals,
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [*_table(self.rows), *(f"note: {note}" for note in self.notes), self._summary()]
        return "\n".join(lines)

    def _summary(self) -> str:
        if not self.rows:
            return "no block of this model is one that bbfast knows a fast class for"
        counted = ", ".join(f"{count} {status}" for status, count in self.totals.items())
        return f"plan (nothing was changed): {counted}" if self.dry_run else counted


def _table(rows: tuple[SwapRow, ...]) -> list[str]:
    """Equal rows of consecutive blocks differ by path alone, so every row is shown, aligned."""
    if not rows:
        return []
    cells = [("path", "class", "status", "reason")]
    cells += [(row.path or "(the model)", _classes(row), row.status, row.reason) for row in rows]
    widths = [max(len(cell[column]) for cell in cells) for column in range(3)]
    lines = []
    for *columns, reason in cells:
        padded = "  ".join(text.ljust(width) for text, width in zip(columns, widths))
        lines.append(f"{padded}  {reason}".rstrip())
    return lines


def _classes(row: SwapRow) -> str:
    old, new = (name.rpartition(".")[2] for name in (row.old, row.new))
    return f"{old} -> {new}" if new else old
