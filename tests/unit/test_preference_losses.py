import inspect
import itertools
import math

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped
from torch.testing import assert_close

from rlhf_helpers.core import preference_losses
from rlhf_helpers.core.preference_losses import (
    bradley_terry_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    listwise_dpo_loss,
    orpo_loss,
    plackett_luce_loss,
    rating_loss,
    robust_dpo_loss,
    simpo_loss,
    slic_loss,
    soft_preference_loss,
)

LN2 = 0.6931472
logps = st.floats(-200, 0, width=32)


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


def check(loss, value, *gradients, atol=1e-6):
    """Compare an unreduced loss with literal values, and its gradients with (leaf, literal) pairs."""
    assert_close(loss, torch.tensor(value), atol=atol, rtol=1e-5)
    leaves = [x for x, _ in gradients]
    for found, (_, wanted) in zip(torch.autograd.grad(loss.sum(), leaves), gradients, strict=True):
        assert_close(found, torch.tensor(wanted), atol=atol, rtol=1e-5)


def dpo_inputs():
    """Two comparisons with h = 2 and h = -2.5."""
    return leaf(-4.0, -7.0), leaf(-6.0, -5.0), torch.tensor([-5.0, -6.0]), torch.tensor([-5.0, -6.5])


# Where the literals come from: a loss of the Bradley-Terry kind of a gap d is log(1 + e^-d), and its
# gradient by d is -sigmoid(-d). So d = 1 gives 0.3132617 and -0.2689414, d = -1 gives 1.3132617 and
# -0.7310586, and d = 0 gives log 2 and -0.5.


def test_bradley_terry_literal():
    # gaps 1, -1.5 and 0: 1.7014133 = log(1 + e^1.5), 0.8175745 = sigmoid(1.5)
    chosen, rejected = leaf(1.0, 0.5, 3.0), leaf(0.0, 2.0, 3.0)
    grad = [-0.2689414, -0.8175745, -0.5]
    check(
        bradley_terry_loss(chosen, rejected),
        [0.3132617, 1.7014133, LN2],
        (chosen, grad),
        (rejected, [-g for g in grad]),
    )


def test_bradley_terry_margin_is_subtracted_from_the_gap():
    chosen, rejected = leaf(1.0, 0.5), leaf(0.0, 2.0)
    loss = bradley_terry_loss(chosen, rejected, margin=torch.tensor([0.5, 1.0]))  # gaps 0.5 and -2.5
    check(loss, [0.4740770, 2.5788897], (chosen, [-0.3775407, -0.9241418]))


def test_bradley_terry_is_blind_to_an_offset_of_the_rewards():
    chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0])
    assert_close(bradley_terry_loss(chosen + 64, rejected + 64), bradley_terry_loss(chosen, rejected))


def test_plackett_luce_literal():
    rewards = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.5]], requires_grad=True)
    # Row 1: log(e^2 + e^0.5 + e^-1) - 2 = 0.2413, and log(e^0.5 + e^-1) - 0.5 = 0.2014. The gradient adds up
    # softmax minus one-hot over these choices: -0.2144030 = e^2 / (e^2 + e^0.5 + e^-1) - 1.
    grad = [[-0.2144030, -0.0071351, 0.2215381], [-0.8136763, 0.1289397, 0.6847366]]
    check(plackett_luce_loss(rewards), [0.4427246, 2.1543467], (rewards, grad))


def test_plackett_luce_mask_excludes_an_entry_wherever_it_stands():
    nan = math.nan
    rewards = torch.tensor([[0.0, 1.0, nan], [nan, 0.0, 1.0], [0.0, nan, 1.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]])
    g = 0.7310586  # sigmoid(1): each row ranks two answers, the worse one first
    grad = [[-g, g, 0.0], [0.0, -g, g], [-g, 0.0, g]]
    check(plackett_luce_loss(rewards, mask=mask), [1.3132617] * 3, (rewards, grad))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(-50, 50, width=32), st.floats(-50, 50, width=32)), min_size=1, max_size=5)
)
def test_plackett_luce_of_two_is_bradley_terry(pairs):
    rewards = torch.tensor(pairs, requires_grad=True)
    ranking, pairwise = plackett_luce_loss(rewards), bradley_terry_loss(rewards[:, 0], rewards[:, 1])
    assert_close(ranking, pairwise)
    (a,), (b,) = torch.autograd.grad(ranking.sum(), rewards), torch.autograd.grad(pairwise.sum(), rewards)
    assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_plackett_luce_probabilities_of_all_orders_sum_to_one():
    rewards = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    orders = torch.stack([rewards[list(order)] for order in itertools.permutations(range(4))])
    assert_close(torch.exp(-plackett_luce_loss(orders)).sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rewards", "mask"),
    [(torch.zeros(2, 1), None), (torch.zeros(2, 3), torch.tensor([[1, 1, 1], [0, 1, 0]]))],
)
def test_a_ranking_of_one_is_refused(rewards, mask):
    with pytest.raises(ValueError, match=r"row [01] of rewards ranks 1 answer"):
        plackett_luce_loss(rewards, mask=mask)


def test_rating_literal():
    rewards = leaf(1.0, -0.5)
    check(rating_loss(rewards, torch.tensor([3.0, -1.0])), [4.0, 0.25], (rewards, [-4.0, 1.0]))


def test_dpo_literal():
    chosen, rejected, *ref = dpo_inputs()
    loss = dpo_loss(chosen, rejected, *ref, beta=0.5)  # gaps beta h = 1 and -1.25, gradients times beta
    grad = [-0.1344707, -0.3886499]
    check(loss, [0.3132617, 1.5019291], (chosen, grad), (rejected, [-g for g in grad]))


def test_conservative_dpo_literal():
    chosen, rejected, *ref = dpo_inputs()
    # 0.9 log(1 + e^-1) + 0.1 log(1 + e) = 0.4132617, that is the loss of DPO and 0.1 times the gap
    loss = dpo_loss(chosen, rejected, *ref, beta=0.5, label_smoothing=0.1)
    check(loss, [0.4132617, 1.3769291], (chosen, [-0.0844707, -0.3386499]))


def test_robust_dpo_literal():
    chosen, rejected, *ref = dpo_inputs()
    loss = robust_dpo_loss(chosen, rejected, *ref, beta=0.5, label_smoothing=0.1)
    check(loss, [0.1882617, 1.6581791], (chosen, [-0.1969707, -0.4511499]))


def test_robust_dpo_over_flipped_labels_averages_to_dpo_on_clean_ones():
    chosen, rejected, ref_chosen, ref_rejected = dpo_inputs()
    right = robust_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.5, label_smoothing=0.2)
    wrong = robust_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=0.5, label_smoothing=0.2)
    check(0.8 * right + 0.2 * wrong, [0.3132617, 1.5019291], (chosen, [-0.1344707, -0.3886499]))


def test_ipo_literal_and_its_finite_optimum():
    chosen, rejected, *ref = dpo_inputs()
    check(
        ipo_loss(chosen, rejected, *ref, beta=0.5),
        [1.0, 12.25],
        (chosen, [2.0, -7.0]),
        (rejected, [-2.0, 7.0]),
    )
    # h = 2 is the target 1 / (2 beta) of beta = 0.25: summed log-probs, never divided by a length
    assert_close(ipo_loss(chosen, rejected, *ref, beta=0.25)[0], torch.tensor(0.0))


def test_hinge_literal_with_no_gradient_past_the_margin():
    chosen, rejected, ref_chosen, ref_rejected = dpo_inputs()
    loss = hinge_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.25)
    check(loss, [0.5, 1.625], (chosen, [-0.25, -0.25]), (rejected, [0.25, 0.25]))
    check(
        hinge_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.75),
        [0.0, 2.875],
        (chosen, [0.0, -0.75]),
    )


def test_slic_literal_with_no_ranking_gradient_past_the_margin():
    chosen, rejected, target = leaf(-4.0, -7.0), leaf(-6.0, -5.0), leaf(-3.0, -2.0)
    loss = slic_loss(chosen, rejected, target, delta=1.0, reg_weight=0.5)
    check(loss, [1.5, 4.0], (chosen, [0.0, -1.0]), (rejected, [0.0, 1.0]), (target, [-0.5, -0.5]))


def test_kto_literal_in_the_order_of_the_batch():
    policy, ref = leaf(-4.0, -4.0, -7.0, -7.0), torch.tensor([-5.0, -5.0, -5.0, -5.0])
    settings_ = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 2.0}
    value = [0.6567352, 1.1243530, 1.1659498, 0.4454003]
    grad = [-0.1846006, 0.2461341, -0.1298286, 0.1731048]
    for desirable in (torch.tensor([True, False, True, False]), torch.tensor([1, 0, 1, 0])):
        check(kto_loss(policy, ref, desirable, torch.tensor(0.5), **settings_), value, (policy, grad))
        check(kto_loss(policy, ref, desirable, 0.5, **settings_), value, (policy, grad))


@pytest.mark.parametrize(
    ("kl", "reason"),
    [
        (torch.tensor(-0.1), "clamp"),
        (-0.1, "clamp"),
        (torch.tensor([0.1]), "scalar"),
        (torch.tensor(0.1, requires_grad=True), "detached"),
        (math.nan, "finite"),
    ],
)
def test_kto_refuses_a_reference_point_the_caller_has_not_prepared(kl, reason):
    with pytest.raises(ValueError, match=reason):
        kto_loss(torch.zeros(1), torch.zeros(1), torch.tensor([True]), kl, beta=0.1)


def test_orpo_literal():
    chosen, rejected = leaf(-0.5, -2.0), leaf(-1.0, -0.25)
    loss = orpo_loss(chosen, rejected, beta=0.2)
    check(
        loss, [0.5640600, 2.6313547], (chosen, [-1.1393088, -1.2214586]), (rejected, [0.0867140, 0.8656786])
    )


def test_orpo_odds_keep_their_digits_on_both_sides():
    for logp in (-1e-6, -1e-3, -0.69, -0.70, -5.0, -30.0):
        odds = math.exp(logp) / -math.expm1(logp)
        against_even = orpo_loss(torch.tensor([logp]), torch.tensor([-math.log(2)]), beta=1.0) + logp
        assert_close(against_even, torch.tensor([math.log1p(1 / odds)]), atol=1e-9, rtol=1e-5)


def test_orpo_at_probability_one_is_finite_and_still_pushes_the_rejected_down():
    chosen, rejected = leaf(-1.0, 0.0, 0.0), leaf(0.0, -1.0, 0.0)
    loss = orpo_loss(chosen, rejected, beta=0.1)
    grads = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert torch.isfinite(torch.stack([loss, *grads])).all()
    assert grads[1][0] > 1
    assert_close(loss[2], torch.tensor(0.1 * LN2))


def test_orpo_refuses_positive_log_probabilities():
    with pytest.raises(ValueError, match=r"rejected_mean_logps must be log-probabilities <= 0, got 0\.5"):
        orpo_loss(torch.tensor([-1.0]), torch.tensor([0.5]), beta=0.1)


def test_simpo_literal_with_gamma_after_beta():
    chosen, rejected = leaf(-0.5, -2.0), leaf(-1.0, -0.25)
    grad = [-0.7550813, -1.9640276]
    loss = simpo_loss(chosen, rejected, beta=2.0, gamma=0.5)
    check(loss, [0.4740770, 4.0181499], (chosen, grad), (rejected, [-g for g in grad]))


def test_listwise_dpo_literal():
    policy = torch.tensor([[-4.0, -5.5, -8.0]], requires_grad=True)
    loss = listwise_dpo_loss(policy, torch.tensor([[-5.0, -5.0, -6.0]]), beta=0.5)
    check(loss, [0.9148467], (policy, [[-0.2051012, -0.0211103, 0.2262115]]))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(logps, logps, logps, logps), min_size=1, max_size=4), st.floats(0.01, 1))
def test_listwise_dpo_of_two_is_dpo(rows, beta):
    pc, pr, rc, rr = torch.tensor(rows).unbind(-1)
    listwise = listwise_dpo_loss(torch.stack([pc, pr], -1), torch.stack([rc, rr], -1), beta=beta)
    assert_close(listwise, dpo_loss(pc, pr, rc, rr, beta=beta), atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(logps, logps), min_size=1, max_size=4), st.floats(0.01, 5), st.floats(0, 0.49))
def test_every_loss_at_policy_equal_to_reference(rows, beta, smoothing):
    chosen, rejected = torch.tensor(rows).unbind(-1)
    same = (chosen, rejected, chosen, rejected)
    assert_close(dpo_loss(*same, beta=beta, label_smoothing=smoothing), torch.full_like(chosen, LN2))
    assert_close(
        robust_dpo_loss(*same, beta=beta, label_smoothing=smoothing),
        torch.full_like(chosen, LN2),
        atol=1e-4,
        rtol=0,
    )
    assert_close(hinge_loss(*same, beta=beta), torch.ones_like(chosen))
    good = torch.zeros_like(chosen, dtype=torch.bool)
    assert_close(kto_loss(chosen, chosen, good, 0.0, beta=beta), torch.full_like(chosen, 0.5))
    four = torch.stack([chosen, rejected, chosen, rejected], -1)
    assert_close(listwise_dpo_loss(four, four, beta=beta), torch.full_like(chosen, math.log(24)))


def test_a_log_ratio_shared_by_both_answers_cancels():
    chosen, rejected, ref_chosen, ref_rejected = dpo_inputs()
    for loss in (dpo_loss, robust_dpo_loss, ipo_loss, hinge_loss):
        plain = loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
        assert_close(loss(chosen - 8, rejected - 8, ref_chosen, ref_rejected, beta=0.5), plain)


# One valid call of every loss: tensors by name, settings by name.
def pair(*names):
    return {name: torch.tensor([-1.0, -2.0, -3.0, -4.0]) for name in names}


DPO_NAMES = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
CALLS = {
    bradley_terry_loss: (pair("chosen_rewards", "rejected_rewards", "margin"), {}),
    soft_preference_loss: (pair("chosen_rewards", "rejected_rewards", "margin"), {}),
    plackett_luce_loss: ({"rewards": torch.zeros(4, 3), "mask": torch.ones(4, 3)}, {}),
    rating_loss: (pair("rewards", "ratings"), {}),
    dpo_loss: (pair(*DPO_NAMES), {"beta": 0.1}),
    robust_dpo_loss: (pair(*DPO_NAMES), {"beta": 0.1}),
    ipo_loss: (pair(*DPO_NAMES), {"beta": 0.1}),
    hinge_loss: (pair(*DPO_NAMES), {"beta": 0.1}),
    slic_loss: (pair(*DPO_NAMES[:2], "target_logps"), {"delta": 1.0, "reg_weight": 0.1}),
    kto_loss: ({**pair("policy_logps", "ref_logps"), "desirable": torch.ones(4)}, {"kl": 0.0, "beta": 0.1}),
    orpo_loss: (pair("chosen_mean_logps", "rejected_mean_logps"), {"beta": 0.1}),
    simpo_loss: (pair("chosen_mean_logps", "rejected_mean_logps"), {"beta": 2.0, "gamma": 0.5}),
    listwise_dpo_loss: ({"policy_logps": torch.zeros(4, 3), "ref_logps": torch.zeros(4, 3)}, {"beta": 0.1}),
}
ARGUMENTS = [(loss, name) for loss, (tensors, _) in CALLS.items() for name in tensors]


def test_the_table_below_covers_every_public_loss():
    assert {f.__name__ for f in CALLS} == {n for n in dir(preference_losses) if n.endswith("_loss")}


@pytest.mark.parametrize("loss", CALLS, ids=lambda f: f.__name__)
def test_every_loss_is_unreduced_and_has_the_annotated_shapes(loss):
    tensors, scalars = CALLS[loss]
    assert jaxtyped(typechecker=beartype)(loss)(**tensors, **scalars).shape == (4,)


@pytest.mark.parametrize(("loss", "name"), ARGUMENTS, ids=lambda x: getattr(x, "__name__", x))
def test_no_argument_is_ever_broadcast(loss, name):
    tensors, scalars = CALLS[loss]
    tensor = tensors[name]
    for bad in (
        tensor.unsqueeze(-1),
        tensor.unsqueeze(0),
        tensor[:1],
        tensor[..., :1],
        tensor[0],
        tensor.sum(),
    ):
        if bad.shape == tensor.shape:
            continue
        with pytest.raises(ValueError, match="shape"):
            inspect.unwrap(loss)(**{**tensors, name: bad}, **scalars)


def test_a_shape_error_names_both_shapes():
    with pytest.raises(
        ValueError, match=r"rejected_rewards has shape \(3,\) but chosen_rewards has shape \(4,\)"
    ):
        inspect.unwrap(bradley_terry_loss)(torch.zeros(4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"rejected_rewards must have shape \(B\), got \(4, 1\)"):
        inspect.unwrap(bradley_terry_loss)(torch.zeros(4), torch.zeros(4, 1))


BAD_SCALARS = [
    *(
        (loss, "beta", bad)
        for loss, (_, scalars) in CALLS.items()
        if "beta" in scalars
        for bad in (0.0, -0.1, math.nan)
    ),
    *((loss, "label_smoothing", bad) for loss in (dpo_loss, robust_dpo_loss) for bad in (-0.1, 0.5, 1.0)),
    (slic_loss, "delta", 0.0),
    (slic_loss, "reg_weight", -1.0),
    (simpo_loss, "gamma", -0.5),
    (kto_loss, "desirable_weight", 0.0),
    (kto_loss, "undesirable_weight", -1.0),
]


@pytest.mark.parametrize(("loss", "name", "bad"), BAD_SCALARS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_settings_out_of_range_are_refused_by_name(loss, name, bad):
    tensors, scalars = CALLS[loss]
    with pytest.raises(ValueError, match=f"{name} must be a finite number .*, got {bad}"):
        loss(**tensors, **{**scalars, name: bad})


def test_kto_refuses_labels_that_are_not_0_or_1():
    with pytest.raises(ValueError, match="desirable must hold only 0 and 1, got -1"):
        kto_loss(torch.zeros(2), torch.zeros(2), torch.tensor([1, -1]), 0.0, beta=0.1)


@pytest.mark.parametrize("x", [1e4, -1e4])
@pytest.mark.parametrize("loss", CALLS, ids=lambda f: f.__name__)
def test_extreme_inputs_give_finite_losses_and_gradients(loss, x):
    tensors, scalars = CALLS[loss]
    inputs = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        trained = name not in ("mask", "desirable")
        # one argument of each pair extreme; mean log-probs cannot be positive
        extreme = torch.zeros_like(tensor)
        extreme[..., 0] = (min(x, -1e-6) if "mean" in name else x) if i == 0 else 0.0
        inputs[name] = extreme.requires_grad_() if trained else tensor
    value = loss(**inputs, **scalars)
    assert torch.isfinite(value).all()
    for grad in torch.autograd.grad(value.sum(), [t for t in inputs.values() if t.requires_grad]):
        assert torch.isfinite(grad).all()


def test_the_log_of_a_tiny_sigmoid_does_not_underflow():
    chosen, rejected = leaf(-1e4), leaf(1e4)
    check(bradley_terry_loss(chosen, rejected), [2e4], (chosen, [-1.0]), (rejected, [1.0]))
    with torch.no_grad():
        assert torch.isinf(
            -torch.log(torch.sigmoid(chosen - rejected))
        ).all()  # the fault this guards against
