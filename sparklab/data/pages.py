"""Tokenised records as people read them: tokens as text, what is learned apart from what is only read, every special token visible.

Needs neither torch nor transformers: an entry of :mod:`sparklab.data.store` and the tokenizer's own file are enough.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparklab.data import signs, split
from sparklab.data.store import Store

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

TOKENS: Final = 1500
"""Tokens of a document that a page shows; the others are counted."""
CHARACTERS: Final = 6000
FAULTS: Final = 2000
"""Faults that can be paged through; all are counted."""
_UNSEEN: Final = re.compile("([\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]+)")
"""What a page or a terminal would act on without showing it: controls, and what turns the direction of text. Joiners of letters are text."""

FLAGS: Final = {
    "nothing_learned": (signs.NOTHING_LEARNED, "nothing learned"),
    "no_end": (signs.NO_END, "no end-of-turn"),
    "double_bos": (signs.DOUBLE_BOS, "BOS twice"),
    "empty_turn": (signs.EMPTY_TURN, "an empty turn"),
    "spells": (signs.SPELLS, "spells special tokens"),
    "refused": (signs.FAULT, "the template refuses it"),
}
"""Name, bit, and what a record's line says."""

Piece = dict[str, Any]
"""``t`` text, ``k`` kind (text, special, escape, break), and where true ``l`` learned and ``x`` beyond max_length."""


class Decoder:
    """Token ids to text, from a tokenizer's file; ``tokenizer.json``, or ``pieces.json`` for tokenizers that have none."""

    def __init__(self, folder: Path) -> None:
        self._decode: Callable[[list[int]], str]
        self.special: dict[int, str]
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer  # noqa: PLC0415 - ten milliseconds, for those who look

            backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._decode = lambda ids: str(backend.decode(ids, skip_special_tokens=False))
            self.special = {token: added.content for token, added in backend.get_added_tokens_decoder().items() if not added.content.isspace()}
        else:
            known = json.loads((folder / "pieces.json").read_text(encoding="utf-8"))
            pieces: list[str] = known["pieces"]
            self._decode = lambda ids: "".join(pieces[token] for token in ids).replace("\u2581", " ")
            self.special = {int(token): name for token, name in known["special"].items()}

    def text(self, ids: list[int], start: int, end: int) -> str:
        """The text of ``ids[start:end]`` as it stands in the whole: some decoders write the first token of a text otherwise."""
        before, whole = self._decode(ids[:start]), self._decode(ids[:end])
        return whole[len(before) :] if whole.startswith(before) else self._decode(ids[start:end])

    def pieces(self, ids: list[int], learned: Sequence[int], limit: int) -> list[Piece]:
        """A document in runs: neighbouring tokens that are learned alike; those from ``limit`` on are beyond max_length."""
        shown = ids[:TOKENS]

        def look(at: int) -> tuple[int, bool, bool]:
            return (at if shown[at] in self.special else -1, bool(learned[at]), at >= limit)

        found: list[Piece] = []
        for (special, is_learned, beyond), group in groupby(range(len(shown)), look):
            run = list(group)
            more = {**({"l": 1} if is_learned else {}), **({"x": 1} if beyond else {})}
            if special >= 0:
                found.append({"t": self.special[shown[special]], "k": "special", **more})
            else:
                found += _shown(self.text(shown, run[0], run[-1] + 1)[:CHARACTERS], more)
        return found


def _shown(text: str, more: dict[str, int]) -> list[Piece]:
    """A text in pieces: as it is, what cannot be seen as its escape, line ends visible."""
    found: list[Piece] = []
    for at, part in enumerate(_UNSEEN.split(text)):
        if at % 2:
            found.append({"t": part.encode("unicode_escape").decode("ascii"), "k": "escape", **more})
            continue
        lines = part.split("\n")
        for number, line in enumerate(lines):
            if line:
                found.append({"t": line, "k": "text", **more})
            if number < len(lines) - 1:
                found.append({"t": "\u21b5", "k": "break", **more})
    return found


def paragraphs(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces in lines, each of which reads in a direction of its own: one ends at the mark of a line's end, and where one turn ends and another begins."""
    lines: list[list[Piece]] = [[]]
    for piece in pieces:
        line = lines[-1]
        turn_is_over = len(line) > 1 and line[-1]["k"] == "special" and any(one["k"] != "special" for one in line)
        if line and (line[-1]["k"] == "break" or (turn_is_over and piece["k"] != "break")):
            lines.append([])
        lines[-1].append(piece)
    return [line for line in lines if line]


@dataclass(frozen=True, eq=False)
class Leaf:
    """One source's tokens and which of its records are held out."""

    store: Store
    held: Array
    """[records] booleans."""
    name: str
    kind: str = "jsonl"
    """As :class:`sparklab.data.read.Source` has it."""

    def where(self, record: int) -> str:
        """Where a record stands: its file and line or, of texts, each of which is a record, which of them."""
        row, name = self.store.records[record], Path(self.name).name
        return f"{name}, text {int(row['number']) + 1:,}" if self.kind == "text" else f"{name}:{int(row['line'])}"


class Pages:
    """All records of an inspection, a few at a time: ``pages.page("all", 0, 5)``.

    Filters: ``all``, ``odd`` (anything at all), each of :data:`FLAGS`, ``long``, ``repeated``, ``held_out``, and ``unusable`` for records
    that never became tokens.
    """

    def __init__(self, leaves: Sequence[Leaf], decoder: Decoder, max_length: int, on_long: str) -> None:
        self.leaves, self.decoder, self.max_length, self.on_long = leaves, decoder, max_length, on_long

    def count(self, wanted: str) -> int:
        """How many records a filter leaves."""
        return len(self._unusable) if wanted == "unusable" else len(self._places(wanted))

    def page(self, wanted: str, first: int, count: int) -> list[dict[str, Any]]:
        """Some of them, ready for JSON."""
        if wanted == "unusable":
            return self._unusable[first : first + count]
        return [self._view(int(leaf), int(record)) for leaf, record in self._places(wanted)[first : first + count]]

    @functools.lru_cache(maxsize=16)  # noqa: B019 - lives as long as the inspection that is looked at
    def _places(self, wanted: str) -> Array:
        """[records, 2]: which leaf, which of its records."""
        import numpy as np  # noqa: PLC0415

        found = []
        for number, leaf in enumerate(self.leaves):
            inside = np.flatnonzero(self._mask(leaf, wanted))
            found.append(np.stack([np.full(len(inside), number), inside], 1))
        return np.concatenate(found)

    def _mask(self, leaf: Leaf, wanted: str) -> Array:
        import numpy as np  # noqa: PLC0415

        records = leaf.store.records
        if wanted == "held_out":
            return leaf.held
        if wanted in FLAGS:
            flagged: Array = records["flags"] & FLAGS[wanted][0] > 0
            return flagged
        found = np.full(len(records), wanted == "all")
        if wanted in ("odd", "long"):
            documents = leaf.store.documents
            found[documents["record"][documents["length"] > self.max_length]] = True
        if wanted in ("odd", "repeated"):
            found |= self._repeated[self.leaves.index(leaf)]
        if wanted == "odd":
            found |= records["flags"] & ~np.uint32(signs.ASKS) > 0
        return found

    @functools.cached_property
    def _repeated(self) -> list[Array]:
        """Of each leaf, which of its records say the same as another of it."""
        import numpy as np  # noqa: PLC0415

        found = []
        for leaf in self.leaves:
            groups, _ = split.group(leaf.store.records["key"])
            found.append(np.bincount(groups, minlength=1)[groups] > 1)
        return found

    @functools.cached_property
    def _unusable(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for leaf in self.leaves:
            for fault in leaf.store.faults():
                if len(found) == FAULTS:
                    return found
                where = f"{Path(fault['source']).name}:{fault['line']}" + (f", {fault['field']}" if fault["field"] else "")
                what = fault["kind"] + (f" ({fault['detail']})" if fault["detail"] else "")
                found.append({"where": where, "fault": what, "fix": fault["fix"], "lines": [_shown(fault["excerpt"], {})]})
        return found

    def _view(self, number: int, record: int) -> dict[str, Any]:
        import numpy as np  # noqa: PLC0415

        leaf = self.leaves[number]
        row, documents = leaf.store.records[record], leaf.store.documents
        first, end = np.searchsorted(documents["record"], [record, record + 1]).tolist()
        lines: list[list[Piece]] = []
        tokens = learned = 0
        for document in documents[first:end]:
            start, length = int(document["start"]), int(document["length"])
            tokens, learned = tokens + length, learned + int(document["learned"])
            limit = self.max_length if self.on_long in ("truncate", "drop") else length
            shown = min(length, TOKENS)
            ids, mask = (column[start : start + shown].tolist() for column in (leaf.store.ids, leaf.store.learned))
            lines += paragraphs(self.decoder.pieces(ids, mask, 0 if limit < length and self.on_long == "drop" else limit))
            if length > shown:
                lines.append([{"t": f"\u2026 {length - shown:,} more tokens", "k": "note"}])
        flags = [words for bit, words in FLAGS.values() if int(row["flags"]) & bit]
        if self._repeated[number][record]:
            flags.append("says the same as another")
        if any(int(document["length"]) > self.max_length for document in documents[first:end]):
            flags.append(f"longer than {self.max_length:,}: {_LONG[self.on_long]}")
        return {
            "where": leaf.where(record),
            "side": "held out" if leaf.held[record] else "learned from",
            "tokens": tokens,
            "learned": learned,
            "documents": end - first,
            "flags": flags,
            "scripts": signs.script_names(int(row["scripts"])),
            "lines": lines,
        }


_LONG: Final = {"truncate": "cut", "split": "split", "drop": "left out", "error": "an error"}
