"""Best-of-n: the estimator against all subsets, ties by lot, the bound on its KL, and the sampling itself."""

import math
from itertools import combinations, product

import pytest
import torch

from rlhf_helpers.policy_optimization import (
    best_of_n,
    best_of_n_curve,
    best_of_n_exact_kl,
    best_of_n_kl,
    best_of_n_shares,
)
from tests.conftest import share_of_e

PROMPTS = ["Hello", "What is the capital of France?"]


# ---- the curve


def test_two_of_three_enumerated():
    # Subsets of proxy {1, 4, 2}: {1, 4} -> 4, {1, 2} -> 2, {4, 2} -> 4; gold there 10, 60, 10.
    curve = best_of_n_curve(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([[5.0, 10.0, 60.0]]), [1, 2, 3])
    assert list(curve.columns) == ["n", "kl_bound", "proxy", "gold"]
    assert curve["n"].tolist() == [1, 2, 3]
    assert curve["proxy"].tolist() == pytest.approx([7 / 3, 10 / 3, 4])
    assert curve["gold"].tolist() == pytest.approx([25, 80 / 3, 10])  # rises, then falls: over-optimised
    assert curve["kl_bound"].tolist() == pytest.approx([0, 0.193147, 0.431946], abs=1e-6)


def test_a_flipped_proxy_takes_the_worst():
    proxy = torch.tensor([[1.0, 4.0, 2.0]])
    curve = best_of_n_curve(-proxy, proxy, [2, 3])
    assert curve["gold"].tolist() == pytest.approx([4 / 3, 1])


def test_ties_share_their_gold():
    # Best of two of proxy {0, 3, 3}: always 3; its gold 10 or 40, equally likely in either order.
    for gold in ([7.0, 10.0, 40.0], [7.0, 40.0, 10.0]):
        curve = best_of_n_curve(torch.tensor([[0.0, 3.0, 3.0]]), torch.tensor([gold]), [2, 3])
        assert curve["proxy"].tolist() == pytest.approx([3, 3])
        assert curve["gold"].tolist() == pytest.approx([25, 25])


def test_a_constant_proxy_chooses_nothing():
    gold = torch.tensor([[1.0, 2.0, 6.0]])
    curve = best_of_n_curve(torch.ones(1, 3), gold, [1, 2, 3])
    assert curve["gold"].tolist() == pytest.approx([3, 3, 3])


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_equals_the_mean_over_all_subsets(n):
    draws = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(2, 3, 7, generator=draws, dtype=torch.float64)
    best = [
        (proxy[p, list(s)].max().item(), gold[p, s[proxy[p, list(s)].argmax()]].item())
        for p in range(3)
        for s in combinations(range(7), n)
    ]
    curve = best_of_n_curve(proxy, gold, [n])
    assert curve.loc[0, ["proxy", "gold"]].tolist() == pytest.approx(torch.tensor(best).mean(0).tolist())


def test_large_samples_do_not_overflow():
    rewards = torch.arange(3000.0)[None]
    curve = best_of_n_curve(rewards, rewards, [1500])
    # The expected largest of n of the ranks 1 ... N is n (N + 1) / (n + 1).
    assert curve["proxy"][0] == pytest.approx(1500 * 3001 / 1501 - 1, rel=1e-9)


@pytest.mark.parametrize("n", [0, 4, -1, 1.5, True])
def test_curve_refuses_n(n):
    with pytest.raises(ValueError, match="n must be"):
        best_of_n_curve(torch.ones(2, 3), torch.ones(2, 3), [n])


def test_curve_refuses_shapes_and_what_is_not_finite():
    with pytest.raises(ValueError, match="shape"):
        best_of_n_curve(torch.ones(3), torch.ones(3), [1])
    with pytest.raises(ValueError, match="equal"):
        best_of_n_curve(torch.ones(2, 3), torch.ones(3, 2), [1])
    for bad in (torch.tensor([[1.0, math.nan]]), torch.empty(0, 2)):
        with pytest.raises(ValueError, match="finite"):
            best_of_n_curve(bad, bad, [1])


# ---- the bound


def test_kl_bound_by_hand():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 1 / 2)
    assert best_of_n_kl(64) == pytest.approx(3.174508, abs=1e-6)
    with pytest.raises(ValueError, match="n must be"):
        best_of_n_kl(0)
    with pytest.raises(ValueError, match="whole"):
        best_of_n_kl(2.5)


# ---- the exact distribution

SIX = torch.tensor([0.161060, 0.124526, 0.269541, 0.157760, 0.083130, 0.203983], dtype=torch.float64)


def kl_of(shares, probabilities):
    return torch.special.xlogy(shares, shares / probabilities).sum().item()


def test_shares_by_hand():
    # Best of two: (a, a) gives a; either in any other order gives b. A tie of b and c goes 1 : 3.
    shares = best_of_n_shares(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), 2)
    assert shares.tolist() == [0.25, 0.75]
    assert shares.dtype == torch.float32
    tied = best_of_n_shares(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.5, 0.125, 0.375]), 2)
    assert tied.tolist() == [0.25, 0.1875, 0.5625]
    assert best_of_n_shares(torch.tensor([2.0, 2.0]), torch.tensor([0.0, 1.0]), 9).tolist() == [0, 1]
    assert best_of_n_shares(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), 9).tolist() == [1, 0]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_shares_equal_all_draws_with_ties_by_lot(n):
    rewards, chances = [0.3, -1.0, 0.3, 0.9], [0.1, 0.2, 0.3, 0.4]
    expected = [0.0] * 4
    for draw in product(range(4), repeat=n):
        best = [k for k in draw if rewards[k] == max(rewards[i] for i in draw)]
        for k in best:
            expected[k] += math.prod(chances[i] for i in draw) / len(best)
    shares = best_of_n_shares(torch.tensor(rewards), torch.tensor(chances, dtype=torch.float64), n)
    assert shares.tolist() == pytest.approx(expected, abs=1e-12)


def test_kl_of_six_outcomes_is_far_below_the_bound():
    """A softmax of six numbers, ranked by its own probabilities: nearly always the likeliest, -log 0.27."""
    assert kl_of(best_of_n_shares(SIX, SIX, 64), SIX) == pytest.approx(1.311, abs=5e-4)
    assert kl_of(best_of_n_shares(-SIX, SIX, 1000), SIX) == pytest.approx(-math.log(0.083130), abs=1e-9)


def test_exact_kl_by_hand():
    # 1: n = 2 of two samples: 1/4 and 3/4 against 1/2 each. 2: a tie of all three changes nothing.
    kl = best_of_n_exact_kl(torch.tensor([[0.0, 1.0]]), [1, 2])
    assert kl.tolist() == pytest.approx([0, 0.25 * math.log(0.5) + 0.75 * math.log(1.5)])
    assert best_of_n_exact_kl(torch.ones(2, 3), [5]).tolist() == [0]
    # One reward above three of another: always the one, log 4; a mean over prompts halves it.
    two = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert best_of_n_exact_kl(two, [1000]).item() == pytest.approx(math.log(4) / 2)


def test_exact_kl_meets_the_bound_without_ties_and_stays_below_it_with_them():
    ns, draws = [1, 2, 8, 64], torch.Generator().manual_seed(0)
    bound = [best_of_n_kl(n) for n in ns]
    rewards = torch.randn(2, 10_000, generator=draws)
    assert best_of_n_exact_kl(rewards, ns).tolist() == pytest.approx(bound, abs=1e-3)
    rounded = best_of_n_exact_kl(rewards.round(), ns).tolist()
    assert all(exact < 0.95 * limit for exact, limit in zip(rounded[1:], bound[1:], strict=True))


@pytest.mark.parametrize(
    "rewards, probabilities, n, message",
    [
        ([1.0], [0.5, 0.5], 2, "shape"),
        ([1.0, 2.0], [0.5, 0.4], 2, "sum 1"),
        ([1.0, 2.0], [-0.5, 1.5], 2, "sum 1"),
        ([1.0, math.nan], [0.5, 0.5], 2, "finite"),
        ([1.0, 2.0], [0.5, 0.5], 0, "n must be"),
        ([1.0, 2.0], [0.5, 0.5], 1.5, "whole"),
    ],
)
def test_shares_refuse(rewards, probabilities, n, message):
    with pytest.raises(ValueError, match=message):
        best_of_n_shares(torch.tensor(rewards), torch.tensor(probabilities), n)
    with pytest.raises(ValueError, match="shape"):
        best_of_n_exact_kl(torch.tensor(rewards), [1])


# ---- sampling


def test_keeps_the_best_of_its_own_samples(tiny):
    found = best_of_n(*tiny, PROMPTS, share_of_e, n=6, max_new_tokens=6, seed=1)
    assert found["all_rewards"].shape == (2, 6)
    assert [len(texts) for texts in found["all_responses"]] == [6, 6]
    for place, prompt in enumerate(PROMPTS):
        texts, rewards = found["all_responses"][place], found["all_rewards"][place]
        assert rewards.tolist() == share_of_e([prompt] * 6, texts).tolist()
        assert found["rewards"][place] == rewards.max() > rewards.min()
        assert found["responses"][place] == texts[rewards.tolist().index(rewards.max().item())]
    assert found["kl_bound"] == best_of_n_kl(6)
    again = best_of_n(*tiny, PROMPTS, share_of_e, n=6, max_new_tokens=6, seed=1)
    assert again["all_responses"] == found["all_responses"]
    curve = best_of_n_curve(found["all_rewards"], found["all_rewards"], [6])
    assert curve["gold"][0] == pytest.approx(found["rewards"].mean().item())


def test_each_sample_is_scored_for_its_own_prompt_and_columns(tiny):
    seen = []

    def reward(prompts, responses, target):
        seen.extend(zip(prompts, target, strict=True))
        return torch.zeros(len(prompts))

    found = best_of_n(*tiny, PROMPTS, reward, n=2, max_new_tokens=3, columns={"target": ["x", "y"]})
    assert seen == [(PROMPTS[0], "x")] * 2 + [(PROMPTS[1], "y")] * 2
    assert found["responses"] == [texts[0] for texts in found["all_responses"]]  # all tie: the first


def test_best_of_n_refuses(tiny):
    for n in (0, 1.5):
        with pytest.raises(ValueError, match="n must be"):
            best_of_n(*tiny, PROMPTS, share_of_e, n=n)
    with pytest.raises(ValueError, match="at least one text"):
        best_of_n(*tiny, [], share_of_e, n=2)
