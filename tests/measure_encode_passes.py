"""What cutting the Wan VAE's encode into passes costs: a stream of chunks against the whole clip in one pass.

python tests/measure_encode_passes.py --size 64                      # CPU, seconds of process time
python tests/measure_encode_passes.py --device cuda --size 512 --dtype bfloat16

Official sizes, random weights, 33 pixel frames (chunks of 9, 12 and 12). Ways are interleaved; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lipstream.models.wan_vae import WAN_VAE_FLAVOURS, WanVAE

CHUNKS = (9, 12, 12)


def ways(vae: WanVAE, video: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The whole clip at once, and streams with so many latent frames a pass."""

    def stream(count: int) -> Tensor:
        view = vae.stream_view(1)
        return torch.cat([view.encode(part, count) for part in video.split(CHUNKS, dim=2)], 2)

    return {"whole clip": lambda: vae.encode(video, 9), "1 a pass": lambda: stream(1), "3 a pass": lambda: stream(3)}


def seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    """Process time on a CPU, wall time on a GPU."""
    if device.type != "cuda":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = WanVAE(WAN_VAE_FLAVOURS["official"]).to(device, dtype).requires_grad_(False)
    video = (torch.rand(1, 3, sum(CHUNKS), arguments.size, arguments.size) * 2 - 1).to(device, dtype)
    times: dict[str, list[float]] = {}
    with torch.inference_mode():
        for number in range(arguments.rounds + 1):
            for name, work in ways(vae, video).items():
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                took = seconds(work, device)
                peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
                if number:  # the first round warms up
                    times.setdefault(name, []).append(took)
                print(f"round {number}: {name} {took:.3f} s, peak {peak:.2f} GB", flush=True)
    whole = statistics.median(times["whole clip"])
    for name, taken in times.items():
        print(
            f"{name}: median {statistics.median(taken):.3f} s, {statistics.median(taken) / whole:.3f} of the whole clip"
        )


if __name__ == "__main__":
    main()
