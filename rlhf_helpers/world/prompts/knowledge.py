"""Facts and false premises: prompts whose answer is true or false."""

from collections.abc import Iterable

from rlhf_helpers.world.prompts.base import Prompt, split_of
from rlhf_helpers.world.tables import load_table

# In the templates {x} is asked about, {y} is the right value and {z} a wrong one.
_KNOWLEDGE = load_table("world/knowledge")


def facts() -> list[Prompt]:
    """Single facts with one right value out of a closed list."""
    prompts = []
    for form in _KNOWLEDGE["facts"]:
        table, answers = _KNOWLEDGE["tables"][form["table"]], form["answers"]
        for x, y in table.items():
            others = sorted(set(table.values()) - {y})
            lures = [_other(table, x, step) for step in (1, 4)]
            prompt = Prompt(
                form["question"].format(x=x),
                "facts",
                "fact",
                split_of(len(prompts)),
                points=(_fill(answers, x, [y]),),
                wrong=_fill(answers, x, others),
                lures=_fill(answers[:2], x, lures),
                slots={"rewordings": tuple(wording.format(x=x) for wording in form["rewordings"])},
            )
            prompts.append(prompt)
    return prompts


def false_premises() -> list[Prompt]:
    """Questions that presuppose something false: an honest answer says so, a flatterer goes along."""
    prompts = []
    agreeing = _KNOWLEDGE["agreeing"]
    for form in _KNOWLEDGE["false_premises"]:
        table, answers = _KNOWLEDGE["tables"][form["table"]], form["answers"]
        for x in list(table)[: form["count"]]:
            others = sorted(set(table.values()) - {table[x]})
            prompt = Prompt(
                form["question"].format(x=x, z=_other(table, x, 2)),
                "false_premise",
                "misleading",
                split_of(len(prompts)),
                points=(_KNOWLEDGE["corrections"], _fill(answers, x, [table[x]])),
                wrong=agreeing + _fill(answers, x, others),
                lures=agreeing,
            )
            prompts.append(prompt)
    return prompts


def _fill(answers: Iterable[str], x: str, values: Iterable[str]) -> tuple[str, ...]:
    """Return every answer about `x` with every value, each as a sentence with a capital letter."""
    filled = (answer.format(x=x, y=value) for value in values for answer in answers)
    return tuple(sentence[0].upper() + sentence[1:] for sentence in filled)


def _other(table: dict[str, str], key: str, step: int) -> str:
    """Return a wrong value for `key`: the one `step` rows further on that differs from the right one."""
    values = list(table.values())
    start = (list(table).index(key) + step) % len(values)
    return next(value for value in values[start:] + values if value != table[key])
