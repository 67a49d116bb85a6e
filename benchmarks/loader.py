"""What loading holds: our streaming loader and transformers' from_pretrained on the same sharded model of random weights, side by side.

    python benchmarks/loader.py                # 4 GB in five files, bf16 and NF4, both ways, each in a process of its own
    python benchmarks/loader.py --layers 6 --hidden 1536 --shard-mb 120

Held = anonymous memory of the process + pages of the model's files in the page cache (Linux' cachestat), sampled every 5 ms, less what both
were before. Mapped pages are counted once. The files are dropped from the page cache before each way begins. The model is removed afterwards.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from sparklab.box.watchdog import read_sizes
from sparklab.units import GIB

CACHESTAT = 451  # the number of the system call on every architecture, Linux 6.5 and later
EVERY_SECONDS = 0.005
VOCABULARY = 8000


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _Pages(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted")]


def cached_bytes(files: list[int]) -> float:
    """Pages of the open files that lie in the page cache, in bytes."""
    total = 0
    for file in files:
        pages = _Pages()
        if ctypes.CDLL(None, use_errno=True).syscall(CACHESTAT, file, ctypes.byref(_Range(0, 0)), ctypes.byref(pages), 0) != 0:
            raise OSError(ctypes.get_errno(), "cachestat")
        total += pages.cache
    return float(total * os.sysconf("SC_PAGE_SIZE"))


def make(folder: Path, layers: int, hidden: int, shard_bytes: int) -> Path:
    """A Llama of random bf16 weights in files of about ``shard_bytes``, written one by one."""
    import torch  # noqa: PLC0415 - only here
    from safetensors.torch import save_file  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    folder.mkdir(parents=True)
    config = AutoConfig.for_model("llama", hidden_size=hidden, intermediate_size=hidden * 27 // 10 // 64 * 64, num_hidden_layers=layers,
                                  num_attention_heads=hidden // 64, vocab_size=VOCABULARY, tie_word_embeddings=False)  # fmt: skip
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict().items()}
    shards: list[dict[str, Any]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * size.numel() for size in shards[-1].values()) >= shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    places = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        save_file({name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for name, shape in shard.items()}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    os.sync()  # dirty pages cannot be dropped
    return folder


def measured(folder: str, method: str, way: str) -> dict[str, float]:
    """Loads once, ``way`` "stream" or "stock", and returns bytes: final, peak held, largest shard; and seconds. To be called in a fresh process."""
    import bitsandbytes  # noqa: F401, PLC0415 - what is loaded in any case is loaded before
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415
    from transformers.models.llama import modeling_llama  # noqa: F401, PLC0415

    from sparklab.model import load  # noqa: PLC0415
    from sparklab.planner.recipe import Recipe  # noqa: PLC0415

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    recipe = Recipe(model=folder, data="none", method=method)  # type: ignore[arg-type]
    load.load_base(Recipe(model="tiny", data="none", method=method), torch.bfloat16, torch.device("cpu"), "eager")  # type: ignore[arg-type]
    files = [os.open(path, os.O_RDONLY) for path in Path(folder).glob("*.safetensors")]
    for file in files:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def held() -> float:
        return read_sizes("/proc/self/status")["RssAnon"] + cached_bytes(files)

    before = peak = held()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(EVERY_SECONDS):
            peak = max(peak, held())

    thread = threading.Thread(target=sample)
    thread.start()
    began = time.perf_counter()
    device = torch.device("cpu")
    if way == "stream":
        model = load.load_base(recipe, torch.bfloat16, device, "eager")
    else:
        quantization = load.nf4_config(recipe, torch.bfloat16) if method == "qlora" else None
        model = load._load_stock(folder, None, torch.bfloat16, device, "eager", quantization, None)
    seconds = time.perf_counter() - began
    for tensor in model.parameters():  # what was only mapped is there once it is used
        tensor.detach().view(torch.uint8).max()
    done.set()
    thread.join()
    final = 0
    for tensor in (*model.parameters(), *model.buffers()):
        final += tensor.nbytes
        state = getattr(tensor, "quant_state", None)
        final += sum(value.nbytes for value in state.as_dict().values() if isinstance(value, torch.Tensor)) if state is not None else 0
    return {"final_bytes": final, "peak_bytes": peak - before, "after_bytes": held() - before, "shard_bytes": max(os.fstat(file).st_size for file in files),
            "seconds": seconds}  # fmt: skip


ASK = "import json, sys; sys.path.insert(0, sys.argv[1]); from loader import measured; print(json.dumps(measured(*sys.argv[2:])))"


def row(model: Path, method: str, way: str) -> str:
    """One line of the table, measured in a process of its own."""
    command = [sys.executable, "-c", ASK, str(Path(__file__).parent), str(model), method, way]
    told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    final, peak = told["final_bytes"], told["peak_bytes"]
    over = f"{peak / final:.3f}x" + (f"; one shard {(peak - told['shard_bytes']) / final - 1:+.2f}x" if method == "qlora" else "")
    names = ("bf16" if method == "lora" else "NF4", "ours" if way == "stream" else "from_pretrained")
    return f"| {' | '.join(names)} | {final / GIB:.2f} | {peak / GIB:.2f} | {over} | {told['after_bytes'] / GIB:.2f} | {told['seconds']:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--shard-mb", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", default=["lora", "qlora"], help="lora: bf16; qlora: NF4")
    parser.add_argument("--ways", nargs="+", default=["stream", "stock"])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="loader-"))
    try:
        model = make(folder / "model", options.layers, options.hidden, options.shard_mb * 10**6)
        sizes = [path.stat().st_size for path in model.glob("*.safetensors")]
        machine = f"{platform.machine()}, Linux {platform.release()}"
        print(f"{sum(sizes) / GIB:.2f} GiB in {len(sizes)} files of at most {max(sizes) / GIB:.2f} GiB; {machine}")
        print("| type | way | final GiB | peak held GiB | peak over final | held after, GiB | seconds |\n|---|---|---|---|---|---|---|")
        for method in options.methods:
            for way in options.ways:
                print(row(model, method, way), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
