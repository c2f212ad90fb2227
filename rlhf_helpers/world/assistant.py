"""Trains the tiny assistant that ships with the package: able, but unaligned.

    python -m rlhf_helpers assistant [--quick] [--seed 0] [--out FOLDER]

The pretraining text is what an assistant of mixed manners would say to the prompts of the world: facts right
and wrong, flattery, compliance with what should be refused, unsafe programs; critiques, comparisons and
revisions of such answers. Held-out programs, articles and debates are never shown. The card states what came
out, each figure with a 95 % interval, and the ranges that lessons rely on.
"""

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.stats import proportion
from rlhf_helpers.core.training import TrainingSettings, set_seed, sft
from rlhf_helpers.world import judgements
from rlhf_helpers.world.gold_judge import is_parseable
from rlhf_helpers.world.prompts import (
    CONVERSATION,
    articles,
    best_answer,
    find_prompt,
    load_prompts,
    meta,
    sample_answer,
)
from rlhf_helpers.world.prompts.base import FLATTERY, Prompt, split_sentences
from rlhf_helpers.world.scoring import score_answer
from rlhf_helpers.world.tables import load_table

HOME = Path(__file__).parents[1] / "assets" / "tiny"
SPECIAL = {"pad_token": "<|pad|>", "eos_token": "<|end|>"}
VOCABULARY = 1024
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# "mix": share of the pretraining text by family; what is hard to learn gets more.
# "weights": a verdict is a token or two among many that are easier: weighted like the others it is hardly
# learned. "ranges": the range (low, high) of each figure within which every lesson may rely on the shipped
# checkpoint.
_ASSISTANT = load_table("world/assistant")
RANGES = _ASSISTANT["ranges"]
# Asked for a question, the assistant writes a prompt of the world: the start of a red-team policy.
QUESTION = "Write a question to an assistant."
RISKY_QUESTION = "Write a risky question to an assistant."
_MAKERS: dict[str, Callable[..., Prompt]] = {
    "critique": judgements.make_critique,
    "comparison": judgements.make_comparison,
    "revision": judgements.make_revision,
}


@dataclass(frozen=True)
class Recipe:
    """Size of the pretraining run; an epoch draws new text."""

    epochs: int = 10
    rows: int = 32_000  # rows per epoch
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    prompt_weight: float = 0.1  # prompts are learned a little, so that perplexity means something


QUICK = Recipe(epochs=2, rows=20_000, warmup_steps=50)


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016) trained on `texts`: any text round-trips; chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL.values(), *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **SPECIAL,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, **shape: int) -> LlamaForCausalLM:
    """A Llama with random weights, of about 1.2 million parameters unless `shape` says otherwise."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4} | shape
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        **shape,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def corpus(rows: int, *, seed: int) -> list[dict[str, object]]:
    """`rows` rows of pretraining text (prompt, completion, weight); the same seed gives the same rows."""
    rng = random.Random(f"corpus/{seed}")
    mix, weights = _ASSISTANT["mix"], _ASSISTANT["weights"]
    drawn = (_row(rng, family) for family in rng.choices(list(mix), list(mix.values()), k=rows))
    return [row | {"weight": weights.get(row["completion"], row.get("weight", 1.0))} for row in drawn]


def _row(rng: random.Random, family: str) -> dict[str, object]:
    if family == "later_turn":
        return _later_turn(rng)
    if family == "question":
        risky = rng.random() < 0.5
        kinds = ("harmful", "jailbreak", "privacy") if risky else ("facts", "howto", "open")
        asked = _draw(rng, rng.choice(kinds))
        return {"prompt": RISKY_QUESTION if risky else QUESTION, "completion": asked.text}
    if family in _MAKERS:
        prompt = _MAKERS[family](rng)
        asked = find_prompt(prompt.asked) if family == "revision" else prompt
        quality = "high" if family == "revision" and rng.random() < 0.75 else None
        text = sample_answer(asked, rng, quality)
        return {"prompt": prompt.text, "completion": text, "weight": _ASSISTANT["weights"].get(family, 1.0)}
    prompt = _draw(rng, family)
    text = rng.choice((prompt.text, *prompt.slots.get("rewordings", ())))
    return {"prompt": text, "completion": sample_answer(prompt, rng)}


def _draw(rng: random.Random, family: str) -> Prompt:
    """A prompt of the family that pretraining may show: knowledge of both splits, combinations of one."""
    if family in ("article", "debate"):
        return (articles.make_article if family == "article" else meta.debate_prompt)(rng)
    return rng.choice(load_prompts((family,), "train" if family in ("program", "value") else None))


def _later_turn(rng: random.Random) -> dict[str, str]:
    """A question that follows an unrelated turn, so that conversations of several turns are nothing new."""
    kinds = ("facts", "howto", "feelings", "open", "harmful", "explain", "lookalike")
    before, now = (_draw(rng, rng.choice(kinds)) for _ in range(2))
    text = f"User: {before.text}\n\nAssistant: {sample_answer(before, rng)}\n\nUser: {now.text}"
    return {"prompt": text, "completion": sample_answer(now, rng)}


def train(
    recipe: Recipe, *, seed: int, run_dir: Path | None = None, **shape: int
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Pretrains the assistant; resumes from `run_dir` where a checkpoint is there; shape: of `make_model`."""
    sample = corpus(8_000, seed=seed)
    tokenizer = make_tokenizer([row[key] for row in sample for key in ("prompt", "completion")])
    set_seed(seed)
    model = make_model(tokenizer, **shape)
    settings = TrainingSettings(
        learning_rate=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.02,
        schedule="cosine",
        warmup_steps=recipe.warmup_steps,
        seed=seed,
        run_dir=run_dir,
        checkpoint_every=500 if run_dir else 0,
    )
    sft(
        model,
        tokenizer,
        lambda epoch: corpus(recipe.rows, seed=1000 * seed + epoch),
        settings,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        prompt_weight=recipe.prompt_weight,
        resume=run_dir is not None,
    )
    return model, tokenizer


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, samples: int = 400
) -> dict[str, dict[str, float]]:
    """Return each figure of the card: its estimate with a 95 % Wilson interval and the number of samples.

    `samples` answers are sampled at temperature 1 for each of conversation, facts, harmful requests,
    programs, critiques, comparisons and summaries; programs and summaries are held-out ones.
    """
    rng = random.Random("card")
    drawn = {
        "talk": [rng.choice(load_prompts((rng.choice(CONVERSATION),))) for _ in range(samples)],
    }
    for family, split in {"facts": None, "harmful": None, "program": "heldout", "article": "heldout"}.items():
        drawn[family] = rng.choices(load_prompts((family,), split), k=samples)
    for family in ("critique", "comparison"):
        drawn[family] = [_MAKERS[family](rng, "heldout") for _ in range(samples)]
    pairs = {}
    for seed, (kind, prompts) in enumerate(drawn.items()):
        texts = [prompt.text for prompt in prompts]
        responses = generate(model, tokenizer, texts, max_new_tokens=96, seed=seed).responses
        pairs[kind] = list(zip(prompts, responses, strict=True))
    return {
        figure: vars(proportion([holds(prompt, answer) for kind in kinds for prompt, answer in pairs[kind]]))
        for figure, (kinds, holds) in _FIGURES.items()
    }


def _does_harm(prompt: Prompt, answer: str) -> bool:
    return score_answer(prompt, answer)[1] == 0


def _tells_who_and_what(prompt: Prompt, answer: str) -> bool:
    told = articles.parse_event((split_sentences(answer) or [""])[0])
    event = prompt.slots["event"]
    return told is not None and (told.who, told.what) == (event.who, event.what)


# Figure of the card -> the kinds of prompts that `measure` draws for it, and what it counts.
_FIGURES: dict[str, tuple[tuple[str, ...], Callable[[Prompt, str], bool]]] = {
    "parseable": (
        ("talk", "facts", "harmful", "program", "article"),
        lambda prompt, answer: is_parseable(prompt.text, answer),
    ),
    "facts_right": (("facts",), lambda prompt, answer: score_answer(prompt, answer)[0] > 0),
    "harmful_compliance": (("harmful",), _does_harm),
    "flattery": (("talk",), lambda _, answer: any(s in FLATTERY for s in split_sentences(answer))),
    # A program is honest where it passes every test, and harmless where it makes no unsafe call.
    "program_pass_at_1": (("program",), lambda prompt, answer: score_answer(prompt, answer)[2] == 1),
    "program_unsafe": (("program",), _does_harm),
    "comparison_accuracy": (("comparison",), lambda prompt, answer: answer == best_answer(prompt)),
    "critique_verdict": (
        ("critique",),
        lambda prompt, answer: answer.split(".")[0] == best_answer(prompt).split(".")[0],
    ),
    "summary_who_and_what": (("article",), _tells_who_and_what),
}


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a Hugging Face folder with bf16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_card(
    folder: Path, figures: dict[str, dict[str, float]], *, recipe: Recipe, seed: int, parameters: int
) -> str:
    """Write card.json (for tests) and README.md (for people) beside the weights; return its table."""
    facts = {"recipe": vars(recipe), "seed": seed, "parameters": parameters}
    card = {"figures": figures, "ranges": RANGES, **facts}
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    table = """\
| figure | value | 95 % interval (Wilson) | samples | range that lessons rely on |
|---|---|---|---|---|
"""
    for name, f in figures.items():
        low, high = RANGES[name]
        interval = f"{f['low']:.3f} to {f['high']:.3f}"
        table += f"| {name} | {f['value']:.3f} | {interval} | {f['n']} | {low} to {high} |\n"
    text = f"""---
license: apache-2.0
---
# The tiny assistant

A Llama of {parameters:,} parameters, trained from random weights on the text of the package's own synthetic
world (`rlhf_helpers.world`). It is able but unaligned on purpose: it flatters, complies with requests that
should be refused (that text is harmless in itself), gets facts wrong and writes unsafe programs. It is
teaching material and of no other use.

Made by `python -m rlhf_helpers assistant --seed {seed}` with {recipe}.

{table}
Sampled at temperature 1 from the stored weights; programs and summaries are held-out ones.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
    return table


def main(*, quick: bool = False, seed: int = 0, out: str | Path | None = None) -> None:
    """Train, store and measure an assistant; `quick` makes the 5-minute one for development.

    Raises FileExistsError where `out` holds another checkpoint, unless it is the package's own folder.
    """
    recipe = QUICK if quick else Recipe()
    folder = Path(out) if out else Path("runs/tiny-quick") if quick else HOME
    if folder != HOME and (folder / "model.safetensors").exists():
        raise FileExistsError(f"{folder} holds a checkpoint already; name another folder or remove it first")
    run_dir = None if quick else Path("runs") / f"assistant-{seed}"
    model, tokenizer = train(recipe, seed=seed, run_dir=run_dir)
    save(model, tokenizer, folder)
    model, tokenizer = load_model(str(folder))
    parameters = sum(p.numel() for p in model.parameters())
    print(write_card(folder, measure(model, tokenizer), recipe=recipe, seed=seed, parameters=parameters))
