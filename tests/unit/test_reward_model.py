"""The reward model reads the right token, learns from comparisons, and survives a round through a folder."""

import math

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForSequenceClassification

from rlhf_helpers.core.models import as_reward_fn, frozen_copy, load_encoder, tokenizer_for
from rlhf_helpers.core.preference_losses import bradley_terry_loss
from rlhf_helpers.core.text import encode_response
from rlhf_helpers.reward_model import (
    RewardModel,
    RewardModelInference,
    RewardModelTrainer,
    RewardSettings,
    accuracy,
    create_reward_model,
    gold_agreement,
    load_reward_model,
    pair_credits,
    paired_difference,
    pairwise_accuracy,
    score_pairs,
)
from rlhf_helpers.reward_model.elements import as_rows, encode_groups

SHAPES = ["tiny_gpt2_dir", "tiny_llama_dir", "tiny_qwen_dir", "tiny_distilbert_dir", "tiny_bert_dir"]
CAUSAL = SHAPES[:3]


@pytest.fixture
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def llama(tiny_llama_dir):
    return create_reward_model("basic", base_model_name=tiny_llama_dir, device="cpu")


def pairs(count, *, offset=0):
    """The better answer says thank you; nothing else tells the two apart."""
    words = ["tea", "sad", "today", "water", "Paris", "question", "three", "leaves", "pour", "cup"]
    rows = []
    for i in range(offset, offset + count):
        one, other = words[i % 10], words[(i * 7 + i // 10) % 10]
        rows.append(
            {"prompt": f"{one} {i}?", "chosen": f"thank you, {other}", "rejected": f"no way, {other}"}
        )
    return rows


def real_tokens(model, count, length=6):
    ordinary = sorted(set(range(len(model.tokenizer))) - set(model.tokenizer.all_special_ids))
    places = torch.randint(len(ordinary), (count, length), generator=torch.Generator().manual_seed(0))
    return torch.tensor(ordinary)[places]


@pytest.mark.parametrize("folder", SHAPES, indirect=True)
class TestEveryShape:
    def test_rewards_are_one_number_a_text(self, folder):
        model = create_reward_model("basic", base_model_name=folder, device="cpu")
        rewards = model(real_tokens(model, 3))
        assert rewards.shape == (3,)
        assert rewards.dtype == torch.float32
        assert rewards.unique().numel() == 3

    def test_padding_changes_no_reward(self, folder):
        model = create_reward_model("basic", base_model_name=folder, device="cpu")
        ids = real_tokens(model, 2)
        pad = torch.full((2, 3), model.tokenizer.pad_token_id)
        plain = model(ids)
        for padded in ([ids, pad], [pad, ids], [pad, ids, pad]):
            assert_close(model(torch.cat(padded, 1)), plain, atol=1e-5, rtol=1e-5)

    def test_scores_alone_equal_scores_together(self, folder):
        model = create_reward_model("basic", base_model_name=folder, device="cpu")
        prompts = ["What is tea?", "I feel sad", "hello, how are you today?"]
        responses = ["water over leaves", "I am sorry to hear that; do you want to talk about it?", ""]
        together = model.score(prompts, responses, batch_size=2)
        alone = [model.score([p], [r]).item() for p, r in zip(prompts, responses, strict=True)]
        assert_close(together, torch.tensor(alone), atol=1e-5, rtol=1e-5)
        assert len(set(alone)) == 3

    def test_a_folder_gives_the_same_scores_back(self, folder, tmp_path):
        model = create_reward_model("basic", base_model_name=folder, device="cpu", max_length=64)
        before = model.score(["What is tea?", "hello"], ["water", "today"])
        model.save_pretrained(tmp_path)
        loaded = RewardModel.from_pretrained(tmp_path, device="cpu")
        assert torch.equal(loaded.score(["What is tea?", "hello"], ["water", "today"]), before)
        assert (loaded.pooling, loaded.max_length) == (model.pooling, 64)

    @pytest.mark.slow
    def test_train_step_lowers_the_loss(self, folder):
        trainer = RewardModelTrainer(
            model=create_reward_model("basic", base_model_name=folder), learning_rate=3e-3, device="cpu"
        )
        losses = [trainer.train_step(pairs(8)) for _ in range(6)]
        assert all(isinstance(loss, float) for loss in losses)
        assert losses[-1] < 0.8 * losses[0]


class TestReading:
    def test_the_last_real_token_decides(self, llama):
        """A change of what comes after the last real token changes nothing; of that token itself, much."""
        ids = real_tokens(llama, 1, 8)
        mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
        other_tail, other_last = ids.clone(), ids.clone()
        other_tail[0, 6:] = ids[0, :2]
        other_last[0, 5] = ids[0, 0]
        assert_close(llama(other_tail, mask), llama(ids, mask))
        assert abs(llama(other_last, mask) - llama(ids, mask)) > 1e-3
        assert_close(llama(ids, mask), llama(ids[:, :6]), atol=1e-5, rtol=1e-5)

    def test_reward_is_the_head_on_that_hidden_state(self, llama):
        ids = real_tokens(llama, 2, 5)
        hidden = llama.trunk(input_ids=ids).last_hidden_state[:, -1]
        with torch.no_grad():
            llama.head.linear.bias.fill_(0.25)
        assert_close(llama(ids), hidden @ llama.head.linear.weight[0] + 0.25)

    def test_mean_pooling_averages_real_tokens_only(self, tiny_llama_dir):
        model = create_reward_model("basic", base_model_name=tiny_llama_dir, pooling="mean", device="cpu")
        ids = real_tokens(model, 1, 4)
        hidden = model.trunk(input_ids=ids).last_hidden_state.mean(1)
        padded = torch.cat([ids, torch.full((1, 5), model.tokenizer.pad_token_id)], 1)
        assert_close(model(padded), model.head(hidden), atol=1e-5, rtol=1e-5)

    def test_the_mask_is_inferred_from_pad(self, llama):
        ids = real_tokens(llama, 2)
        ids[0, 4:] = llama.tokenizer.pad_token_id
        mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
        assert torch.equal(llama(ids), llama(ids, mask))

    def test_a_row_of_padding_is_refused(self, llama):
        ids = real_tokens(llama, 2)
        ids[1] = llama.tokenizer.pad_token_id
        with pytest.raises(ValueError, match="row 1 of input_ids holds no real token"):
            llama(ids)

    def test_a_mask_of_another_shape_is_refused(self, llama):
        with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 6\)"):
            llama(real_tokens(llama, 2), torch.ones(1, 6))

    def test_long_prompts_keep_their_end(self, tiny_llama_dir):
        model = create_reward_model("basic", base_model_name=tiny_llama_dir, max_length=24, device="cpu")
        prompt = "I feel sad today. " * 9 + "What is tea?"
        assert len(model.encode(prompt, "water")) == 24
        kept = model.tokenizer.decode(model.encode(prompt, "water"))
        assert kept.endswith("What is tea?<|assistant|>water<|end|>")

    def test_it_has_no_dropout_and_knows_its_tokenizer(self, tiny_gpt2_dir):
        model = create_reward_model("basic", base_model_name=tiny_gpt2_dir, device="cpu").train()
        ids = real_tokens(model, 2)
        assert torch.equal(model(ids), model(ids))
        assert tokenizer_for(model) is model.tokenizer
        assert model.tokenizer.pad_token_id != model.tokenizer.eos_token_id

    def test_rewards_keep_their_bits_in_half_precision(self, tiny_llama_dir):
        """bf16 has 8 bits: rounded to it, the rewards of two good answers tie."""
        half = create_reward_model(
            "basic", base_model_name=tiny_llama_dir, device="cpu", dtype=torch.bfloat16
        )
        full = create_reward_model("basic", base_model_name=tiny_llama_dir, device="cpu")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = full(real_tokens(full, 4))
        for rewards in (half(real_tokens(half, 4)), mixed):
            assert rewards.dtype == torch.float32
            assert not torch.equal(rewards, rewards.bfloat16().float())

    @pytest.mark.slow
    def test_head_starts_at_its_scale(self, tiny_llama_dir):
        heads = [
            create_reward_model("basic", base_model_name=tiny_llama_dir, seed=seed).head.linear
            for seed in range(20)
        ]
        spread = torch.cat([head.weight for head in heads]).std().item()
        assert spread == pytest.approx(1 / math.sqrt(33), rel=0.1)
        assert all(head.bias.item() == 0 for head in heads)

    def test_score_restores_the_mode_and_needs_no_gradient(self, llama):
        llama.train()
        assert not llama.score(["a"], ["b"]).requires_grad
        assert llama.training

    def test_it_is_a_reward_function(self, llama):
        rewards = as_reward_fn(llama)(["hello", "tea"], ["today", "water"], references=["x", "y"])
        assert torch.equal(rewards, llama.score(["hello", "tea"], ["today", "water"]))

    def test_a_frozen_copy_scores_alike(self, llama):
        assert torch.equal(frozen_copy(llama).score(["tea"], ["water"]), llama.score(["tea"], ["water"]))


class TestMaking:
    def test_an_unknown_kind_is_refused(self):
        with pytest.raises(ValueError, match=r"kind 'triple'; choose from \('basic', 'separate'"):
            create_reward_model("triple")

    def test_first_token_of_a_causal_trunk_is_refused(self, tiny_llama_dir):
        with pytest.raises(ValueError, match="has seen nothing"):
            create_reward_model("basic", base_model_name=tiny_llama_dir, pooling="first")

    @pytest.mark.parametrize(
        "change, told", [({"pooling": "max"}, "'max'"), ({"max_length": 257}, "256, got 257")]
    )
    def test_bad_options_are_named(self, tiny_llama_dir, change, told):
        with pytest.raises(ValueError, match=told):
            create_reward_model("basic", base_model_name=tiny_llama_dir, **change)

    def test_a_seed_gives_one_head(self, tiny_llama_dir):
        one, same, other = (
            create_reward_model("basic", base_model_name=tiny_llama_dir, seed=s).head.linear.weight
            for s in (1, 1, 2)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


class TestFolder:
    @pytest.mark.parametrize("folder", CAUSAL, indirect=True)
    def test_plain_transformers_gives_the_same_scores(self, folder, tmp_path):
        model = create_reward_model("basic", base_model_name=folder, device="cpu")
        ids = real_tokens(model, 3)
        ids[0, 4:] = model.tokenizer.pad_token_id
        model.save_pretrained(tmp_path)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert plain.config.num_labels == 1
        logits = plain(input_ids=ids, attention_mask=(ids != model.tokenizer.pad_token_id).long()).logits
        assert_close(logits.squeeze(-1), model(ids), atol=1e-6, rtol=1e-6)

    def test_a_bias_and_mean_pooling_survive(self, tiny_llama_dir, tmp_path):
        for pooling in ("last", "mean"):
            model = create_reward_model(
                "basic", base_model_name=tiny_llama_dir, pooling=pooling, device="cpu"
            )
            with torch.no_grad():
                model.head.linear.bias.fill_(1.5)
            model.save_pretrained(tmp_path / pooling)
            loaded = RewardModel.from_pretrained(tmp_path / pooling, device="cpu")
            assert loaded.pooling == pooling
            assert torch.equal(loaded.score(["tea"], ["water"]), model.score(["tea"], ["water"]))

    def test_saving_leaves_the_model_as_it_was(self, llama, tmp_path):
        before, config = llama.score(["tea"], ["water"]), llama.config
        llama.save_pretrained(tmp_path)
        assert llama.config is config
        assert not hasattr(config, "reward_pooling")
        assert torch.equal(llama.score(["tea"], ["water"]), before)

    def test_a_language_model_is_no_reward_model(self, tiny_llama_dir):
        with pytest.raises(
            ValueError, match=r"needs a reward head .* found none; .* call create_reward_model"
        ):
            RewardModel.from_pretrained(tiny_llama_dir)

    def test_a_trunk_without_a_classifier_keeps_its_rewards(self, checkpoint, tmp_path):
        """Granite has no sequence classifier in the library."""
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        folder = checkpoint("granite", **sizes, num_key_value_heads=2)
        model = create_reward_model(base_model_name=folder, device="cpu")
        model.save_pretrained(tmp_path)
        again = load_reward_model(tmp_path, device="cpu")
        assert torch.equal(again.score(["tea"], ["water"]), model.score(["tea"], ["water"]))

    def test_a_narrow_head_for_projected_states(self, checkpoint, tmp_path):
        sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        folder = checkpoint("opt", **sizes, word_embed_proj_dim=16, do_layer_norm_before=False)
        model = create_reward_model(base_model_name=folder, device="cpu")
        assert model.head.linear.weight.shape == (1, 16)
        model.save_pretrained(tmp_path)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        ids = torch.tensor([model.encode("tea", "water")])
        assert_close(plain(input_ids=ids).logits[0], model(ids), atol=1e-6, rtol=1e-6)

    def test_the_settings_lower_the_length_that_is_read_for_good(self, tiny_llama_dir):
        rows = [{"prompt": "tea " * 100, "chosen": "water", "rejected": "no"}] * 2
        model = create_reward_model(base_model_name=tiny_llama_dir, device="cpu")
        RewardModelTrainer(model, progress=False, max_length=24).train(rows, epochs=1)
        assert model.max_length == 24
        assert len(model.encode("tea " * 100, "water")) == 24

    def test_texts_longer_than_the_positions_of_roberta_are_cut(self, checkpoint):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        folder = checkpoint("roberta", AutoModel, **sizes, max_position_embeddings=66)
        model = create_reward_model(base_model_name=folder, device="cpu")
        assert model.max_length == 65
        assert torch.isfinite(model.score(["tea " * 200], ["water"])).all()


LONG = "What is the capital of France? I feel sad today. "


class TestElements:
    def test_answers_of_a_pair_follow_the_same_prompt(self, tiny_llama_dir):
        model = create_reward_model(base_model_name=tiny_llama_dir, max_length=40, device="cpu")
        row = {"prompt": LONG * 3, "chosen": "tea", "rejected": "water over the leaves, three minutes"}
        ranking = {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], "no"]}
        for rows, objective in (([row], "pairwise"), ([ranking], "ranking")):
            one, two, *_ = encode_groups(model, rows, objective)[0].sequences
            assert len(two) == 40
            tail = len(encode_response(model.tokenizer, row["rejected"]))
            assert one[: 40 - tail] == two[: 40 - tail]
            assert one[40 - tail :] == encode_response(model.tokenizer, row["chosen"])

    def test_ranked_answers_are_scored_after_the_same_prompt(self, tiny_llama_dir, monkeypatch):
        model = create_reward_model(base_model_name=tiny_llama_dir, max_length=40, device="cpu")
        seen, read = {}, model.rewards_of

        def spy(sequences):
            seen.update({len(ids): ids for ids in sequences})
            return read(sequences)

        monkeypatch.setattr(model, "rewards_of", spy)
        RewardModelInference(model).rank_responses(LONG * 3, ["tea", "water over the leaves, three minutes"])
        short, long = seen.values()
        assert len(long) == 40
        shared = len(long) - len(encode_response(model.tokenizer, "water over the leaves, three minutes"))
        assert short[:shared] == long[:shared]
        assert short[shared:] == encode_response(model.tokenizer, "tea")

    def test_answers_that_are_the_same_after_the_cut_are_refused(self, tiny_llama_dir):
        model = create_reward_model(base_model_name=tiny_llama_dir, max_length=30, device="cpu")
        row = {"prompt": "tea?", "chosen": LONG * 3 + "yes", "rejected": LONG * 3 + "no"}
        with pytest.raises(ValueError, match=r"row 2: two answers are the same tokens \(max_length=30\)"):
            encode_groups(model, [*pairs(2), row])

    def test_half_an_emoji_names_the_row(self, llama):
        row = {"prompt": "tea?", "chosen": "a \ud83d", "rejected": "b"}
        with pytest.raises(ValueError, match=r"row 3: chosen must be a text, got 'a \\ud83d'"):
            encode_groups(llama, [*pairs(3), row])
        with pytest.raises(ValueError, match=r"pair 1 must be two texts"):
            RewardModelInference(llama).batch_predict([("a", "b"), ("tea?", "a \ud83d")])
        with pytest.raises(ValueError, match=r"row 1: .* half a surrogate pair"):
            llama.score(["a", "b"], ["c", "a \ud83d"])

    def test_roles_that_the_template_refuses_name_the_row(self, llama):
        llama.tokenizer.chat_template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        )
        row = {"prompt": "System: Be kind.\n\nUser: Hi", "chosen": "a", "rejected": "b"}
        with pytest.raises(ValueError, match=r"row 1: .* roles system, user \(no system\)"):
            encode_groups(llama, [*pairs(1), row])


class TestTraining:
    def test_it_learns_what_people_prefer(self, llama):
        train, test = pairs(96), pairs(40, offset=200)
        before = pairwise_accuracy(*score_pairs(llama, test)).value
        history = RewardModelTrainer(llama, learning_rate=2e-3, progress=False).train(
            train, epochs=3, batch_size=16, val_rows=test
        )
        after = pairwise_accuracy(*score_pairs(llama, test))
        assert before < 0.85
        assert after.value >= 0.95
        assert len(history) == 18
        assert history.last("eval_rewards/accuracies") == pytest.approx(after.value)
        assert history[-1]["loss"] < 0.3 < history[0]["loss"]
        assert history[-1]["rewards/margins"] == pytest.approx(
            history[-1]["rewards/chosen"] - history[-1]["rewards/rejected"], abs=1e-5
        )

    def test_all_row_forms_train_alike(self, tiny_llama_dir):
        rows = pairs(6)
        losses = []
        for form in (rows, Dataset.from_list(rows), Dataset.from_list(rows)[:6]):
            model = create_reward_model("basic", base_model_name=tiny_llama_dir)
            trainer = RewardModelTrainer(model=model, learning_rate=1e-3, device="cpu")
            losses.append([trainer.train_step(form) for _ in range(2)])
        assert losses[0] == losses[1] == losses[2]
        assert losses[0][1] < losses[0][0]

    def test_a_big_slice_is_cut_into_batches(self, llama, monkeypatch):
        seen = []
        monkeypatch.setattr(
            llama, "rewards_of", lambda seqs, f=llama.rewards_of: (seen.append(len(seqs)), f(seqs))[1]
        )
        RewardModelTrainer(llama, batch_size=4).train_step(pairs(10))
        assert seen == [8, 8, 4]

    def test_a_ranking_is_one_group_whose_answers_are_read_once(self, llama, monkeypatch):
        seen = []
        monkeypatch.setattr(
            llama, "_batch", lambda seqs, f=llama._batch: (seen.append(len(seqs)), f(seqs))[1]
        )
        ranked = [("tea", "water", "leaves")]
        rows = [
            {"prompt": "cup?", "chosen": a[i], "rejected": a[j]}
            for a in ranked
            for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        groups = encode_groups(llama, [*rows, *pairs(1)])
        assert [group.pairs for group in groups] == [[(0, 1), (0, 2), (1, 2)], [(0, 1)]]

        def three_for_the_ranking(chosen, rejected):
            return (chosen - rejected) * 0 + torch.tensor([3.0, 3.0, 3.0, 1.0])

        # the mean over groups is 2; over pairs it would be 2.5
        loss = RewardModelTrainer(llama).train_step([*rows, *pairs(1)], loss_fn=three_for_the_ranking)
        assert loss == pytest.approx(2.0)
        assert seen == [5]

    def test_accumulation_is_the_same_update(self, tiny_llama_dir):
        runs = []
        for batch_size, accumulation in ((5, 1), (1, 5)):
            model = create_reward_model("basic", base_model_name=tiny_llama_dir, device="cpu")
            trainer = RewardModelTrainer(model, accumulation_steps=accumulation, progress=False)
            history = trainer.train(pairs(7), epochs=1, batch_size=batch_size)
            runs.append(history.to_frame()[["loss", "grad_norm", "rewards/margins"]].to_numpy())
        assert len(runs[0]) == 2  # five pairs, then the two left over
        assert runs[1] == pytest.approx(runs[0], rel=1e-4, abs=1e-5)

    def test_a_stopped_run_goes_on_as_if_it_had_not(self, tiny_llama_dir, tmp_path):
        def run(loss_fn, run_dir, **options):
            model = create_reward_model("basic", base_model_name=tiny_llama_dir, device="cpu")
            trainer = RewardModelTrainer(
                model,
                epochs=2,
                batch_size=2,
                warmup_steps=0,
                checkpoint_every=2,
                run_dir=run_dir,
                progress=False,
            )
            return trainer.train(pairs(6), loss_fn=loss_fn, **options), model

        calls = []

        def breaks_at_five(chosen, rejected):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return bradley_terry_loss(chosen, rejected)

        whole, model = run(bradley_terry_loss, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            run(breaks_at_five, tmp_path / "broken")
        resumed, other = run(breaks_at_five, tmp_path / "broken", resume=True)
        assert len(calls) == 5 + 2  # four steps were saved, two of six are left
        assert resumed == whole
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    def test_a_run_is_not_resumed_on_other_data(self, tiny_llama_dir, tmp_path):
        def run(rows, **options):
            model = create_reward_model("basic", base_model_name=tiny_llama_dir, device="cpu")
            settings = {"epochs": 1, "batch_size": 2, "checkpoint_every": 1, "run_dir": tmp_path}
            trainer = RewardModelTrainer(model, schedule="constant", progress=False, **settings)
            return trainer.train(rows, **options)

        run(pairs(6))
        swapped = [dict(row) for row in pairs(6)]
        swapped[4]["chosen"], swapped[4]["rejected"] = swapped[4]["rejected"], swapped[4]["chosen"]
        with pytest.raises(ValueError, match=r"belongs to another run: data was \d+, now \d+\. "):
            run(swapped, resume=True)
        assert len(run(pairs(6), resume=True)) == 3

    def test_a_pass_counts_its_steps(self, llama):
        """So the message of a loss that is not finite names the step, as in training."""

        def not_finite_at_the_end(chosen, rejected):
            return (chosen - rejected) * (1.0 if len(chosen) == 2 else math.inf)

        with pytest.raises(FloatingPointError, match=r"at step 2 \(rows \[4\]\)"):
            RewardModelTrainer(llama, batch_size=2).train_step(pairs(5), loss_fn=not_finite_at_the_end)

    def test_a_loss_that_does_not_fit_is_refused(self, llama):
        with pytest.raises(ValueError, match=r"loss"):
            RewardModelTrainer(llama).train_step(pairs(2), loss_fn=lambda c, r: (c - r).mean())

    @pytest.mark.parametrize(
        "rows, told",
        [
            ([], "there are no rows"),
            ({"prompt": [], "chosen": [], "rejected": []}, "there are no rows"),
            ([*pairs(1), {"prompt": "a", "chosen": "b"}], "row 1: rejected must be a text, got None"),
            ({"prompt": ["a"], "chosen": ["b"]}, "row 0: rejected must be a text, got None"),
            ({"prompt": ["a"], "chosen": ["b", "c"], "rejected": ["d"]}, "columns differ in length"),
            ([("a", "b", "c")], "row 0 must be a dict .* got tuple"),
            ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "row 0: chosen and rejected are the same"),
        ],
    )
    def test_bad_rows_are_named(self, rows, told):
        with pytest.raises(ValueError, match=told):
            as_rows(rows)

    def test_bad_settings_are_named(self, llama):
        with pytest.raises(ValueError, match=r"RewardSettings.epochs must be a finite number >= 1, got 0"):
            RewardSettings(epochs=0)
        with pytest.raises(TypeError, match=r"RewardSettings.*lerning_rate"):
            RewardModelTrainer(llama, lerning_rate=1e-3)


class TestInference:
    def test_ranks_best_first(self, llama):
        inference = RewardModelInference(llama, llama.tokenizer)
        answers = ["water", "tea leaves", "I feel sad today"]
        ranked = inference.rank_responses("What is tea?", answers)
        scored = inference.batch_predict([("What is tea?", answer) for answer in answers])
        assert scored.shape == (3,)
        assert ranked == sorted(zip(answers, scored.tolist(), strict=True), key=lambda pair: -pair[1])
        assert ranked[0][1] > ranked[-1][1]

    def test_a_foreign_tokenizer_is_refused(self, llama, tiny_gpt2_dir):
        with pytest.raises(ValueError, match="is not the model's own"):
            RewardModelInference(llama, load_encoder(tiny_gpt2_dir)[1])

    @pytest.mark.parametrize(
        "given, told", [([], "no pairs"), (["ab"], "pair 0"), ([("a", "b", "c")], "pair 0")]
    )
    def test_bad_pairs_are_named(self, llama, given, told):
        with pytest.raises(ValueError, match=told):
            RewardModelInference(llama).batch_predict(given)


class TestMetrics:
    def test_ties_count_one_half(self):
        chosen, rejected = torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 1.0, 4.0])
        assert pair_credits(chosen, rejected).tolist() == [1.0, 0.5, 0.0, 1.0]
        assert pairwise_accuracy(chosen, rejected).value == 0.625

    def test_wilson_interval(self):
        found = accuracy(torch.tensor([1.0] * 8 + [0.0] * 2))
        assert (found.low, found.high) == (
            pytest.approx(0.4901625, abs=1e-6),
            pytest.approx(0.9433178, abs=1e-6),
        )
        assert accuracy(torch.ones(5)).high == pytest.approx(1.0)

    def test_paired_difference_sees_what_two_intervals_hide(self):
        """Right on 60 and on 50 of the same 100 pairs: ten differ, and yet both intervals overlap."""
        first, second = torch.zeros(100), torch.zeros(100)
        first[:60], second[:50] = 1, 1
        found = paired_difference(first, second)
        assert found.value == pytest.approx(0.1)
        # mean 0.1, standard error 0.3015 / 10, t quantile of 99 degrees 1.9842
        assert (found.low, found.high) == (pytest.approx(0.04017, abs=1e-4), pytest.approx(0.15983, abs=1e-4))
        assert accuracy(first).low < accuracy(second).high

    def test_no_difference_has_no_width(self):
        found = paired_difference(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
        assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)

    def test_gold_ties_are_left_out(self):
        first, second = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 9.0])
        found = gold_agreement(
            first, second, torch.tensor([1.0, 0.2, 0.0, 0.5]), torch.tensor([0.0, 0.2, 1.0, 0.1])
        )
        assert (found.value, found.n) == (0.5, 3)  # right, (tie), one half, wrong

    def test_nothing_to_measure_is_refused(self):
        with pytest.raises(ValueError, match="no pairs"):
            accuracy(torch.zeros(0))
        with pytest.raises(ValueError, match="shape"):
            pair_credits(torch.zeros(3), torch.zeros(3, 1))
