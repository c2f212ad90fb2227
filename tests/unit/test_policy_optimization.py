"""RLOO on small random models: what must hold whatever the model is, and that it learns what it can."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from rlhf_helpers.core.generation import Rollout, generate
from rlhf_helpers.core.models import frozen_copy, load_model
from rlhf_helpers.policy_optimization import (
    RLOOSettings,
    collect,
    evaluate_policy,
    policy_logps,
    reinforce_loss,
    rloo,
    rollout_metrics,
)
from rlhf_helpers.policy_optimization.on_policy import make_batch, start_run
from tests.conftest import dies_at, resume_equals_whole, share_of_e, weights, with_padding

PROMPTS = ["Hello", "What is the capital of France?", "Why?", "Tell me a story about a dog."]
SETTINGS = RLOOSettings(
    learning_rate=3e-3, steps=4, prompts_per_step=2, samples_per_prompt=4, max_new_tokens=6, progress=False
)


# ---- by hand


def hand_rollout():
    """Two prompts with two responses each, of 2, 1, 2 and 1 real tokens; padding holds rubbish."""
    return Rollout(
        prompts=["p", "p", "q", "q"],
        responses=["ab", "a", "cd", "c"],
        input_ids=torch.zeros(4, 3, dtype=torch.long),
        attention_mask=torch.ones(4, 3, dtype=torch.long),
        response_mask=torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]]).bool(),
        old_logps=torch.tensor([[-1.0, -2.0], [-3.0, 99.0], [-1.0, -1.0], [-2.0, 99.0]]),
        ended=torch.tensor([True, False, True, True]),
    )


def test_metrics_of_a_rollout_by_hand():
    ref_logps = torch.tensor([[-1.5, -2.0], [-2.0, -77.0], [-1.0, -4.0], [-2.0, 7.0]])
    row = rollout_metrics(
        hand_rollout(),
        torch.tensor([1.0, 0.0, 0.5, 0.5]),
        torch.tensor([0.0, -1.0, 0.5, 0.5]),
        ref_logps,
        samples_per_prompt=2,
    )
    # k1 a response: 0.5, -1, 3, 0; over 6 real tokens they sum to 2.5
    assert row == pytest.approx(
        {
            "objective/scores": 0.5,
            "objective/rlhf_reward": 0.0,
            "objective/kl": 0.625,
            "objective/kl_per_token": 2.5 / 6,
            "eos_fraction": 0.75,
            "response_length": 1.5,
            "frac_reward_zero_std": 0.5,
        }
    )


def test_reinforce_loss_by_hand():
    logps = torch.tensor([[-0.5, -2.0]], requires_grad=True)
    loss = reinforce_loss(logps, torch.zeros(1, 2), torch.tensor([[3.0, -1.0]]))
    assert loss.tolist() == [[1.5, -2.0]]
    loss.sum().backward()
    assert logps.grad.tolist() == [[-3.0, 1.0]]
    with pytest.raises(ValueError, match="advantages must have shape"):
        reinforce_loss(logps, torch.zeros(1, 2), torch.zeros(1))


def test_advantages_compare_the_samples_of_one_prompt(tiny):
    seen = []

    def loss_fn(logps, old_logps, advantages):
        seen.append(advantages[:, 0].clone())
        return reinforce_loss(logps, old_logps, advantages)

    def reward(prompts, responses):
        assert [prompts.index(p) // 4 for p in prompts] == [0] * 4 + [1] * 4
        return torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 9.0])

    rloo(*tiny, PROMPTS, reward, replace(SETTINGS, steps=1, kl_coef=0.0), loss_fn=loss_fn)
    expected = torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3, -4 / 3, -4 / 3, -4 / 3, 4.0])
    torch.testing.assert_close(seen[0], expected)


def test_penalties_are_taken_off_the_reward(tiny):
    model, tokenizer = tiny
    other = frozen_copy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.3)
    settings = replace(SETTINGS, steps=2, kl_coef=0.5, missing_eos_penalty=2.0)
    history = rloo(model, tokenizer, PROMPTS, share_of_e, settings, ref_model=other)
    for row in history:
        assert row["objective/kl"] > 0.01
        assert row["eos_fraction"] < 1
        expected = row["objective/scores"] - 0.5 * row["objective/kl"] - 2.0 * (1 - row["eos_fraction"])
        assert row["objective/rlhf_reward"] == pytest.approx(expected, abs=1e-5)


# ---- at the start


@pytest.mark.parametrize("folder", ["tiny_llama_dir", "tiny_gpt2_dir"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_update_is_on_policy(folder, temperature, request):
    model, tokenizer = load_model(request.getfixturevalue(folder), device="cpu")
    how = {"max_new_tokens": 6, "temperature": temperature}
    rollout = collect(model, tokenizer, PROMPTS, samples_per_prompt=2, seed=3, **how)
    assert rollout.attention_mask.min() == 0, "the prompts must differ in length for this to mean anything"
    real = rollout.response_mask.bool()
    again, _ = policy_logps(model, rollout, temperature=temperature)
    torch.testing.assert_close(again[real], rollout.old_logps[real], atol=1e-5, rtol=0)

    settings = replace(SETTINGS, steps=1, prompts_per_step=4, temperature=temperature)
    row = rloo(model, tokenizer, PROMPTS, share_of_e, settings)[0]
    assert row["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert row["policy/approxkl"] == pytest.approx(0, abs=1e-9)
    assert row["objective/kl_per_token"] == pytest.approx(0, abs=1e-5)
    assert row["policy/entropy"] > 0.5


def test_a_prompt_beyond_max_length_is_refused_before_the_first_step(tiny):
    model, tokenizer = tiny
    asked = []
    with pytest.raises(ValueError, match="max_new_tokens=6 that exceeds the context or max_length of 20"):
        rloo(model, tokenizer, ["Hello", "tea " * 40], asked.append, replace(SETTINGS, max_length=20))
    assert not asked


def test_no_learning_rate_no_drift(tiny):
    model, tokenizer = tiny
    before = weights(model)
    history = rloo(model, tokenizer, PROMPTS, share_of_e, replace(SETTINGS, learning_rate=0.0))
    assert torch.equal(weights(model), before)
    assert all(abs(row["objective/kl"]) < 1e-4 for row in history)


def test_padding_changes_no_metric(tiny):
    model, tokenizer = tiny
    how = {"samples_per_prompt": 2, "max_new_tokens": 6, "temperature": 1.0, "seed": 1}
    rollout = collect(model, tokenizer, PROMPTS, **how)
    width = rollout.response_mask.shape[1]
    prompt_part = rollout.input_ids.shape[1] - width
    wider = with_padding(rollout)
    assert prompt_part > 0
    other = frozen_copy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    scores = share_of_e(rollout.prompts, rollout.responses)
    metrics = []
    for r in (rollout, wider):
        ref_logps, entropy = policy_logps(other, r, temperature=1.0)
        row = rollout_metrics(r, scores, scores, ref_logps.detach(), samples_per_prompt=2)
        metrics.append(row | {"entropy": entropy.item()})
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)
    assert metrics[0]["objective/kl"] != 0


# ---- learning


@pytest.fixture(scope="module")
def learned(tiny_llama_dir):
    """One run without KL penalty, long enough to learn: (history, model, model at the start, tokenizer)."""
    model, tokenizer = load_model(tiny_llama_dir, device="cpu")
    start = frozen_copy(model)
    settings = replace(
        SETTINGS, learning_rate=2e-2, steps=25, prompts_per_step=4, samples_per_prompt=8, kl_coef=0.0
    )
    return rloo(model, tokenizer, PROMPTS, share_of_e, settings), model, start, tokenizer


@pytest.mark.slow
def test_reward_rises_on_new_prompts(learned):
    _, model, start, tokenizer = learned
    new = ["Good morning", "Is it late?", "Where are you now, my friend?", "Sing!"]
    before, after = (
        evaluate_policy(m, tokenizer, new, share_of_e, samples=16, max_new_tokens=6, seed=9)
        for m in (start, model)
    )
    assert after["mean"] > before["mean"] + 0.2


@pytest.mark.slow
def test_kl_to_the_reference_grows_from_zero(learned):
    history = learned[0]
    kl = [row["objective/kl"] for row in history]
    assert kl[0] == pytest.approx(0, abs=1e-4)
    assert kl[-1] > 1.0, "nats per response: a policy that moved this far is not at KL 0"
    assert min(kl) > -0.2


@pytest.mark.slow
def test_kl_penalty_pulls_back(learned):
    _, model, start, tokenizer = learned
    moved = copy.deepcopy(model)
    settings = replace(
        SETTINGS, learning_rate=2e-2, steps=15, prompts_per_step=4, samples_per_prompt=8, kl_coef=1.0
    )

    def nothing(prompts, responses):
        return torch.zeros(len(prompts))

    history = rloo(moved, tokenizer, PROMPTS, nothing, settings, ref_model=start)
    kl = [row["objective/kl"] for row in history]
    assert sum(kl[-3:]) / 3 < 0.7 * kl[0]


# ---- repeatable


@pytest.mark.slow
def test_same_seed_same_history(tiny, tiny_llama_dir):
    runs = [
        rloo(*load_model(tiny_llama_dir, device="cpu"), PROMPTS, share_of_e, replace(SETTINGS, seed=seed))
        for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_one(tiny_llama_dir, tmp_path):
    def run(folder, reward_fn, prompts=PROMPTS, **options):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        settings = replace(SETTINGS, steps=5, run_dir=tmp_path / folder, checkpoint_every=2)
        return rloo(model, tokenizer, prompts, reward_fn, settings, **options), weights(model)

    resume_equals_whole(run, share_of_e, dies_at(4, share_of_e))
    with pytest.raises(ValueError, match="prompts was"):
        run("broken", share_of_e, prompts=[*PROMPTS, "New"], resume=True)


def test_micro_batches_change_nothing_but_memory(tiny_llama_dir):
    runs = []
    for parts in (1, 4):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        settings = replace(SETTINGS, steps=1, accumulation_steps=parts, max_grad_norm=None)
        runs.append((rloo(model, tokenizer, PROMPTS, share_of_e, settings)[0], weights(model)))
    (whole, whole_weights), (parts, parts_weights) = runs
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert (
        parts_weights - whole_weights
    ).abs().max() < 1e-4  # Adam's first step is as long as the rate, 3e-3


# ---- what the caller hands in


def test_a_greedy_rollout_is_refused(tiny):
    """No loop samples greedily; the guard is for rollouts that a caller brings."""
    model, tokenizer = tiny
    run = start_run(model, tokenizer, PROMPTS, share_of_e, SETTINGS)
    for greedy in (False, True):
        rollout = generate(model, tokenizer, PROMPTS, max_new_tokens=3, greedy=greedy, seed=0)
        with pytest.raises(ValueError, match="not a sample of the policy") if greedy else nullcontext():
            make_batch(run, rollout, torch.zeros(4), [0, 1, 2, 3])


def test_columns_follow_their_prompts(tiny):
    asked = {p: p.upper() for p in PROMPTS}

    def reward(prompts, responses, *, shouted):
        assert shouted == [asked[p] for p in prompts]
        return share_of_e(prompts, responses)

    columns = {"shouted": [asked[p] for p in PROMPTS]}
    rloo(*tiny, PROMPTS, reward, replace(SETTINGS, steps=2), columns=columns)
    with pytest.raises(ValueError, match="column 'shouted' must hold one entry for each of 4 prompts, got 1"):
        rloo(*tiny, PROMPTS, reward, SETTINGS, columns={"shouted": ["HELLO"]})


def test_evaluation_at_its_steps_and_the_last(tiny):
    steps = iter(range(100))
    history = rloo(
        *tiny,
        PROMPTS,
        share_of_e,
        replace(SETTINGS, steps=5, eval_every=2),
        eval_fn=lambda model: {"eval/mean": float(next(steps))},
    )
    assert [row.get("eval/mean") for row in history] == [None, 0.0, None, 1.0, 2.0]


def test_standard_error_counts_prompts_not_samples(tiny):
    def reward(prompts, responses):
        return torch.tensor([float(PROMPTS.index(p)) for p in prompts])

    result = evaluate_policy(
        *tiny, PROMPTS, reward, samples=3, max_new_tokens=2, keep_responses=True, columns={}
    )
    assert result["mean"] == pytest.approx(1.5)
    assert result["standard_error"] == pytest.approx((5 / 3) ** 0.5 / 2)  # std of 0, 1, 2, 3 over sqrt(4)
    assert result["n"] == len(result["responses"]) == 12
    assert result["scores"][:4] == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda prompts, responses: torch.zeros(len(prompts), 1), r"shape \(8,\), got \(8, 1\)"),
        (lambda prompts, responses: torch.tensor(1.0), r"shape \(8,\), got \(\)"),
        (lambda prompts, responses: torch.full((len(prompts),), float("nan")), "nan for row 0"),
    ],
)
def test_a_wrong_reward_stops_before_the_first_update(tiny, reward, message):
    model, tokenizer = tiny
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        rloo(model, tokenizer, PROMPTS, reward, SETTINGS)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize(
    "field, value",
    [
        ("steps", 0),
        ("steps", 2.5),
        ("samples_per_prompt", 1),
        ("prompts_per_step", 0),
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("kl_coef", -0.1),
        ("missing_eos_penalty", float("nan")),
        ("eval_every", -1),
        ("accumulation_steps", 3),
        ("learning_rate", -1.0),
    ],
)
def test_settings_refuse(field, value):
    with pytest.raises(ValueError, match=field):
        replace(SETTINGS, **{field: value})


@pytest.mark.parametrize("prompts, message", [("Hi", "list"), ([], "list"), (["Hi", ""], r"prompts\[1\]")])
def test_prompts_refused(tiny, prompts, message):
    with pytest.raises(ValueError, match=message):
        rloo(*tiny, prompts, share_of_e, SETTINGS)


def test_a_reference_that_moves_is_refused(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="frozen_copy"):
        rloo(model, tokenizer, PROMPTS, share_of_e, SETTINGS, ref_model=model)


def test_prompts_that_cannot_be_answered_are_refused_before_the_first_step(tiny):
    calls = []

    def reward(prompts, responses):
        calls.append(prompts)
        return share_of_e(prompts, responses)

    for bad, message in (("tea " * 400, "prompt 4 has 40"), ("a \ud83d", r"prompts\[4\] must be a text")):
        with pytest.raises(ValueError, match=message):
            rloo(*tiny, [*PROMPTS, bad], reward, replace(SETTINGS, steps=1))
    assert not calls
