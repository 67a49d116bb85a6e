"""The rest of a large source, encoded on every core: ``python -m sparklab.data.encoders``, started by :mod:`sparklab.data.tokenise`.

One line of JSON comes in on standard input and says what is to be encoded and where to; how many records are done goes out, a number a line.
The input stays open as long as somebody waits: when it closes, this process and its children end.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Final, NoReturn

from sparklab.data.encode import Encoder
from sparklab.data.read import Source, open_source
from sparklab.data.tokenise import Part, Share, cache_key, encode_share
from sparklab.errors import SparklabError
from sparklab.model.source import resolve
from sparklab.planner.recipe import Recipe

EVERY_SECONDS: Final = 0.5


def main() -> int:
    """Encodes what the request says, in as many processes as it says, printing how many records are done; 0 when all of them succeeded."""
    request = json.loads(sys.stdin.readline())
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers' tokenizers do without, in a fifth of the memory and of the time
    from transformers import AutoTokenizer  # noqa: PLC0415

    recipe = Recipe.from_dict(request["recipe"])
    where = resolve(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=os.path.isdir(where))
    source, encoder = open_source(request["data"], request["format"]), Encoder(tokenizer, recipe)
    if cache_key(source, recipe, encoder) != request["key"]:
        return 3  # the caller's tokenizer is not the model's own
    world = int(request["world"])
    counts = mmap.mmap(-1, 8 * world)  # one number a process, seen by all
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _be_one_of_many(source, encoder, Path(request["folder"]), Share(rank, world, int(request["skip"])), counts)
        children.append(child)
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    return _watch(children, counts)


def _be_one_of_many(source: Source, encoder: Encoder, folder: Path, share: Share, counts: mmap.mmap) -> NoReturn:
    status = 1
    try:
        with Part(folder / f"part-{1 + share.rank}", encoder, reads=share.rank == 0) as part:
            encode_share(part, source, share, lambda done: struct.pack_into("q", counts, 8 * share.rank, done))
        status = 0
    except SparklabError:
        pass  # the caller goes on alone, meets the same error and raises it
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)


def _watch(children: list[int], counts: mmap.mmap) -> int:
    """Prints progress until all are done; ends them all where one fails."""
    waiting = set(children)
    while waiting:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == 0:
            print(sum(struct.unpack(f"{len(children)}q", counts)), flush=True)  # noqa: T201 - read by the caller
            time.sleep(EVERY_SECONDS)
            continue
        waiting.discard(ended)
        if status:
            for child in waiting:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            return 1
    return 0


def _end_with_the_caller() -> None:
    """Ends this process and its children when the one that waits for them is gone."""
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
