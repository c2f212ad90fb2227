"""Preference data made and collected: labels stay true, known biases are found, known agreement."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rlhf_helpers.core.text import to_messages
from rlhf_helpers.preference_data import (
    Guideline,
    PreferenceDataset,
    ai_labels,
    annotator_reliability,
    cohen_kappa,
    collect_comparisons,
    collect_rankings,
    collect_ratings,
    create_preference_data,
    flattery_bias,
    fleiss_kappa,
    krippendorff_alpha,
    length_bias,
    position_bias,
    select_pairs,
)
from rlhf_helpers.world.annotators import (
    CARELESS,
    FLATTERED,
    LENGTH_BIASED,
    STANDARD,
    VALUE_GROUPS,
    Annotator,
    make_pairs,
)
from rlhf_helpers.world.gold_judge import gold_reward
from rlhf_helpers.world.prompts import best_answer, load_prompts

EXACT = Annotator(temperature=0)
# Near the gold reward's own weights: a compromise between the value groups.
RULES = Guideline(
    "Be harmless, then helpful, then honest.", {"helpfulness": 0.7, "harmlessness": 1, "honesty": 0.3}
)
# An honest quote is all there is to say for a true claim.
TRUE_CLAIM = next(
    p.text for p in load_prompts(["debate"]) if p.kind == "argue" and p.slots["claim"] == p.slots["true"]
)
HAIKU = "Write a haiku about rain"


def shown_pairs(count, seed=0):
    """Pairs of the world in random order, with how much better the first is."""
    rng = random.Random(seed)
    rows = []
    for row in make_pairs(count, seed=seed):
        first, second = rng.sample(("chosen", "rejected"), 2)
        gap = row[f"{first}_gold"] - row[f"{second}_gold"]
        rows.append({"prompt": row["prompt"], "first": row[first], "second": row[second], "gap": gap})
    return rows


def answer_sets(count):
    """Best, medium and worst answer to facts, the best one in the middle."""
    return [
        {"prompt": p.text, "responses": [f"{best_answer(p)} You are so clever!", best_answer(p), p.wrong[0]]}
        for p in load_prompts(["facts"])[:count]
    ]


class TestCreation:
    def test_the_better_level_wins_and_gold_agrees(self):
        data = create_preference_data(600)
        order = ["low", "medium", "high"]
        assert all(order.index(r["chosen_quality"]) > order.index(r["rejected_quality"]) for r in data)
        gold = {
            side: gold_reward([r["prompt"] for r in data], [r[side] for r in data])
            for side in ("chosen", "rejected")
        }
        means = [
            torch.cat([gold[s][[r[f"{s}_quality"] == level for r in data]] for s in gold]).mean()
            for level in order
        ]
        assert means[0] + 0.2 < means[1] < means[2] - 0.2
        assert means[2] > 0.95

    @pytest.mark.parametrize("prompts", [[HAIKU], None, ["What is the capital of France?", HAIKU]])
    def test_pairs_differ_whatever_the_prompt(self, prompts):
        data = create_preference_data(200, prompts, seed=3)
        assert len(data) == 200
        assert all(row["chosen"] != row["rejected"] for row in data)
        assert (
            data[:]
            == create_preference_data(200, prompts, seed=3)[:]
            != create_preference_data(200, prompts)[:]
        )

    def test_a_stranger_is_answered_about_its_own_prompt(self):
        data = create_preference_data(60, [HAIKU], ["high", "low"])
        assert all(HAIKU in row["chosen"] and HAIKU not in row["rejected"] for row in data)

    def test_answers_to_a_conversation_stay_one_message(self):
        talk = "User: Write {a} song\n\nAssistant: Of what?\n\nUser: Of rain,\nplease"
        for row in create_preference_data(30, [talk], ["high", "medium"]):
            assert len(to_messages(row["chosen"])) == len(to_messages(row["rejected"])) == 1
            assert "Of rain, please" in row["chosen"]
            assert "Assistant" not in row["chosen"]

    @pytest.mark.parametrize(
        "arguments, match",
        [
            ((0,), "num_samples=0"),
            ((5, []), "prompt_templates"),
            ((5, HAIKU), "prompt_templates"),
            ((5, [HAIKU, " "]), "blank"),
            ((5, None, ["high"]), "at least two"),
            ((5, None, ["high", "high"]), "at least two"),
            ((5, None, ["high", "best"]), "best"),
            ((5, [TRUE_CLAIM]), "one answer only"),
        ],
    )
    def test_refuses(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            create_preference_data(*arguments)

    def test_the_data_set_is_torchs(self):
        rows = [{"prompt": "a", "chosen": str(i), "rejected": "no"} for i in range(3)]
        data = PreferenceDataset(rows)
        assert isinstance(data, torch.utils.data.Dataset)
        assert (len(data), data[0], data[-1], data[1:], list(data)) == (3, rows[0], rows[2], rows[1:], rows)
        batch = next(iter(torch.utils.data.DataLoader(data, batch_size=2)))
        assert batch["chosen"] == ["0", "1"]
        with pytest.raises(ValueError, match=r"row 1 lacks \['rejected'\]"):
            PreferenceDataset([rows[0], {"prompt": "a", "chosen": "b"}])


class TestCollection:
    def test_comparisons_are_of_the_first_answer(self):
        rows = [row for row in shown_pairs(100) if row["gap"]]
        labels = collect_comparisons(rows, [EXACT, EXACT])
        assert labels.shape == (len(rows), 2)
        assert (labels == (np.array([row["gap"] for row in rows]) > 0)[:, None]).all()

    def test_one_more_person_changes_nobody(self):
        rows = shown_pairs(100)
        labels = collect_comparisons(rows, [STANDARD] * 3, seed=1)
        assert (collect_comparisons(rows, [STANDARD] * 2, seed=1) == labels[:, :2]).all()
        assert (labels[:, 0] != labels[:, 1]).any()
        assert (collect_comparisons(rows, [STANDARD] * 3, seed=2) != labels).any()

    def test_rankings_and_ratings(self):
        rows = answer_sets(20)
        orders, marks = collect_rankings(rows, [EXACT, EXACT]), collect_ratings(rows, [EXACT, EXACT])
        assert orders.shape == marks.shape == (20, 2, 3)
        assert (orders == [1, 0, 2]).all()
        assert (marks == [4, 5, 1]).all()  # 0.7 * 0.85 + 0.3 * 0.5 = 0.745, 1, 0 in fifths
        people = collect_ratings(rows, [EXACT, Annotator(temperature=0, flattery_bias=-9)])
        assert people[:, :, 0].tolist() == [[4, 1]] * 20

    def test_rankings_differ_by_row_and_person(self):
        orders = collect_rankings([answer_sets(1)[0]] * 40, [Annotator(temperature=9)] * 2)
        assert len({str(order) for order in orders[:, 0]}) == 6
        assert (orders[:, 0] != orders[:, 1]).any()

    @pytest.mark.slow
    @pytest.mark.parametrize("people", [list(VALUE_GROUPS.values()), [LENGTH_BIASED, FLATTERED]])
    def test_agreement_rises_under_a_guideline(self, people):
        rows = shown_pairs(600)
        free = fleiss_kappa(collect_comparisons(rows, people))
        guided = fleiss_kappa(collect_comparisons(rows, people, guideline=RULES))
        assert guided > free + (0.2 if people[0].axis_weights else 0.05)

    def test_a_guideline_mixes_utilities_and_shrinks_biases(self):
        fan = Annotator("fan", flattery_bias=0.5, length_bias=0.1, temperature=0.3, reliability=0.9)
        rules = Guideline("Do no harm.", {"harmlessness": 1.0}, adherence=0.75)
        guided = replace(fan, guidelines=(rules,))
        question, answer = "What is the capital of France?", "You are so clever! It is Rome."
        own = 0 + 0.5 + 0.1 * 7 / 10  # false: worth nothing, but flattering and seven words
        assert guided.utility([question], [answer]) == pytest.approx([0.25 * own + 0.75 * 1.0])
        assert guided.biases([answer]) == pytest.approx([0.25 * 0.57])
        assert (guided.temperature, guided.reliability) == (0.3, 0.9)
        nobody = replace(fan, guidelines=(Guideline("", {"harmlessness": 1.0}, adherence=0),))
        assert (nobody.utility([question], [answer]) == fan.utility([question], [answer])).all()

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"adherence must be .* got 1\.5"):
            Guideline("", {}, adherence=1.5)
        with pytest.raises(ValueError, match="kindness"):
            Guideline("", {"kindness": 1.0})
        with pytest.raises(ValueError, match="haiku"):
            collect_comparisons([{"prompt": HAIKU, "first": "a", "second": "b"}], [STANDARD])
        ragged = [answer_sets(1)[0], {"prompt": "Good morning", "responses": ["a", "b"]}]
        for collect in (collect_rankings, collect_ratings):
            with pytest.raises(ValueError, match=r"\[2, 3\] responses"):
                collect(ragged, [STANDARD])


class TestAgreement:
    def test_cohen_by_hand(self):
        # 20 both yes, 5 + 10 apart, 15 both no: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5
        first = [1] * 25 + [0] * 25
        second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
        assert cohen_kappa(first, second) == pytest.approx(0.4)
        assert cohen_kappa([1, 0, 1, 0], [0, 1, 0, 1]) == pytest.approx(-1)

    def test_fleiss_by_hand(self):
        # rows agree on 1, 1, 1/3, 1/3 of their pairs: P = 2/3; half the labels are 1: P_e = 1/2
        labels = [[1, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]]
        assert fleiss_kappa(labels) == pytest.approx(1 / 3)

    def test_krippendorffs_own_example(self):
        # Krippendorff 2011, Computing Krippendorff's alpha-reliability, example C: four observers, gaps.
        table = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
        labels = [[float(x) if x != "." else np.nan for x in row] for row in table]
        assert krippendorff_alpha(np.transpose(labels)) == pytest.approx(0.743, abs=5e-4)

    def test_what_has_no_kappa_is_refused(self):
        for agreement in (fleiss_kappa, krippendorff_alpha, annotator_reliability):
            with pytest.raises(ValueError, match="beyond chance is undefined"):
                agreement(np.ones((4, 3)))
        with pytest.raises(ValueError, match="beyond chance is undefined"):
            cohen_kappa([0, 0], [0, 0])
        with pytest.raises(ValueError, match="1 labels are NaN: use krippendorff_alpha"):
            fleiss_kappa([[1, 0], [np.nan, 1]])
        with pytest.raises(ValueError, match="1 labels are NaN"):
            cohen_kappa([1, np.nan], [0, 1])

    def test_the_careless_one_is_found(self):
        people = [STANDARD, STANDARD, CARELESS, STANDARD, STANDARD]
        for seed in range(3):
            found = annotator_reliability(collect_comparisons(shown_pairs(300, seed), people, seed=seed))
            assert found.argmin() == 2
            assert found[2] < np.delete(found, 2).min() - 0.15

    def test_reliability_by_hand(self):
        # The third always says the opposite of two who agree; against it each of them meets a split.
        labels = np.array([[1, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 1]])
        with pytest.raises(ValueError, match="undefined"):
            annotator_reliability(labels)
        one_more = np.column_stack([labels, labels[:, 0]])
        assert annotator_reliability(one_more) == pytest.approx([1, 1, -1, 1])
        gaps = np.vstack([one_more.astype(float), [np.nan, 1, 0, 1]])
        # The third now has p_o = 0 and p_e = 2 * 0.4 * 0.6; the others meet a split on the new row.
        assert annotator_reliability(gaps) == pytest.approx([1, 1, -0.48 / 0.52, 1])

    @pytest.mark.parametrize("labels", [[[2, 1]], [[0.5, 1]], [], [[np.nan]]])
    def test_only_comparisons(self, labels):
        with pytest.raises(ValueError, match="comparisons"):
            position_bias(labels)

    @pytest.mark.parametrize("agreement", [fleiss_kappa, krippendorff_alpha, annotator_reliability])
    def test_agreement_needs_two(self, agreement):
        with pytest.raises(ValueError, match="at least two"):
            agreement([[1], [0], [1]])


class TestBiases:
    def test_position_by_hand(self):
        found = position_bias([1] * 8 + [0] * 2)
        assert found.value == pytest.approx(0.3)
        assert (found.low, found.high) == pytest.approx(
            (0.4902 - 0.5, 0.9433 - 0.5), abs=1e-4
        )  # Wilson, 8 of 10
        twice = position_bias([[1, 1]] * 8 + [[0, np.nan]] * 2 + [[np.nan, np.nan]])
        assert twice == found  # a second look at a row is no second row
        assert position_bias([0, 0, 1]).value == pytest.approx(-1 / 6)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "measure, person, slope",
        [(length_bias, LENGTH_BIASED, 0.35 / 0.18), (flattery_bias, FLATTERED, 0.5 / 0.18)],
    )
    def test_a_known_bias_is_recovered(self, measure, person, slope):
        rows = shown_pairs(1500, seed=5)
        gap = [row["gap"] for row in rows]
        biased, fair = (collect_comparisons(rows, [who]) for who in (person, STANDARD))
        found, none = measure(rows, biased, quality_gap=gap), measure(rows, fair, quality_gap=gap)
        assert found.low < slope < found.high
        assert none.low < 0 < none.high < found.low
        # Without the truth the figure mixes in quality, but who is more biased still shows.
        assert measure(rows, biased).low > measure(rows, fair).high

    def test_the_slope_turns_with_the_labels_and_with_the_order(self):
        rows = shown_pairs(300)
        labels = collect_comparisons(rows, [LENGTH_BIASED])
        swapped = [{**row, "first": row["second"], "second": row["first"]} for row in rows]
        found = length_bias(rows, labels).value
        assert found > 0.5
        assert length_bias(rows, 1 - labels).value == pytest.approx(-found)
        assert length_bias(swapped, 1 - labels).value == pytest.approx(found)

    def test_copies_of_labels_buy_no_certainty(self):
        rows = shown_pairs(200)
        labels = collect_comparisons(rows, [STANDARD]).astype(float)
        once, thrice = (length_bias(rows, np.repeat(labels, k, axis=1)) for k in (1, 3))
        assert thrice.value == pytest.approx(once.value)
        assert thrice.high - thrice.low == pytest.approx(once.high - once.low, rel=0.02)
        gaps = np.column_stack([labels, np.full(200, np.nan)])
        assert length_bias(rows, gaps) == once

    @pytest.mark.parametrize(
        "order, labels",
        [
            ([0, 1], [[1, 0, 1], [0, 0, 1]]),  # two rows
            ([0, 1] * 10, [1, 0] * 10),  # the longer one always wins: the slope is infinite
            ([0] * 20, [1, 0] * 10),  # no row differs from the others
        ],
    )
    def test_what_fixes_no_slope_is_refused(self, order, labels):
        two = ("a b c", "d"), ("a", "b c")
        rows = [{"prompt": "p", "first": two[i][0], "second": two[i][1]} for i in order]
        with pytest.raises(ValueError, match="fix no slope on words"):
            length_bias(rows, labels)
        with pytest.raises(ValueError, match="fix no slope on flattering"):
            flattery_bias(rows, labels)
        with pytest.raises(ValueError, match="differ"):
            length_bias(rows[1:], labels)


class TestSelection:
    def test_the_smallest_margins_come_first(self):
        margins = [3.0, -0.1, 0.5, -2.0, 0.1]
        assert select_pairs(margins, 3).tolist() == [1, 4, 2]
        assert select_pairs(torch.tensor(margins), 5).tolist() == [1, 4, 2, 3, 0]
        for n in (0, 6):
            with pytest.raises(ValueError, match=f"n={n} of 5"):
                select_pairs(margins, n)
        with pytest.raises(ValueError, match="margin 1 is not finite"):
            select_pairs([1.0, np.nan], 1)

    @pytest.mark.slow
    def test_ai_labels_agree_with_gold_and_see_no_position(self):
        from rlhf_helpers.core.models import load_model

        model, tokenizer = load_model("tiny", device="cpu")
        rows = [row for row in shown_pairs(60) if abs(row["gap"]) > 0.2]
        found = ai_labels(model, tokenizer, rows)
        assert found.shape == (len(rows),)
        better = torch.tensor([row["gap"] > 0 for row in rows])
        assert ((found > 0.5) == better).float().mean() > 0.85
        swapped = [{**row, "first": row["second"], "second": row["first"]} for row in rows]
        assert_close(ai_labels(model, tokenizer, swapped), 1 - found, atol=1e-4, rtol=0)
        assert_close(
            torch.cat([ai_labels(model, tokenizer, [row]) for row in rows[:3]]), found[:3], atol=1e-4, rtol=0
        )
