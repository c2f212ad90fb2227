import inspect
import json
import math

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped
from torch.testing import assert_close

from rlhf_helpers.core.policy_losses import (
    AdaptiveKLController,
    FixedKLController,
    approx_kl,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    kl_shaped_rewards,
    rloo_advantages,
)
from rlhf_helpers.core.tensors import masked_mean, token_logps

NAN = math.nan
finite = st.floats(-5, 5, width=32)


def close(found, wanted, atol=1e-6):
    assert_close(found, torch.as_tensor(wanted, dtype=found.dtype), atol=atol, rtol=1e-5)


# --- KL estimators, exact by enumerating a policy over three outcomes
PI, REF = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
KL_PI_REF = 0.3600624
GRAD_KL_PI_REF = [0.2781141, 0.0136208, -0.2917349]  # with respect to the logits of pi
GRAD_KL_REF_PI = [0.3, 0.1, -0.4]


def outcomes():
    """Return logits of pi with their gradient, and the log-probs of each outcome under pi and ref (3, 1)."""
    logits = torch.tensor(PI, dtype=torch.float64).log().requires_grad_()
    logps = torch.log_softmax(logits, -1).unsqueeze(-1)
    return logits, logps, torch.tensor(REF, dtype=torch.float64).log().unsqueeze(-1)


def mean_under_pi(per_outcome):
    return (torch.tensor(PI, dtype=torch.float64).unsqueeze(-1) * per_outcome).sum()


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", [0.5, -0.5, 0.0], [1.0, 1.0, 1.0]),
        ("k2", [0.125, 0.125, 0.0], [0.5, -0.5, 0.0]),
        ("k3", [0.1065307, 0.1487213, 0.0], [0.3934693, -0.6487213, 0.0]),
    ],
)
def test_kl_estimators_literal(estimator, value, slope):
    logps = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    found = kl_estimate(logps, torch.tensor([[-1.5, -1.5, -3.0]]), estimator=estimator)
    close(found, [value])
    found.sum().backward()
    close(logps.grad, [slope])


@pytest.mark.parametrize(("estimator", "mean"), [("k1", KL_PI_REF), ("k2", 0.3552524), ("k3", KL_PI_REF)])
def test_k1_and_k3_are_unbiased_and_k2_is_not(estimator, mean):
    _, logps, ref_logps = outcomes()
    close(mean_under_pi(kl_estimate(logps, ref_logps, estimator=estimator)), mean)
    # with its sign flipped k3 would measure chi^2 - KL, here 0.4066042


@pytest.mark.parametrize(
    ("estimator", "gradient"), [("k1", [0.0, 0.0, 0.0]), ("k2", GRAD_KL_PI_REF), ("k3", GRAD_KL_REF_PI)]
)
def test_gradient_of_each_estimator_used_as_a_loss(estimator, gradient):
    logits, logps, ref_logps = outcomes()
    mean_under_pi(kl_estimate(logps, ref_logps, estimator=estimator)).backward()
    close(logits.grad, gradient)


@pytest.mark.parametrize(("estimator", "exact"), [("k1", True), ("k2", False), ("k3", False)])
def test_in_the_reward_only_k1_gives_the_exact_gradient(estimator, exact):
    logits, logps, ref_logps = outcomes()
    penalty = kl_estimate(logps, ref_logps, estimator=estimator).detach()
    mean_under_pi(penalty * logps).backward()  # REINFORCE on the penalty
    wanted = torch.tensor(GRAD_KL_PI_REF, dtype=torch.float64)
    assert ((logits.grad - wanted).abs().max() < 1e-6) == exact


def test_a_sum_of_per_token_k2_is_not_the_gradient_of_the_sequence_kl():
    first = torch.tensor([0.6, 0.4], dtype=torch.float64).log().requires_grad_()
    second = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64).log()  # fixed, given the first token
    ref = torch.full((4, 2), 0.5, dtype=torch.float64).log()
    logp_first = torch.log_softmax(first, -1).repeat_interleave(2)
    logps = torch.stack([logp_first, second.flatten()], -1)  # (4 sequences, 2 tokens)
    probs = logps.sum(-1).exp()
    kl = (probs * kl_estimate(logps, ref, estimator="k1").sum(-1)).sum()
    (exact,) = torch.autograd.grad(kl, first, retain_graph=True)
    per_token = (probs.detach() * kl_estimate(logps, ref, estimator="k2").sum(-1)).sum()
    (wrong,) = torch.autograd.grad(per_token, first)
    # It sees KL(first token) alone, 0.24 ln 1.5, and not that the first token leads to a costlier second one.
    close(wrong, [0.0973116, -0.0973116])
    close(exact, [0.0973116 + 0.0685875, -0.0973116 - 0.0685875])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=6))
def test_k3_is_never_negative_even_for_tiny_differences(pairs):
    logps, ref_logps = torch.tensor([pairs]).unbind(-1)
    assert (kl_estimate(logps, ref_logps, estimator="k3") >= -1e-6).all()
    nudged = kl_estimate(torch.tensor([[2e-4]]), torch.tensor([[0.0]]), estimator="k3")
    assert_close(nudged, torch.tensor([[2e-8]]), atol=2e-11, rtol=0.2)  # exp(-d) - 1 + d would give 0 or 1e-7


def test_k3_of_a_far_too_likely_token_is_finite_and_of_an_impossible_one_is_not_hidden():
    logps = torch.tensor([[1e4]], requires_grad=True)
    kl = kl_estimate(logps, torch.zeros(1, 1), estimator="k3")
    close(kl, [[9999.0]])
    assert torch.isfinite(torch.autograd.grad(kl.sum(), logps)[0]).all()
    assert torch.isinf(kl_estimate(torch.full((1, 1), -1e4), torch.zeros(1, 1), estimator="k3")).all()


@pytest.mark.parametrize("estimator", ["k4", "K1", "", None])
def test_unknown_estimators_are_refused(estimator):
    with pytest.raises(ValueError, match=r"estimator must be .*k1.*k2.*k3.*, got"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), estimator=estimator)


# --- rewards and advantages
def test_kl_shaped_rewards_literal():
    old = torch.tensor([[-1.0, -2.0, -1.0, NAN], [-1.0, NAN, NAN, NAN], [-1.0, -1.0, -1.0, -1.0]])
    ref = torch.tensor([[-2.0, -1.5, -1.0, 7.0], [-3.0, 7.0, 7.0, 7.0], [-1.0, -1.0, -1.0, -2.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    found = kl_shaped_rewards(torch.tensor([5.0, -1.0, 2.0]), old, ref, mask, kl_coef=0.1)
    # The EOS (the last 1) pays its KL too and carries the score; nothing lands on padding.
    close(found, [[-0.1, 0.05, 5.0, 0.0], [-1.2, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.9]])


def test_the_score_goes_to_the_last_real_token_of_a_mask_with_holes():
    mask = torch.tensor([[0, 1, 0, 1, 0]])
    found = kl_shaped_rewards(torch.tensor([3.0]), torch.zeros(1, 5), torch.ones(1, 5), mask, kl_coef=0.5)
    close(found, [[0.0, 0.5, 0.0, 3.5, 0.0]])


def test_shaped_rewards_sum_to_the_score_minus_the_sequence_kl():
    generator = torch.Generator().manual_seed(0)
    old, ref = torch.randn(2, 3, 5, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    scores = torch.tensor([1.0, -2.0, 0.5])
    shaped = kl_shaped_rewards(scores, old, ref, mask, kl_coef=0.3)
    close(shaped.sum(-1), scores - 0.3 * ((old - ref) * mask).sum(-1))


def test_a_response_without_tokens_has_no_place_for_its_score():
    with pytest.raises(ValueError, match="row 1 of mask has no real token"):
        kl_shaped_rewards(
            torch.ones(2), *torch.zeros(2, 2, 3), torch.tensor([[1, 0, 0], [0, 0, 0]]), kl_coef=0.1
        )


@pytest.mark.parametrize(
    ("gamma", "lam", "wanted"),
    [
        (0.9, 0.8, [[0.03424, 0.492, 0.6], [0.956, 0.8, 0.0]]),
        (1.0, 0.95, [[0.3365, 0.67, 0.6], [1.16, 0.8, 0.0]]),
        (1.0, 1.0, [[0.4, 0.7, 0.6], [1.2, 0.8, 0.0]]),  # sum of the rewards to come, minus V
        (0.9, 0.0, [[-0.32, 0.06, 0.6], [0.38, 0.8, 0.0]]),  # r + gamma V' - V
    ],
)
def test_gae_literal(gamma, lam, wanted):
    rewards = torch.tensor([[0.0, -0.1, 1.0], [0.3, 1.0, NAN]])
    values = torch.tensor([[0.5, 0.2, 0.4], [0.1, 0.2, NAN]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    close(advantages, wanted)
    close(returns, torch.tensor(wanted) + torch.tensor([[0.5, 0.2, 0.4], [0.1, 0.2, 0.0]]))


def test_a_value_left_on_padding_does_not_become_the_bootstrap():
    rewards, values = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.5, 100.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[1, 1, 0]]), gamma=1.0, lam=1.0)
    close(advantages, [[0.5, 0.5, 0.0]])
    close(returns, [[1.0, 1.0, 0.0]])


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(finite, finite), min_size=1, max_size=5),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 3),
)
def test_padding_on_either_side_changes_no_advantage(row, gamma, lam, extra):
    rewards, values = torch.tensor([row]).unbind(-1)
    ones, zeros, junk = torch.ones_like(rewards), torch.zeros(1, extra), torch.full((1, extra), 9.0)
    plain = gae(rewards, values, ones, gamma=gamma, lam=lam)
    for side in (1, -1):

        def joined(real, pad, side=side):
            return torch.cat([real, pad][::side], dim=1)

        found = gae(joined(rewards, junk), joined(values, junk), joined(ones, zeros), gamma=gamma, lam=lam)
        for a, b in zip(found, plain, strict=True):
            assert_close(a, joined(b, zeros))


def test_group_advantages_literal():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0]])
    close(group_advantages(rewards), [[0.0, -0.7070568, -0.7070568, 1.4141136]])  # std sqrt(2), with n - 1
    close(group_advantages(rewards, scale=False), [[0.0, -1.0, -1.0, 2.0]])
    close(group_advantages(rewards, eps=1.0), [[0.0, -0.4142136, -0.4142136, 0.8284271]])


def test_rloo_advantages_literal():
    found = rloo_advantages(torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, -2.0]]))
    close(found, [[0.0, -1.3333333, -1.3333333, 2.6666667], [1.3333333, 1.3333333, 1.3333333, -4.0]])


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6).flatmap(lambda k: st.lists(finite, min_size=k, max_size=k)))
def test_rloo_is_the_reward_minus_the_mean_of_the_others(row):
    k, rewards = len(row), torch.tensor([row])
    others = torch.tensor([[(sum(row) - r) / (k - 1) for r in row]])
    close(rloo_advantages(rewards), rewards - others, atol=1e-5)
    close(rloo_advantages(rewards), k / (k - 1) * (rewards - rewards.mean()), atol=1e-5)


@pytest.mark.parametrize("reward", [0.1, -7.3, 1e4, 0.0])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_rewards_give_exactly_zero(reward, size):
    rewards = torch.full((2, size), reward)
    for advantages in (
        group_advantages(rewards),
        group_advantages(rewards, scale=False),
        rloo_advantages(rewards),
    ):
        assert (advantages == 0).all()


@pytest.mark.parametrize("function", [group_advantages, rloo_advantages])
def test_groups_of_one_and_integer_rewards_are_refused(function):
    with pytest.raises(ValueError, match="group of one"):
        function(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"rewards must have shape \(B, G\), got \(4,\)"):
        inspect.unwrap(function)(torch.zeros(4))
    with pytest.raises(ValueError, match="floating point"):
        inspect.unwrap(function)(torch.zeros(2, 2, dtype=torch.long))


# --- the clipped losses
RATIOS = [1.1, 1.5, 1.5, 0.5, 0.5, 1.0]
ADVANTAGES = [2.0, 2.0, -2.0, 2.0, -2.0, 1.0]


def test_clipped_policy_loss_literal():
    logps = torch.tensor([RATIOS]).log().requires_grad_()
    loss = clipped_policy_loss(logps, torch.zeros(1, 6), torch.tensor([ADVANTAGES]), cliprange=0.2)
    close(loss, [[-2.2, -2.4, 3.0, -1.0, 1.6, -1.0]])
    loss.sum().backward()
    # Zero only where the move has gone far enough in the direction the advantage asked for.
    close(logps.grad, [[-2.2, 0.0, 3.0, -1.0, 0.0, -1.0]])


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, requires_grad=True)
    labels = torch.randint(5, (2, 3), generator=generator)
    advantages = torch.randn(2, 3, generator=generator)
    logps = token_logps(logits, labels)
    clipped = clipped_policy_loss(logps, logps.detach(), advantages, cliprange=0.2).sum()
    (found,) = torch.autograd.grad(clipped, logits, retain_graph=True)
    (reinforce,) = torch.autograd.grad(-(advantages * logps).sum(), logits)
    assert_close(found, reinforce)
    assert found.abs().max() > 0.1
    close(clipped, -advantages.sum())


@settings(deadline=None, max_examples=60)
@given(finite, st.floats(-3, 3, width=32), st.floats(0.05, 0.5))
def test_clipped_policy_loss_is_the_pessimistic_one_of_two(log_ratio, advantage, cliprange):
    rho = math.exp(log_ratio)
    wanted = max(-advantage * rho, -advantage * min(max(rho, 1 - cliprange), 1 + cliprange))
    found = clipped_policy_loss(
        torch.tensor([[log_ratio]]), torch.zeros(1, 1), torch.tensor([[advantage]]), cliprange=cliprange
    )
    assert_close(found, torch.tensor([[wanted]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("log_ratio", "advantage"), [(1e4, 1.0), (-1e4, 1.0), (-1e4, -1.0), (1e4, 0.0), (-1e4, 0.0)]
)
def test_extreme_ratios_are_finite_in_value_and_gradient(log_ratio, advantage):
    logps = torch.tensor([[log_ratio]], requires_grad=True)
    loss = clipped_policy_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), cliprange=0.2)
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    close(logps.grad, [[0.0]])


def test_a_bad_token_that_became_ever_likelier_is_not_hidden():
    loss = clipped_policy_loss(torch.full((1, 1), 1e4), torch.zeros(1, 1), -torch.ones(1, 1), cliprange=0.2)
    assert torch.isposinf(loss).all()  # unclipped by design: PPO never stops a correction


def test_clipped_value_loss_literal():
    values = torch.tensor([[1.0, 1.0, 1.0, 0.1]], requires_grad=True)
    old_values = torch.tensor([[0.9, 0.5, 0.5, 0.5]])
    returns = torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    loss = clipped_value_loss(values, old_values, returns, cliprange_value=0.2)
    # Clipped to 0.7 in the second (already moved far towards its return: no gradient) and to 0.3 in the last.
    close(loss, [[0.5, 0.845, 0.5, 0.045]])
    loss.sum().backward()
    close(values.grad, [[1.0, 0.0, 1.0, 0.0]])


# --- diagnostics
def test_diagnostics_literal():
    old = torch.tensor([[-1.0, -1.0, NAN], [-1.0, NAN, NAN]])
    logps = torch.tensor([[-0.9, -1.2, 5.0], [-0.5, 5.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kl = approx_kl(logps, old, mask)
    close(kl, (0.0051709 + 0.0187308 + 0.1487213) / 3)
    share = clip_fraction(logps, old, mask, cliprange=0.2)
    close(share, 1 / 3)  # only the last: exp(-0.2) = 0.82 is still inside
    values = torch.tensor([[1.0, 2.0, NAN], [3.0, NAN, NAN]], requires_grad=True)
    returns = torch.tensor([[1.5, 2.0, 9.0], [4.0, 9.0, 9.0]])
    explained = explained_variance(values, returns, mask)
    close(explained, 0.8571429)
    assert not any(x.requires_grad for x in (kl, share, explained))


def test_at_the_first_minibatch_kl_and_clip_fraction_are_zero():
    logps, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2)
    assert approx_kl(logps, logps, mask) == 0
    assert clip_fraction(logps, logps, mask, cliprange=0.2) == 0


def test_diagnostics_do_not_track_the_length_of_the_padding():
    generator = torch.Generator().manual_seed(1)
    logps, old = torch.randn(2, 2, 4, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    wide = [torch.cat([x, torch.full((2, 60), junk)], 1) for x, junk in ((logps, 8.0), (old, -8.0))]
    wide_mask = torch.cat([mask, torch.zeros(2, 60, dtype=torch.long)], 1)
    assert_close(approx_kl(*wide, wide_mask), approx_kl(logps, old, mask))
    assert_close(
        clip_fraction(*wide, wide_mask, cliprange=0.2), clip_fraction(logps, old, mask, cliprange=0.2)
    )
    assert_close(explained_variance(*wide, wide_mask), explained_variance(logps, old, mask))


def test_explained_variance_at_its_landmarks():
    returns, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3)
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(returns + 5, returns, mask) == 1  # an offset is no variance
    close(explained_variance(torch.zeros(1, 3), returns, mask), 0.0)
    close(explained_variance(-returns, returns, mask), -3.0)
    assert torch.isnan(explained_variance(returns, torch.ones(1, 3), mask))


def test_padding_changes_neither_a_masked_loss_nor_its_gradient():
    generator = torch.Generator().manual_seed(2)
    logps, old, advantages = torch.randn(3, 2, 4, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    grads = []
    for filler in (0.0, 50.0):
        x = torch.where(mask.bool(), logps, filler).requires_grad_()
        loss = masked_mean(clipped_policy_loss(x, old, advantages, cliprange=0.2), mask)
        loss = loss + masked_mean(kl_estimate(x, old, estimator="k3"), mask)
        grads.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    assert_close(grads[0], grads[1])
    assert (grads[0][1][1, 1:] == 0).all()


# --- controllers
@pytest.mark.parametrize(
    ("kl", "wanted"), [(6.6, 0.202), (60.0, 0.204), (5.4, 0.198), (0.0, 0.196), (-1.0, 0.196), (6.0, 0.2)]
)
def test_adaptive_controller_rises_above_its_target_and_falls_below(kl, wanted):
    controller = AdaptiveKLController(0.2, 6.0, 1000)
    controller.update(kl, 100)
    assert controller.value == pytest.approx(wanted)


def test_adaptive_controller_reaches_its_target_on_a_policy_that_answers():
    controller = AdaptiveKLController(init_kl_coef=1.0, target=6.0, horizon=1000)
    for _ in range(2000):
        controller.update(3.0 / controller.value, 64)  # a larger coefficient gives a smaller KL
    assert controller.value == pytest.approx(0.5, rel=1e-3)


def test_controllers_resume_where_they_were_through_json():
    whole, first, second = (AdaptiveKLController(0.1, 2.0, 100) for _ in range(3))
    for kl in (1.0, 3.0, 2.05, 1.9):
        whole.update(kl, 8)
    for kl in (1.0, 3.0):
        first.update(kl, 8)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for kl in (2.05, 1.9):
        second.update(kl, 8)
    assert second.value == whole.value != 0.1


def test_fixed_controller_stays():
    controller = FixedKLController(0.05)
    controller.update(1e6, 512)
    assert controller.value == 0.05
    controller.load_state_dict(controller.state_dict())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: AdaptiveKLController(0.0, 6.0, 100), "init_kl_coef"),
        (lambda: AdaptiveKLController(0.1, 0.0, 100), "target"),
        (lambda: AdaptiveKLController(0.1, 6.0, -1), "horizon"),
        (lambda: FixedKLController(-0.1), "kl_coef"),
        (lambda: AdaptiveKLController(0.1, 6.0, 100).update(NAN, 1), "kl"),
        (lambda: AdaptiveKLController(0.1, 6.0, 100).update(1.0, 0), "n"),
        (lambda: AdaptiveKLController(0.1, 6.0, 100).update(1.0, 500), "n / horizon"),
    ],
)
def test_controllers_refuse_bad_settings_and_measurements(make, name):
    with pytest.raises(ValueError, match=f"^{name} must be a finite number"):
        make()


# --- one valid call of every function: shapes and ranges
def grid(*names):
    return {name: torch.arange(12.0).reshape(4, 3) / 10 for name in names}


MASK = {"mask": torch.ones(4, 3)}
CALLS = {
    kl_estimate: (grid("logps", "ref_logps"), {"estimator": "k1"}),
    kl_shaped_rewards: (
        {"scores": torch.zeros(4), **grid("old_logps", "ref_logps"), **MASK},
        {"kl_coef": 0.1},
    ),
    gae: ({**grid("rewards", "values"), **MASK}, {"gamma": 1.0, "lam": 0.95}),
    clipped_policy_loss: (grid("logps", "old_logps", "advantages"), {"cliprange": 0.2}),
    clipped_value_loss: (grid("values", "old_values", "returns"), {"cliprange_value": 0.2}),
    approx_kl: ({**grid("logps", "old_logps"), **MASK}, {}),
    clip_fraction: ({**grid("logps", "old_logps"), **MASK}, {"cliprange": 0.2}),
    explained_variance: ({**grid("values", "returns"), **MASK}, {}),
    rloo_advantages: (grid("rewards"), {}),
    group_advantages: (grid("rewards"), {}),
}
ARGUMENTS = [(f, name) for f, (tensors, _) in CALLS.items() for name in tensors if len(tensors) > 1]


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_the_annotated_shapes_are_the_real_ones(function):
    tensors, scalars = CALLS[function]
    found = jaxtyped(typechecker=beartype)(function)(**tensors, **scalars)
    for tensor in found if isinstance(found, tuple) else (found,):
        assert tensor.shape in ((4, 3), ())


@pytest.mark.parametrize(("function", "name"), ARGUMENTS, ids=lambda x: getattr(x, "__name__", x))
def test_no_argument_is_ever_broadcast(function, name):
    tensors, scalars = CALLS[function]
    tensor = tensors[name]
    for bad in (
        tensor.unsqueeze(-1),
        tensor.unsqueeze(0),
        tensor[:1],
        tensor[..., :1],
        tensor[0],
        tensor.sum(),
    ):
        with pytest.raises(ValueError, match="shape"):
            inspect.unwrap(function)(**{**tensors, name: bad}, **scalars)


def test_a_shape_error_names_both_shapes():
    with pytest.raises(ValueError, match=r"old_logps has shape \(4, 1\) but logps has shape \(4, 3\)"):
        inspect.unwrap(clip_fraction)(torch.zeros(4, 3), torch.zeros(4, 1), torch.ones(4, 3), cliprange=0.2)
    with pytest.raises(ValueError, match=r"scores has shape \(3,\) but old_logps has shape \(4, 3\)"):
        inspect.unwrap(kl_shaped_rewards)(
            torch.zeros(3), *torch.zeros(2, 4, 3), torch.ones(4, 3), kl_coef=0.1
        )


@pytest.mark.parametrize(
    ("function", "name", "bad"),
    [
        (kl_shaped_rewards, "kl_coef", -0.1),
        (gae, "gamma", 1.1),
        (gae, "gamma", -0.1),
        (gae, "lam", 1.5),
        (gae, "lam", NAN),
        (clipped_policy_loss, "cliprange", 0.0),
        (clipped_policy_loss, "cliprange", 1.0),
        (clip_fraction, "cliprange", -0.2),
        (clipped_value_loss, "cliprange_value", 0.0),
        (group_advantages, "eps", 0.0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(function, name, bad):
    tensors, scalars = CALLS[function]
    with pytest.raises(ValueError, match=f"{name} must be a finite number .*, got {bad}"):
        function(**tensors, **{**scalars, name: bad})


@pytest.mark.parametrize("function", [kl_shaped_rewards, gae, approx_kl, clip_fraction, explained_variance])
def test_what_is_no_mask_is_refused(function):
    tensors, scalars = CALLS[function]
    with pytest.raises(ValueError, match="mask must hold only 0 and 1, got 5"):
        function(**{**tensors, "mask": torch.full((4, 3), 5)}, **scalars)
