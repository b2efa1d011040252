"""Many processes as one run: the only place that knows about ranks. Without torchrun everything here is a no-op.

A network's `blocks` are sharded one by one (FSDP2): weights, gradients and optimiser states lie in pieces, and a block
is put together only while it runs. All that is not a block is small; every process holds it whole and its gradients
are averaged before the update. Forgetting these is a silent mistake (they drift apart), so every save compares them.
Checkpoints are written in the background (`torch.distributed.checkpoint`) through a process group of their own.

    torchrun --nproc-per-node 4 my_stage.py

    with parallel.started("cuda", seed=0):              # in my_stage.py; alone without torchrun
        Loop([Trainee(model=dit, loss=loss)], config, folder).run()
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lipstream.devices import usable_device

log = logging.getLogger(__name__)

# Methods beside `forward` that need a network's (a block's) weights.
_ENTRIES = ("predict", "remember", "prepare_text")
_BLOCK_ENTRIES = ("remember", "text_keys")
_SEED_STRIDE = 1_000_003


@contextmanager
def started(device: str = "cpu", seed: int = 0) -> Iterator[torch.device]:
    """Join the processes that torchrun started, or stay alone; yields this process's device.

    All processes are seeded alike, so that they build the same networks; `Loop` then seeds them apart.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl, one GPU per process).

    Raises:
        ValueError: there is no such device.
    """
    chosen = usable_device(device)
    torch.manual_seed(seed)
    if not dist.is_torchelastic_launched():
        yield chosen
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(chosen)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=chosen)
    else:
        dist.init_process_group("gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def together() -> bool:
    """Whether this process is one of a group (which may have one member)."""
    return dist.is_available() and dist.is_initialized()


def processes() -> int:
    """How many processes train."""
    return dist.get_world_size() if together() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if together() else 0


def speaks() -> bool:
    """Whether this process is the one that reports and writes."""
    return rank() == 0


def seed_apart() -> None:
    """Give torch's random numbers a seed of their own in each process; alone: leave them."""
    if together():
        torch.manual_seed(seed_for(torch.initial_seed() + 1))


def seed_for(base: int) -> int:
    """A seed for a stage's own generator that no other process has; alone: ``base``."""
    return base + _SEED_STRIDE * rank()


def micro_batch(number: int) -> int:
    """Number over all processes of this process's micro batch; a global batch has the same ones however it is split."""
    return number * processes() + rank()


def share(value: float) -> float:
    """The first process's value, for all (the exit step of a rollout: else processes wait for each other forever)."""
    if not together():
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=_device())
    dist.broadcast(tensor, 0)
    return float(tensor.item())


def means(seen: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Means over the values of all processes; a process may lack a name."""
    rows: list[Any] = [seen]
    if together():
        rows = [None] * processes()
        dist.all_gather_object(rows, dict(seen))
    pooled: dict[str, list[float]] = {}
    for row in rows:
        for name, values in row.items():
            pooled.setdefault(name, []).extend(values)
    return {name: sum(values) / len(values) for name, values in pooled.items()}


def _device() -> torch.device:
    """Where the group's tensors live."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if "nccl" in dist.get_backend_config()
        else torch.device("cpu")
    )


# ---------------------------------------------------------------------------------------------------------- networks


def recompute_blocks(model: nn.Module) -> None:
    """Activation checkpointing: a backward pass runs each of the network's `blocks` again instead of keeping it."""
    for block in _blocks_of(model):
        if not isinstance(block.forward, functools.partial):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def shard(model: nn.Module, *, bf16: bool = False, dtype: torch.dtype | None = None) -> None:
    """Spread a network over the processes, in place; alone: only ``dtype``.

    Each process starts from the first one's numbers. Blocks go to the device one at a time, so that a network larger
    than the device's memory may come in on the host (mapped from its file, for instance).

    Args:
        bf16: put blocks together in bfloat16. Their masters and the sums of their gradients stay as they are; call the
            network under `torch.autocast(device, torch.bfloat16)`, as without many processes.
        dtype: of what is kept; float32 for networks that learn, None leaves it.
    """
    if isinstance(model, FSDPModule):
        return
    if not together():
        if dtype is not None:
            model.to(dtype)
        return
    device, blocks = _device(), _blocks_of(model)
    mesh = init_device_mesh(device.type, (processes(),))
    policy = MixedPrecisionPolicy()
    if bf16:
        # Inputs stay: rotary tables are among them, and bfloat16 has too few digits for angles.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            _settle(module, device, dtype, recurse=False)
    replicated = {p for module in model.modules() if id(module) not in inside for p in module.parameters(recurse=False)}
    for block in blocks:
        _settle(block, device, dtype, recurse=True)
        fully_shard(block, mesh=mesh, mp_policy=policy)
        for name in _BLOCK_ENTRIES:
            if hasattr(block, name):
                register_fsdp_forward_method(block, name)
    if blocks:
        # The whole holds nothing itself; it lets the blocks fetch ahead of each other.
        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=replicated)
        for name in _ENTRIES:
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)


def _blocks_of(model: nn.Module) -> list[nn.Module]:
    blocks = getattr(model, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def _settle(module: nn.Module, device: torch.device, dtype: torch.dtype | None, recurse: bool) -> None:
    """To the device and dtype, with the first process's numbers."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if dtype is not None and tensor.is_floating_point() else None)

    module._apply(moved, recurse=recurse)  # type: ignore[no-untyped-call]
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        dist.broadcast(tensor.data, 0)


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; all have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ----------------------------------------------------------------------------------------------------------- updates


def optimizer_groups(parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser: sharded and whole parameters cannot be updated in one call."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) == kind] for kind in (False, True)]
    return [{"params": kind} for kind in kinds if kind]


def clip_gradients(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Average the gradients of whole parameters over the processes, then clip all by their common norm; returns that.

    Blocks have averaged theirs during the backward pass.
    """
    if not together():
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    _average_gradients([p for p in parameters if not isinstance(p, DTensor)])
    whole_grads, pieces = (
        [local(p.grad) for p in parameters if p.grad is not None and isinstance(p, DTensor) == kind]
        for kind in (False, True)
    )
    squares = torch.zeros(2, device=_device())
    for index, grads in enumerate((whole_grads, pieces)):
        if grads:
            squares[index] = torch.stack(torch._foreach_norm(grads)).square().sum()
    dist.all_reduce(squares[1])
    norm = squares.sum().sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for grads in (whole_grads, pieces):
        if grads:
            torch._foreach_mul_(grads, factor)
    return norm


def _average_gradients(parameters: Sequence[Tensor]) -> None:
    """Mean over the processes, in one message. A parameter that some process did not use counts as zero there."""
    if not parameters:
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=_device())
    dist.all_reduce(used, dist.ReduceOp.MAX)
    touched = [p for p, any_process in zip(parameters, used.tolist(), strict=True) if any_process]
    if not touched:
        return
    for parameter in touched:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [p.grad for p in touched if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= processes()
    for grad, mean in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def require_equal_replicas(model: nn.Module) -> None:
    """Check that the parameters which every process holds whole are the same everywhere.

    Raises:
        RuntimeError: they drifted apart; the run is broken.
    """
    names, sums = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            names.append(name)
            sums.append(parameter.detach().double().sum())
    if not names or not together():
        return
    highest = torch.stack(sums)
    lowest = highest.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    apart = [name for name, equal in zip(names, (highest == lowest).tolist(), strict=True) if not equal]
    if apart:
        raise RuntimeError(f"{len(apart)} parameters differ between processes, first {apart[0]}: do not use this run")


# ------------------------------------------------------------------------------------------------------- checkpoints


def tensors_of(model: nn.Module, averaged: nn.Module | None, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """All that a learner's checkpoint holds, sharing the memory of what learns: reading into these restores it.

    Frozen parameters are left out, as they come from where the network was made from.
    """
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - set(learning)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, parameter in learning.items():
        state = optimizer.state[parameter]
        if not state:  # before the first update there is nothing, and reading needs a place
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter.detach()) for _ in range(2))
        moments[name] = dict(state)
    networks = {"model": model} if averaged is None else {"model": model, "averaged": averaged}
    kept = {
        role: {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}
        for role, network in networks.items()
    }
    return {**kept, "optimizer": moments}


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder of :class:`ShardedCheckpoints`, or None."""
    pointer = folder / "latest"
    return folder / pointer.read_text().strip() if pointer.exists() else None


class ShardedCheckpoints:
    """``FOLDER/step-00000200/`` per save (`torch.distributed.checkpoint`), the last two, and ``FOLDER/latest``.

    Saving copies the tensors and returns; a thread writes them. ``latest`` names a checkpoint only once every process
    has written its part, and is replaced atomically: whatever is killed when, it leads to a whole one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._group = dist.new_group(backend="gloo")  # training's messages and these must not wait for each other
        self._pending: tuple[Future[Any], str] | None = None
        latest = latest_checkpoint(folder)
        if speaks():
            for old in self._folders():
                if latest is None or old.name > latest.name:  # cut off while it was written
                    shutil.rmtree(old)
        dist.barrier(self._group)

    def load(self, learners: Mapping[str, dict[str, Any]]) -> int | None:
        """Read the latest checkpoint into the tensors of :func:`tensors_of`; returns its step, None if there is none.

        Raises:
            ValueError: the checkpoint is of another kind of run.
        """
        path = latest_checkpoint(self.folder)
        if path is None:
            return None
        held = set(filesystem.FileSystemReader(path).read_metadata().state_dict_metadata)
        state: dict[str, Any] = {**learners, "step": torch.zeros((), dtype=torch.long)}
        wanted = set(_flat_names(state))
        missing, extra = wanted - held, {n for n in held - wanted if not re.fullmatch(r"random\.\d+\.\w+", n)}
        if missing or extra:
            odd = sorted(missing)[:1] or sorted(extra)[:1]
            raise ValueError(f"{path}: of another kind of run (see {odd[0]}); use a new run folder")
        drawn = {n for n in held if n.endswith(".cpu")}
        exact = len(drawn) == processes()
        if exact:
            state["random"] = {str(rank()): _random_state()}
        state_dict_loader.load(state, checkpoint_id=path, process_group=self._group)
        step = int(state["step"])
        if exact:
            _set_random_state(state["random"][str(rank())])
        else:
            log.warning("%s is of %d processes, now there are %d: other draws", path, len(drawn), processes())
            torch.manual_seed(torch.initial_seed() + step)
        return step

    def save(self, step: int, learners: Mapping[str, dict[str, Any]]) -> None:
        """Begin to write a checkpoint; waits only if the one before is not written yet."""
        self.finish()
        state = {**learners, "step": torch.tensor(step), "random": {str(rank()): _random_state()}}
        name = f"step-{step:08d}"
        pending = state_dict_saver.async_save(state, checkpoint_id=self.folder / name, process_group=self._group)
        assert isinstance(pending, Future)
        self._pending = pending, name

    def poll(self) -> None:
        """Publish the checkpoint that was being written, if it is whole now; call this once a step."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is whole, and publish it."""
        if self._pending is None:
            return
        (future, name), self._pending = self._pending, None
        future.result()
        if not speaks():
            return
        temporary = self.folder / "latest.tmp"
        with temporary.open("w") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / "latest")
        for old in self._folders()[:-2]:
            shutil.rmtree(old)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def _flat_names(state: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if _device().type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
