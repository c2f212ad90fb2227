"""Studies of lesson 2: what is stored holds what the lesson says, and each runs end to end in small."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.lab.studies import load_study
from rlhf_helpers.lab.studies.lesson2 import methods, overoptimisation, sweeps
from rlhf_helpers.world.assistant import Recipe
from rlhf_helpers.world.gold_judge import gold_reward

pytestmark = pytest.mark.slow


class TestStored:
    def test_every_method_gains_or_is_named(self):
        """At least three standard errors over five seeds, each against the base's own samples."""
        table = load_study("methods")
        start = table[table.method == "base"].set_index("seed").gold
        short = []
        for name in methods.METHODS:
            gain = table[table.method == name].set_index("seed").gold - start
            if gain.mean() < 3 * gain.std() / math.sqrt(len(gain)):
                short.append(name)
        assert short == []

    def test_tuning_is_on_other_seeds_and_equal_for_all(self):
        table, reported = load_study("method_tuning"), load_study("methods")
        assert not set(table.seed) & set(reported.seed)
        assert table.groupby("method").size().nunique() == 1
        used = reported[reported.value > 0].groupby("method").value.unique()
        assert {name: value.tolist() for name, value in used.items()} == {
            name: [value] for name, value in methods.chosen_values().items()
        }

    @pytest.mark.parametrize("name", ["best_of_n_overoptimisation", "rl_overoptimisation"])
    def test_gold_rises_peaks_and_falls(self, name):
        table = load_study(name)
        along = "n" if "n" in table else "step"
        mean = table[table.cure == "none"].groupby(along)[["gold", "proxy"]].mean()
        peak = mean.gold.idxmax()
        assert mean.gold[peak] > mean.gold.iloc[0] + 0.05
        assert mean.gold[peak] > mean.gold.iloc[-1] + 0.03
        assert mean.proxy.iloc[-1] > mean.proxy[peak]


ONE_STEP = {"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 4}
# 16 labelled pairs, every thirtieth prompt, one step of 16 samples
SMALL = {"pairs": 16, "every": 30, "budget": ONE_STEP}


@pytest.fixture(scope="module")
def small():
    return methods.make_task(0, **SMALL)


class TestMethods:
    def test_untrained_policy_is_at_the_reference(self, small):
        found = methods.measure(small.base, small, samples=1)
        assert found["kl"] == pytest.approx(0, abs=1e-4)
        assert 0 <= found["gold"] <= 1
        assert methods.measure(small.base, small, samples=1) == found

    @pytest.mark.parametrize("name", ["RLOO", "TRPO", "DPO", "KTO", "listwise DPO", "online DPO"])
    def test_a_method_trains_a_copy(self, small, name):
        before = {key: value.clone() for key, value in small.base.state_dict().items()}
        run = methods.run_method(name, small, methods.METHODS[name].values[0])
        assert all(torch.equal(before[key], value) for key, value in small.base.state_dict().items())
        assert any(not torch.equal(before[key], value) for key, value in run.model.state_dict().items())
        assert len(run.history)

    def test_every_method_draws_as_many_answers_of_the_same_length(self, monkeypatch):
        drawn, task = {}, methods.make_task(0, gold_reward)

        class Drawn(Exception):
            """Ends a run once it is known how much it samples."""

        def loop(model, tokenizer, prompts, reward, settings, **options):
            count = settings.steps * settings.prompts_per_step * settings.samples_per_prompt
            raise Drawn(count, settings.max_new_tokens)

        def collect(model, tokenizer, prompts, *, samples_per_prompt, max_new_tokens, **options):
            raise Drawn(len(prompts) * samples_per_prompt, max_new_tokens)

        monkeypatch.setattr(methods, "collect", collect)  # of the offline losses
        for name, method in methods.METHODS.items():
            monkeypatch.setitem(methods.METHODS, name, replace(method, loop=method.loop and loop))
            with pytest.raises(Drawn) as stopped:
                methods.run_method(name, task, method.values[0])
            drawn[name] = stopped.value.args
        assert drawn == dict.fromkeys(methods.METHODS, (512, 64))

    def test_offline_rows_follow_the_reward(self, small):
        def longer(prompts, responses):
            return torch.tensor([float(len(text)) for text in responses])

        task = methods.Task(**{**vars(small), "reward": longer})
        pairs = methods.offline_rows(task, "dpo")
        assert pairs
        assert all(len(row["chosen"]) > len(row["rejected"]) for row in pairs)
        ranked = methods.offline_rows(task, "listwise")
        assert all(
            list(map(len, r["responses"])) == sorted(map(len, r["responses"]), reverse=True) for r in ranked
        )
        single = methods.offline_rows(task, "kto")
        assert {row["label"] for row in single} == {True, False}

    def test_every_method_draws_as_many_answers(self, monkeypatch):
        task = methods.make_task(0, pairs=16)
        drawn = {}
        for name, method in methods.METHODS.items():
            if method.loop is not None:
                found = method.settings(**{**task.budget, **method.fixed})
                drawn[name] = found.steps * found.prompts_per_step * found.samples_per_prompt

        def drawn_at_once(model, tokenizer, prompts, *, seed, each):
            drawn["offline"] = len(prompts) * each
            raise InterruptedError

        monkeypatch.setattr(methods, "sampled", drawn_at_once)
        with pytest.raises(InterruptedError):
            methods.offline_rows(task, "dpo")
        assert set(drawn.values()) == {8 * 16 * 4}, drawn

    def test_study_and_best_of_four(self):
        table = methods.methods(seeds=(0,), names=("base", "best of 4", "RLOO"), **SMALL)
        by_method = table.set_index("method")
        assert by_method.proxy["best of 4"] > by_method.proxy["base"]
        assert by_method.value["RLOO"] == methods.chosen_values()["RLOO"]
        assert not table.isna().any().any()

    def test_the_choice_is_the_highest_mean(self):
        chosen, tuning = methods.chosen_values(), load_study("method_tuning")
        for name, tried in tuning.groupby("method"):
            means = {value: rows.objective.mean() for value, rows in tried.groupby("value")}
            assert means[chosen[name]] == max(means.values()), name


class TestOveroptimisation:
    def test_searches_and_their_looks(self):
        search = {"prompts_per_step": 2, "samples_per_prompt": 4, "eval_every": 1}
        options = {"steps": 3, "few": 16, "many": 16, "every": 30, "budget": search}
        table = overoptimisation.rl_overoptimisation(seeds=(0,), cures=("none", "iterative"), **options)
        assert table.groupby("cure").step.apply(list).to_dict() == {
            "none": [0, 1, 2, 3],
            "iterative": [0, 1, 2, 3],
        }
        assert table[table.step == 0].kl.abs().max() < 1e-4
        assert not table.isna().any().any()

    def test_best_of_n_shares_its_samples(self):
        options = {"prompts": 2, "samples": 256, "few": 16, "many": 16}
        table = overoptimisation.best_of_n_overoptimisation(seeds=(0,), **options)
        assert table[table.n == 1].gold.nunique() == 1
        assert (table.kl <= table.kl_bound + 1e-9).all()
        assert table.groupby("cure").proxy.apply(lambda x: x.is_monotonic_increasing).all()

    def test_labels_of_a_round_follow_gold_where_nobody_errs(self, small):
        rollout = methods.sampled(small.base, small.tokenizer, small.prompts[:4], seed=0, each=4)
        assert isinstance(rollout, Rollout)
        seen = overoptimisation.round_labels([rollout], seed=0, flips=0.0)
        sides = [[row[side] for row in seen] for side in ("chosen", "rejected")]
        chosen, rejected = (gold_reward([row["prompt"] for row in seen], side) for side in sides)
        assert (chosen >= rejected).all()
        assert 0 < len(seen) <= 8


class TestSweeps:
    def test_rules_that_pay(self):
        prompts = ["What is the capital of France?"] * 3
        said = ["It is Paris.", "Thank you! " + "It is nice. " * 8, ""]
        # 3 words; 2 + 24 words with one "thank" and eight "nice"; nothing
        assert sweeps.friendly_and_long(prompts, said).tolist() == pytest.approx([0.03, 0.26 + 0.9, 0.0])
        assert set(sweeps.exact_reward(prompts, said).tolist()) <= {0.0, 1.0}

    def test_exploration_and_designs(self):
        few = {"every": 30, "budget": ONE_STEP}
        explored = sweeps.exploration(seeds=(0,), temperatures=(1.0,), bonuses=(0.2,), **few)
        assert explored.entropy_coef.tolist() == [0.0, 0.2]
        assert explored.distinct.between(0.25, 1).all()
        designs = sweeps.reward_design(seeds=(0,), names=("gameable",), **few)
        assert designs.design.tolist() == ["none", "gameable"]

    def test_grid_and_frontier(self):
        grid = sweeps.clip_and_kl(seeds=(0,), clips=(0.2,), kl_coefs=(0.1,), **SMALL)
        assert grid.clipfrac.between(0, 1).all()
        line = sweeps.frontier(seeds=(0,), betas=(0.1,), kl_coefs=(0.1,), every=30, budget=ONE_STEP)
        assert line.method.tolist() == ["dpo", "ppo"]

    def test_kto_learns_from_few_good_answers(self):
        table = sweeps.kto_imbalance(seeds=(0,), bad_per_good=2, **SMALL)
        assert table.desirable_weight.tolist() == [1, 2]
        assert table.kl.nunique() == 2  # the weight enters

    def test_tax_is_logged_while_training(self):
        table = sweeps.ability_tax(seeds=(0,), weights=(1.0,), steps=1, eval_every=1, **SMALL)
        assert table.step.tolist() == [0, 1]
        assert np.isfinite(table.surprise).all()

    def test_sizes(self):
        recipe = Recipe(epochs=1, rows=64, batch_size=32, warmup_steps=0)
        table = sweeps.model_sizes(seeds=(0,), names=("small", sweeps.SHIPPED), recipe=recipe, **SMALL)
        parameters = table.groupby("size").parameters.first()
        assert parameters["small"] < 0.3 * parameters[sweeps.SHIPPED]
        assert table.trained.tolist() == [0, 1, 0, 1]
