"""The reward model: a trunk that reads prompt and response together, and one number at the end.

r(x, y) = w . h + b, with h the hidden state at the last real token (causal trunks) or the first (encoders).
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_helpers.core.generation import eval_mode
from rlhf_helpers.core.lora import has_adapter, merged_copy
from rlhf_helpers.core.models import (
    ScalarHead,
    load_encoder,
    remember_tokenizer,
    state_width,
    tokenizer_for,
    usable_positions,
)
from rlhf_helpers.core.shared_prompts import pack, takes_block_mask
from rlhf_helpers.core.tensors import as_bool_mask, batches_by_length, pad_right, require_shapes
from rlhf_helpers.core.text import encode_answers, naming
from rlhf_helpers.core.training import progress
from rlhf_helpers.core.training.distributed import full_weights, save_pretrained, whole, writes_files_of

POOLINGS = ("last", "first", "mean")
HEAD_FILE = "reward_head.safetensors"


class RewardModel(nn.Module):
    """Joint encoder: `model(input_ids)` -> rewards (B,); only differences for one prompt mean anything.

    pooling: the hidden state that the head reads. "last" real token for causal trunks, the only one that has
        seen the whole text; "first" for encoders (CLS), which sees all of it and is where public classifiers
        read; "mean" over real tokens for either, where what a response contributes shrinks with the length of
        its prompt.
    max_length: tokens read of prompt and response together (the prompt loses its beginning first); default
        and limit: the trunk's own context.

    Dropout is 0: a text has one reward, in training as in use. The head is linear and starts at
    N(0, 1/(d+1)) (Stiennon et al. 2020), drawn from torch's global generator. Ouyang et al. 2022, section
    3.5. Lesson 1. Raises ValueError for an unknown pooling, "first" over a causal trunk, or no tokenizer.
    """

    kind = "basic"
    num_hidden_inputs = 1  # hidden states that the head reads

    def __init__(
        self,
        trunk: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        pooling: str | None = None,
        max_length: int | None = None,
    ) -> None:
        """Put a new head on `trunk` (from `load_encoder`), which is trained along with it."""
        super().__init__()
        causal = _is_causal(trunk.config)
        pooling = pooling or ("last" if causal else "first")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
        if pooling == "first" and causal:
            raise ValueError(
                f'pooling "first" over a causal {trunk.config.model_type} reads a token that has seen '
                'nothing of the text: use "last" or "mean"'
            )
        self.trunk, self.pooling = trunk, pooling
        self.tokenizer: Any = tokenizer or tokenizer_for(trunk)
        remember_tokenizer(self, self.tokenizer)
        limit = usable_positions(trunk)
        if max_length is not None and (max_length < 2 or (limit and max_length > limit)):
            raise ValueError(
                f"max_length must lie between 2 and the trunk's context of {limit}, got {max_length}"
            )
        self.max_length = max_length or limit
        self.head = ScalarHead(self.num_hidden_inputs * state_width(trunk)).to(trunk.device)
        self.options: dict[str, Any] = {}  # further arguments, kept in the folder's config.json

    @property
    def config(self) -> PretrainedConfig:
        """The trunk's configuration."""
        return self.trunk.config

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Shaped[Tensor, "B T"] | None = None,
        **packed: Tensor,
    ) -> Float[Tensor, "B"]:
        """Rewards (B,), float32, of token ids padded on the right, on the left, or both.

        Without a mask it is inferred: every pad token is padding (so pad must not be EOS: `load_encoder` sees
        to that). Rows are first moved to start at position 0: padding changes no reward. Raises ValueError
        where shapes differ, the mask is not 0/1, or a row holds no real token.

        packed: where several answers share a row (`rewards_of`), position_ids, and for each answer the place
        where it ends.
        """
        rewards = self._judge(self._read(input_ids, attention_mask, **packed))
        return rewards.sum(-1)  # of one column; a squeezed view would not do under fully_shard

    def _read(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Shaped[Tensor, "B T"] | None,
        ends: Int[Tensor, "n"] | None = None,
        **positions: Tensor,
    ) -> Float[Tensor, "B d"]:
        """One hidden state per row, or per end of an answer, in float32."""
        if ends is not None:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **positions}
            return self.trunk(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[ends].float()
        require_shapes("B T", input_ids=input_ids)
        if attention_mask is None:
            attention_mask = input_ids.ne(self.tokenizer.pad_token_id)
        require_shapes("B T", input_ids=input_ids, attention_mask=attention_mask)
        ids, mask = _move_to_start(input_ids, as_bool_mask(attention_mask, "attention_mask"))
        options = {"use_cache": False} if _is_causal(self.config) else {}
        hidden = self.trunk(input_ids=ids, attention_mask=mask.long(), **options).last_hidden_state
        return self._pool(hidden, mask).float()

    def _judge(self, features: Float[Tensor, "B d"]) -> Float[Tensor, "B K"]:
        # bf16 keeps 8 bits, too few for a difference of two rewards: the head is computed in float32.
        with torch.autocast(features.device.type, enabled=False):
            return nn.functional.linear(
                features, self.head.linear.weight.float(), self.head.linear.bias.float()
            )

    def _pool(self, hidden: Float[Tensor, "B T d"], mask: Shaped[Tensor, "B T"]) -> Float[Tensor, "B d"]:
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        return torch.where(mask.unsqueeze(-1), hidden, 0.0).sum(1) / mask.sum(1, keepdim=True)

    def encode_answers(self, prompt: str, responses: Sequence[str]) -> list[list[int]]:
        """Tokenize a prompt with each response that is compared as an answer to it, at most max_length.

        All of them get the same prompt, cut for the longest (`core.text.encode_answers`).
        """
        prompt_ids, answers = encode_answers(self.tokenizer, prompt, responses, max_length=self.max_length)
        return [prompt_ids + ids for ids in answers]

    def encode(self, prompt: str, response: str) -> list[int]:
        """Tokenize one prompt with one response, as `encode_answers` does."""
        return self.encode_answers(prompt, [response])[0]

    def rewards_of(self, sequences: Sequence[list[int]]) -> Float[Tensor, "B"]:
        """One forward over token sequences (from `encode`), padded here; keeps the gradient.

        A sequence that occurs several times is read once, and so is what several of them begin with, their
        prompt (`core.shared_prompts`).
        """
        distinct, rows = distinct_rows(sequences)
        return self(**self._batch(distinct))[rows]

    def _batch(self, sequences: Sequence[list[int]]) -> dict[str, Tensor]:
        """Lay out sequences for `forward`; they share rows only where the head reads the end of each."""
        if self.pooling == "last" and takes_block_mask(self.trunk):
            inputs, places = pack(self.trunk, sequences)
            ends = torch.tensor([path[-1] for path in places], device=self.trunk.device)
            return {**inputs, "ends": ends}
        ids, mask = pad_right(sequences, self.tokenizer.pad_token_id, device=self.trunk.device)
        return {"input_ids": ids, "attention_mask": mask}

    @torch.no_grad()
    def score(
        self, prompts: Sequence[str], responses: Sequence[str], *, batch_size: int = 64
    ) -> Float[Tensor, "B"]:
        """Rewards (B,) of responses to prompts, without gradient; rows of similar length share a batch.

        Responses to the same prompt are cut together if it is too long (`encode_answers`). What
        `core.models.as_reward_fn` calls. Raises ValueError for unequal numbers or batch_size < 1.
        """
        if len(prompts) != len(responses) or batch_size < 1:
            raise ValueError(
                f"need as many prompts as responses and batch_size >= 1; got {len(prompts)} prompts, "
                f"{len(responses)} responses, batch_size {batch_size}"
            )
        # Answers to one prompt are compared, so they share its cut, as in training.
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(row)
        sequences: list[list[int]] = [[]] * len(prompts)
        longest = [0] * len(prompts)
        for prompt, own in rows.items():
            with naming(f"row {own[0]}"):
                answers = self.encode_answers(prompt, [responses[row] for row in own])
            for row, ids in zip(own, answers, strict=True):
                sequences[row] = ids
                longest[row] = max(map(len, answers))
        # By the longest answer to their prompt, so that answers to one prompt stay together.
        rewards = torch.empty(len(prompts), device=self.trunk.device)
        with eval_mode(self):
            for batch in progress.track(batches_by_length(longest, batch_size), "scoring"):
                rewards[batch] = self.rewards_of([sequences[row] for row in batch])
        return rewards

    def save_pretrained(self, folder: str | Path, *, merge: bool = False) -> None:
        """Write a Hugging Face folder: config.json, safetensors, tokenizer.

        Over a causal trunk with pooling "last" the folder has the layout of the library's classifiers:
        `AutoModelForSequenceClassification.from_pretrained(folder)` gives these rewards as its logits, padded
        on the right. (A bias that is not 0, which Bradley-Terry never makes it, is kept in the folder but not
        read by the library.) Other poolings, heads that read more than one hidden state and trunks for which
        the library has no such classifier get this package's own layout: the trunk, and the head in its own
        file. So do adapters (LoRA): alone with the name of their base model, unless `merge` adds them to
        a copy of the trunk, which needs its memory once more. Raises ValueError as `save_pretrained`.
        """
        folder, head = Path(folder), self.head.linear
        trunk: Any = merged_copy(self.trunk) if merge and has_adapter(self.trunk) else self.trunk
        own, config = trunk.config, copy.deepcopy(trunk.config)
        config.num_labels, config.pad_token_id = head.out_features, self.tokenizer.pad_token_id
        config.reward_pooling, config.reward_max_length = self.pooling, self.max_length
        config.reward_kind, config.reward_options = self.kind, self.options
        classifier = None
        if self.pooling == "last" and self.num_hidden_inputs == 1 and not has_adapter(trunk):
            classifier = _as_classifier(trunk, head, config)
        if classifier is None:
            tensors = {f"score.{name}": tensor for name, tensor in full_weights(head).items()}
        if writes_files_of(self):
            self.tokenizer.save_pretrained(folder)
            if classifier is None:
                config.save_pretrained(folder)  # adapters come without
                save_file(tensors, folder / HEAD_FILE, metadata={"format": "pt"})
        try:
            trunk.config = config
            save_pretrained(trunk if classifier is None else classifier, folder)
        finally:
            trunk.config = own

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "RewardModel":
        """Load what `save_pretrained` wrote, or a local one-label sequence classifier over a causal LM.

        Raises ModelNotFoundError where there is nothing to load, ValueError where the folder holds no reward
        head of this size (a plain language model, another kind).
        """
        trunk, tokenizer = load_encoder(folder, device=device, dtype=dtype)
        head = _read_head(Path(folder))
        config, _ = PretrainedConfig.get_config_dict(folder)
        saved = {name: config.get(f"reward_{name}") for name in ("pooling", "max_length", "options")}
        with torch.random.fork_rng(devices=[]):  # a head is drawn, then overwritten
            model = cls(trunk, tokenizer, **(saved.pop("options") or {}), **saved)
        wanted = model.head.linear.weight.shape
        if "weight" not in head or head["weight"].shape != wanted:
            shape = f"shape {tuple(head['weight'].shape)}" if "weight" in head else "none"
            raise ValueError(
                f"{str(folder)!r} needs a reward head score.weight of shape {tuple(wanted)} for a "
                f"{cls.__name__}, found {shape}; for a new reward model over this trunk call "
                "create_reward_model, for a saved one of any kind load_reward_model"
            )
        model.head.linear.load_state_dict(head, strict=False)  # other libraries' heads have no bias
        return model


def distinct_rows(sequences: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Return the distinct ones of these sequences, and for each sequence which of them it is."""
    index_of = {ids: index for index, ids in enumerate(dict.fromkeys(map(tuple, sequences)))}
    return [list(ids) for ids in index_of], [index_of[tuple(ids)] for ids in sequences]


def _is_causal(config: PretrainedConfig) -> bool:
    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_decoder", False)


def _move_to_start(
    input_ids: Int[Tensor, "B T"], mask: Shaped[Tensor, "B T"]
) -> tuple[Int[Tensor, "B T"], Shaped[Tensor, "B T"]]:
    """Shift every row's real tokens to the front, in their order; columns that hold only padding go."""
    lengths = mask.sum(1)
    if (lengths == 0).any():
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"row {row} of input_ids holds no real token, so there is nothing to reward")
    order = torch.argsort(mask.int(), dim=1, descending=True, stable=True)[:, : int(lengths.max())]
    return input_ids.gather(1, order), mask.gather(1, order)


def _as_classifier(
    trunk: PreTrainedModel, head: nn.Linear, config: PretrainedConfig
) -> PreTrainedModel | None:
    """The library's classifier around our very modules, for saving: built without memory, then filled.

    None where the library has no classifier for this trunk (Granite, Cohere, ...), or one of another layout.
    """
    if config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return None
    with torch.device("meta"):
        shell = AutoModelForSequenceClassification.from_config(config)
    score, trunk_name = getattr(shell, "score", None), shell.base_model_prefix
    fits = isinstance(score, nn.Linear) and score.weight.shape == head.weight.shape
    if not fits or type(getattr(shell, trunk_name, None)) is not type(trunk):
        return None
    setattr(shell, trunk_name, trunk)
    biased = bool(whole(head.bias).any())
    shell.score = nn.Linear(head.in_features, head.out_features, bias=biased, device="meta")
    shell.score.weight = head.weight
    if shell.score.bias is not None:
        shell.score.bias = head.bias
    return shell


def _read_head(folder: Path) -> dict[str, Tensor]:
    """Weight and bias of the head, from whichever safetensors file (or shard) of the folder holds them."""
    head = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in {"score.weight", "score.bias"} & set(tensors.keys()):
                head[name.removeprefix("score.")] = tensors.get_tensor(name)
    return head
