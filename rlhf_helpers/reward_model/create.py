"""Create and load reward models of every kind: the one file that knows them all."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from rlhf_helpers.core.lora import add_lora
from rlhf_helpers.core.models import load_encoder
from rlhf_helpers.reward_model.ensemble import ENSEMBLE_FILE, RewardEnsemble
from rlhf_helpers.reward_model.model import RewardModel
from rlhf_helpers.reward_model.multi_objective import MultiObjectiveRewardModel
from rlhf_helpers.reward_model.separate import SeparateRewardModel

CLASSES = {
    "basic": RewardModel,
    "separate": SeparateRewardModel,
    "multi_objective": MultiObjectiveRewardModel,
    "ensemble": RewardEnsemble,
}


def create_reward_model(
    kind: str = "basic",
    *,
    base_model_name: str | Path = "tiny",
    pooling: str | None = None,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    lora: int = 0,
    members: int = 4,
    **options: Any,
) -> nn.Module:
    """Make an untrained reward model over a pretrained trunk: "tiny", a local folder or a hub name.

    kind: "basic", the joint encoder `RewardModel`; "separate", `SeparateRewardModel`; "multi_objective",
        `MultiObjectiveRewardModel` (options: objectives, weights); "ensemble", `RewardEnsemble` of so many
        `members` of kind "basic", heads drawn from seed, seed + 1, ... (options: aggregate, penalty).
    lora: rank of adapters to train in place of the trunk's weights (`core.lora.add_lora`); 0: none.
    seed: of the new head alone. All else as in `RewardModel` and `load_encoder`. Raises ValueError for an
    unknown kind or what the kind refuses, ModelNotFoundError for no such model.
    """
    if kind not in tuple(CLASSES):
        raise ValueError(f"there is no reward model of kind {kind!r}; choose from {tuple(CLASSES)}")
    shape = {"pooling": pooling, "max_length": max_length}
    if kind == "ensemble":
        shape |= {"base_model_name": base_model_name, "device": device, "dtype": dtype, "lora": lora}
        return CLASSES[kind]([create_reward_model(seed=seed + i, **shape) for i in range(members)], **options)
    trunk, tokenizer = load_encoder(base_model_name, device=device, dtype=dtype)
    if lora:
        add_lora(trunk, lora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLASSES[kind](trunk, tokenizer, **shape, **options)


def load_reward_model(
    folder: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Load a reward model of whatever kind its `save_pretrained` wrote; raises as `from_pretrained` does."""
    options = {"device": device, "dtype": dtype}
    if (Path(folder) / ENSEMBLE_FILE).is_file():
        return RewardEnsemble.from_pretrained(folder, load_member=load_reward_model, **options)
    kind = PretrainedConfig.get_config_dict(folder)[0].get("reward_kind", "basic")
    return CLASSES[kind].from_pretrained(folder, **options)
