"""Faults in the data: each one located, all of them counted, raised once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from sparklab.errors import DataError

EXCERPT: Final = 80
"""Characters of the offending value that an error shows."""
SHOWN: Final = 5
"""Faults an error spells out; the others are counted."""


def excerpt(value: object) -> str:
    """The first 80 characters of a value on one line; whatever a terminal would act on (control, bidi, surrogate) is escaped."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr, skipkeys=True)
    shown = "".join(char if char.isprintable() else _escaped(char) for char in text[:EXCERPT])
    return shown + ("…" if len(text) > EXCERPT else "")


def _escaped(char: str) -> str:
    point = ord(char)
    return {9: "\\t", 10: "\\n", 13: "\\r"}.get(point) or (f"\\x{point:02x}" if point < 256 else f"\\u{point:04x}" if point < 65536 else f"\\U{point:08x}")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing wrong with one record."""

    kind: str
    """What is wrong, in words that are the same for all faults of this sort, since they are counted by it."""
    source: str
    line: int
    field: str = ""
    """Where in the record, as in ``messages[2].role``; "" for the whole line."""
    detail: str = ""
    """What is special to this one, as the parser's column."""
    excerpt: str = ""
    fix: str = ""

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}" + (f", {self.field}" if self.field else "")
        what = f"{self.kind} ({self.detail})" if self.detail else self.kind
        return f"{where}: {what}" + (f": {self.excerpt}" if self.excerpt else "")


class WrongError(ValueError):
    """One fault, before anybody knows its file and line."""

    def __init__(self, kind: str, value: object = "", *, field: str = "", detail: str = "", fix: str = "") -> None:
        super().__init__(kind)
        self.kind, self.value, self.field, self.detail, self.fix = kind, value, field, detail, fix

    def at(self, source: str, line: int) -> Fault:
        """The fault, located."""
        return Fault(kind=self.kind, source=source, line=line, field=self.field, detail=self.detail, excerpt=excerpt(self.value), fix=self.fix)


class Faults:
    """Collects faults in bounded memory: every one counted, the first few kept, and each handed to ``each`` where that is given.

    >>> faults = Faults()
    >>> faults.add(Fault(kind="not JSON", source="a.jsonl", line=3))
    >>> faults.total
    1
    """

    def __init__(self, each: Callable[[Fault], None] | None = None) -> None:
        self.by_kind: Counter[str] = Counter()
        self._each = each
        self.first: list[Fault] = []
        self.lines = 0
        self._fixes: dict[str, str] = {}
        self._last: tuple[str, int] | None = None

    def add(self, fault: Fault) -> None:
        """Count one fault; faults of one line must come one after the other."""
        self.by_kind[fault.kind] += 1
        self._fixes.setdefault(fault.kind, fault.fix)
        if (fault.source, fault.line) != self._last:
            self.lines += 1
            self._last = (fault.source, fault.line)
        if len(self.first) < SHOWN:
            self.first.append(fault)
        if self._each is not None:
            self._each(fault)

    @property
    def total(self) -> int:
        """Faults counted."""
        return self.by_kind.total()

    def raise_any(self, source: str, records: int, hint: str = "") -> None:
        """Raise one :class:`DataError` for everything collected, or return where there is nothing.

        ``records`` is how many records were looked at; ``hint`` a fix that mends all of them at once and so goes first.
        """
        if not self.total:
            return
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.by_kind.most_common())
        lines = [f"{source}: {self.lines:,} of {records:,} records cannot be used ({kinds}):", *(f"  - {fault}" for fault in self.first)]
        if self.total > len(self.first):
            lines.append(f"  ... and {self.total - len(self.first):,} more")
        fixes = [hint, *(self._fixes[kind] for kind, _ in self.by_kind.most_common(3))]
        raise DataError("\n".join(lines), "; ".join(dict.fromkeys(fix for fix in fixes if fix)) or "mend or remove these lines")


class Skipped:
    """Writes records that are left out to a JSONL file, a line for each fault, so that nothing is lost silently: ``Faults(skipped)``.

    The file begins anew with every preparation, and there is none where nothing is left out. Without a path nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> Skipped:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def __call__(self, fault: Fault) -> None:
        """Write one fault."""
        if self._path is None:
            return
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8")
        line = {"source": fault.source, "line": fault.line, "field": fault.field, "reason": fault.kind, "detail": fault.detail, "excerpt": fault.excerpt}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
