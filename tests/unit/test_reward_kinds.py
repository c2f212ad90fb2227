"""Separate, multi-objective and ensemble reward models; margins, rankings and ratings; rewards on a scale."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from rlhf_helpers.core.models import as_reward_fn, frozen_copy, tokenizer_for
from rlhf_helpers.core.preference_losses import bradley_terry_loss, plackett_luce_loss, rating_loss
from rlhf_helpers.reward_model import (
    NormalisedReward,
    RewardEnsemble,
    RewardModel,
    RewardModelInference,
    RewardModelTrainer,
    RewardSettings,
    SeparateRewardModel,
    create_reward_model,
    label_objectives,
    load_reward_model,
    normalise_reward,
    pairwise_accuracy,
    score_pairs,
    stable_reward_training,
)
from rlhf_helpers.reward_model.elements import as_rows, encode_groups
from rlhf_helpers.reward_model.objectives import OBJECTIVES, objective_fn_of, objective_losses
from rlhf_helpers.world.annotators import VALUE_GROUPS, Annotator, make_pairs

KINDS = {
    "basic": {},
    "separate": {},
    "multi_objective": {"objectives": ("kind", "safe"), "weights": {"kind": 2.0, "safe": -0.5}},
    "ensemble": {"members": 2, "aggregate": "worst"},
}
WORDS = ["tea", "sad", "today", "water", "Paris", "question", "three", "leaves", "pour", "cup"]
PROMPTS, ANSWERS = ["What is tea?", "I feel sad", "hello"], ["water over leaves", "do you want to talk?", ""]


def make(kind, folder, **changes):
    return create_reward_model(kind, base_model_name=folder, device="cpu", **{**KINDS[kind], **changes})


def trainer(model, **changes):
    return RewardModelTrainer(
        model, **{"learning_rate": 3e-3, "batch_size": 16, "progress": False, **changes}
    )


def polite_pairs(count, *, offset=0):
    """The better answer says thank you; nothing else tells the two apart."""
    return [
        {
            "prompt": f"{WORDS[i % 10]} {i}?",
            "chosen": f"thank you, {WORDS[i * 7 % 10]}",
            "rejected": f"no way, {WORDS[i * 7 % 10]}",
        }
        for i in range(offset, offset + count)
    ]


def scores_by_objective(model, prompts, responses):
    sequences = [model.encode(*row) for row in zip(prompts, responses, strict=True)]
    with torch.no_grad():
        return dict(zip(model.objectives, model.objective_rewards_of(sequences).unbind(1), strict=True))


@pytest.mark.parametrize("shape", ["tiny_llama_dir", "tiny_distilbert_dir"])
@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    @pytest.mark.slow
    def test_it_scores_like_any_reward(self, kind, shape, request):
        model = make(kind, request.getfixturevalue(shape))
        scores = model.score(PROMPTS, ANSWERS)
        alone = [model.score([p], [a]).item() for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        assert_close(scores, torch.tensor(alone), atol=1e-5, rtol=1e-5)
        assert scores.unique().numel() == 3
        assert not scores.requires_grad
        assert torch.equal(as_reward_fn(model)(PROMPTS, ANSWERS, references=["x"] * 3), scores)
        inference = RewardModelInference(model, tokenizer_for(model))
        assert torch.equal(inference.batch_predict(list(zip(PROMPTS, ANSWERS, strict=True))), scores)
        best = inference.rank_responses(PROMPTS[0], ANSWERS)[0]
        assert best[1] == pytest.approx(max(model.score(PROMPTS[:1] * 3, ANSWERS).tolist()))
        rows = [{"prompt": p, "chosen": a, "rejected": "no"} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        assert_close(score_pairs(model, rows)[0], scores, atol=1e-5, rtol=1e-5)
        assert torch.equal(frozen_copy(model).score(PROMPTS, ANSWERS), scores)

    @pytest.mark.slow
    def test_a_folder_gives_the_same_model_back(self, kind, shape, request, tmp_path):
        model = make(kind, request.getfixturevalue(shape), max_length=64)
        if kind == "ensemble":
            model.normalise(PROMPTS, ANSWERS)
        model.save_pretrained(tmp_path)
        loaded = load_reward_model(tmp_path, device="cpu")
        assert type(loaded) is type(model)
        assert torch.equal(loaded.score(PROMPTS, ANSWERS), model.score(PROMPTS, ANSWERS))
        assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {
            ".json",
            ".safetensors",
            ".jinja",
            ".txt",
        }

    @pytest.mark.slow
    def test_the_seed_is_the_heads(self, kind, shape, request):
        folder = request.getfixturevalue(shape)
        one, same, other = (make(kind, folder, seed=seed).score(PROMPTS, ANSWERS) for seed in (1, 1, 5))
        assert torch.equal(one, same)
        assert not torch.allclose(one, other)


class TestSeparate:
    def test_the_head_reads_both_vectors_and_their_product(self, tiny_llama_dir):
        model = make("separate", tiny_llama_dir)
        ids = torch.arange(40, 52).reshape(2, 6)
        prompt, response = (
            model.trunk(input_ids=i).last_hidden_state[:, -1] for i in (ids[:, :4], ids[:, 4:])
        )
        size = prompt.shape[1]
        weight = model.head.linear.weight[0]
        wanted = prompt @ weight[:size] + response @ weight[size : 2 * size]
        wanted = wanted + (prompt * response) @ weight[2 * size :]
        assert_close(model(ids[:, :4], ids[:, 4:]), wanted, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("shape", ["tiny_llama_dir", "tiny_distilbert_dir"])
    def test_text_padding_and_shared_prompts_change_nothing(self, shape, request):
        model = make("separate", request.getfixturevalue(shape))
        tokens = [model.encode("What is tea?", answer) for answer in ("water", "leaves, three minutes")]
        rewards = model.rewards_of(tokens)
        start = 1 + tokens[0][0]
        alone = [model(torch.tensor([t[1:start]]), torch.tensor([t[start:]])).item() for t in tokens]
        assert_close(rewards, torch.tensor(alone), atol=1e-5, rtol=1e-5)
        assert model.tokenizer.decode(tokens[0][1:start]).count("tea") == 1
        if shape == "tiny_distilbert_dir":  # "first" pooling reads the answer's own CLS
            assert tokens[0][start] == model.tokenizer.cls_token_id

    def test_long_texts_fit(self, tiny_llama_dir):
        model = make("separate", tiny_llama_dir, max_length=24)
        tokens = model.encode("I feel sad today. " * 9 + "What is tea?", "water")
        assert len(tokens) == 25
        assert model.tokenizer.decode(tokens[1 : 1 + tokens[0]]).endswith("What is tea?<|assistant|>")

    @pytest.mark.slow
    def test_it_learns_what_only_the_prompt_decides(self, tiny_llama_dir):
        """The same two answers, preferred one way or the other: blind to the prompt, half are wrong."""

        def rows(count, offset):
            found = []
            for i in range(offset, offset + count):
                tea, water = f"tea, {WORDS[i * 7 % 10]}", f"water, {WORDS[i * 7 % 10]}"
                chosen, rejected = (tea, water) if i % 2 else (water, tea)
                asked = "tea" if i % 2 else "water"
                found.append({"prompt": f"pour {i} {asked}", "chosen": chosen, "rejected": rejected})
            return found

        model = make("separate", tiny_llama_dir)
        trainer(model).train(rows(96, 0), epochs=12)
        assert pairwise_accuracy(*score_pairs(model, rows(60, 300))).value >= 0.9

    def test_it_is_no_basic_folder(self, tiny_llama_dir, tmp_path):
        make("separate", tiny_llama_dir).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"shape \(1, 32\) for a RewardModel, found shape \(1, 96\)"):
            RewardModel.from_pretrained(tmp_path)
        assert isinstance(load_reward_model(tmp_path), SeparateRewardModel)


class TestMultiObjective:
    def test_rewards_are_the_weighted_sum(self, tiny_llama_dir):
        model = make("multi_objective", tiny_llama_dir)
        ids = torch.arange(40, 52).reshape(2, 6)
        rewards, parts = model(ids)
        assert list(parts) == ["kind", "safe"]
        hidden = model.trunk(input_ids=ids).last_hidden_state[:, -1]
        assert_close(parts["safe"], hidden @ model.head.linear.weight[1])
        assert_close(rewards, 2 * parts["kind"] - 0.5 * parts["safe"])
        model.weights = {"safe": 1, "kind": 0}
        assert torch.equal(model(ids)[0], parts["safe"])
        model.weights = None
        assert_close(model(ids)[0], (parts["kind"] + parts["safe"]) / 2)

    def test_scores_by_objective_add_up(self, tiny_llama_dir):
        model = make("multi_objective", tiny_llama_dir)
        parts = scores_by_objective(model, PROMPTS, ANSWERS)
        assert_close(model.score(PROMPTS, ANSWERS), 2 * parts["kind"] - 0.5 * parts["safe"])

    def test_names_and_weights_survive_a_folder(self, tiny_llama_dir, tmp_path):
        model = make("multi_objective", tiny_llama_dir)
        model.save_pretrained(tmp_path)
        loaded = load_reward_model(tmp_path)
        assert (loaded.objectives, loaded.weights) == (("kind", "safe"), {"kind": 2.0, "safe": -0.5})
        ids = torch.arange(40, 52).reshape(2, 6)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert_close(plain(input_ids=ids).logits, torch.stack(list(model(ids)[1].values()), 1))

    @pytest.mark.parametrize(
        "change, told",
        [
            ({"objectives": ["a", "a"]}, "distinct"),
            ({"weights": {"kind": 1.0}}, "one number to each"),
            ({"weights": {"kind": 1, "honest": 1}}, "one number to each"),
            ({"weights": {"kind": 1, "safe": math.nan}}, r"weights\['safe'\] must be a finite number"),
        ],
    )
    def test_bad_objectives_are_named(self, tiny_llama_dir, change, told):
        with pytest.raises(ValueError, match=told):
            make("multi_objective", tiny_llama_dir, **change)

    def test_each_head_learns_its_own_labels(self, tiny_llama_dir):
        """Two objectives at odds on every pair: one likes thanks, the other dislikes it."""
        labels = {"kind": 1, "safe": -1}
        rows = [{**row, "objective_labels": labels} for row in polite_pairs(64)]
        rows += [{**row, "objective_labels": {"kind": 0.2}} for row in polite_pairs(16, offset=80)]
        model, test = make("multi_objective", tiny_llama_dir), polite_pairs(40, offset=200)
        history = trainer(model).train(rows, epochs=4, val_rows=rows[:8])
        prompts = [row["prompt"] for row in test]
        likes, dislikes = (
            scores_by_objective(model, prompts, [row[key] for row in test]) for key in ("chosen", "rejected")
        )
        assert (likes["kind"] > dislikes["kind"]).float().mean() >= 0.95
        assert (likes["safe"] < dislikes["safe"]).float().mean() >= 0.95
        assert history.last("eval_rewards/accuracies") >= 0.95

    @pytest.mark.slow
    def test_it_learns_from_people_of_different_values(self):
        """Where two groups disagree, one reward can side with one of them only: 1.0 in all."""
        people = {n: replace(VALUE_GROUPS[n], temperature=0) for n in ("helpful-first", "safety-first")}
        families = ("harmful", "facts")
        train = label_objectives(make_pairs(160, families=families), people)
        test = label_objectives(make_pairs(160, families=families, split="heldout", seed=1), people)
        test = [row for row in test if len(set(row["objective_labels"].values())) == 2]
        model = create_reward_model("multi_objective", objectives=tuple(people), device="cpu")
        trainer(model, learning_rate=1e-3).train(train, epochs=2)
        prompts = [row["prompt"] for row in test]
        chosen, rejected = (
            scores_by_objective(model, prompts, [row[key] for row in test]) for key in ("chosen", "rejected")
        )
        right = {}
        for name in people:
            labels = torch.tensor([row["objective_labels"][name] for row in test])
            right[name] = ((chosen[name] - rejected[name]).sign() == labels).float().mean().item()
        assert len(test) >= 50
        assert min(right.values()) >= 0.65, right
        assert sum(right.values()) >= 1.5, right

    def test_labels_have_a_person_each(self):
        rows = make_pairs(30)
        sides = {
            "long": Annotator(temperature=0, length_bias=50),
            "short": Annotator(temperature=0, length_bias=-50),
        }
        labelled = label_objectives(rows, sides)
        for row in labelled:
            gap = len(row["chosen"].split()) - len(row["rejected"].split())
            if gap:
                sign = 1 if gap > 0 else -1
                assert row["objective_labels"] == {"long": sign, "short": -sign}
        assert "objective_labels" not in rows[0]

    @pytest.mark.parametrize("labels", [None, {"kind": 0}, {"honest": 1}, [1, 1]])
    def test_rows_without_a_judgement_are_named(self, tiny_llama_dir, labels):
        model = make("multi_objective", tiny_llama_dir)
        rows = [{**polite_pairs(1)[0], "objective_labels": {"kind": 1}}]
        rows += [{**polite_pairs(1)[0], "objective_labels": labels}]
        with pytest.raises(ValueError, match="row 1: objective_labels must give some of"):
            encode_groups(model, rows)

    def test_other_objectives_are_refused(self, tiny_llama_dir):
        with pytest.raises(ValueError, match="'pairwise' rows, not from 'rating'"):
            trainer(make("multi_objective", tiny_llama_dir)).train_step(
                [{"prompt": "a", "response": "b", "rating": 1}], objective="rating"
            )


class Fixed(nn.Module):
    """Rewards from a table."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def score(self, prompts, responses):
        return torch.tensor([float(self.table[response]) for response in responses])

    def forward(self, ids):
        return ids[:, 0].float()


class TestEnsemble:
    def test_the_three_ways_to_combine(self):
        ensemble = RewardEnsemble([Fixed({"a": 1, "b": 2}), Fixed({"a": 3, "b": 2}), Fixed({"a": 5, "b": 2})])
        assert ensemble.score(["?"] * 2, ["a", "b"]).tolist() == [3.0, 2.0]
        ensemble.aggregate = "worst"
        assert ensemble.score(["?"] * 2, ["a", "b"]).tolist() == [1.0, 2.0]
        ensemble.aggregate, ensemble.penalty = "variance", 0.75
        # variance of 1, 3, 5 with divisor N: 8 / 3
        assert_close(ensemble.score(["?"] * 2, ["a", "b"]), torch.tensor([1.0, 2.0]))
        assert ensemble(torch.tensor([[7], [9]])).tolist() == [7.0, 9.0]

    def test_offset_and_unit_of_a_member_do_not_count(self):
        """Without a common scale the lowest member alone would be "worst" everywhere."""
        one, two = {"a": 0, "b": 1, "c": 2}, {"a": -90, "b": -110, "c": -100}
        ensemble = RewardEnsemble([Fixed(one), Fixed(two)], aggregate="worst")
        assert ensemble.score(["?"] * 3, list("abc")).argmax() == 0  # follows the second alone
        ensemble.normalise(["?"] * 3, list("abc"))
        assert_close(ensemble.member_scores(["?"] * 3, list("abc")).mean(1), torch.zeros(2))
        assert_close(ensemble.member_scores(["?"] * 3, list("abc")).std(1), torch.ones(2))
        # a: -1 and 1, b: 0 and -1, c: 1 and 0
        assert ensemble.score(["?"] * 3, list("abc")).tolist() == [-1.0, -1.0, 0.0]

    @pytest.mark.parametrize(
        "models, change, told",
        [
            (1, {}, "at least two models, got 1"),
            (2, {"aggregate": "median"}, "'median'"),
            (2, {"penalty": -1}, "penalty"),
        ],
    )
    def test_bad_options_are_named(self, models, change, told):
        with pytest.raises(ValueError, match=told):
            RewardEnsemble([Fixed({}) for _ in range(models)], **change)

    @pytest.mark.slow
    def test_fit_trains_members_that_differ(self, tiny_llama_dir, tmp_path):
        ensemble = make("ensemble", tiny_llama_dir, members=3)
        settings = RewardSettings(
            learning_rate=3e-3, epochs=3, progress=False, seed=4, checkpoint_every=6, run_dir=tmp_path
        )
        train, test = polite_pairs(64), polite_pairs(40, offset=200)
        histories = ensemble.fit(train, settings=settings, batch_size=16)
        assert [len(history) for history in histories] == [12, 12, 12]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["member-0", "member-1", "member-2"]
        assert pairwise_accuracy(*score_pairs(ensemble, test)).value >= 0.95
        scores = ensemble.member_scores(*zip(*((r["prompt"], r["chosen"]) for r in test), strict=True))
        assert not torch.allclose(scores[0], scores[1], atol=1e-2)
        both = ensemble.member_scores(
            [r["prompt"] for r in train] * 2, [r[k] for k in ("chosen", "rejected") for r in train]
        )
        assert_close(both.mean(1), torch.zeros(3), atol=1e-4, rtol=0)

    def test_members_see_the_data_in_their_own_order(self, tiny_llama_dir):
        ensemble = make("ensemble", tiny_llama_dir)
        twin = frozen_copy(ensemble.members[0]).requires_grad_(True)
        ensemble.members[1] = twin  # same head: only the order is left to differ
        rows = polite_pairs(12)
        first, second = ensemble.fit(rows, settings=RewardSettings(progress=False), epochs=1, batch_size=4)
        assert [row["loss"] for row in first] != [row["loss"] for row in second]

    def test_the_trainer_points_to_fit(self, tiny_llama_dir):
        with pytest.raises(TypeError, match=r"by its fit\(rows\)"):
            RewardModelTrainer(make("ensemble", tiny_llama_dir))


class TestObjectives:
    def test_losses_are_those_of_the_scores(self, tiny_llama_dir):
        model = make("basic", tiny_llama_dir)

        def scores(prompt, *answers):
            return model.score([prompt] * len(answers), answers)

        def loss(rows, objective):
            losses, _ = OBJECTIVES[objective](model, encode_groups(model, rows, objective))
            return losses.mean().item()

        rankings = [
            {"prompt": "cup?", "responses": ["tea", "water", "three leaves"]},
            {"prompt": "sad?", "responses": ["talk", "today"]},
        ]
        wanted = [plackett_luce_loss(scores(r["prompt"], *r["responses"])[None]).item() for r in rankings]
        assert loss(rankings, "ranking") == pytest.approx(sum(wanted) / 2, abs=1e-5)
        pair = {"prompt": "cup?", "chosen": "tea", "rejected": "water", "margin": 1.5}
        tea, water = scores("cup?", "tea", "water").unsqueeze(1)
        assert loss([pair], "pairwise") == pytest.approx(bradley_terry_loss(tea, water).item(), abs=1e-5)
        wanted = -math.log(1 / (1 + math.exp(-(tea.item() - water.item() - 1.5))))
        assert loss([pair], "margin") == pytest.approx(wanted, abs=1e-5)
        rated = {"prompt": "cup?", "response": "tea", "rating": 4}
        assert loss([rated], "rating") == pytest.approx((tea.item() - 4) ** 2, rel=1e-4)

    def test_a_larger_margin_makes_a_larger_gap(self, tiny_llama_dir):
        gaps = []
        for margin in (0.0, 3.0):
            model = make("basic", tiny_llama_dir)
            rows = [{**row, "margin": margin} for row in polite_pairs(48)]
            history = trainer(model).train(rows, epochs=4, objective="margin")
            gaps.append(history[-1]["rewards/margins"])
        assert gaps[1] > gaps[0] + 1

    def test_rankings_teach_an_order(self, tiny_llama_dir):
        levels = ["thank you", "hello", "no way"]

        def rankings(count, offset=0):
            return [
                {
                    "prompt": f"{WORDS[i % 10]} {i}?",
                    "responses": [f"{a}, {WORDS[i * 7 % 10]}" for a in levels],
                }
                for i in range(offset, offset + count)
            ]

        model = make("basic", tiny_llama_dir)
        history = trainer(model).train(
            rankings(64), epochs=5, objective="ranking", val_rows=rankings(20, 300)
        )
        right = [
            [text for text, _ in RewardModelInference(model).rank_responses(row["prompt"], row["responses"])]
            == row["responses"]
            for row in rankings(20, 200)
        ]
        assert sum(right) >= 18
        assert history[0]["loss"] > 1.2  # ln 3! = 1.79 for a coin
        assert history.last("eval_loss") < 0.6
        assert history.last("eval_rewards/accuracies") >= 0.9

    def test_ratings_fix_the_offset(self, tiny_llama_dir):
        marks = {"thank you": 5.0, "hello": 3.0, "no way": 1.0}
        rng = random.Random(0)

        def rated(count):
            texts = [(rng.choice(WORDS), rng.choice(list(marks))) for _ in range(count)]
            return [
                {"prompt": f"{word} {i}?", "response": f"{text}, {word}", "rating": marks[text]}
                for i, (word, text) in enumerate(texts)
            ]

        model, test = make("basic", tiny_llama_dir), rated(60)
        history = trainer(model, learning_rate=1e-2).train(rated(128), epochs=5, objective="rating")
        found = model.score([row["prompt"] for row in test], [row["response"] for row in test])
        for mark in marks.values():
            mean = found[[row["rating"] == mark for row in test]].mean().item()
            assert mean == pytest.approx(mark, abs=0.6)
        assert history[-1]["loss"] < 0.3 * history[0]["loss"]

    def test_your_own_loss_fits_each(self, tiny_llama_dir):
        model = make("basic", tiny_llama_dir)
        seen = {}

        def mine(name, value):
            def loss(*given, **named):
                seen[name] = [tuple(t.shape) for t in (*given, *named.values())], sorted(named)
                return value(*given, **named)

            return loss

        pair = {**polite_pairs(1)[0], "margin": -1}
        ranking = {"prompt": "a", "responses": ["b", "c", "d"]}
        step = trainer(model).train_step
        step([pair], objective="margin", loss_fn=mine("margin", bradley_terry_loss))
        step([ranking], objective="ranking", loss_fn=mine("ranking", plackett_luce_loss))
        rated = {"prompt": "a", "response": "b", "rating": 1}
        step([rated], objective="rating", loss_fn=mine("rating", rating_loss))
        assert seen == {
            "margin": ([(1,)] * 3, ["margin"]),
            "ranking": ([(1, 3)] * 2, ["mask"]),
            "rating": ([(1,)] * 2, []),
        }
        with pytest.raises(ValueError, match=r"loss must have shape \(B\), got \(1, 3\)"):
            step([ranking], objective="ranking", loss_fn=lambda rewards, mask: rewards)

    @pytest.mark.parametrize(
        "objective, row, told",
        [
            ("listwise", {}, "no objective 'listwise'"),
            (
                "margin",
                {"prompt": "a", "chosen": "b", "rejected": "c"},
                "margin must be a finite number, got None",
            ),
            (
                "rating",
                {"prompt": "a", "response": "b", "rating": math.nan},
                "rating must be a finite number",
            ),
            ("ranking", {"prompt": "a", "responses": ["b"]}, "at least two different texts"),
            ("ranking", {"prompt": "a", "responses": ["b", "b"]}, "at least two different texts"),
            ("ranking", {"prompt": "a", "responses": "bc"}, "at least two different texts"),
            ("ranking", {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}, r"ranks \[1, 1\] tie"),
        ],
    )
    def test_bad_rows_are_named(self, objective, row, told):
        with pytest.raises(ValueError, match=told):
            as_rows([row], objective)

    def test_the_best_weights_are_kept(self, tiny_llama_dir):
        """Validation wants the opposite of what is trained: the first look is the best one."""
        model = make("basic", tiny_llama_dir)
        against = [
            {**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in polite_pairs(16, offset=90)
        ]
        one = trainer(model, seed=1)
        history = one.train(polite_pairs(32), epochs=4, val_rows=against, keep_best=True)
        losses = history.to_frame()["eval_loss"].dropna().tolist()
        assert losses[-1] > losses[0] + 0.1
        assert one.evaluate(against)["eval_loss"] == pytest.approx(min(losses), abs=1e-5)
        with pytest.raises(ValueError, match="keep_best needs val_rows"):
            one.train(polite_pairs(4), keep_best=True)

    def test_without_a_number_to_choose_by_the_last_weights_are_kept(self, tiny_llama_dir):
        def loss_fn(chosen_rewards, rejected_rewards):
            losses = bradley_terry_loss(chosen_rewards, rejected_rewards)
            return losses if torch.is_grad_enabled() else losses * torch.nan

        one = trainer(make("basic", tiny_llama_dir))
        rows = polite_pairs(4)
        with pytest.warns(UserWarning, match=r"never finite \(last: nan\): check val_rows and loss_fn"):
            history = one.train(rows, epochs=2, val_rows=rows, loss_fn=loss_fn, keep_best=True)
        assert one.evaluate(rows)["eval_loss"] < history[0]["loss"], "the last weights"
        assert math.isnan(history[-1]["eval_loss"]), "a NaN among the losses shows"


class TestStable:
    @pytest.mark.slow
    def test_it_ends_with_the_best_weights_on_unseen_prompts(self, tiny_llama_dir):
        model = make("basic", tiny_llama_dir)
        history = stable_reward_training(
            model, polite_pairs(80), epochs=4, learning_rate=3e-3, progress=False
        )
        rates = [row["learning_rate"] for row in history]
        assert len(history) == 4 * 64 / 8
        assert rates[0] == pytest.approx(3e-3 / 5)  # warm-up over a tenth of the steps, rounded up
        assert max(rates) == 3e-3
        assert len(set(rates[4:])) == 28  # moves every step, not every epoch
        assert rates[-1] < 0.01 * max(rates)
        assert pairwise_accuracy(*score_pairs(model, polite_pairs(40, offset=200))).value >= 0.9

    def test_one_prompt_cannot_be_split(self, tiny_llama_dir):
        rows = [{**row, "prompt": "same?"} for row in polite_pairs(4)]
        with pytest.raises(ValueError, match="1 prompts leaves none to train on"):
            stable_reward_training(make("basic", tiny_llama_dir), rows)


class TestNormalised:
    def test_mean_zero_and_unit_spread(self):
        reward = normalise_reward(Fixed({"a": 1, "b": 3, "c": 5}), ["?"] * 3, list("abc"))
        assert isinstance(reward, NormalisedReward)
        assert (reward.mean, reward.std) == (3.0, 2.0)
        assert as_reward_fn(reward)(["?"] * 3, list("cab")).tolist() == [1.0, -1.0, 0.0]

    def test_columns_go_through(self):
        reward = normalise_reward(
            lambda prompts, responses, *, marks: torch.tensor(marks), ["?"] * 2, list("ab"), marks=[2.0, 4.0]
        )
        assert reward(["?"], ["a"], marks=[3.0]).tolist() == [0.0]

    @pytest.mark.parametrize("answers", [["a"], ["a", "a", "a"]])
    def test_a_constant_reward_has_no_scale(self, answers):
        with pytest.raises(ValueError, match=r"constant \(0.1\)"):
            normalise_reward(Fixed({"a": 0.1}), ["?"] * len(answers), answers)


def test_a_model_of_another_class_with_objectives_is_trained_as_it_is_encoded():
    assert objective_fn_of(SimpleNamespace(objectives=("help", "safe")), "pairwise") is objective_losses
