"""Devices: which there are, and what memory is free on them."""

from __future__ import annotations

from pathlib import Path

import torch


def usable_device(name: str) -> torch.device:
    """A device that this torch has.

    Raises:
        ValueError: it has not; one line that names the fix.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device '{name}': use cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device '{name}': torch sees no CUDA GPU (there is no GPU, or this torch was built without CUDA); use cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device '{name}': there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return device


def free_bytes(device: torch.device) -> int | None:
    """Memory that a process may still take; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
