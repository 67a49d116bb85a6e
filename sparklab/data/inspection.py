"""What is to be known of a recipe's data before a step is spent on it: counts, faults, and whether training would take it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparklab.data import signs
from sparklab.data.corpus import Corpus, Opened
from sparklab.data.dataset import refuse_nothing_to_learn, refuse_strangers, refuse_too_long, refuse_unusable, report_of
from sparklab.data.encode import Encoder
from sparklab.data.faults import Faults
from sparklab.data.packed import Rows
from sparklab.data.pages import FLAGS
from sparklab.data.read import Source, open_source
from sparklab.data.render import Tokenizer
from sparklab.data.tokenise import Tell, tokenised
from sparklab.errors import DataError

if TYPE_CHECKING:
    from sparklab.data.report import DataReport
    from sparklab.planner.recipe import Recipe

Answer = dict[str, Any]

_BARS: Final = 32
_LITTLE: Final = 0.02
"""A share of learned tokens below which one asks whether that is meant."""


def look(recipe: Recipe, tokenizer: Tokenizer, folder: Path, tell: Tell | None = None) -> Answer:
    """The inspection in numbers, ready for JSON; what :mod:`sparklab.data.pages` needs besides is left in ``folder``.

    Raises :class:`DataError` where the data cannot be opened at all; what training would refuse is in ``refusals``.
    """
    refusals: list[DataError] = []

    def attempt(check: Callable[..., Any], *given: Any) -> Any:
        try:
            return check(*given)
        except DataError as error:
            refusals.append(error)
            return None

    encoder = attempt(Encoder, tokenizer, recipe)
    names = [data for data in (recipe.data, recipe.held_out) if isinstance(data, str)]
    sources = [open_source(data, recipe.format) for data in names]
    for source in sources:
        attempt(source.refuse_untrainable)
    stores = [attempt(tokenised, data, source, recipe, encoder, tell) for data, source in zip(names, sources, strict=True)] if encoder is not None else [None]
    known: Answer = {"sources": [{"name": source.name, "kind": source.kind, "format": source.format, "named": source.is_named} for source in sources]}
    opened = tuple(Opened(source, store) for source, store in zip(sources, stores, strict=False) if store is not None)
    if len(opened) < len(sources):
        return {**known, **_without_tokens(sources), **_verdict(refusals, [])}
    for one in opened:
        attempt(refuse_unusable, one, recipe)
    usable = all(len(one.store.documents) for one in opened)  # without a record, what else is missing is no news
    corpus = (attempt(Corpus.open, recipe, encoder, opened) if usable else None) or Corpus.open(recipe.replace(held_out=0.0), encoder, opened[:1])
    for check in (refuse_too_long, refuse_nothing_to_learn, refuse_strangers) if usable else ():
        attempt(check, corpus, recipe)
    report = report_of(corpus, len(Rows(corpus.train.slices, recipe.micro_batch_tokens, recipe.seed)), skipped=_faults(corpus.opened).lines)
    _leave_for_pages(corpus, tokenizer, folder)
    return {**known, **_numbers(corpus, report), **_verdict(refusals, list(_findings(corpus, report))), **_left(corpus, recipe)}


def _numbers(corpus: Corpus, report: DataReport) -> Answer:
    import numpy as np  # noqa: PLC0415

    faults = _faults(corpus.opened)
    lengths = np.concatenate([one.store.documents["length"] for one in corpus.opened])
    flags = np.concatenate([one.store.records["flags"] for one in corpus.opened])
    scripts = np.concatenate([one.store.records["scripts"] for one in corpus.opened])
    return {
        "report": {name: value for name, value in report.to_dict().items() if name not in ("warnings", "template_warnings", "few_updates")},
        "lengths": _histogram(lengths),
        "scripts": {name: count for place, name in enumerate(signs.SCRIPTS) if (count := int((scripts >> np.uint64(place) & np.uint64(1)).sum()))},
        "flags": {name: int((flags & bit > 0).sum()) for name, (bit, _) in FLAGS.items()},
        "faults": _faults_in_words(faults),
    }


def _histogram(lengths: Any) -> Answer:
    """Median, 95th percentile, largest, mean, and counts between edges: evenly spaced, or evenly in octaves where lengths differ widely."""
    import numpy as np  # noqa: PLC0415

    if not len(lengths):
        return {"p50": None, "p95": None, "max": None, "mean": None, "edges": [], "counts": []}
    least, most = int(lengths.min()), int(lengths.max())
    if most < 16 * least:
        step = max(1, -(-(most + 1 - least) // _BARS))
        edges = np.arange(least, most + 1 + step, step)
    else:
        edges = np.unique(np.round(np.geomspace(least, most + 1, _BARS + 1)).astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    p50, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf").tolist()
    return {"p50": p50, "p95": p95, "max": int(lengths.max()), "mean": float(lengths.mean()), "edges": edges.tolist(), "counts": counts.tolist()}


def _faults(opened: tuple[Opened, ...]) -> Faults:
    found = Faults()
    for one in opened:
        one.faults(found)
    return found


def _faults_in_words(faults: Faults) -> Answer:
    kinds = [{"kind": kind, "count": count} for kind, count in faults.by_kind.most_common()]
    return {"records": faults.lines, "total": faults.total, "kinds": kinds, "first": [str(fault) for fault in faults.first]}


def _findings(corpus: Corpus, report: DataReport) -> Iterator[Answer]:
    """What is worth a warning, most first; ``filter`` is the page filter that shows it."""
    numbers = _numbers(corpus, report)
    flags, records = numbers["flags"], report.records
    recipe = corpus.train.recipe
    cut = report.truncated + report.held_out_truncated
    for count, name, noun, words in (
        (flags["nothing_learned"], "nothing_learned", "record", "without a token to learn"),
        (flags["no_end"], "no_end", "record", "from which no end-of-turn is learned"),
        (flags["double_bos"], "double_bos", "record", "with BOS twice"),
        (numbers["faults"]["records"] if recipe.on_bad == "skip" else 0, "unusable", "record", "that cannot be used and will be skipped (on_bad='skip')"),
        (cut, "long", "document", f"cut at max_length ({recipe.max_length:,} tokens), and with the end the last end-of-turn"),
        (report.split, "long", "document", f"split at max_length ({recipe.max_length:,} tokens): what comes later does not see what came before"),
        (report.dropped, "long", "document", f"left out, being longer than max_length ({recipe.max_length:,} tokens)"),
        (report.unsupervised - flags["nothing_learned"], "long", "piece", "left out, having no learned token within max_length"),
        (flags["empty_turn"], "empty_turn", "record", "with a turn that says nothing"),
        (flags["spells"], "spells", "record", "whose words spell special tokens"),
        (report.overlap, "held_out", "held-out record", "also learned from: what is measured there is known by heart"),
        (report.duplicates, "repeated", "record", "repeating an earlier one word for word"),
    ):
        if count > 0:
            yield {"name": name, "count": count, "filter": name, "words": f"{count:,} {noun}{'s' if count > 1 else ''} {words}"}
    if report.tokens and report.supervised_share < _LITTLE:
        yield {"name": "little", "count": report.supervised, "filter": "all", "words": f"only {report.supervised_share:.2%} of the tokens are learned"}
    for name, count in sorted(report.ignored_fields.items()):
        yield {"name": "ignored", "count": count, "filter": "all", "words": f"the field {name} is not used ({count:,} of {records:,} records)"}
    for warning in report.template_warnings:
        yield {"name": "template", "count": 1, "filter": "all", "words": warning}
    if report.few_updates and recipe.max_steps:  # how many are meant, is said; without that the rows may not be as long as those of the training
        yield {"name": "few", "count": report.rows, "filter": "all", "words": report.few_updates}


def _verdict(refusals: list[DataError], findings: list[Answer]) -> Answer:
    said = [{"fact": error.fact, "fix": error.fix} for error in refusals]
    said = [one for place, one in enumerate(said) if one not in said[:place]]
    verdict = "refuse" if said else "ready with warnings" if findings else "ready"
    return {"verdict": verdict, "refusals": said, "findings": findings}


def _left(corpus: Corpus, recipe: Recipe) -> Answer:
    """Where the tokens lie, for the pages."""
    entries = [{"folder": str(one.store.folder), "name": one.source.name, "kind": one.source.kind} for one in corpus.opened]
    return {"entries": entries, "max_length": recipe.max_length, "on_long": recipe.on_long}


def _leave_for_pages(corpus: Corpus, tokenizer: Any, folder: Path) -> None:
    """The tokenizer's file, and which records are held out."""
    for number in range(len(corpus.opened)):
        held = corpus.held_out.chosen if number == len(corpus.opened) - 1 else ~corpus.train.chosen
        held.tofile(folder / f"held-{number}.bin")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
        return
    special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items()}
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    (folder / "pieces.json").write_text(json.dumps({"pieces": pieces, "special": special}), encoding="utf-8")


def _without_tokens(sources: list[Source]) -> Answer:
    """What can be said where the records cannot become tokens."""
    faults, records, scripts, empty, keys = Faults(), 0, 0, 0, set()
    counts: dict[str, int] = {}
    for source in sources:
        for record in source.records(faults):
            records += 1
            said = [str(message["content"]) for message in record.messages] or [record.text or ""]
            empty += any(not text.strip() for text in said)
            keys.add(record.key)
            scripts = 0
            for text in said:
                scripts |= signs.script_bits(text)
            for name in signs.script_names(scripts):
                counts[name] = counts.get(name, 0) + 1
    return {
        "report": {"records": records, "duplicates": records - len(keys)},
        "lengths": _histogram([]),
        "scripts": counts,
        "flags": {"empty_turn": empty},
        "faults": _faults_in_words(faults),
        "entries": [],
    }
