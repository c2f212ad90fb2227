"""TRPO: its linear algebra against what can be computed outright, and the loop on a small random model."""

import math
from dataclasses import replace

import pytest
import torch

from rlhf_helpers.core.generation import response_logits
from rlhf_helpers.core.models import frozen_copy, load_model
from rlhf_helpers.policy_optimization import (
    TRPOSettings,
    collect,
    conjugate_gradient,
    evaluate_policy,
    fisher_product,
    natural_step,
    surrogate_loss,
    trpo,
)
from rlhf_helpers.policy_optimization.trpo import eager_attention
from tests.conftest import dies_at, resume_equals_whole, share_of_e, weights, with_padding

PROMPTS = ["Hello", "What is the capital of France?", "Why?", "Tell me a story about a dog."]
SETTINGS = TRPOSettings(
    steps=2, prompts_per_step=2, samples_per_prompt=4, max_new_tokens=6, max_kl=0.1, progress=False
)
LEARNING = replace(SETTINGS, steps=12, prompts_per_step=4, samples_per_prompt=32, max_kl=0.3, kl_coef=0.0)


# ---- linear algebra

MATRIX = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 2.0]])


def test_conjugate_gradient_is_exact_after_as_many_steps_as_dimensions():
    x = torch.tensor([1.0, -2.0, 3.0])
    found = conjugate_gradient(lambda v: MATRIX @ v, MATRIX @ x, iterations=3)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=0)
    rough = conjugate_gradient(lambda v: MATRIX @ v, MATRIX @ x, iterations=1)
    assert (rough - x).norm() > 0.1


def test_conjugate_gradient_refuses_what_is_not_positive():
    with pytest.raises(ValueError, match="damping"):
        conjugate_gradient(lambda v: -v, torch.ones(2), iterations=2)


def test_the_step_descends_to_the_edge_of_the_region():
    gradient = torch.tensor([1.0, 0.5, -1.0])
    step = natural_step(gradient, lambda v: MATRIX @ v, max_kl=0.02, iterations=3)
    assert (step @ MATRIX @ step / 2).item() == pytest.approx(0.02, rel=1e-4)
    assert (step @ gradient).item() < 0
    torch.testing.assert_close(MATRIX @ step / (MATRIX @ step).norm(), -gradient / gradient.norm())
    assert natural_step(torch.zeros(3), lambda v: MATRIX @ v, max_kl=0.02, iterations=3).tolist() == [0, 0, 0]


def test_surrogate_by_hand():
    logps = torch.tensor([[math.log(2.0), 0.0]], requires_grad=True)
    loss = surrogate_loss(logps, torch.zeros(1, 2), torch.tensor([[3.0, -1.0]]))
    assert loss.tolist() == [[-6.0, 1.0]]
    loss.sum().backward()
    assert logps.grad.tolist() == [[-6.0, 1.0]]


# ---- curvature


@pytest.mark.parametrize("folder", ["tiny_llama_dir", "tiny_gpt2_dir"])
def test_fisher_product_is_the_curvature_of_the_kl(folder, request):
    """KL(theta || theta + eps v) = eps^2 v.Fv / 2, and F is symmetric, in double precision."""
    model, tokenizer = load_model(request.getfixturevalue(folder), device="cpu", dtype=torch.float64)
    how = {"samples_per_prompt": 1, "max_new_tokens": 4, "temperature": 0.8, "seed": 1}
    # One prompt: attention takes its softmax in float32, where the mask of a float64 model overflows.
    rollout = collect(model, tokenizer, PROMPTS[1:2] * 4, **how)
    parameters = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters)
    v, w = torch.randn(2, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / count**0.5

    def log_probs():
        width = rollout.response_mask.shape[1]
        logits = response_logits(model, rollout.input_ids, rollout.attention_mask, response_length=width)
        return (logits / 0.8).log_softmax(-1)[rollout.response_mask]

    with eager_attention(model):
        product = fisher_product(model, parameters, rollout, 0.8)
        image, other = product(v), product(w)
    assert (w @ image).item() == pytest.approx((v @ other).item(), rel=1e-4)
    with torch.no_grad():
        old, eps = log_probs(), 1e-2
        pieces = v.split([p.numel() for p in parameters])
        for p, piece in zip(parameters, pieces, strict=True):
            p.add_(eps * piece.view_as(p))
        kl = (old.exp() * (old - log_probs())).sum(-1).mean().item()
    assert kl == pytest.approx(eps**2 * (v @ image).item() / 2, rel=0.02)


def test_fisher_product_does_not_see_padding(tiny):
    model, tokenizer = tiny
    how = {"samples_per_prompt": 1, "max_new_tokens": 4, "temperature": 1.0, "seed": 1}
    rollout = collect(model, tokenizer, PROMPTS, **how)
    assert rollout.attention_mask.min() == 0
    wider = with_padding(rollout)
    parameters = [p for p in model.parameters() if p.requires_grad]
    v = torch.randn(weights(model).numel(), generator=torch.Generator().manual_seed(0))
    with eager_attention(model):
        image, other = (fisher_product(model, parameters, r, 1.0)(v) for r in (rollout, wider))
    assert image.norm() > 1e-3
    torch.testing.assert_close(other, image, atol=1e-3 * image.abs().max().item(), rtol=0)


def test_attention_is_as_it_was_after_the_block(tiny):
    model, _ = tiny
    before = model.config._attn_implementation
    with eager_attention(model):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == before != "eager"


# ---- the loop


def test_each_step_stays_in_the_region_and_gains(tiny_llama_dir):
    gains = {}
    for max_kl in (1e-3, 1e-1):
        model = load_model(tiny_llama_dir, device="cpu")
        history = trpo(*model, PROMPTS, share_of_e, replace(SETTINGS, max_kl=max_kl))
        for row in history:
            assert 0 < row["trpo/kl"] <= max_kl
            assert row["trpo/gain"] > 0
            assert row["trpo/step_fraction"] > 0
            assert row["policy/approxkl"] == pytest.approx(0, abs=1e-9)
            assert row["val/ratio"] == pytest.approx(1, abs=1e-5)
        # no damping would reach the edge; with it a step falls short, but not by orders
        assert history[0]["trpo/kl"] > 0.05 * max_kl
        gains[max_kl] = history[0]["trpo/gain"]
    assert gains[1e-1] > 3 * gains[1e-3]


def test_a_step_that_keeps_no_promise_is_not_taken(tiny):
    """A loss that rises wherever the policy goes: the line search gives up and the weights stay."""
    model, tokenizer = tiny
    before = weights(model)

    def only_worse(logps, old_logps, advantages):
        return -advantages * (logps - old_logps) + 1e6 * (logps - old_logps).square()

    row = trpo(model, tokenizer, PROMPTS, share_of_e, SETTINGS, loss_fn=only_worse)[-1]
    assert row["trpo/step_fraction"] == row["trpo/kl"] == 0
    assert torch.equal(weights(model), before)


def test_equal_rewards_move_nothing(tiny):
    model, tokenizer = tiny
    before = weights(model)
    trpo(model, tokenizer, PROMPTS, lambda p, r: torch.ones(len(p)), replace(SETTINGS, kl_coef=0.0))
    assert torch.equal(weights(model), before)


NEW = ["Good morning", "Is it late?", "Where are you now, my friend?", "Sing!"]


@pytest.mark.slow
@pytest.mark.parametrize("flip", [1, -1])
def test_reward_rises_on_new_prompts_and_not_with_the_sign_flipped(tiny, flip):
    model, tokenizer = tiny
    start = frozen_copy(model)

    def loss_fn(logps, old_logps, advantages):
        return surrogate_loss(logps, old_logps, flip * advantages)

    trpo(model, tokenizer, PROMPTS, share_of_e, LEARNING, loss_fn=loss_fn)
    before, after = (
        evaluate_policy(m, tokenizer, NEW, share_of_e, samples=16, max_new_tokens=6, seed=9)["mean"]
        for m in (start, model)
    )
    assert after > before + 0.15 if flip == 1 else after < before + 0.02


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_one(tiny_llama_dir, tmp_path):
    def run(folder, reward_fn, **options):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        settings = replace(SETTINGS, steps=5, run_dir=tmp_path / folder, checkpoint_every=2)
        return trpo(model, tokenizer, PROMPTS, reward_fn, settings, **options), weights(model)

    resume_equals_whole(run, share_of_e, dies_at(4, share_of_e))


def test_micro_batches_change_nothing_but_memory(tiny_llama_dir):
    rows = [
        trpo(
            *load_model(tiny_llama_dir, device="cpu"),
            PROMPTS,
            share_of_e,
            replace(SETTINGS, steps=1, accumulation_steps=parts),
        )[0]
        for parts in (1, 4)
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_kl", 0.0),
        ("damping", -1.0),
        ("cg_iterations", 0),
        ("backtracks", 0),
        ("fisher_rows", 0),
        ("entropy_coef", 0.1),
        ("samples_per_prompt", 1),
    ],
)
def test_settings_refuse(field, value):
    with pytest.raises(ValueError, match=field):
        replace(SETTINGS, **{field: value})
