"""Records to tokens, once: on every core, with progress, kept on disk under a key of everything the tokens depend on.

The first records are encoded right here. Where more follow, a process of its own goes on with the rest (:mod:`sparklab.data.encoders`):
it loads the tokenizer without torch, then divides itself into one process a core. Each reads the whole source and encodes its own share of
it: reading costs a tenth of encoding, and nothing but what was read from disk and what is written there ever passes between processes.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparklab.data import signs, store
from sparklab.data.encode import CHUNK, Encoded, Encoder
from sparklab.data.faults import Fault, Faults
from sparklab.data.read import Source
from sparklab.data.record import Record
from sparklab.data.store import Shard, Store
from sparklab.data.template import IGNORED
from sparklab.errors import DiskFull

if TYPE_CHECKING:
    from sparklab.planner.recipe import Recipe

HERE: Final = 16
"""Chunks of records that are encoded in this process before others are started: those take seconds to start."""
Tell = Callable[[int, int | None], Any]
"""Told how many records are done, and of how many where that is known."""


@dataclass(frozen=True)
class Share:
    """Which chunks of the source one process encodes: those from ``skip`` on whose number, divided by ``world``, leaves ``rank``."""

    rank: int = 0
    world: int = 1
    skip: int = 0

    def has(self, chunk: int) -> bool:
        return chunk >= self.skip and chunk % self.world == self.rank


def tokenised(data: str, source: Source, recipe: Recipe, encoder: Encoder, tell: Tell | None = None, processes: int | None = None) -> Store:
    """The tokens of ``data``, which ``source`` reads, with their loss mask, from the cache or made now; ``encoder`` is the recipe's.

    ``tell`` hears of progress; ``processes`` is how many may encode at once (default: one a core). What is wrong with records is in the
    store's faults. Raises :class:`DataError` where the source cannot be read on or the template cannot be learned from, :class:`DiskFull`.
    """
    key = cache_key(source, recipe, encoder)
    with store.held(key) as folder:
        found = store.open_entry(folder)
        if found is None:
            try:
                with store.draft(folder) as made:
                    _Making(made, data, source, recipe, encoder, key, tell).run(processes or _cores())
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                fix = f"free some space, or name a folder on another disk in the environment: {store.SWITCH}"
                raise DiskFull(f"the disk is full: no room in {folder.parent} for the tokens of {source.name}", fix) from error
            found = store.open_entry(folder)
            assert found is not None, "sealed a moment ago"
            store.evict(folder)
    return found


def cache_key(source: Source, recipe: Recipe, encoder: Encoder) -> str:
    """Thirty-two hex digits of everything tokens and mask depend on: content, tokenizer, template, what is learned, and the code itself."""
    depends = [store.FORMAT, source.fingerprint, _tokenizer_text(encoder), recipe.template, recipe.learn, sorted(recipe.overrule), _code()]
    return hashlib.blake2b(json.dumps(depends).encode(), digest_size=16).hexdigest()


def _tokenizer_text(encoder: Encoder) -> str:
    """A digest of the tokenizer and its chat template."""
    tokenizer: Any = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # What a call last asked for is no part of a tokenizer, though its file has room for it.
    parts = {**json.loads(backend.to_str()), "truncation": None, "padding": None} if backend is not None else sorted(tokenizer.get_vocab().items())
    said = json.dumps(parts)
    more = [tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "add_bos_token", None), type(tokenizer).__name__]
    return hashlib.blake2b((said + repr(more)).encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


def _code() -> str:
    """A digest of this folder's source and of the versions that render and tokenise: what another version makes is another entry."""
    from importlib.metadata import version  # noqa: PLC0415

    whole = hashlib.blake2b(repr([version(name) for name in ("transformers", "tokenizers", "jinja2")]).encode(), digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        whole.update(file.read_bytes())
    return whole.hexdigest()


def _cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------- one process


class Part:
    """One process's share of an entry: its shard, and what it met on the way."""

    def __init__(self, folder: Path, encoder: Encoder, reads: bool) -> None:
        self.shard = Shard(folder)
        self.encoder = encoder
        self.ignored: Counter[str] = Counter()
        self.good = 0
        self._files = {name: open(folder / f"{name}.jsonl", "w", encoding="utf-8") for name in ("reading", "encoding")}  # noqa: SIM115 - closed by finish()
        self._reads = reads  # every process reads all of the source; one of them notes what is wrong with it
        self.reading = Faults(lambda fault: self._note("reading", fault)) if reads else Faults()

    def chunks(self, source: Source) -> Iterator[tuple[int, list[Record]]]:
        """The source's good records, so many at a time."""
        records = source.records(self.reading)
        number = 0
        while chunk := list(islice(records, CHUNK)):
            self.good += len(chunk)
            yield number, chunk
            number += 1

    def take(self, first: int, encoded: Iterable[Encoded]) -> None:
        """Append what became of consecutive records, the first of which is the source's ``first``-th good one."""
        import numpy as np  # noqa: PLC0415

        documents, records, ids, labels, start = [], [], [], [], self.shard.tokens
        for number, one in enumerate(encoded, first):
            flags = signs.FAULT if one.fault is not None else 0
            if one.fault is not None:
                self._note("encoding", one.fault)
            for document in one.documents:
                length = len(document.input_ids)
                documents.append((start, length, document.supervised, number))
                ids.append(document.input_ids)
                labels.append(document.labels)
                start += length
            self.ignored.update(one.record.ignored)
            records.append((one.record.key, number, one.record.line, _scripts(one.record), flags | self._flags(one)))
        tokens = start - self.shard.tokens
        self.shard.append(
            ids=np.fromiter(chain.from_iterable(ids), np.int32, tokens),
            learned=np.fromiter(chain.from_iterable(labels), np.int32, tokens) != IGNORED,
            documents=np.array(documents, np.dtype(store.DOCUMENT)),
            records=np.array(records, np.dtype(store.RECORD)),
        )

    def _flags(self, one: Encoded) -> int:
        flags = signs.SPELLS * one.spells | signs.ASKS * one.record.asks
        if any(_is_empty(message) for message in one.record.messages):
            flags |= signs.EMPTY_TURN
        if one.fault is not None:
            return flags
        ends, bos = self.encoder.stop_ids, self.encoder.tokenizer.bos_token_id
        if not any(document.supervised for document in one.documents):
            flags |= signs.NOTHING_LEARNED
        if any(document.supervised and not any(end in document.labels for end in ends) for document in one.documents):
            flags |= signs.NO_END
        if bos is not None and any(document.input_ids[:2] == [bos, bos] for document in one.documents):
            flags |= signs.DOUBLE_BOS
        return flags

    def _note(self, where: str, fault: Fault) -> None:
        self._files[where].write(json.dumps(asdict(fault)) + "\n")

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        self.shard.close()
        for file in self._files.values():
            file.close()

    def finish(self) -> None:
        """Write down what else there is to know."""
        known = {"good": self.good, "bad_lines": self.reading.lines} if self._reads else {}
        notes = {"ignored": dict(self.ignored), "warnings": self.encoder.warnings, "stop_ids": _stop_ids(self.encoder), **known}
        (self.shard.folder / "notes.json").write_text(json.dumps(notes), encoding="utf-8")


def _stop_ids(encoder: Encoder) -> list[int]:
    return [int(token) for token in encoder.stop_ids]


def _is_empty(message: dict[str, Any]) -> bool:
    return not str(message["content"]).strip() and len(message) == 2


def _scripts(record: Record) -> int:
    bits = 0
    for message in (*record.messages, *record.rejected):
        bits |= signs.script_bits(str(message["content"]))
    return bits | signs.script_bits(record.text or "")


def encode_share(part: Part, source: Source, share: Share, progress: Callable[[int], Any]) -> None:
    """One process's work, from the first record to the last."""
    done = 0
    for number, chunk in part.chunks(source):
        if share.has(number):
            part.take(number * CHUNK, part.encoder.encode(chunk))
            done += len(chunk)
            progress(done)
    part.finish()


# ---------------------------------------------------------------- all of them


class _Making:
    """An entry in the making, in its draft folder."""

    def __init__(self, folder: Path, data: str, source: Source, recipe: Recipe, encoder: Encoder, key: str, tell: Tell | None) -> None:
        self.folder, self.data, self.source, self.recipe, self.encoder, self.key, self.tell = folder, data, source, recipe, encoder, key, tell

    def run(self, processes: int) -> None:
        """Encode everything and lay it together."""
        done, parts = 0, [self.folder / "part-0"]
        with Part(parts[0], self.encoder, reads=True) as part:
            for number, chunk in part.chunks(self.source):
                part.take(number * CHUNK, self.encoder.encode(chunk))
                done += len(chunk)
                if self.tell is not None:
                    self.tell(done, None)
                if number == HERE - 1 and processes > 1:
                    parts += self._others(done, processes)
                    if len(parts) > 1:
                        break
            part.finish()
        self._lay_together(parts)

    def _others(self, done: int, processes: int) -> list[Path]:
        """The parts that other processes made of all records but the first ``done``; none where they could not, and this one has to go on."""
        total = _count_records(self.source)
        request = {"data": self.data, "recipe": self.recipe.to_dict(), "folder": str(self.folder), "key": self.key, "skip": HERE, "world": processes}
        request["format"] = self.source.format or "auto"
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "sparklab.data.encoders"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as helper:  # type: ignore[call-overload]
            assert helper.stdin is not None and helper.stdout is not None
            try:
                helper.stdin.write(json.dumps(request).encode() + b"\n")
                helper.stdin.flush()  # it stays open: when it closes, the others know that nobody waits any more
                for line in helper.stdout:
                    if self.tell is not None:
                        self.tell(done + int(line), total)
            except BrokenPipeError:  # it is gone already
                pass
            finally:
                helper.stdin.close()
        if helper.returncode:
            return []
        return [self.folder / f"part-{1 + rank}" for rank in range(processes)]

    def _lay_together(self, parts: list[Path]) -> None:
        notes = [json.loads((part / "notes.json").read_text(encoding="utf-8")) for part in parts]
        store.merge(parts, self.folder)
        reads = 1 if len(parts) > 1 else 0  # of the others, the first has read everything
        with open(self.folder / "faults.jsonl", "w", encoding="utf-8") as whole:
            for lines in _in_order([parts[reads] / "reading.jsonl", *(part / "encoding.jsonl" for part in parts)]):
                whole.write(lines)
        ignored: Counter[str] = Counter()
        for note in notes:
            ignored.update(note["ignored"])
        kept = {**notes[0], **notes[reads], "ignored": dict(ignored), "warnings": notes[0]["warnings"]}
        (self.folder / "notes.json").write_text(json.dumps(kept), encoding="utf-8")
        for part in parts:
            shutil.rmtree(part)


def _in_order(files: list[Path]) -> Iterator[str]:
    """The lines of files of faults, each in the order of the source, merged so."""
    with ExitStack() as stack:
        opened = [stack.enter_context(open(file, encoding="utf-8")) for file in files]
        yield from heapq.merge(*opened, key=lambda line: int(json.loads(line)["line"]))


def _count_records(source: Source) -> int | None:
    """How many records the source has, about: the lines of a file of lines; None for others, where counting would be reading."""
    path = Path(source.name)
    if source.kind != "jsonl" or not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**22), b""))
