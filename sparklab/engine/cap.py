"""A cap on this process's share of device memory: what would take more raises an error here, where on one pool it would freeze the box.

Control groups do not see what CUDA takes on a unified chip, and the driver refuses nothing before it is too late; torch's own allocator can
be told.
"""

from __future__ import annotations

import torch

from sparklab.units import is_na


def cap_device(limit_bytes: float, runtime_bytes: float) -> float | None:
    """Lets CUDA's allocator hold no more than ``limit_bytes`` less ``runtime_bytes``; the share of the device that is, None where nothing is capped.

    ``limit_bytes``: what the process may take of the pool in all; ``runtime_bytes``: what of it never goes through the allocator.
    """
    if not torch.cuda.is_available() or is_na(limit_bytes):
        return None
    share = (limit_bytes - runtime_bytes) / torch.cuda.get_device_properties(0).total_memory
    share = min(1.0, max(share, 0.0))
    torch.cuda.set_per_process_memory_fraction(share)
    return share
