"""Several processes, low precision, recomputed activations: what the engine does to models and gradients."""

import os
from collections.abc import Iterable
from contextlib import suppress
from types import MethodType

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, convert_outputs_to_fp32, parse_flag_from_env

BUCKET = 2**25  # numbers averaged over the processes at once


def process_state() -> PartialState:
    """Return rank and number of processes; joins the group that torchrun or accelerate launch opened.

    Raises RuntimeError if several processes were launched and each believes to be alone.
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


def make_accelerator() -> Accelerator:
    """Return an Accelerator; ValueError under FSDP or DeepSpeed, since the engine averages whole copies."""
    cpu = process_state().device.type == "cpu"
    if AcceleratorState._shared_state:  # another library's may differ in precision, which we do not use
        accelerator = Accelerator()
    else:
        accelerator = Accelerator(cpu=cpu, mixed_precision="no")
    kind = str(accelerator.distributed_type.value)
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise ValueError(f"{kind} shards the weights; launch with plain data parallelism (--multi_gpu)")
    return accelerator


def enter_autocast(module: torch.nn.Module, device: torch.device) -> None:
    """Let `module` compute in bf16 and answer in float32; weights and gradients stay as they are."""
    leave_autocast(module)
    forward = torch.autocast(device.type, torch.bfloat16)(module.forward.__func__)
    # A bound method, not a closure over the module: a deep copy must call its own weights.
    module.forward = MethodType(convert_outputs_to_fp32(forward), module)
    module._computes_in_bf16 = True


def leave_autocast(module: torch.nn.Module) -> None:
    """Undo `enter_autocast`; does nothing to other modules."""
    if module.__dict__.pop("_computes_in_bf16", False):
        del module.forward


def enable_gradient_checkpointing(model: torch.nn.Module) -> None:
    """Recompute activations in every Hugging Face model inside `model`; ValueError if there is none."""
    options = {"use_reentrant": False}  # the reentrant kind needs inputs that require gradients
    found = False
    for module in _checkpointable(model):
        with suppress(ValueError):  # a part that has no layers of its own
            if hasattr(module, "activation_checkpointing_enable"):  # its name in newer transformers
                module.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
            else:
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            found = True
    if not found:
        raise ValueError(f"{type(model).__name__} holds no model that supports gradient checkpointing")


def disable_gradient_checkpointing(model: torch.nn.Module) -> None:
    """Undo `enable_gradient_checkpointing`: a model in train mode could not use its cache to generate."""
    for module in _checkpointable(model):
        getattr(module, "activation_checkpointing_disable", module.gradient_checkpointing_disable)()


def _checkpointable(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if getattr(m, "supports_gradient_checkpointing", False)]


def average_gradients(
    parameters: list[torch.nn.Parameter], accelerator: Accelerator, *, scale: float
) -> None:
    """Mean gradient over processes times `scale`; a weight that no process used keeps no gradient."""
    if accelerator.num_processes > 1:
        parameters = _used_anywhere(parameters, accelerator)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scale != 1:
        torch._foreach_mul_(gradients, scale)
    if accelerator.num_processes > 1:
        for bucket in _buckets(gradients):
            mean = accelerator.reduce(torch.cat([g.flatten() for g in bucket]), "mean")
            for gradient, part in zip(bucket, mean.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _used_anywhere(
    parameters: list[torch.nn.Parameter], accelerator: Accelerator
) -> list[torch.nn.Parameter]:
    """Weights with a gradient on some process; where it is missing, it is zero."""
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=accelerator.device)
    used = accelerator.reduce(used, "sum").tolist()
    parameters = [p for p, count in zip(parameters, used, strict=True) if count]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return parameters


def _buckets(gradients: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Neighbours of one dtype, together at most BUCKET numbers (or one larger tensor)."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.numel() > BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket


def copy_from_first(model: torch.nn.Module) -> None:
    """Give every process the weights and buffers of rank 0 (new heads are drawn with a seed per rank)."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.copy_(broadcast(tensor.data.contiguous()))
