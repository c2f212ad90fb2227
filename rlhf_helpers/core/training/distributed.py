"""Processes, sharded weights, low precision, recomputed activations: what the engine does to a model."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf_helpers.core.lora import has_adapter, merged_copy, save_adapter
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.core.smollm2 import quiet_loading


def process_state() -> PartialState:
    """Return rank and number of processes; join the group that torchrun or accelerate launch opened.

    Raises:
        RuntimeError: several processes were launched, but each one runs as if it were the only process.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)  # without this flag accelerate sees no group on a machine without a GPU
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise RuntimeError(
            f"{launched} processes were launched but accelerate counts {state.num_processes}: "
            "create no Accelerator or PartialState before the first Engine or set_seed"
        )
    return state


def make_accelerator(precision: str) -> Accelerator:
    """Return an Accelerator for "no" or "bf16"; it knows the processes, the device and the precision."""
    cpu = process_state().device.type == "cpu"  # pyright: ignore[reportOptionalMemberAccess]
    AcceleratorState._reset_state()  # precision belongs to a run; accelerate keeps it for the whole process
    return Accelerator(cpu=cpu, mixed_precision=precision)


def distribute(model: torch.nn.Module, *, shard: bool) -> None:
    """Spread `model` over all processes by torch's FSDP2; every process starts with the weights of rank 0.

    With `shard` each process holds its part of weights, gradients and optimizer state (a mesh of n). Without,
    each holds all of them (a mesh of n x 1): one mechanism, and the same gradients. The gradient is the SUM
    over the processes, so each loss must be this process's part of the total.

    FSDP2 changes the modules in place and wraps nothing: a loop calls the model as before. Three rules hold
    from then on: every process makes the same number of forward calls, a copy cannot be made (copy the
    reference first), and a head is called through the module that holds it.
    """
    processes = dist.get_world_size()
    device_type = next(model.parameters()).device.type
    if shard:
        mesh = init_device_mesh(device_type, (processes,))
    else:
        mesh = init_device_mesh(device_type, (processes, 1), mesh_dim_names=("replicate", "shard"))
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, src=0)  # new heads are drawn with a seed per rank
    layer_names: set[str] = set()
    for module in model.modules():  # a reward model holds its Hugging Face model as a part
        layer_names.update(getattr(module, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in layer_names]
    model.weights_are_sharded = shard  # pyright: ignore[reportArgumentType]
    for module in (*layers, model):
        module = fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot sum and scale in one operation


def is_distributed(model: torch.nn.Module) -> bool:
    """Whether `distribute` has spread this model, or a part of it, over the processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def writes_files_of(model: torch.nn.Module) -> bool:
    """Whether this process writes the files of `model`: the first one, if it is spread over several."""
    return not is_distributed(model) or process_state().is_main_process


def sum_over_shards(model: torch.nn.Module, count: int) -> int:
    """Add up a count over the processes among which `model` is sharded; a whole model's stays as it is.

    Each process then holds only its part of the weights, so that a forward call needs all of them. The
    weights themselves do not tell: between a forward without gradient and the next backward, those of the
    root are whole.
    """
    if not getattr(model, "weights_are_sharded", False):
        return count
    total = torch.tensor(count, device=next(model.parameters()).device)
    dist.all_reduce(total)
    return int(total)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor behind a sharded one; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a full tensor, spread as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the whole weights on the CPU, tied ones once; every process must ask for them."""
    return {name: whole(tensor).cpu().clone() for name, tensor in _untied_weights(model).items()}


def _untied_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights as they lie in this process, tied ones under their first name alone."""
    first = dict(model.named_parameters()).keys()
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - first
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def load_full_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put back what `full_weights` returned.

    Raises:
        ValueError: weights are missing, unknown or of another shape; names them, and changes nothing.
    """
    own = _untied_weights(model)
    mine = {name: tensor.shape for name, tensor in own.items()}  # of a sharded weight, the whole one's
    theirs = {name: tensor.shape for name, tensor in weights.items()}
    if wrong := sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name)):
        raise ValueError(f"the checkpoint and the model differ in {wrong[:5]}")
    parts = {name: local_part(tensor, own[name]) for name, tensor in weights.items()}
    model.load_state_dict(parts, strict=False)


def save_model(
    model: torch.nn.Module, folder: str | os.PathLike, *, tokenizer: Any = None, merge: bool = False
) -> None:
    """Write a policy and its tokenizer: `core.models.load_model(folder)` reads them.

    Args:
        merge: add adapters (LoRA) to the weights, so that any tool reads the folder. False: adapters are
            written alone, a few MB, with the name of their base model. A model without adapters is always
            written whole.

    Raises:
        ValueError: as `save_pretrained`.
    """
    if writes_files_of(model):
        (tokenizer or tokenizer_for(model)).save_pretrained(folder)
    save_pretrained(model, folder, merge=merge)  # last: it ends with all processes waiting for the first


def save_pretrained(model: torch.nn.Module, folder: str | os.PathLike, *, merge: bool = False) -> None:
    """Write config and whole weights as a plain Hugging Face folder, or adapters alone.

    Every process must call it, since each may hold a part of the weights; the first writes.

    Raises:
        ValueError: as `merged_copy` and `save_adapter`.
    """
    if merge and has_adapter(model):
        model = merged_copy(model)
    weights = full_weights(model) if is_distributed(model) else None
    if writes_files_of(model):
        if has_adapter(model):
            save_adapter(model, Path(folder), weights)
        else:
            with quiet_loading():
                model.save_pretrained(folder, state_dict=weights)  # pyright: ignore[reportCallIssue]
    if is_distributed(model):
        process_state().wait_for_everyone()


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the whole optimizer state on the CPU; every process must ask for it."""
    state = optimizer.state_dict()
    moments = {
        index: {name: whole(value).cpu().clone() for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {"state": moments, "param_groups": state["param_groups"]}


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put back what `full_optimizer_state` returned; each process takes its part."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for index, values in state["state"].items():
        like = parameters[index]
        moments[index] = {
            name: local_part(value, like) if value.shape == like.shape else value
            for name, value in values.items()
        }
    optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})


def enable_gradient_checkpointing(model: torch.nn.Module) -> None:
    """Recompute activations in every Hugging Face model inside `model`; ValueError if there is none."""
    options = {"use_reentrant": False}  # the reentrant kind needs inputs that require gradients
    supported = False
    for module in _checkpointable(model):
        with suppress(ValueError):  # a part that has no layers of its own
            module.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
            supported = True
    if not supported:
        raise ValueError(f"{type(model).__name__} holds no model that supports gradient checkpointing")


def disable_gradient_checkpointing(model: torch.nn.Module) -> None:
    """Undo `enable_gradient_checkpointing`: a model in train mode could not use its cache to generate."""
    for module in _checkpointable(model):
        module.activation_checkpointing_disable()


def _checkpointable(model: torch.nn.Module) -> list[Any]:
    return [m for m in model.modules() if getattr(m, "supports_gradient_checkpointing", False)]
