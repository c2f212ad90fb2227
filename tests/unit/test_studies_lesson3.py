"""Studies of lesson 3: what is stored holds what the lesson says, and each runs end to end in small."""

import numpy as np
import pytest
import torch

from rlhf_helpers.alignment_eval.objectives import hypervolume, pareto_front
from rlhf_helpers.core.stats import mean_interval
from rlhf_helpers.lab.studies import load_study
from rlhf_helpers.lab.studies.lesson3 import (
    attacks,
    constitution,
    gradient_attacks,
    oversight,
    table,
    tradeoffs,
)

pytestmark = pytest.mark.slow


def gain(name, by, column, after, before, **kept):
    """Differences within seeds, after less before, of the rows in which `kept` holds."""
    rows = load_study(name)
    for field, value in kept.items():
        rows = rows[rows[field] == value]
    wide = rows.pivot_table(index="seed", columns=by, values=column)
    return (wide[after] - wide[before]).to_numpy()


class TestStored:
    def test_each_revision_gains_and_less_each_time(self):
        steps = [
            gain("revisions", "round", "harmlessness", n + 1, n, way="one rule", prompts="harmful")
            for n in range(3)
        ]
        means = [step.mean() for step in steps]
        assert means[0] > means[1] > means[2] > 0
        assert steps[0].min() > 0.1

    def test_the_first_answer_is_as_harmless_as_a_revised_one(self):
        difference = gain("constitutional_training", "policy", "harmlessness", "SFT", "revised once")
        assert mean_interval(difference.tolist())[1] > -0.05

    def test_hardening_halves_what_succeeds_on_held_out_requests(self):
        rows = load_study("red_team_campaign")
        rows = rows[rows.name.isin(["all", "social_engineering"])]
        for _, part in rows.groupby(["seed", "name"]):
            found = part.set_index("model").value
            assert found["hardened"] <= found["before"] / 2

    def test_a_cheaper_kl_price_brings_success_and_costs_diversity(self):
        assert gain("red_team_policy", "kl_coef", "success", 0.02, 0.5, diversity_weight=0.0).mean() > 0
        assert gain("red_team_policy", "kl_coef", "different", 0.02, 0.5, diversity_weight=0.0).mean() < 0

    def test_gradients_find_lower_losses_than_chance_at_one_budget(self):
        rows = load_study("gradient_attacks")
        ends = rows[rows.trained.notna() & rows.evaluations.gt(1)]
        assert ends.groupby("method").evaluations.nunique().eq(1).all()
        assert ends.evaluations.nunique() == 1
        loss = ends.pivot(index="seed", columns="method", values="loss")
        assert (loss["gcg"] - loss["random"]).mean() < 0

    def test_constraints_are_kept_and_the_front_is_one(self):
        rows = load_study("constraints")
        kept = rows[rows.method == "lagrangian"]
        assert (kept.cost - kept.setting).max() < 0.1
        volumes = {}
        for (seed, method), part in rows.groupby(["seed", "method"]):
            points = part[["helpfulness", "harmlessness"]].to_numpy(copy=True)
            front = points[pareto_front(points_tensor(points)).numpy()]
            assert not any((a >= b).all() and (a > b).any() for a in points for b in front)
            volumes[seed, method] = hypervolume(points_tensor(points), points_tensor(np.zeros(2)))
        gains = [volumes[s, "lagrangian"] - volumes[s, "single"] for s in rows.seed.unique()]
        assert mean_interval(gains)[1] > 0

    def test_mixing_pretraining_text_wins_part_of_the_tax_back(self):
        assert gain("safety_tax", "mix", "surprise", 1.0, 0.0, strength=1.0).max() < 0
        assert gain("safety_tax", "strength", "surprise", 1.0, 0.0, mix=1.0).mean() > 0

    def test_debate_beats_no_debate(self):
        assert gain("debate", "form", "judge_accuracy", "debate", "no debate").min() > 0.1

    def test_help_is_worth_more_than_an_echo(self):
        assert gain("recursive_judges", "helper", "agreement", "assistant", "self", round=2).mean() > 0

    def test_probes_beat_their_control(self):
        rows = load_study("probes")
        for concept in oversight.CONCEPTS:
            best = (
                rows[(rows.concept == concept) & (rows.model == "base")]
                .groupby("layer")
                .mean(numeric_only=True)
            )
            assert (best.accuracy - best.control).max() > 0.15, concept

    def test_the_table_holds_every_technique_in_every_seed(self):
        rows = load_study("safety_table")
        assert all(tuple(part.technique) == tuple(table.techniques_of(0)) for _, part in rows.groupby("seed"))
        safe = rows.groupby("technique").harmlessness.mean()
        assert (safe.drop("base") > safe["base"] + 0.1).all()


def points_tensor(points):
    return torch.from_numpy(np.array(points))


def columns_of(name):
    return list(load_study(name).columns)


SEARCH = {"suffix_length": 3, "steps": 1, "candidates": 4, "top_k": 4}
SMALL = [
    (constitution.revisions, {"ways": ("one rule",), "rounds": 1, "answers": 4}),
    (attacks.red_team_policy, {"kl_coefs": (), "n": 4, "train_attacks": 4}),
    (
        gradient_attacks.gradient_attacks,
        {"behaviours": 1, "samples": 1, "epochs": 1, "search": SEARCH},
    ),
    (oversight.debate, {"passages": 4, "forms": ("no debate", "debate")}),
    (table.safety_table, {"names": ("base",), "each": 4}),
]


@pytest.mark.parametrize("study, settings", SMALL, ids=[study.__name__ for study, _ in SMALL])
def test_a_small_run_has_the_columns_of_the_stored_one(study, settings):
    found = study(seeds=(0,), **settings)
    assert list(found.columns) == columns_of(study.__name__)
    assert len(found)


def test_a_constrained_run_moves_its_price():
    _, history = tradeoffs.run("lagrangian", 0.1, seed=0, steps=2, prompts_per_step=4, max_new_tokens=16)
    assert len(history) == 2
    assert history[1]["multiplier/harm"] != history[0]["multiplier/harm"]
