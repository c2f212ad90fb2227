"""PPO on small random models: what must hold whatever the model is, and that it learns what it can."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from rlhf_helpers.core.generation import generate, rollout_from_text, rollout_outputs, sequence_logps
from rlhf_helpers.core.models import ScalarHead, frozen_copy, load_model
from rlhf_helpers.core.policy_losses import clipped_policy_loss
from rlhf_helpers.policy_optimization import (
    PPOSettings,
    PPOTrainer,
    collect,
    evaluate_policy,
    on_policy,
    policy_outputs,
    ppo,
    reinforce_loss,
    robust_ppo_training,
)
from tests.conftest import dies_at, resume_equals_whole, share_of_e, weights, with_padding

PROMPTS = ["Hello", "What is the capital of France?", "Why?", "Tell me a story about a dog."]
SETTINGS = PPOSettings(
    learning_rate=3e-3,
    steps=2,
    prompts_per_step=2,
    samples_per_prompt=4,
    max_new_tokens=6,
    minibatches=2,
    progress=False,
)
LEARNING = replace(
    SETTINGS, learning_rate=1e-2, steps=18, prompts_per_step=4, samples_per_prompt=8, kl_coef=0.0
)


def nothing(prompts, responses):
    return torch.zeros(len(prompts))


def random_head(size=32):
    torch.manual_seed(1)
    return ScalarHead(size)


# ---- values


@pytest.mark.parametrize("folder", ["tiny_llama_dir", "tiny_gpt2_dir"])
def test_a_value_has_not_seen_the_token_it_judges(folder, request):
    model, tokenizer = load_model(request.getfixturevalue(folder), device="cpu")
    texts = ["Paris is big", "Paris is bad"]
    rollout = rollout_from_text(model, tokenizer, ["Why?"] * 2, texts)
    first, second = rollout.response_ids
    place = int((first != second).nonzero()[0])
    assert place > 0
    _, _, values = policy_outputs(model, rollout, temperature=1.0, value_head=random_head())
    torch.testing.assert_close(values[0, : place + 1], values[1, : place + 1])
    assert (values[0, place + 1] - values[1, place + 1]).abs() > 1e-3


def test_padding_changes_no_output(tiny):
    model, tokenizer = tiny
    rollout = collect(
        model, tokenizer, PROMPTS, samples_per_prompt=2, max_new_tokens=6, temperature=1.0, seed=1
    )
    wider = with_padding(rollout)
    both = [policy_outputs(model, r, temperature=0.8, value_head=random_head()) for r in (rollout, wider)]
    width = rollout.response_mask.shape[1]
    for narrow, wide in zip(*both, strict=True):
        torch.testing.assert_close(wide[:, :width], narrow)
        assert wide[:, width:].abs().max() == 0
        assert narrow.abs().max() > 0.1


# ---- one step


def spy_on(seen):
    def loss_fn(logps, old_logps, advantages, *, cliprange):
        seen.append((logps.detach().clone(), old_logps.clone(), advantages.clone()))
        return clipped_policy_loss(logps, old_logps, advantages, cliprange=cliprange)

    return loss_fn


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_the_score_reaches_earlier_tokens_by_gae(tiny, lam):
    seen = []
    settings = replace(
        SETTINGS, steps=1, epochs=1, minibatches=1, lam=lam, kl_coef=0.0, whiten_advantages=False
    )
    settings = replace(settings, prompts_per_step=4, samples_per_prompt=8, max_new_tokens=40)
    ppo(*tiny, PROMPTS, lambda p, r: torch.full((len(p),), 2.0), settings, loss_fn=spy_on(seen))
    (_, old_logps, advantages), *_ = seen  # the value head says 0, so delta is 2 at the end and 0 before
    lengths = (old_logps != 0).sum(-1)
    assert len(set(lengths.tolist())) > 1, "the responses must differ in length for this to mean anything"
    for row, length in zip(advantages, lengths.tolist(), strict=True):
        expected = [2.0 * lam ** (length - 1 - t) for t in range(length)]
        assert row[:length].tolist() == pytest.approx(expected)
        assert row[length:].abs().sum() == 0


def test_advantages_are_whitened_over_the_tokens_of_the_step(tiny):
    seen = []
    ppo(*tiny, PROMPTS, share_of_e, replace(SETTINGS, steps=1, epochs=1), loss_fn=spy_on(seen))
    real = torch.cat([advantages[old != 0] for _, old, advantages in seen])
    assert real.mean() == pytest.approx(0, abs=1e-5)
    assert real.std() == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["tiny_llama_dir", "tiny_gpt2_dir"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_minibatch_is_on_policy_and_the_next_is_not(folder, temperature, request):
    model, tokenizer = load_model(request.getfixturevalue(folder), device="cpu")
    seen = []
    settings = replace(SETTINGS, steps=1, temperature=temperature)
    row = ppo(model, tokenizer, PROMPTS, share_of_e, settings, loss_fn=spy_on(seen))[0]
    logps, old_logps, _ = seen[0]
    torch.testing.assert_close(logps, old_logps, atol=1e-5, rtol=0)
    assert (seen[1][0] - seen[1][1]).abs().max() > 1e-3
    assert row["val/ratio_at_start"] == pytest.approx(1, abs=1e-5)
    assert row["policy/approxkl_at_start"] == pytest.approx(0, abs=1e-9)
    assert row["policy/approxkl"] > 1e-5
    assert row["objective/kl_per_token"] == pytest.approx(0, abs=1e-5)
    assert row["policy/updates"] == 4


def test_one_epoch_of_one_minibatch_is_an_actor_critic(tiny_llama_dir):
    """At ratio 1 the clipped surrogate has REINFORCE's gradient."""
    settings, ends = replace(SETTINGS, epochs=1, minibatches=1, vf_coef=0.5), []
    for loss_fn in (clipped_policy_loss, lambda *tensors, cliprange: reinforce_loss(*tensors)):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        before = weights(model)
        head = random_head()
        row = ppo(model, tokenizer, PROMPTS, share_of_e, settings, loss_fn=loss_fn, value_head=head)[-1]
        assert row["val/ratio"] == pytest.approx(1, abs=1e-5)
        assert "policy/clipfrac" in row
        assert (weights(model) - before).abs().max() > 1e-3
        ends.append(torch.cat([weights(model), weights(head)]))
    torch.testing.assert_close(*ends, atol=2e-4, rtol=0)


def test_micro_batches_change_nothing_but_memory(tiny_llama_dir):
    """Also where the parts of a minibatch hold unequally many tokens."""
    ends = []
    for parts in (1, 4):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        settings = replace(
            SETTINGS, steps=1, epochs=1, accumulation_steps=parts, max_grad_norm=None, minibatches=1
        )
        settings = replace(settings, entropy_coef=0.1)
        row = ppo(model, tokenizer, PROMPTS, share_of_e, settings, value_head=random_head())[0]
        ends.append((row, weights(model)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4, abs=1e-5)
    # Adam's first step is as long as the rate, 3e-3
    assert (ends[0][1] - ends[1][1]).abs().max() < 1e-4


# ---- the early stop


def test_early_stop_ends_all_updates_of_the_step(tiny_llama_dir, monkeypatch):
    """No minibatch after the stop, in this epoch or the next, moves a weight or leaves a gradient behind."""
    settings = replace(SETTINGS, learning_rate=1e-2, steps=1, epochs=4, early_stop_kl=2e-3)

    def run(loss_fn, settings):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        try:
            row = ppo(model, tokenizer, PROMPTS, share_of_e, settings, loss_fn=loss_fn)[0]
        except KeyboardInterrupt:
            row = None
        return row, model

    seen, forwards = [], []

    def counted(*arguments, **options):
        forwards.append(1)
        return rollout_outputs(*arguments, **options)

    monkeypatch.setattr(on_policy, "rollout_outputs", counted)
    row, stopped = run(spy_on(seen), settings)
    count = int(row["policy/updates"])
    assert 1 <= count == len(seen) < 8
    # One for the minibatch that is too far, and none after it.
    assert len(forwards) == count + 1
    assert all(p.grad is None for p in stopped.parameters())

    def dies(logps, old_logps, advantages, *, cliprange):
        seen.append(1)
        if len(seen) == 2 * count + 1:
            raise KeyboardInterrupt
        return clipped_policy_loss(logps, old_logps, advantages, cliprange=cliprange)

    _, cut = run(dies, replace(settings, early_stop_kl=None))
    assert torch.equal(weights(stopped), weights(cut))


def test_after_a_stop_the_next_step_learns_again(tiny):
    settings = replace(SETTINGS, learning_rate=1e-2, steps=3, epochs=4, early_stop_kl=2e-3)
    history = ppo(*tiny, PROMPTS, share_of_e, settings)
    assert all(1 <= row["policy/updates"] < 8 for row in history)
    assert all(row["policy/approxkl_at_start"] == pytest.approx(0, abs=1e-9) for row in history)


# ---- KL, penalties, bonuses


def moved_copy(model, factor=1.3):
    other = frozen_copy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(factor)
    return other


def test_penalties_are_taken_off_the_reward(tiny):
    model, tokenizer = tiny
    settings = replace(SETTINGS, kl_coef=0.5, missing_eos_penalty=2.0, length_penalty=0.1)
    for row in ppo(model, tokenizer, PROMPTS, share_of_e, settings, ref_model=moved_copy(model)):
        assert row["objective/kl"] > 0.01
        assert row["eos_fraction"] < 1
        expected = row["objective/scores"] - 0.5 * row["objective/kl"] - 2.0 * (1 - row["eos_fraction"])
        assert row["objective/rlhf_reward"] == pytest.approx(
            expected - 0.1 * row["response_length"], abs=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("target, sign", [(1e-3, 1), (1e3, -1), (None, 0)])
def test_adaptive_kl_moves_towards_its_target(tiny, target, sign):
    model, tokenizer = tiny
    settings = replace(SETTINGS, steps=3, kl_coef=0.1, kl_target=target, kl_horizon=80, learning_rate=1e-5)
    history = ppo(model, tokenizer, PROMPTS, nothing, settings, ref_model=moved_copy(model))
    used = [row["objective/kl_coef"] for row in history]
    # 8 episodes a step over a horizon of 80, and an error clipped to 0.2: 2 % a step
    assert used == pytest.approx([0.1, 0.1 * (1 + 0.02 * sign), 0.1 * (1 + 0.02 * sign) ** 2])


@pytest.mark.slow
def test_entropy_bonus_keeps_the_policy_broad(tiny_llama_dir):
    ends = []
    for coef in (0.0, 0.5):
        settings = replace(LEARNING, steps=6, entropy_coef=coef)
        ends.append(ppo(*load_model(tiny_llama_dir, device="cpu"), PROMPTS, share_of_e, settings)[-1])
    assert ends[1]["policy/entropy"] > ends[0]["policy/entropy"] + 0.3
    assert ends[1]["loss/entropy"] < 0


@pytest.mark.slow
def test_ptx_keeps_up_the_likelihood_of_given_text(tiny_llama_dir):
    prompts, answers = ["What is the capital of France?", "Hello"], ["Paris.", "Good day"]
    rows = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]
    ends = {}
    for coef in (None, 0.0, 1.0):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        options = {} if coef is None else {"ptx_rows": rows}
        ppo(
            model, tokenizer, PROMPTS, share_of_e, replace(SETTINGS, steps=4, ptx_coef=coef or 0.0), **options
        )
        with torch.no_grad():
            ends[coef] = weights(model), sequence_logps(model, tokenizer, prompts, answers)[0].sum().item()
    torch.testing.assert_close(ends[0.0][0], ends[None][0])
    assert ends[1.0][1] > ends[None][1] + 5, "nats"


# ---- learning


@pytest.fixture(scope="module")
def learned(tiny_llama_dir):
    model, tokenizer = load_model(tiny_llama_dir, device="cpu")
    start = frozen_copy(model)
    return ppo(model, tokenizer, PROMPTS, share_of_e, LEARNING), model, start, tokenizer


NEW = ["Good morning", "Is it late?", "Where are you now, my friend?", "Sing!"]


@pytest.mark.slow
def test_reward_rises_on_new_prompts(learned):
    _, model, start, tokenizer = learned
    before, after = (
        evaluate_policy(m, tokenizer, NEW, share_of_e, samples=16, max_new_tokens=6, seed=9)["mean"]
        for m in (start, model)
    )
    assert after > before + 0.2


@pytest.mark.slow
def test_kl_penalty_pulls_back(learned):
    _, model, start, tokenizer = learned
    settings = replace(LEARNING, kl_coef=1.0, steps=8)
    history = ppo(copy.deepcopy(model), tokenizer, PROMPTS, nothing, settings, ref_model=start)
    kl = [row["objective/kl"] for row in history]
    assert kl[0] > 1
    assert sum(kl[-2:]) / 2 < 0.7 * kl[0]


@pytest.mark.slow
def test_a_flipped_sign_does_not_learn(tiny):
    model, tokenizer = tiny

    def flipped(logps, old_logps, advantages, *, cliprange):
        return clipped_policy_loss(logps, old_logps, -advantages, cliprange=cliprange)

    ppo(model, tokenizer, PROMPTS, share_of_e, replace(LEARNING, steps=6), loss_fn=flipped)
    after = evaluate_policy(model, tokenizer, NEW, share_of_e, samples=16, max_new_tokens=6, seed=9)["mean"]
    assert after < 0.05


@pytest.mark.slow
def test_the_value_head_learns_what_a_prompt_is_worth(tiny):
    def of_prompt(prompts, responses):
        return torch.tensor([float(PROMPTS.index(p)) / 3 for p in prompts])

    settings = replace(LEARNING, steps=15, vf_coef=1.0, lam=1.0)
    history = ppo(*tiny, PROMPTS, of_prompt, settings)
    explained = [row["val/explained_variance"] for row in history]
    assert explained[0] == pytest.approx(0, abs=1e-5), "a head that says 0 explains nothing"
    assert explained[-1] > 0.5


# ---- repeatable


def test_no_learning_rate_no_drift(tiny):
    model, tokenizer = tiny
    before = weights(model)
    history = ppo(model, tokenizer, PROMPTS, share_of_e, replace(SETTINGS, learning_rate=0.0))
    assert torch.equal(weights(model), before)
    assert all(row["policy/approxkl"] < 1e-9 and row["policy/clipfrac"] == 0 for row in history)


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_one(tiny_llama_dir, tmp_path):
    """Policy, value head, optimiser, order of the minibatches and KL controller, bit for bit."""

    def run(folder, reward_fn, changes=(), **options):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        settings = replace(
            SETTINGS,
            steps=5,
            kl_target=0.5,
            kl_horizon=40,
            early_stop_kl=0.05,
            entropy_coef=0.01,
            run_dir=tmp_path / folder,
            checkpoint_every=2,
        )
        settings, head = replace(settings, **dict(changes)), random_head()
        rows = [{"prompt": p, "completion": "Fine."} for p in PROMPTS]
        history = ppo(
            model, tokenizer, PROMPTS, reward_fn, settings, value_head=head, ptx_rows=rows, **options
        )
        return history, torch.cat([weights(model), weights(head)])

    history = resume_equals_whole(run, share_of_e, dies_at(4, share_of_e))
    assert len({row["objective/kl_coef"] for row in history}) == 5
    with pytest.raises(ValueError, match="minibatches was 2, now 4"):
        run("broken", share_of_e, changes={"minibatches": 4}, resume=True)


@pytest.mark.parametrize(
    "field, value",
    [
        ("minibatches", 3),
        ("minibatches", 0),
        ("epochs", 1.5),
        ("cliprange", 1.0),
        ("cliprange_value", 0.0),
        ("vf_coef", -1.0),
        ("gamma", 1.1),
        ("lam", -0.1),
        ("early_stop_kl", 0.0),
        ("kl_target", 0.0),
        ("kl_horizon", 1.0),
        ("length_penalty", -1.0),
        ("entropy_coef", float("nan")),
        ("ptx_coef", -1.0),
        ("ptx_batch_size", 0),
    ],
)
def test_settings_refuse(field, value):
    with pytest.raises(ValueError, match=field):
        replace(SETTINGS, **{field: value})


def test_a_reference_that_moves_is_refused(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="frozen_copy"):
        ppo(model, tokenizer, PROMPTS, share_of_e, SETTINGS, ref_model=model)


def test_a_loss_that_was_reduced_is_refused(tiny):
    with pytest.raises(ValueError, match=r"loss_fn must have shape \(B, T\)"):
        ppo(*tiny, PROMPTS, share_of_e, SETTINGS, loss_fn=lambda logps, *rest, cliprange: logps.mean())


# ---- the trainer of the guide


def test_steps_on_given_text_favour_what_was_rewarded(tiny):
    model, tokenizer = tiny
    trainer = PPOTrainer(model=model, tokenizer=tokenizer, learning_rate=3e-3, kl_coef=0.0)
    prompts, texts = ["Hello"] * 2, ["Good day to you", "I will not help"]

    def gap():
        with torch.no_grad():
            good, bad = sequence_logps(model, tokenizer, prompts, texts)[0].sum(-1).tolist()
        return good - bad

    before = gap()
    for _ in range(4):
        row = trainer.train_step(prompts, texts, [1.0, 0.0])
        assert row["val/ratio_at_start"] == pytest.approx(1, abs=1e-5)
    assert gap() > before + 2, "nats"
    assert row["step"] == 3


def test_steps_on_a_rollout_keep_its_log_probs(tiny):
    model, tokenizer = tiny
    trainer = PPOTrainer(model, None, share_of_e, tokenizer, 1e-3, max_new_tokens=6)
    rollout = collect(
        model, tokenizer, PROMPTS, samples_per_prompt=2, max_new_tokens=6, temperature=1.0, seed=1
    )
    first, second = trainer.train_step(rollout), trainer.train_step(rollout)
    assert first["policy/approxkl_at_start"] == pytest.approx(0, abs=1e-9)
    assert second["policy/approxkl_at_start"] > 1e-6, "the policy has left the one that sampled"
    assert first["objective/scores"] == pytest.approx(share_of_e(0, rollout.responses).mean().item())


@pytest.mark.parametrize(
    "responses, rewards, message",
    [
        (["a", "b"], [1.0], "rewards must be 2 finite numbers"),
        (["a", "b"], [1.0, float("nan")], "rewards must be 2 finite numbers"),
        (["a"], [1.0, 2.0], "as many prompts as responses"),
        (["a", "b"], None, "no reward_model"),
    ],
)
def test_train_step_refuses(tiny, responses, rewards, message):
    model, tokenizer = tiny
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        PPOTrainer(model, tokenizer=tokenizer).train_step(["p", "q"], responses, rewards)
    assert torch.equal(weights(model), before)


def test_train_step_refuses_a_greedy_rollout(tiny):
    model, tokenizer = tiny
    before = weights(model)
    rollout = generate(model, tokenizer, PROMPTS, max_new_tokens=3, greedy=True)
    with pytest.raises(ValueError, match="not a sample of the policy"):
        PPOTrainer(model, tokenizer=tokenizer).train_step(rollout, rewards=[1.0] * 4)
    assert torch.equal(weights(model), before)


def test_unknown_keywords_are_named(tiny):
    with pytest.raises(TypeError, match="clip_range"):
        PPOTrainer(tiny[0], clip_range=0.2)


@pytest.mark.slow
def test_robust_training_keeps_each_step_near_its_sampler(tiny):
    model, tokenizer = tiny
    changes = {"learning_rate": 3e-3, "steps": 8, "samples_per_prompt": 8, "max_new_tokens": 6}
    changes |= {"kl_coef": 0.0, "progress": False}
    history = robust_ppo_training(
        model, frozen_copy(model), share_of_e, {"prompts": PROMPTS}, tokenizer=tokenizer, **changes
    )
    assert any(row["policy/updates"] < 16 for row in history)
    assert all(row["policy/approxkl"] < 0.05 for row in history)
    assert history[-1]["objective/scores"] > history[0]["objective/scores"]


def test_a_value_head_reads_projected_states(checkpoint):
    """OPT-350m gives out states that are narrower than its hidden_size."""
    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = checkpoint("opt", **sizes, word_embed_proj_dim=16, do_layer_norm_before=False)
    model, tokenizer = load_model(folder, device="cpu")
    options = {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4, "progress": False}
    history = PPOTrainer(model, None, share_of_e, tokenizer, **options).train(["Hello", "Why?"], steps=1)
    assert math.isfinite(history[0]["loss/value"])
