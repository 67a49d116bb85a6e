"""The command line: the same verbs as ``import sparklab as sl``, each with ``--json``.

Exit status: 0 done, 1 an error of sparklab's own, 2 something the user can mend (one clear error, no traceback), 130 interrupted;
of ``doctor`` also 3 warnings, 4 faults.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from sparklab.errors import SparklabError
from sparklab.planner.forecast import TOKENS_ASSUMED
from sparklab.planner.recipe import Recipe, field_help
from sparklab.run.exhausted import MAY_CHANGE
from sparklab.text import clean, harmless_json
from sparklab.units import format_count, jsonable

USER_ERROR = 2
INTERRUPTED = 130
LONGEST_TEXT = 1_000_000  # characters printed at once
CHOSEN = {
    "micro_batch_tokens": "the fastest that fits",
    "checkpoint_layers": "as few as fit",
    "max_length": f"{Recipe.max_length}, less where the model or a row holds less",
    "learning_rate": "by method and size of the model",
}
"""What the planner decides where nobody says it."""
_MERGE: Final = (
    'in Python: from peft import AutoPeftModelForCausalLM; AutoPeftModelForCausalLM.from_pretrained("RUN/adapter").merge_and_unload().save_pretrained("OUT")'
)
ELSEWHERE: Final = {
    "merge": f"PEFT merges an adapter into its base, {_MERGE}",
    "export": f"a run's adapter directory is PEFT's own and can be used as it is; PEFT merges it into its base, {_MERGE}",
}
"""What is no verb, and how it is done all the same."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    parser.check_verb(next(iter(words), ""))
    options, strangers = parser.parse_known_args(words)
    parser.check_flags(words[0] if words else "", strangers)
    try:
        return int(options.run(options) or 0)
    except SparklabError as error:
        if options.json:
            _print_json(error.to_dict())
        print(f"sparklab: {error}", file=sys.stderr)  # noqa: T201
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `sparklab ... | head` is no error
        sys.stderr.close()
        return 0


class Parser(argparse.ArgumentParser):
    """argparse's, which says of a verb that does not exist which one is near, and not all of them."""

    verbs: Mapping[str, argparse.ArgumentParser] = MappingProxyType({})

    def check_verb(self, word: str) -> None:
        """Ends with status 2 where the first word is no verb."""
        if not word or word.startswith("-") or word in self.verbs:
            return
        near = difflib.get_close_matches(word, self.verbs, n=1)
        fix = ELSEWHERE.get(word) or (f"did you mean {near[0]}?" if near else "sparklab --help lists the verbs")
        self.error(f"there is no verb {clean(word, 80)!r}; {fix}")

    def check_flags(self, verb: str, strangers: Sequence[str]) -> None:
        """Ends with status 2 where words of the line are nothing that the verb knows; names the flag that is near, and not all of them."""
        if not strangers:
            return
        word = next((word for word in strangers if word.startswith("-")), strangers[0]).split("=")[0]
        known = self.verbs[verb]._option_string_actions if verb in self.verbs else self._option_string_actions
        near = difflib.get_close_matches(word, [flag for flag in known if flag not in ("-h", "--help")], n=1)
        fix = f"did you mean {near[0]}?" if near else f"sparklab {verb} --help lists what it takes"
        self.exit(USER_ERROR, f"{self.prog}: error: {verb} does not know {clean(word, 80)!r}; {fix}\n")


def build_parser() -> Parser:
    """All verbs with their flags; a recipe's flags derive from its fields."""
    parser = Parser(
        prog="sparklab", description="Fine-tune language models on a 128 GB unified-memory box.",
        epilog="sparklab VERB --help says what a verb takes; every verb has --json.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"sparklab {sys.modules['sparklab'].__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = _verb(verbs, "box", "what this machine has: memory usable now, compute, what was measured and what assumed", _box)
    verb.add_argument("name", nargs="?", default="this", help="a profile instead of this machine (default: this)")

    verb = _verb(verbs, "doctor", "what about this machine would spoil a run, and the line that mends it", _doctor)
    verb.add_argument("directory", nargs="?", help="a run directory: whether its checkpoints fit on the disk is looked at too")
    verb.add_argument("--drill", action="store_true", help="rehearse the guard's trip with a tiny run, in under a minute")

    verb = _verb(verbs, "monitor", "the memory of this machine, live: who holds it, how hard it is pressed", _monitor)
    verb.add_argument("--once", action="store_true", help="print it once and leave")

    verb = _verb(verbs, "plan", "whether a model fits and how long it takes, from its config.json alone", _plan)
    verb.add_argument("model", nargs="+", help="a config.json, a model directory, a hub name, or tiny; several: which is the largest that fits")
    verb.add_argument("--longest", action="store_true", help="the longest documents that fit, instead of the fastest plan")
    _plan_flags(verb)

    verb = _verb(verbs, "rehearse", "run a recipe at full size with random weights, and hold it against its plan", _rehearse)
    verb.add_argument("model", help=_help("model"))
    verb.add_argument("--force", action="store_true", help="try although the plan does not fit")
    verb.add_argument("--profile", action="store_true", help="also where the time of an update goes, by kind of work")
    _plan_flags(verb)

    verb = _verb(verbs, "trace", "the best plan, its training step traced: the real one, on tensors without memory", _trace)
    verb.add_argument("model", help=_help("model"))
    _plan_flags(verb)

    verb = _verb(verbs, "train", "train a recipe in a run directory", _train)
    verb.add_argument("model", help=_help("model"))
    verb.add_argument("data", help=_help("data"))
    verb.add_argument("--run", dest="directory", help="the run directory (default: runs/ and a name of its own)")
    verb.add_argument("--detach", action="store_true", help="return at once; look with sparklab watch")
    verb.add_argument("--force", action="store_true", help="start although the plan does not fit")
    _recipe_flags(verb, leave_out={"model", "data"}, chosen=CHOSEN)

    verb = _verb(verbs, "inspect", "the data as the model will see it: what is learned, what is wrong with it, and whether training would take it", _inspect)
    verb.add_argument("data", help=_help("data"))
    verb.add_argument("--model", help="whose tokenizer and chat template; default: the bundled tiny model's")
    verb.add_argument("--show", default="", metavar="WHICH", help="page through these records instead: all, odd, unusable, long, repeated, held_out ...")
    verb.add_argument("--first", type=int, default=0, help="with --show: the first of them (default: 0)")
    _recipe_flags(verb, leave_out={"model", "data"})

    verb = _verb(verbs, "quickstart", "teach the bundled model something it cannot do, and show that it helped", _quickstart)
    verb.add_argument("--method", default="lora", help="lora, qlora or full (default: lora)")
    verb.add_argument("--seed", type=int, default=0, help="seed of the training data and the run (default: 0)")
    verb.add_argument("--run", dest="directory", help="the run directory (default: runs/quickstart-...)")

    verb = _verb(verbs, "runs", "runs side by side: how they ended, in what they differ, which is best", _runs)
    verb.add_argument("places", nargs="*", help="run directories, or folders of runs (default: runs)")

    _run_verbs(verbs)
    parser.verbs = verbs.choices
    return parser


def _run_verbs(verbs: Any) -> None:
    """The verbs on a run that is there already."""
    for name, text, action in (
        ("watch", "follow a run until it is over; Ctrl-C leaves it at work", _watch),
        ("stop", "finish the update, save a checkpoint, leave", _stop),
        ("pause", "hold a run after its update", _pause),
        ("checkpoint", "save a checkpoint now", _checkpoint),
        ("evaluate-now", "measure the held-out loss of a run at work, as its model is now", _evaluate_now),
        ("sample", "ask the model of a run at work, as it is now; sparklab watch shows the answers", _sample),
        ("learning-rate", "change the learning rate of a run at work, from its next update on", _learning_rate),
        ("resume", "go on from a pause, or from the newest good checkpoint", _resume),
        ("compare", "answers of base and tuned, side by side", _compare),
        ("evaluate", "held-out loss and exact match of base and tuned", _evaluate),
        ("report", "the run as one HTML file that needs nothing else", _report),
    ):
        verb = _verb(verbs, name, text, action)
        verb.add_argument("directory", help="the run directory")
        if name == "compare":
            verb.add_argument("prompts", nargs="+", help="what to ask")
            verb.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (default: the recipe's answer_tokens)")
        if name == "sample":
            verb.add_argument("prompts", nargs="*", help="what to ask (default: the recipe's sample_prompts)")
        if name == "learning-rate":
            verb.add_argument("learning_rate", type=float, help="the schedule goes on as if the recipe's learning_rate had been this")
        if name == "evaluate":
            verb.add_argument("--n", type=int, help="how many held-out records are answered (default: all)")
        if name == "report":
            verb.add_argument("--out", help="where to write it (default: report.html in the run's directory)")
        if name == "resume":
            verb.add_argument("--detach", action="store_true", help="return at once")
            verb.add_argument("--accept", nargs="+", default=[], metavar="NAME", help="go on although this changed: recipe, data, held_out, model, versions")
            _recipe_flags(verb, leave_out=set(), goes_on=True)


def _verb(verbs: Any, name: str, text: str, run: Callable[[argparse.Namespace], int | None]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    """What every verb that looks ahead takes: the box, the size of the data, the recipe's fields."""
    parser.add_argument("--box", help="a profile instead of this machine (default: this)")
    parser.add_argument(
        "--tokens", type=int, help=f"non-pad tokens to train on, for hours and Wh (default: {format_count(TOKENS_ASSUMED)}, and the plan says so)"
    )
    _recipe_flags(parser, leave_out={"model", "data", "held_out"}, chosen={**CHOSEN, "method": "each of them"})


def _help(name: str) -> str:
    """The sentence under a field of the recipe, as argparse wants it."""
    return field_help()[name].replace("%", "%%").replace("``", "")


def _recipe_flags(parser: argparse.ArgumentParser, leave_out: set[str], chosen: Mapping[str, str] = MappingProxyType({}), *, goes_on: bool = False) -> None:
    """A flag for every field of the recipe; what is not given keeps the recipe's default, or is ``chosen`` by the planner; of a run that
    ``goes_on`` it stays as it was."""
    hints = typing.get_type_hints(Recipe)
    parser.usage = " ".join(parser.format_usage().split()).removeprefix("usage: ") + " [recipe flags, see --help]"  # not all sixty in every error
    group = parser.add_argument_group("recipe", "What is not given stays as it was." if goes_on else None)
    for field in dataclasses.fields(Recipe):
        if field.name in leave_out:
            continue
        hint, flag = hints[field.name], "--" + field.name.replace("_", "-")
        default = "" if goes_on else f" (default: {chosen.get(field.name) or _default_words(field.default)})"
        shown = argparse.SUPPRESS if goes_on and field.name not in MAY_CHANGE else _help(field.name) + default  # the run refuses those, and says why
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f"recipe_{field.name}", "help": shown}
        if hint is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif typing.get_origin(hint) is tuple:
            group.add_argument(flag, nargs="+", type=_parser_of(hint), metavar=_metavar(typing.get_args(hint)[0]), **options)
        else:
            group.add_argument(flag, type=_parser_of(hint), metavar=_metavar(hint), **options)


def _default_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _metavar(hint: Any) -> str:
    """What stands for a flag's value: a whole number N, a number X, a text, or the words there are to choose from."""
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(typing.get_args(hint)) + "}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return "|".join(_metavar(one) for one in typing.get_args(hint) if one is not type(None))
    if typing.get_origin(hint) is tuple:
        return f"{_metavar(typing.get_args(hint)[0])},..."
    return {int: "N", float: "X"}.get(hint, "TEXT")


def _parser_of(hint: Any) -> Callable[[str], Any]:
    """How a flag's text becomes the field's type: the first of int, float and str, of those the field allows, that takes it."""
    origin = typing.get_origin(hint)
    allowed = set(typing.get_args(hint)) if origin in (typing.Union, types.UnionType, tuple) else {hint}

    def parse(text: str) -> Any:
        if text.lower() == "none" and type(None) in allowed:
            return None
        for kind in (int, float):
            if kind in allowed:
                try:
                    return kind(text)
                except ValueError:
                    continue
        return tuple(text.split(",")) if "," in text and any(typing.get_origin(one) is tuple for one in allowed) else text

    return parse


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    given = {name.removeprefix("recipe_"): value for name, value in vars(options).items() if name.startswith("recipe_")}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _print_json(content: dict[str, Any]) -> None:
    print(harmless_json(json.dumps(jsonable(content), ensure_ascii=False)))  # noqa: T201


def _show(options: argparse.Namespace, content: dict[str, Any], text: object) -> None:
    """One JSON object, or the words for a person."""
    if options.json:
        _print_json(content)
    else:
        print(clean(text, LONGEST_TEXT))  # noqa: T201


# the verbs; each imports what it needs, so that `sparklab plan` stays quick


def _box(options: argparse.Namespace) -> None:
    from sparklab.box import Box  # noqa: PLC0415

    box = Box.profile(options.name)
    _show(options, box.to_dict(), box.describe())


def _monitor(options: argparse.Namespace) -> None:
    from sparklab.panels.box_panel import follow, monitor  # noqa: PLC0415

    panel = monitor()
    if options.json or options.once or not sys.stdout.isatty():
        _show(options, panel.to_dict(), panel)
    else:
        follow(panel, sys.stdout)


def _doctor(options: argparse.Namespace) -> int:
    from sparklab.api import doctor  # noqa: PLC0415

    checkup = doctor(options.directory, drill=options.drill)
    _show(options, checkup.to_dict(), checkup)
    return checkup.exit_status


def _plan(options: argparse.Namespace) -> None:
    from sparklab.planner import plan  # noqa: PLC0415

    models, changes = options.model if len(options.model) > 1 else options.model[0], _changes(options)
    table = plan(models, box=options.box, tokens=options.tokens, **changes)
    if options.longest:
        kept = {name: changes[name] for name in ("micro_batch_tokens", "max_length", "checkpoint_layers") if name in changes}
        table = table.longest_context(**kept)
    _show(options, table.to_dict(), table)


def _rehearse(options: argparse.Namespace) -> None:
    from sparklab.api import rehearse  # noqa: PLC0415
    from sparklab.planner import plan  # noqa: PLC0415

    recipe = plan(options.model, box=options.box, tokens=options.tokens, **_changes(options)).best().recipe
    rehearsal = rehearse(recipe, box=options.box, force=options.force, profile=options.profile, on_phase=lambda phase: print(f"{phase} ...", file=sys.stderr))  # noqa: T201
    _show(options, rehearsal.to_dict(), rehearsal)


def _trace(options: argparse.Namespace) -> None:
    from sparklab.api import plan  # noqa: PLC0415

    best: Any = plan(options.model, box=options.box, tokens=options.tokens, **_changes(options)).best()
    if hasattr(best, "ledger"):
        best = plan(best.recipe, trace=True, box=best.box, tokens=options.tokens)
    _show(options, best.to_dict(), best)


def _train(options: argparse.Namespace) -> int:
    from sparklab.api import train  # noqa: PLC0415
    from sparklab.planner import recipes  # noqa: PLC0415

    changes = _changes(options)
    recipe = recipes.sized(changes.pop("method", Recipe.method), options.model, options.data, **changes)
    return _follow(options, train(recipe, options.directory, panel=False, force=options.force), options.detach)


def _told(done: int, total: int | None) -> None:
    """How far tokenising is, on one line of the terminal."""
    print(f"\r\x1b[2K{done:,}{'' if total is None else f' of {total:,}'} records tokenised\r", end="", file=sys.stderr, flush=True)  # noqa: T201


def _inspect(options: argparse.Namespace) -> int:
    from sparklab.panels.data_panel import inspect  # noqa: PLC0415

    seen = inspect(options.data, model=options.model, on_progress=_told if sys.stderr.isatty() else None, **_changes(options))
    if options.show:
        rows = seen.page(options.show, options.first)
        _show(options, {"records": rows}, seen.page_text(rows, colour=sys.stdout.isatty()))
        return 0
    _show(options, seen.to_dict(), seen.text(colour=sys.stdout.isatty()))
    return USER_ERROR if seen.verdict == "refuse" else 0


def _quickstart(options: argparse.Namespace) -> int:
    from sparklab.api import quickstart, quickstart_result  # noqa: PLC0415

    run = quickstart(options.method, options.seed, options.directory, panel=False)
    status = _follow(options, run, detach=False, quiet=True)
    if status == 0 and run.status == "finished":
        result = quickstart_result(run)
        _show(options, result, _quickstart_words(result))
    return status


def _quickstart_words(result: dict[str, Any]) -> str:
    question = "Ship 12 red kites to Cairo for Omar, due Friday."
    return (
        f"\nIt helped: {result['exact_match_before']:.1%} of {result['held_out']} unseen orders became the right JSON before, "
        f"{result['exact_match_after']:.1%} after.\n{result['method']}, {result['seconds']:.0f} s, {result['tokens_per_second']:,.0f} non-pad tokens/s; "
        f"memory planned {result['planned_gib']:.2f} GiB, measured {result['measured_gib']:.2f} GiB.\n"
        f"Look again: sparklab watch {result['run']}\nAsk it:     sparklab compare {result['run']} '{question}'"
    )


def _follow(options: argparse.Namespace, run: Any, detach: bool, quiet: bool = False) -> int:
    """Shows the progress of a run that this command started until it is over; Ctrl-C stops it gracefully."""
    from sparklab.panels.terminal import follow  # noqa: PLC0415
    from sparklab.run.launch import raise_failure  # noqa: PLC0415

    asked = []

    def stop() -> None:
        asked.append("stop")
        print("stopping after this update; a checkpoint is saved ...", file=sys.stderr)  # noqa: T201
        if run.directory.is_alive:
            run.stop("interrupted in the terminal")

    if not detach:
        print(f"{clean(run.path)}: Ctrl-C stops it, with a checkpoint saved", file=sys.stderr)  # noqa: T201
        raise_failure(run.directory, follow(run.directory, on_interrupt=stop))
    if not quiet:
        _show(options, run.to_dict(), run)
    return INTERRUPTED if asked and run.status == "stopped" else 0


def _runs(options: argparse.Namespace) -> None:
    from sparklab.api import runs  # noqa: PLC0415

    table = runs(*options.places)
    _show(options, table.to_dict(), table)


def _open(options: argparse.Namespace) -> Any:
    from sparklab.api import Run  # noqa: PLC0415

    return Run.open(options.directory)


def _watch(options: argparse.Namespace) -> None:
    """Ctrl-C ends the looking, not the run, which others may have started."""
    from sparklab.panels.terminal import follow  # noqa: PLC0415
    from sparklab.run.launch import raise_failure  # noqa: PLC0415

    run = _open(options)
    try:
        raise_failure(run.directory, follow(run.directory))
    except KeyboardInterrupt:
        print(f"{clean(run.path)} goes on; to end it: sparklab stop {clean(run.path)}", file=sys.stderr)  # noqa: T201
        raise
    _show(options, run.to_dict(), run)


def _asked(options: argparse.Namespace, command: str, words: str, **details: Any) -> None:
    _show(options, {"asked": command, "run": options.directory, **details}, f"asked {options.directory} {words}")


def _stop(options: argparse.Namespace) -> None:
    _open(options).stop()
    _asked(options, "stop", "to stop; it saves a checkpoint first")


def _pause(options: argparse.Namespace) -> None:
    _open(options).pause()
    _asked(options, "pause", "to pause")


def _checkpoint(options: argparse.Namespace) -> None:
    _open(options).checkpoint()
    _asked(options, "checkpoint", "for a checkpoint")


def _evaluate_now(options: argparse.Namespace) -> None:
    _open(options).evaluate_now()
    _asked(options, "evaluate", "for its held-out loss; sparklab watch shows it")


def _sample(options: argparse.Namespace) -> None:
    _open(options).sample(options.prompts)
    _asked(options, "sample", "for answers; sparklab watch shows them", prompts=options.prompts)


def _learning_rate(options: argparse.Namespace) -> None:
    _open(options).set_learning_rate(options.learning_rate)
    _asked(options, "learning_rate", f"to go on with learning rate {options.learning_rate:g}", learning_rate=options.learning_rate)


def _resume(options: argparse.Namespace) -> int:
    return _follow(options, _open(options).resume(accept=options.accept, panel=False, **_changes(options)), options.detach)


def _compare(options: argparse.Namespace) -> None:
    comparison = _open(options).compare(options.prompts, options.max_new_tokens)
    _show(options, comparison.to_dict(), comparison)


def _evaluate(options: argparse.Namespace) -> None:
    evaluation = _open(options).evaluate(options.n)
    _show(options, evaluation.to_dict(), evaluation)


def _report(options: argparse.Namespace) -> None:
    run = _open(options)
    path = run.report(options.out)
    _show(options, {**run.to_dict(), "report": str(path), "bytes": path.stat().st_size}, f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
