"""Sharded training (torch's FSDP2): each process holds a part of every weight, its gradient and its optimizer's state.

What is saved is whole again, and the same as without: `gathered` makes it of the parts, and `scattered` takes it apart.
All processes call these together. torch.distributed's modules load slowly, so only what shards loads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kdctl import ranks
from kdctl.config.schema import RunSettings
from kdctl.errors import ConfigError, Problem

_LEAST_SHARE = 0.01
"""Blocks with less of the weights than this are gathered with the net as a whole: each exchange has its price."""


def wanted(settings: RunSettings) -> bool:
    """Whether there is something to shard: the settings say so, and there are several processes."""
    return settings.sharding == "fsdp" and ranks.current().size > 1


def check(settings: RunSettings) -> None:
    """Raises ConfigError for settings that sharding does not go with."""
    key, hint = "train.sharding", "or train without sharding"
    if settings.compile is True:
        raise ConfigError(Problem("a sharded student is not compiled here", key=key, hint=f"compile: false, {hint}"))
    if settings.precision == "fp16":
        message = "fp16 needs its loss scaled, of which the processes of a sharded student would disagree"
        raise ConfigError(Problem(message, key=key, hint=f"precision: bf16, {hint}"))
    if settings.layout == "channels_last":
        raise ConfigError(
            Problem("weights in channels_last cannot be sharded", key=key, hint=f"layout: contiguous, {hint}")
        )


def shard(net: nn.Module, device: torch.device) -> None:
    """Has every process keep its part of each weight of `net`, in place and on the device, block by block.

    The parts of a block are put together for its forward and backward pass (Zhao et al., "PyTorch FSDP: Experiences on
    Scaling Fully Sharded Data Parallel", VLDB 2023). Raises ConfigError where modules share a weight.
    """
    names = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    if len(names) > len(list(net.parameters())):
        message = "two modules of the student share a weight, which can then not be sharded"
        raise ConfigError(Problem(message, key="train.sharding", hint="sharding: none"))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.current().size,))
    for module in [*_blocks(net), net]:
        # The weights of a block that are left together after a forward pass are not those that the optimizer moves.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _blocks(net: nn.Module) -> Iterator[nn.Module]:
    """The larger children of a net; of a container, its own."""
    least = _LEAST_SHARE * sum(p.numel() for p in net.parameters())
    for child in net.children():
        inside = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        for block in child.children() if inside else [child]:
            if isinstance(block, nn.ModuleList | nn.ModuleDict):  # these have no forward pass
                continue
            if sum(p.numel() for p in block.parameters()) > least:
                yield block


def is_part(value: Any) -> bool:
    """Whether a tensor is sharded, of which this process holds its part."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def is_sharded(module: nn.Module) -> bool:
    return any(is_part(p) for p in module.parameters())


def gathered(state: Any) -> Any:
    """The state (nested dicts and lists) with whole tensors, on the CPU; whole in the first process alone."""
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    if not is_part(state):
        return state
    whole = state.full_tensor()  # of every process, one tensor at a time
    return whole.cpu() if ranks.current().first else None


def scattered(state: Any, like: Any) -> Any:
    """The state with each tensor sharded as the one of the same name in `like` is; exchanges nothing."""
    if isinstance(state, dict) and isinstance(like, dict):
        return {name: scattered(value, like.get(name)) for name, value in state.items()}
    return _part(state, like) if is_part(like) else state


def scattered_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's saved state: tensors of a weight's shape sharded as the weight is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        number: {n: _part(v, parameters[number]) if _belongs(v, parameters[number]) else v for n, v in of_one.items()}
        for number, of_one in state["state"].items()
    }
    return state | {"state": own}


def gathered_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's whole state. Raises ConfigError for state that is sharded otherwise than its weight."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if is_part(value) and value.shape != parameter.shape:
                message = f"{type(optimizer).__name__} keeps a {name} that is not one number for each weight"
                raise ConfigError(Problem(message, key="train.sharding", hint="use sgd, adam or adamw"))
    whole: dict[str, Any] = gathered(optimizer.state_dict())
    return whole


def _belongs(value: Any, parameter: Tensor) -> bool:
    return is_part(parameter) and isinstance(value, Tensor) and value.shape == parameter.shape


def _part(whole: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reduce(parameters: Iterable[nn.Parameter]) -> None:
    """Averages over processes the gradients of what is not sharded (adapters), as FSDP does those of what is."""
    everyone = ranks.current()
    plain = [p for p in parameters if not is_part(p)]
    if not plain:
        return
    here = everyone.total(torch.tensor([float(p.grad is not None) for p in plain]))
    moved = [p for p, count in zip(plain, here.tolist(), strict=True) if count]
    for parameter in moved:
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = everyone.total(own) / everyone.size


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Scales all gradients so that their norm, over sharded and other weights, is at most `most`."""
    moved = [p for p in parameters if p.grad is not None]
    sides = [side for side in ([p for p in moved if is_part(p)], [p for p in moved if not is_part(p)]) if side]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in side if p.grad is not None]) for side in sides]
    whole = [norm.full_tensor() if is_part(norm) else norm for norm in norms]  # type: ignore[attr-defined]
    for side in sides:
        torch.nn.utils.clip_grads_with_norm_(side, most, torch.linalg.vector_norm(torch.stack(whole)))
