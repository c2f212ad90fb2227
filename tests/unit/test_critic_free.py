"""REINFORCE and GRPO as variations of RLOO, rejection sampling and iterative RLHF, on small random models."""

from dataclasses import replace

import pytest
import torch

from rlhf_helpers.core.generation import Rollout, sequence_logps
from rlhf_helpers.core.models import frozen_copy, load_model
from rlhf_helpers.core.policy_losses import clipped_policy_loss
from rlhf_helpers.policy_optimization import (
    GRPOSettings,
    PPOSettings,
    ReinforceSettings,
    RejectionSamplingSettings,
    RLOOSettings,
    collect,
    evaluate_policy,
    grpo,
    iterative_rlhf,
    policy_logps,
    ppo,
    reinforce,
    reinforce_loss,
    rejection_sampling,
    rloo,
)
from tests.conftest import dies_at, resume_equals_whole, share_of_e, weights

PROMPTS = ["Hello", "What is the capital of France?", "Why?", "Tell me a story about a dog."]
NEW = ["Good morning", "Is it late?", "Where are you now, my friend?", "Sing!"]
SIZES = {"learning_rate": 3e-3, "steps": 2, "prompts_per_step": 2, "samples_per_prompt": 4}
SIZES |= {"max_new_tokens": 6, "progress": False}
LONG = {"learning_rate": 2e-2, "steps": 20, "prompts_per_step": 4, "samples_per_prompt": 8, "kl_coef": 0.0}
LOOPS = {
    "reinforce": (reinforce, ReinforceSettings(**SIZES)),
    "rloo": (rloo, RLOOSettings(**SIZES)),
    "grpo": (grpo, GRPOSettings(**SIZES)),
    "rejection_sampling": (rejection_sampling, RejectionSamplingSettings(**SIZES)),
}


# ---- what a reward is compared with

REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 9.0])  # two prompts, four samples each
EXPECTED = [
    (reinforce, ReinforceSettings(**SIZES, kl_coef=0.0, baseline=False), REWARDS),
    # 25 in all: R minus the mean of the seven others, 8/7 (R - 25/8)
    (reinforce, ReinforceSettings(**SIZES, kl_coef=0.0), 8 / 7 * (REWARDS - 3.125)),
    # the first prompt: mean 1/4, std 1/2; the second: mean 6, std 2
    (grpo, GRPOSettings(**SIZES), torch.tensor([1.5, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5, 1.5])),
    (grpo, GRPOSettings(**SIZES, scale=False), torch.tensor([0.75] + [-0.25] * 3 + [-1.0] * 3 + [3.0])),
]


@pytest.mark.parametrize("loop, settings, expected", EXPECTED, ids=["plain", "baseline", "grpo", "unscaled"])
def test_advantages_by_hand(tiny, loop, settings, expected):
    seen = []

    def loss_fn(logps, old_logps, advantages, **cliprange):
        seen.append(advantages.clone())
        return reinforce_loss(logps, old_logps, advantages)

    loop(*tiny, PROMPTS, lambda p, r: REWARDS, replace(settings, steps=1), loss_fn=loss_fn)
    torch.testing.assert_close(seen[0][:, 0], expected, atol=1e-3, rtol=0)
    assert (seen[0] == seen[0][:, :1]).all(), "one advantage per response"


@pytest.mark.parametrize("name", ["reinforce", "rloo", "grpo"])
def test_a_baseline_takes_out_what_all_samples_share(name, tiny_llama_dir):
    loop, settings = LOOPS[name]
    ends = []
    for offset in (0.0, 8.0):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        loop(
            model, tokenizer, PROMPTS, lambda p, r, o=offset: share_of_e(p, r) + o, replace(settings, steps=1)
        )
        ends.append(weights(model))
    torch.testing.assert_close(*ends, atol=1e-4, rtol=0)


def test_without_a_baseline_the_gradient_is_mostly_noise(tiny_llama_dir):
    norms = {}
    for baseline in (True, False):
        settings = ReinforceSettings(**SIZES, baseline=baseline, kl_coef=0.0)
        model = load_model(tiny_llama_dir, device="cpu")
        row = reinforce(*model, PROMPTS, lambda p, r: share_of_e(p, r) + 8, settings)[0]
        norms[baseline] = row["grad_norm"]
    assert norms[False] > 10 * norms[True]


# ---- how tokens are averaged, and where the KL goes


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_rloo_sums_over_tokens_and_ppo_averages_over_them(tiny, parts):
    """Each token's loss set to 1: a sum over a response gives its length, a mean over all tokens 1."""
    sizes = {**SIZES, "max_new_tokens": 40, "steps": 1, "kl_coef": 0.0, "accumulation_steps": parts}

    def ones(logps, *rest, **cliprange):
        return logps * 0 + 1

    row = rloo(*tiny, PROMPTS, share_of_e, RLOOSettings(**sizes), loss_fn=ones)[0]
    assert row["loss/policy"] == pytest.approx(row["response_length"], rel=1e-5)
    settings = PPOSettings(**sizes, epochs=1, minibatches=2, vf_coef=0.0)
    row = ppo(*tiny, PROMPTS, share_of_e, settings, loss_fn=ones)[0]
    assert row["response_length"] < 40
    assert row["loss/policy"] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("length_mean", [True, False])
def test_grpo_weighs_tokens_by_its_rule(tiny, length_mean):
    """Each token's loss set to 1: a mean over tokens gives 1, a sum over a constant its share."""
    settings = GRPOSettings(
        **{**SIZES, "max_new_tokens": 40, "steps": 1}, kl_coef=0.0, length_mean=length_mean
    )
    row = grpo(*tiny, PROMPTS, share_of_e, settings, loss_fn=lambda logps, *rest, cliprange: logps * 0 + 1)[0]
    assert row["response_length"] < 40
    expected = 1 if length_mean else row["response_length"] / 40
    assert row["loss/policy"] == pytest.approx(expected, rel=1e-5)


def test_grpo_starts_at_a_loss_of_zero_and_keeps_the_kl_out_of_the_reward(tiny):
    model, tokenizer = tiny
    other = frozen_copy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.3)
    settings = GRPOSettings(**SIZES, kl_coef=0.5)
    row = grpo(model, tokenizer, PROMPTS, share_of_e, settings, ref_model=other)[0]
    assert row["loss/policy"] == pytest.approx(0, abs=1e-5)
    assert row["loss/kl"] > 0.01, "k3 is never negative"
    assert row["loss"] == pytest.approx(row["loss/policy"] + row["loss/kl"], abs=1e-6)
    assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"], abs=1e-6)


def test_later_epochs_of_grpo_leave_ratio_one(tiny):
    seen = []

    def loss_fn(logps, old_logps, advantages, *, cliprange):
        seen.append((logps - old_logps).abs().max().item())
        return clipped_policy_loss(logps, old_logps, advantages, cliprange=cliprange)

    settings = GRPOSettings(**{**SIZES, "steps": 1}, epochs=3)
    row = grpo(*tiny, PROMPTS, share_of_e, settings, loss_fn=loss_fn)[0]
    assert seen[0] < 1e-5
    assert seen[2] > seen[1] > 1e-3
    assert row["policy/updates"] == 3
    assert row["val/ratio_at_start"] == pytest.approx(1, abs=1e-5)
    assert 0 < row["policy/clipfrac"] < 1


def test_equal_rewards_teach_grpo_nothing(tiny):
    model, tokenizer = tiny
    before = weights(model)
    settings = GRPOSettings(**SIZES, kl_coef=0.0)
    row = grpo(model, tokenizer, PROMPTS, lambda p, r: torch.full((len(p),), 0.3), settings)[-1]
    assert torch.equal(weights(model), before)
    assert row["frac_reward_zero_std"] == 1


def test_one_sample_a_prompt_is_enough_for_reinforce(tiny):
    settings = ReinforceSettings(**{**SIZES, "samples_per_prompt": 1, "prompts_per_step": 4})
    row = reinforce(*tiny, PROMPTS, share_of_e, settings)[0]
    assert "frac_reward_zero_std" not in row


def test_length_penalty_is_a_price_per_token(tiny):
    settings = ReinforceSettings(**SIZES, kl_coef=0.0, length_penalty=0.25)
    row = reinforce(*tiny, PROMPTS, share_of_e, settings)[0]
    expected = row["objective/scores"] - 0.25 * row["response_length"]
    assert row["objective/rlhf_reward"] == pytest.approx(expected, abs=1e-5)


# ---- learning


def rise(model, tokenizer, start):
    means = [
        evaluate_policy(m, tokenizer, NEW, share_of_e, samples=16, max_new_tokens=6, seed=9)["mean"]
        for m in (start, model)
    ]
    return means[1] - means[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reinforce", "grpo", "rejection_sampling"])
def test_reward_rises_on_new_prompts(tiny, name):
    model, tokenizer = tiny
    start, (loop, settings) = frozen_copy(model), LOOPS[name]
    loop(model, tokenizer, PROMPTS, share_of_e, replace(settings, **LONG))
    assert rise(model, tokenizer, start) > 0.15


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reinforce", "grpo"])
def test_a_flipped_sign_does_not_learn(tiny, name):
    model, tokenizer = tiny
    start, (loop, settings) = frozen_copy(model), LOOPS[name]
    right = reinforce_loss if name == "reinforce" else clipped_policy_loss

    def flipped(logps, old_logps, advantages, **cliprange):
        return right(logps, old_logps, -advantages, **cliprange)

    loop(model, tokenizer, PROMPTS, share_of_e, replace(settings, **LONG, seed=1), loss_fn=flipped)
    assert rise(model, tokenizer, start) < 0.02


def test_rejection_sampling_imitates_the_best_and_pushes_nothing_down(tiny):
    model, tokenizer = tiny
    texts = []

    def reward(prompts, responses):
        texts.append((prompts, responses))
        return torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])

    start = frozen_copy(model)
    settings = replace(LOOPS["rejection_sampling"][1], steps=1, epochs=6)
    row = rejection_sampling(model, tokenizer, PROMPTS, reward, settings)[0]
    assert row["objective/best"] == 1
    assert row["objective/scores"] == 0.25
    kept = [(texts[0][0][i], texts[0][1][i]) for i in (2, 7)]
    with torch.no_grad():
        before, after = (
            sequence_logps(m, tokenizer, *map(list, zip(*kept, strict=True)))[0].sum(-1)
            for m in (start, model)
        )
    assert (after > before + 0.5).all(), "nats"


# ---- repeatable


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reinforce", "grpo", "rejection_sampling"])
def test_resumed_run_equals_uninterrupted_one(tiny_llama_dir, tmp_path, name):
    loop, settings = LOOPS[name]
    settings = replace(settings, epochs=2, minibatches=2, entropy_coef=0.01)

    def run(folder, reward_fn, loop=loop, settings=settings, **options):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        settings = replace(settings, steps=5, run_dir=tmp_path / folder, checkpoint_every=2)
        return loop(model, tokenizer, PROMPTS, reward_fn, settings, **options), weights(model)

    resume_equals_whole(run, share_of_e, dies_at(4, share_of_e))
    with pytest.raises(ValueError, match="loop was"):
        run("broken", share_of_e, *LOOPS["rloo"], resume=True)


@pytest.mark.parametrize(
    "settings, field, value",
    [
        (GRPOSettings(**SIZES), "cliprange", 0.0),
        (GRPOSettings(**SIZES), "samples_per_prompt", 1),
        (GRPOSettings(**SIZES), "epochs", 0),
        (ReinforceSettings(**SIZES), "samples_per_prompt", 0),
        (ReinforceSettings(**SIZES), "length_penalty", -0.1),
        (ReinforceSettings(**SIZES), "minibatches", 3),
        (RejectionSamplingSettings(**SIZES), "minibatches", 4),
        (RejectionSamplingSettings(**SIZES), "samples_per_prompt", 1),
    ],
)
def test_settings_refuse(settings, field, value):
    with pytest.raises(ValueError, match=f"{type(settings).__name__}.*{field}"):
        replace(settings, **{field: value})


# ---- iterative


def test_each_round_refits_on_the_policy_of_its_start(tiny):
    model, tokenizer = tiny
    start, seen, rewards = frozen_copy(model), [], []

    def refit(rollouts):
        assert all(isinstance(rollout, Rollout) for rollout in rollouts)
        seen.append(rollouts)
        number = len(seen) - 1

        def reward(prompts, responses):
            rewards.append(number)
            return share_of_e(prompts, responses) + number

        return reward

    settings = RLOOSettings(**{**SIZES, "learning_rate": 2e-2, "steps": 4})
    history = iterative_rlhf(model, tokenizer, PROMPTS, refit, settings, rounds=3, prompts_per_round=3)
    assert [len(rollouts) for rollouts in seen] == [1, 2, 3]
    assert all(len(rollout) == 12 for rollout in seen[2])
    assert rewards == [0] * 4 + [1] * 4 + [2] * 4
    assert [(row["round"], row["step"]) for row in history] == [(i // 4, i) for i in range(12)]
    with torch.no_grad():
        logps = [policy_logps(start, rollout, temperature=1.0)[0] for rollout in seen[2]]
    drift = [(r.old_logps - x).abs().max() for r, x in zip(seen[2], logps, strict=True)]
    assert drift[0] < 1e-5
    assert min(drift[1:]) > 0.1, "later rounds are sampled by the policy as it is by then"
    kl = [row["objective/kl"] for row in history]
    assert kl[0] == pytest.approx(0, abs=1e-4)
    assert abs(kl[4]) > 1e-3, "the reference is the start of the first round, not of the second"
    assert rollout_texts(seen[2][0]) == rollout_texts(seen[0][0])
    assert rollout_texts(seen[2][0]) != rollout_texts(seen[2][1])


def rollout_texts(rollout):
    return list(zip(rollout.prompts, rollout.responses, strict=True))


@pytest.mark.slow
def test_iterative_run_resumes_in_its_round(tiny_llama_dir, tmp_path):
    def refit_of(reward):
        def refit(rollouts):
            level = sum(len(text) for rollout in rollouts for text in rollout.responses) / 1000
            return lambda prompts, responses: reward(prompts, responses) * level

        return refit

    def run(folder, refit, **options):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        settings = RLOOSettings(**{**SIZES, "steps": 4}, run_dir=tmp_path / folder, checkpoint_every=2)
        history = iterative_rlhf(model, tokenizer, PROMPTS, refit, settings, rounds=3, **options)
        return history, weights(model)

    # The eighth call is in the second round of four steps each, after its checkpoint.
    resume_equals_whole(run, refit_of(share_of_e), refit_of(dies_at(8, share_of_e)))


@pytest.mark.parametrize("change", [{"rounds": 0}, {"prompts_per_round": 0}])
def test_iterative_refuses(tiny, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        iterative_rlhf(*tiny, PROMPTS, lambda rollouts: share_of_e, RLOOSettings(**SIZES), **change)


def test_collect_is_what_refit_is_given(tiny):
    """The samples of a prompt lie together, so that a refit may pair them."""
    rollout = collect(*tiny, PROMPTS, samples_per_prompt=2, max_new_tokens=3, temperature=1.0, seed=0)
    assert rollout.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
