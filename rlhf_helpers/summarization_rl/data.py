"""Articles and reference summaries: the world's, a learner's own texts and files, a set of the hub."""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from rlhf_helpers.core.models import encode_prompt
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.preference_data.reading import Source, read_records
from rlhf_helpers.preference_data.report import PreferenceDataError
from rlhf_helpers.world.prompts import load_prompts, sample_answer

INSTRUCTION = "Summarise this article."
ARTICLE_COLUMNS = ("article", "document", "text", "dialogue", "post")
SUMMARY_COLUMNS = ("summary", "highlights", "reference", "tldr", "completion")
Texts = Sequence[str] | Source


def create_summarization_data(
    articles: Texts | None = None, summaries: Texts | None = None, num_samples: int | None = None,
    *, split: str | None = None, quality: str | None = "high", article_column: str | None = None,
    summary_column: str | None = None, seed: int = 0,
) -> Dataset:  # fmt: skip
    """Rows to learn from: prompt (instruction and article), article and, where there is one, reference.

    articles: None: the tiny world's. A list of texts; a .txt file, or a folder of them in the order of their
        names; .jsonl, .json, .csv, .parquet; a datasets.Dataset or list of dicts; the name of a hub set (the
        only thing that asks the network). Columns by name (ARTICLE_COLUMNS, SUMMARY_COLUMNS) unless told.
    summaries: the same kinds, one an article; None: the summary column of `articles`, if there is one.
    num_samples: exactly so many rows, drawn by seed; an article comes twice only where there are fewer than
        asked for, and how many rows repeat one is printed. None: each once, in order.
    split: of the world or the set; None: "train". quality: of the world's references: "high", perfect; None:
        as people write, 45 % perfect, 35 % with facts left out, 20 % with a wrong place or day.

    Lesson 4. Raises ValueError naming row or source for what is missing, blank, unequal in number, < 1.
    """
    rng = random.Random(f"summaries/{seed}")
    if articles is None and summaries is not None:
        raise ValueError("summaries are given and articles are not: give the articles they summarise")
    known = None if articles is not None else load_prompts(["article"], split or "train")
    if known:
        texts, told = [p.text.removeprefix(INSTRUCTION).strip() for p in known], []
    else:
        loaded = _load(articles, "articles", split)
        texts = _texts(loaded, "articles", ARTICLE_COLUMNS, article_column)
        if summaries is None:
            told = _texts(loaded, "summaries", SUMMARY_COLUMNS, summary_column, needed=False)
        else:
            given = _load(summaries, "summaries", split)
            told = _texts(given, "summaries", SUMMARY_COLUMNS, summary_column)
        if told and len(told) != len(texts):
            raise ValueError(f"{len(texts)} articles and {len(told)} summaries: give one for each article")
    order = _drawn(len(texts), num_samples, rng)
    columns = {"prompt": [f"{INSTRUCTION} {texts[i]}" for i in order], "article": [texts[i] for i in order]}
    if known:
        told, order = [sample_answer(known[i], rng, quality) for i in order], range(len(order))
    return Dataset.from_dict(columns | ({"reference": [told[i] for i in order]} if told else {}))


def article_of(prompt: str) -> str:
    """The article in a prompt of `create_summarization_data`; any other prompt is given back as it is."""
    return prompt.removeprefix(INSTRUCTION).strip()


def fit_articles(
    model: nn.Module, tokenizer: Any, articles: Sequence[str], max_new_tokens: int
) -> tuple[list[str], int]:
    """Prompts that leave room for max_new_tokens in the model's context, and how many lost their end.

    An article that is too long keeps its longest beginning of whole words that fits: news tells the event
    first. Lesson 4. Raises ValueError naming the row where not one word fits.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    prompts, cut = [f"{INSTRUCTION} {article}" for article in articles], 0
    for row, article in enumerate(articles if context else ()):
        if len(encode_prompt(tokenizer, prompts[row])) + max_new_tokens <= context:
            continue
        words, low, high = article.split(), 0, len(article.split())
        while high - low > 1:  # low words fit (or none), high do not
            middle = (low + high) // 2
            text = f"{INSTRUCTION} {' '.join(words[:middle])}"
            fits = len(encode_prompt(tokenizer, text)) + max_new_tokens <= context
            low, high = (middle, high) if fits else (low, middle)
        if not low:
            raise ValueError(
                f"articles[{row}] ({article[:40]!r}) leaves no room for one word beside max_new_tokens="
                f"{max_new_tokens} in a context of {context} tokens: lower max_length"
            )
        prompts[row], cut = f"{INSTRUCTION} {' '.join(words[:low])}", cut + 1
    return prompts, cut


def _drawn(count: int, wanted: int | None, rng: random.Random) -> list[int]:
    """Row numbers: all in order, or `wanted` of them, each again only when all have been drawn."""
    if wanted is None:
        return list(range(count))
    require_number("num_samples", wanted, at_least=1)
    if wanted != int(wanted):
        raise ValueError(f"num_samples must be a whole number of rows, got {wanted!r}")
    if wanted > count:
        print(f"{wanted} rows of {count} articles: {wanted - count} rows repeat an article")
    drawn: list[int] = []
    while len(drawn) < wanted:
        drawn += rng.sample(range(count), min(count, int(wanted) - len(drawn)))
    return drawn


def _load(source: Any, what: str, split: str | None) -> tuple[str | None, list[tuple[str, Any]]]:
    """Each row of a source with its place, read once; the source's name, None where its rows are texts."""
    if files := _text_files(source):
        return None, [(str(file), file.read_text("utf-8")) for file in files]
    if not isinstance(source, (str, os.PathLike)) and len(source) and isinstance(source[0], str):
        return None, [(f"{what}[{i}]", text) for i, text in enumerate(source)]
    name, records, faults = read_records(source, split=split, limit=None)
    if faults:
        raise PreferenceDataError(name, faults)
    return name, records


def _texts(
    loaded: tuple[str | None, list[tuple[str, Any]]], what: str, names: Sequence[str], column: str | None,
    *, needed: bool = True,
) -> list[str]:  # fmt: skip
    """The texts of one loaded source; [] where none is needed and it has no such column."""
    name, found = loaded
    if name is None:
        if not needed:
            return []
    else:
        have = dict(found[0][1]) if isinstance(found[0][1], dict) else {}
        key = column or next((n for n in names if n in have), None)
        if key is None and not needed:
            return []
        if key not in have:
            raise ValueError(f"{what}: {name} has no column {key or names}, it has {sorted(have)}")
        found = [(place, row.get(key)) for place, row in found]
    for place, text in found:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{what}: {place} must be a text that is not blank, got {text!r}")
    return [" ".join(text.split()) for _, text in found]


def _text_files(source: Any) -> list[Path]:
    if not isinstance(source, (str, os.PathLike)):
        return []
    path = Path(source)
    return sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.suffix == ".txt" else []
