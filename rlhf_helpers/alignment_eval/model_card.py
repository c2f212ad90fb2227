"""A finished policy for others: a Hugging Face folder with a model card that says what is known of it."""

import copy
import inspect
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from rlhf_helpers.alignment_eval.report import AlignmentReportGenerator, markdown_table
from rlhf_helpers.core.lora import has_adapter, merged_copy
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.core.smollm2 import quiet_loading
from rlhf_helpers.core.stats import Estimate, WinRate
from rlhf_helpers.core.text import end_id, opening_ids

# What this package feeds a model without a chat template (`core.text.encode_prompt`), as a chat template.
PLAIN_TEMPLATE = (
    "{%- if messages | length == 1 and messages[0]['role'] == 'user' %}{{ messages[0]['content'] }}"
    "{%- else %}{%- for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{%- if not loop.last %}{{ '\n\n' }}{%- endif %}{%- endfor %}{%- endif %}"
    "{%- if messages[-1]['content'][-1:] | trim %}{{ '\n' }}{%- endif %}"
)
_USE = """```python
from transformers import pipeline

chat = pipeline("text-generation", model="path/of/this/folder")
print(chat([{"role": "user", "content": "What is the capital of France?"}], return_full_text=False))
```"""


def save_policy(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    data: str,
    method: str,
    seeds: Sequence[int],
    metrics: Mapping[str, Any],
    limits: str,
    tokenizer: Any = None,
    settings: Mapping[str, Any] | None = None,
    max_new_tokens: int = 64,
    **facts: Any,
) -> Path:
    """Write weights (safetensors), tokenizer, chat template, generation config, README.md; return the folder.

    `transformers.pipeline("text-generation", model=folder)` loads it anywhere, without this package, and
    samples as the policy was trained: temperature 1, no top-k or top-p, at most max_new_tokens. A tokenizer
    without a chat template gets one that gives the same ids as `encode_prompt`; adapters (peft) are merged.

    The folder appears whole or not at all: written beside it, then renamed. `model` stays as it is. Lesson 4.

    Args:
        model: The policy.
        folder: Its last part is the title.
        data: What it was trained on, in Markdown.
        method: How, in Markdown.
        seeds: Of the training.
        metrics: name -> number, `Estimate` (of `score_interval`, say) or `WinRate`.
        limits: What it must not be used for, or is not known of it, in Markdown.
        tokenizer: None: the model's own.
        settings: Further lines of the card.
        max_new_tokens: Of an answer.
        **facts: What the card's head says to the hub: license, language ("en"), base_model and other fields
            of `huggingface_hub.ModelCardData`.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something already.
        ValueError: a text is empty, there are no seeds or metrics, or a value is not finite or outside its
            interval.
        TypeError: the model is not a Hugging Face causal LM, or a keyword is unknown.
    """
    folder = Path(folder)
    # ModelCardData takes any keyword: a misspelled one would end up on the card.
    if unknown := sorted(set(facts) - set(inspect.signature(ModelCardData).parameters)):
        raise TypeError(f"save_policy and the card's head have no such fields, unknown: {unknown}")
    for name, text in {"data": data, "method": method, "limits": limits}.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}= must say something: a card without it misleads, got {text!r}")
    if not seeds or not metrics:
        raise ValueError(f"a card needs seeds and metrics, got seeds={seeds!r} and metrics={metrics!r}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists: name another folder, or empty it")
    rows = pd.DataFrame([_measured(*item) for item in metrics.items()], index=list(metrics))
    tokenizer = copy.deepcopy(tokenizer or tokenizer_for(model))
    if has_adapter(model):
        model = merged_copy(model)
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(f"save_policy needs a Hugging Face causal LM, got {type(model).__name__}")

    usual = {
        "license": "unknown",
        "language": "en",
        "tags": ["rlhf"],
        "model_name": folder.name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    front = ModelCardData(**usual | facts)
    manifest = AlignmentReportGenerator(model=model, seeds=seeds, settings=settings).manifest
    manifest["parameters"] = f"{sum(p.numel() for p in model.parameters()):,}"
    measured = f"{markdown_table(rows)}\n\nIntervals: 95 %."
    texts = {"Limits": limits, "Data": data, "Method": method, "Measured": measured, "Use": _USE}
    texts["Made with"] = markdown_table(manifest)
    body = "\n\n".join(
        [f"# {folder.name}", *(f"## {head}\n\n{text.strip()}" for head, text in texts.items())]
    )
    _write(folder, model, tokenizer, f"---\n{front.to_yaml()}\n---\n\n{body}\n", max_new_tokens)
    return folder


def _write(folder: Path, model: PreTrainedModel, tokenizer: Any, card: str, max_new_tokens: int) -> None:
    """Fill a folder beside the target, then rename it when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    if not tokenizer.chat_template:
        opens = "{{ bos_token or cls_token }}" if opening_ids(tokenizer) else ""
        tokenizer.chat_template = opens + PLAIN_TEMPLATE
    stops = model.generation_config.eos_token_id
    stops = sorted({end_id(tokenizer), *(stops if isinstance(stops, list) else [stops])} - {None})
    generation = copy.deepcopy(model.generation_config)
    generation._from_model_config = False  # else a loader may write it anew from config.json
    generation.update(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        max_length=None,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        with quiet_loading():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            generation.save_pretrained(partial)
        ModelCard(card).save(partial / "README.md")
        if folder.exists():
            folder.rmdir()  # empty; Windows renames onto nothing that exists
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _measured(name: str, given: Any) -> dict[str, Any]:
    """Return one row of the table of metrics."""
    figure = given.estimate if isinstance(given, WinRate) else given
    known = isinstance(figure, Estimate)
    value, low, high = (figure.value, figure.low, figure.high) if known else (figure,) * 3
    if not (isinstance(value, Real) and -math.inf < low <= value <= high < math.inf):
        raise ValueError(
            f"metrics[{name!r}] must be a finite number, or an Estimate or WinRate within its interval, got "
            f"{given!r}: leave out what was not measured"
        )
    return {
        "value": float(value),
        "95 % interval": f"{low:.3f} to {high:.3f}" if known else "not given",
        "samples": figure.n if known else "not given",
    }
