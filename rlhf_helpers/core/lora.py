"""LoRA: train low-rank matrices beside frozen weights; with them switched off, the model is the reference."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from rlhf_helpers.core.models import frozen_copy, remember_tokenizer, tokenizer_for


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """Freeze a Hugging Face model and put trainable adapters beside all its linear layers but the last.

    W x + 2 B A x,  A (rank, d_in) random, B (d_out, rank) zero: at the start the model is unchanged

    Works in place. A reward or value head around the model keeps its own trainable weights. Hu et al. 2021.

    Args:
        model: a causal LM, a trunk, or a module that holds some (a reward model).
        rank: of A and B; 8 to 64 is common.

    Returns:
        The model given. One that has adapters of this rank already stays as it is.

    Raises:
        ValueError: rank < 1, adapters of another rank, or no Hugging Face model to adapt.
    """
    if rank < 1:
        raise ValueError(f"the LoRA rank must be >= 1, got {rank}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    ranks = {size for layer in layers for size in layer.r.values()}
    if ranks - {rank}:
        raise ValueError(f"the model has adapters of rank {sorted(ranks)} already: lora={rank} must match")
    bases = [] if ranks else _outermost(model)
    if not bases and not ranks:
        raise ValueError(f"{type(model).__name__} holds no Hugging Face model that LoRA could adapt")
    for base in bases:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        # A seed of its own: adding adapters twice gives the same ones, and moves no other generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base.add_adapter(config)
    return model


def has_adapter(model: nn.Module) -> bool:
    """Whether `model` holds adapters, of this module or of a peft model."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def reference_model(policy: nn.Module, ref_model: nn.Module | None = None, *, lora: int = 0) -> nn.Module:
    """Return ref_model, or the policy without its adapters, or, if it has none, a frozen copy of it.

    It must be made before an engine spreads the policy over processes: then it cannot be copied.

    Args:
        lora: > 0: the policy will get adapters before it is trained.

    Raises:
        ValueError: ref_model is the policy itself.
    """
    if ref_model is policy:
        raise ValueError("ref_model is the model that is trained, so KL would stay 0; give a frozen_copy")
    if ref_model is not None:
        return ref_model
    return WithoutAdapter(policy) if lora or has_adapter(policy) else frozen_copy(policy)


class WithoutAdapter(nn.Module):
    """A model whose adapters are switched off in each forward call: a reference without a second model.

    An adapter that was trained before, by supervised fine-tuning for example, is not part of this reference.
    To measure KL from the fine-tuned model, merge the adapter first or give a `frozen_copy`.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hold the model itself, not a copy."""
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model without its adapters."""
        with adapters_off(self.module):
            return self.module(*args, **kwargs)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.module.config

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights that the reference is made of: those of the model but its adapters'."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            if ".lora_" not in name:
                yield name, parameter


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapters off within the block.

    Unlike peft's own switch this one leaves requires_grad alone, which FSDP reads in the first forward call.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its adapters added to the weights; it costs their memory once more.

    Raises:
        ValueError: the model is spread over processes.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            "adapters spread over processes cannot be merged: save them with merge=False, then load the "
            "folder in one process and save it with merge=True"
        )
    tokenizer = tokenizer_for(model)
    merged: Any = copy.deepcopy(model, {id(tokenizer): tokenizer})
    if hasattr(merged, "merge_and_unload"):
        merged = merged.merge_and_unload()
        remember_tokenizer(merged, tokenizer)
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            merged.set_submodule(name, layer.get_base_layer())
    merged._hf_peft_config_loaded = False
    # load_adapter leaves the names that weights have in an adapter file, under which they would be saved.
    merged._weight_conversions = None
    return merged


def save_adapter(model: nn.Module, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapters of a model alone, in peft's format: adapter_config.json and safetensors.

    Embeddings are never written: `load_model` grows those of the base for a pad token in the same way.

    Args:
        weights: the whole weights of a model that is spread over processes.

    Raises:
        ValueError: the base model was trained or built in memory, so the adapters could not find it again.
    """
    config: Any = model.peft_config["default"]  # pyright: ignore[reportArgumentType, reportIndexIssue]
    if not config.base_model_name_or_path:
        raise ValueError(
            "the base model of these adapters was trained or built in memory, so they could not find it "
            "again: pass merge=True, or save the base model and load it before adding adapters"
        )
    state = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    prefix = "base_model.model."  # the names inside a peft model have it already
    tensors = {prefix + name.removeprefix(prefix): tensor.contiguous() for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def forget_base_name(model: nn.Module) -> None:
    """Unset the name under which the base model was loaded, because its weights are trained now.

    Adapters added later are saved with this name, and would be put beside the untrained weights.
    """
    for base in _outermost(model):
        if any(p.requires_grad and ".lora_" not in name for name, p in base.named_parameters()):
            base.name_or_path = ""


def _outermost(model: nn.Module) -> list[PreTrainedModel]:
    """The Hugging Face models in a module; a trunk inside one of them does not count."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [base for child in model.children() for base in _outermost(child)]
