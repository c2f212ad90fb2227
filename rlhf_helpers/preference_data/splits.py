"""Splits that keep every prompt on one side: a model that has seen a prompt's answers knows too much."""

import unicodedata

from datasets import Dataset

from rlhf_helpers.core.tensors import require_number


def normalised_prompt(prompt: str) -> str:
    """Return the prompt as splits compare it: Unicode form NFKC, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _groups(dataset: Dataset) -> list[str]:
    if "prompt" not in dataset.column_names:
        raise ValueError(f"splitting by prompt needs a column 'prompt', got {dataset.column_names}")
    return [normalised_prompt(prompt) for prompt in dataset["prompt"]]


def split_by_prompt(dataset: Dataset, *, test_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split into (train, test), `test_fraction` of the distinct prompts (rounded up) to the test side.

    Prompts are compared by `normalised_prompt`. The same prompts and seed give the same sides, in whatever
    order the rows come. Raises ValueError unless 0 < test_fraction < 1 and both sides get a prompt.
    """
    from sklearn.model_selection import GroupShuffleSplit

    require_number("test_fraction", test_fraction, above=0, below=1)
    groups = _groups(dataset)
    distinct = len(set(groups))
    if test_fraction * distinct > distinct - 1:
        raise ValueError(f"test_fraction {test_fraction} of {distinct} prompts leaves none to train on")
    splitter = GroupShuffleSplit(1, test_size=test_fraction, random_state=seed)
    train, test = next(splitter.split(groups, groups=groups))
    return dataset.select(train), dataset.select(test)


def prompt_folds(dataset: Dataset, k: int, seed: int) -> list[tuple[Dataset, Dataset]]:
    """Cut into k folds by prompt and return (train, test) for each; every row is tested exactly once.

    Deterministic as `split_by_prompt`. Raises ValueError if k < 2 or there are fewer than k distinct prompts.
    """
    from sklearn.model_selection import GroupKFold

    groups = _groups(dataset)
    folds = GroupKFold(k, shuffle=True, random_state=seed).split(groups, groups=groups)
    return [(dataset.select(train), dataset.select(test)) for train, test in folds]


def leaked_prompts(train: Dataset, test: Dataset) -> set[str]:
    """Return the normalised prompts that stand on both sides; empty when nothing leaks."""
    return set(_groups(train)) & set(_groups(test))
