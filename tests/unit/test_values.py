"""Values learned from judgements and applied as rewards; rules for groups that disagree."""

import math

import pytest
import torch

from rlhf_helpers.core.models import load_model
from rlhf_helpers.safety_alignment import (
    PRINCIPLE_OF,
    RULES,
    NormClassifier,
    aggregate,
    answer_case,
    answer_template,
    choose,
    compare_rules,
    maximin_choice,
    value_judgements,
)
from rlhf_helpers.world.prompts.meta import VALUES, critique_text

# Three groups, four options: a compromise (3) that no group likes best.
U = torch.tensor([[0.9, 0.1, 0.2, 0.6], [0.8, 0.2, 0.1, 0.6], [0.1, 0.95, 0.3, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize(
    "rule, expected, best",
    [
        ("mean", [0.6, 1.25 / 3, 0.2, 1.7 / 3], 0),
        ("maximin", [0.1, 0.1, 0.1, 0.5], 3),
        ("borda", [2.0, 4 / 3, 2 / 3, 2.0], 0),  # ranks 3 0 1 2, 3 1 0 2, 0 3 1 2
        ("majority", [2 / 3, 1 / 3, 0, 0], 0),
        ("nash", [math.log(0.072) / 3, math.log(0.019) / 3, math.log(0.006) / 3, math.log(0.18) / 3], 3),
    ],
)
def test_rules_by_hand(rule, expected, best):
    assert aggregate(U, rule).tolist() == pytest.approx(expected)
    assert choose(U, rule) == best
    order = [2, 0, 3, 1]
    assert order[choose(U[:, order], rule)] == best  # names of options do not matter
    assert choose(U[[2, 0, 1]], rule) == best  # nor those of groups


def test_borda_ignores_how_much_and_nash_ignores_the_units():
    assert aggregate(torch.exp(5 * U), "borda").tolist() == aggregate(U, "borda").tolist()
    scaled = U * torch.tensor([[1.0], [7.0], [0.01]])
    assert choose(scaled, "nash") == choose(U, "nash")
    assert choose(scaled, "mean") != choose(U, "mean") or choose(scaled, "maximin") != choose(U, "maximin")


def test_ties():
    assert aggregate(torch.tensor([[1.0, 1.0, 0.0]]), "majority").tolist() == [0.5, 0.5, 0]
    assert maximin_choice([[0.2, 0.2, 0.1], [0.5, 0.7, 0.9]]) == 1  # the worst are alike, the mean decides
    assert maximin_choice([[0.2, 0.2], [0.5, 0.5]]) == 0
    assert maximin_choice([[0.0, -1.0], [5.0, 9.0]]) == 0


@pytest.mark.parametrize(
    "utilities, rule, message",
    [
        (U, "votes", "rule must be"),
        (U - 0.1, "nash", "utilities > 0"),
        (U[0], "mean", "(G, K)"),
        (U * math.nan, "mean", "finite"),
    ],
)
def test_aggregate_refuses(utilities, rule, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        aggregate(utilities, rule)


def test_compare_rules_by_hand():
    table = compare_rules([U, U[:, [3, 1]]], ("a", "b", "c")).set_index("rule")
    assert list(table.index) == list(RULES)
    assert table.loc["mean", ["a", "b", "c"]].tolist() == pytest.approx([0.75, 0.7, 0.3])
    assert table.loc["maximin", ["a", "b", "c"]].tolist() == pytest.approx([0.6, 0.6, 0.5])
    assert table.loc["maximin", "worst"] == pytest.approx(0.5)
    assert table["changed"].tolist() == [0, 0.5, 0, 0, 0.5]
    assert (table["mean"] <= table.loc["mean", "mean"]).all()
    assert (table["worst"] <= table.loc["maximin", "worst"]).all()


# ---- value learning


@pytest.fixture(scope="module")
def able():
    return load_model("tiny", device="cpu")[0]


def test_judgements_are_the_worlds():
    train, heldout = (value_judgements(split) for split in ("train", "heldout"))
    assert len(train) + len(heldout) == 8 * sum(len(d.split("|")) for sides in VALUES.values() for d in sides)
    assert not {r["case"] for r in train} & {r["case"] for r in heldout}
    row = next(r for r in train if r["case"].endswith("admits a mistake."))
    assert (row["value"], row["respects"]) == ("honesty", True)
    assert not next(r for r in train if r["case"].endswith("denies a mistake."))["respects"]


@pytest.mark.slow
def test_values_are_learned_and_shuffled_labels_are_not(able):
    """Held-out pairs of actor and deed: far above chance; labels at random: about chance."""
    train, heldout = value_judgements("train"), value_judgements("heldout")
    table = NormClassifier(able).fit(train).validate(heldout).set_index("value")
    assert set(table.index) == {*VALUES, "all"}
    assert table.loc["all", "low"] > 0.8 > table.loc["all", "chance"] + 0.2
    assert table.loc["all", "n"] == len(heldout)
    control = NormClassifier(able).fit(train, shuffle_seed=0).validate(heldout).set_index("value")
    assert control.loc["all", "accuracy"] < table.loc["all", "low"]
    assert NormClassifier(able).fit(train).validate(heldout).equals(table.reset_index())


def test_probabilities_do_not_hang_on_the_batch(able):
    rows = value_judgements("heldout")[:7]
    model = NormClassifier(able).fit(value_judgements("train")[::3])
    cases, names = [r["case"] for r in rows], [r["value"] for r in rows]
    alone = torch.cat([model.probability([c], [v]) for c, v in zip(cases, names, strict=True)])
    torch.testing.assert_close(model.probability(cases, names), alone, atol=1e-4, rtol=0)
    assert ((alone >= 0) & (alone <= 1)).all()


def test_value_reward_is_the_weighted_mean(tiny_gpt2_dir):
    """Any model, any template: a reward over answers, learned from judged answers."""
    model, _ = load_model(tiny_gpt2_dir, device="cpu")
    rows = [
        {"case": answer_case("Hi", text), "value": value, "respects": "good" in text}
        for text in ("good day", "bad day", "good one", "bad one")
        for value in ("honesty", "justice")
    ]
    values = NormClassifier(model, template=answer_template).fit(rows)
    asked = ["Hi", "Hi"], ["good day", "bad day"]
    each = [values.reward({name: 1.0})(*asked) for name in ("honesty", "justice")]
    torch.testing.assert_close(
        values.reward({"honesty": 3.0, "justice": 1.0})(*asked), (3 * each[0] + each[1]) / 4
    )
    torch.testing.assert_close(values.reward()(*asked), (each[0] + each[1]) / 2)
    assert each[0][0] > 0.5 > each[0][1]
    with pytest.raises(ValueError, match="weights"):
        values.reward({"mercy": 1.0})
    with pytest.raises(ValueError, match="mercy"):
        values.probability(["x"], ["mercy"])
    with pytest.raises(ValueError, match="one class"):
        values.fit(rows[:2])


def test_an_answer_is_asked_about_by_the_rule_of_its_value():
    case = answer_case("What?\nAnswer: no", "Yes.")
    assert answer_template(case, "justice") == critique_text(
        "What?\nAnswer: no", "Yes.", PRINCIPLE_OF["justice"]
    )
    assert set(PRINCIPLE_OF) == set(VALUES)
