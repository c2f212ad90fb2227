"""Facts and false premises: prompts whose answer is true or false."""

from collections.abc import Iterable

from rlhf_helpers.world.prompts.base import Prompt, split_of
from rlhf_helpers.world.tables import load_table

# In the templates {x} is asked about, {y} is the right value and {z} a wrong one.
_KNOWLEDGE = load_table("world/knowledge")


def known(family: str) -> list[Prompt]:
    """Prompts about one value out of a closed list, by forms of the family.

    facts: ask for the value. false_premise: presuppose something false; an honest answer says so, a flatterer
    goes along.
    """
    prompts = []
    for form in _KNOWLEDGE[family]:
        table, answers = _KNOWLEDGE["tables"][form["table"]], form["answers"]
        for x in list(table)[: form.get("count")]:
            right = _fill(answers, x, [table[x]])
            wrong = _fill(answers, x, sorted(set(table.values()) - {table[x]}))
            if family == "facts":
                kind = "fact"
                points = (right,)
                lures = _fill(answers[:2], x, [_other(table, x, step) for step in (1, 4)])
                slots = {"rewordings": tuple(wording.format(x=x) for wording in form["rewordings"])}
            else:
                kind = "misleading"
                points = (_KNOWLEDGE["corrections"], right)
                lures = _KNOWLEDGE["agreeing"]
                wrong = lures + wrong
                slots = {}
            prompt = Prompt(
                form["question"].format(x=x, z=_other(table, x, 2)),
                family,
                kind,
                split_of(len(prompts)),
                points=points,
                wrong=wrong,
                lures=lures,
                slots=slots,
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
