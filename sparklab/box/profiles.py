"""What is known of the boxes sparklab has a name for: one table, each figure beside where it comes from.

``spec``: the maker's data sheet. ``published``: measured by others and written down in public. ``assumed``: our own careful guess, replaced
by a measurement as soon as a rehearsal makes one. Memory, bandwidth and FLOP/s are those of one device, power is that of all together.
"""

from __future__ import annotations

from typing import Any, Final

from sparklab.units import GIB, NA

TERA: Final = 1e12
GIGA: Final = 1e9

# The system sees 119.6 to 121.7 GiB of the 128 GB, depending on the unit: plan with the least.
_SPARK: Final[dict[str, Any]] = {
    "chip": "NVIDIA GB10",
    "memory_bytes": 119.6 * GIB,
    "unified": True,
    "bandwidth_bytes_per_second": 273 * GIGA,
    "bf16_flops": 92.3 * TERA,
    "fp32_flops": 31 * TERA,
    "has_native_bf16": True,
    "power_watts": 170.0,
    "devices": 1,
    "reserve_bytes": 8.0 * GIB,
    "runtime_bytes": 2.0 * GIB,
}
_SPARK_SOURCES: Final = {
    "chip": "spec",
    "memory_bytes": "published",
    "bandwidth_bytes_per_second": "spec",
    "bf16_flops": "published",
    "fp32_flops": "assumed",
    "has_native_bf16": "spec",
    "power_watts": "published",
    "reserve_bytes": "assumed",
    "runtime_bytes": "assumed",
}

PROFILES: Final[dict[str, dict[str, Any]]] = {
    "dgx-spark": {**_SPARK, "sources": _SPARK_SOURCES},
    "2x-dgx-spark": {
        **_SPARK,
        "devices": 2,
        "power_watts": 340.0,
        "sources": _SPARK_SOURCES,
        "note": "Two boxes are not one pool of memory: with data parallelism each holds the whole plan, and only the speed doubles. "
        "Memory is shared out only where weights are sharded across both (FSDP), over a 200 Gb/s link.",
    },
    "h200": {
        "chip": "NVIDIA H200",
        "memory_bytes": 139.0 * GIB,
        "unified": False,
        "bandwidth_bytes_per_second": 4800 * GIGA,
        "bf16_flops": 795 * TERA,
        "fp32_flops": 67 * TERA,
        "has_native_bf16": True,
        "power_watts": 700.0,
        "devices": 1,
        "reserve_bytes": 1.0 * GIB,
        "runtime_bytes": 0.6 * GIB,
        "sources": {**_SPARK_SOURCES, "fp32_flops": "spec", "power_watts": "spec"},
        "note": "The power is the GPU's own; the server around it is not counted.",
    },
    "dgx-1": {
        "chip": "NVIDIA P100",
        "memory_bytes": 16.0 * GIB,
        "unified": False,
        "bandwidth_bytes_per_second": 732 * GIGA,
        "bf16_flops": NA,
        "fp32_flops": 10.6 * TERA,
        "has_native_bf16": False,
        "power_watts": 3200.0,
        "devices": 8,
        "reserve_bytes": 0.5 * GIB,
        "runtime_bytes": 0.4 * GIB,
        "sources": {**_SPARK_SOURCES, "memory_bytes": "spec", "fp32_flops": "spec", "power_watts": "spec"},
        "note": "Eight GPUs of 16 GiB are not one pool of memory: with data parallelism each holds the whole plan, and only the speed multiplies. "
        "Without native bf16 the base is held in fp32.",
    },
}

# What a detected NVIDIA chip is known to do, by a word in its name; any other chip's speed stays NA.
CHIPS: Final[dict[str, str]] = {"GB10": "dgx-spark", "H200": "h200", "P100-SXM2": "dgx-1"}
