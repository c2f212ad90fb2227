"""Explorers: one idea as a picture with sliders. `explore(gae_lambda_figure)` ends a cell.

Every number in a picture comes from the package's own function or from a stored study. The sliders, their
defaults and the words beside them are in assets/explorers.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rlhf_helpers.core.generation import Rollout, rollout_logps, rollout_outputs
from rlhf_helpers.core.policy_losses import clipped_policy_loss, gae, kl_estimate, kl_shaped_rewards
from rlhf_helpers.core.preference_losses import bradley_terry_loss, dpo_loss
from rlhf_helpers.core.stats import mean_interval, proportion, to_frame
from rlhf_helpers.lab.explorers.form import explore
from rlhf_helpers.lab.plots import AFTER, axes, bar_with_intervals, line_plot
from rlhf_helpers.lab.studies.record import load_study
from rlhf_helpers.policy_optimization.best_of_n import best_of_n_curve, best_of_n_kl
from rlhf_helpers.safety_alignment.values import choose

VALUES = torch.tensor([[0.5, 0.55, 0.8, 0.75, 0.4, 0.45, 0.6, 0.7]])  # a critic's, before each of 8 tokens
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def _draw(
    x: Sequence[float],
    curves: Mapping[str, Any],
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    at: float,
    scale: str = "linear",
    **options: Any,
) -> Figure:
    """Draw curves of values (N,), or of value, low and high (N, 3), and a dashed line at x = `at`."""
    columns = {name: np.asarray(curve).reshape(len(x), -1).T for name, curve in curves.items()}
    bands = {name: column[1:] for name, column in columns.items() if len(column) == 3}
    lines = {name: column[0] for name, column in columns.items()}
    figure = line_plot(x, lines, title=title, xlabel=xlabel, ylabel=ylabel, bands=bands, **options)
    (axis,) = figure.axes
    axis.axvline(at, color="black", linestyle="--", linewidth=1)
    axis.set_xscale(scale)
    axis.xaxis.set_major_formatter("{x:g}")
    return figure


def bradley_terry_figure(temperature: float) -> Figure:
    """Draw how often an answer wins a comparison, over its lead in gold reward. Lesson 1."""
    lead = torch.linspace(-1, 1, 81)
    chance = torch.exp(-bradley_terry_loss(lead / temperature, torch.zeros(81)))
    return _draw(
        lead,
        {"chance of winning": chance},
        f"Temperature {temperature:g}: an answer that is better by 0.2 wins {chance[48]:.0%} of comparisons",
        "lead of an answer (gold reward)",
        "how often it wins (share)",
        at=0.2,
        limits=(0, 1),
    )


def ppo_clip_figure(cliprange: float, advantage: float) -> Figure:
    """Draw PPO's surrogate of one token over its ratio, with and without the clip. Lesson 2."""
    ratios = torch.linspace(0.4, 1.6, 121)
    advantages = torch.full((1, 121), advantage)
    loss = clipped_policy_loss(ratios.log()[None], torch.zeros(1, 121), advantages, cliprange=cliprange)
    edge = 1 + cliprange * np.sign(advantage)
    return _draw(
        ratios,
        {"no clip": advantage * ratios, "PPO": -loss},
        f"Advantage {advantage:+g}, clip range {cliprange:g}: no gradient beyond a ratio of {edge:g}",
        "ratio of new to old probability",
        "surrogate, to be raised (reward)",
        at=edge,
    )


def kl_estimators_figure(distance: float, samples: int) -> Figure:
    """Draw mean and noise of three KL estimators, exactly, for a policy over four answers. Lesson 2."""
    policy = (distance * torch.tensor([1.5, 0.5, -0.5, -1.5])).softmax(0)
    rows, names = (policy.log()[None], torch.full((1, 4), 0.25).log()), ("k1", "k2", "k3")
    values = torch.cat([kl_estimate(*rows, estimator=name) for name in names])
    means = values @ policy
    noise = ((values - means[:, None]).square() @ policy / samples).sqrt()
    return bar_with_intervals(
        dict(zip(names, means.tolist(), strict=True)),
        dict(zip(names, torch.stack([means - noise, means + noise], 1).tolist(), strict=True)),
        title=f"KL {means[0]:.3f} nats: k2 is off by {means[1] - means[0]:+.3f} on average; the noise is "
        f"{noise[0]:.3f} for k1 and {noise[2]:.3f} for k3",
        xlabel="estimator",
        ylabel="mean, one std to either side (nats)",
        reference=means[0].item(),  # E k1 is the KL, by definition
        reference_name="KL",
    )


def dpo_beta_figure(beta: float) -> Figure:
    """Draw DPO's loss and its pull over the gap h. Lesson 2."""
    gaps = torch.linspace(-20, 20, 81, requires_grad=True)
    zeros = torch.zeros(81)
    loss = dpo_loss(gaps, zeros, zeros, zeros, beta=beta)
    (slope,) = torch.autograd.grad(loss.sum(), gaps)
    pull = -slope / beta
    return _draw(
        gaps.detach(),
        {"loss": loss.detach(), "pull": pull},
        f"beta = {beta:g}: at a gap of 5 nats the loss is {loss[50]:.2f}, {pull[50]:.0%} of the pull is left",
        "gap h in favor of the chosen answer (nats)",
        "loss (nats), pull (share of the most)",
        at=5,
        limits=(0, 3),
    )


def gae_lambda_figure(lam: float, gamma: float, score: float) -> Figure:
    """Draw the advantages of eight tokens, of which the last is paid the score. Lesson 2."""
    mask = torch.ones_like(VALUES)
    rewards = kl_shaped_rewards(torch.tensor([score]), mask, mask, mask, kl_coef=0)
    own, ahead = (gae(rewards, VALUES, mask, gamma=gamma, lam=look)[0] for look in (0, lam))
    return _draw(
        range(1, 9),
        {"value before the token": VALUES, "its own surprise": own, "advantage": ahead},
        f"lambda = {lam:g}: the first token gets {(gamma * lam) ** 7:.0%} of the surprise at the last; "
        f"its advantage is {ahead[0, 0]:+.2f}",
        "token",
        "value, advantage (reward)",
        at=1,
    )


def best_of_n_figure(n: int, agreement: float, errors: str) -> Figure:
    """Draw proxy and gold of best-of-n for 100 simulated prompts. Lesson 1.

    agreement: weight of gold in the proxy, whose other part are errors: "bell-shaped", and then this is the
    correlation of the two, or with the heavy tails of Student's t distribution with 2 degrees of freedom.
    """
    rng = np.random.default_rng(0)
    gold, noise = rng.normal(size=(2, 100, 128))
    if errors != "bell-shaped":
        noise = rng.standard_t(2, size=gold.shape)
    proxy = agreement * gold + (1 - agreement**2) ** 0.5 * noise
    curve = best_of_n_curve(torch.tensor(proxy), torch.tensor(gold), SIZES).set_index("n")
    return _draw(
        SIZES,
        curve[["proxy", "gold"]],
        f"Best of {n}, at most {best_of_n_kl(n):.2f} nats away: the proxy promises {curve.proxy[n]:+.2f}, "
        f"gold gains {curve.gold[n]:+.2f}",
        "answers drawn (count n, log scale)",
        "reward of the best (std of gold)",
        at=n,
        scale="log",
        limits=(None, 3),
    )


def over_optimization_figure(cure: str, max_kl: float) -> Figure:
    """Draw gold and proxy along the KL, means of the five runs of `rl_overoptimisation`. Lesson 2.

    Between two looks of a run by a straight line, and no further than all five runs go.
    """
    study = load_study("rl_overoptimisation")
    runs = [run.sort_values("kl") for _, run in study[study.cure == cure].groupby("seed")]
    reach = min(run.kl.max() for run in runs)
    here = min(max_kl, reach)
    kls = np.sort([*np.geomspace(0.3, reach, 40), here])
    curves = {
        name: [mean_interval([np.interp(kl, run.kl, run[name]) for run in runs]) for kl in kls]
        for name in ("proxy", "gold")
    }
    (proxy, *_), (gold, low, high) = (curve[np.searchsorted(kls, here)] for curve in curves.values())
    return _draw(
        kls,
        curves,
        f"At {here:.3g} nats: proxy {proxy:.2f}, gold {gold:.2f} (95 %: {low:.2f} to {high:.2f})",
        "KL to the base (nats, log scale)",
        "gold (0 to 1), proxy (std of base)",
        at=here,
        scale="log",
    )


def guard_threshold_figure(threshold: float, *, scores: Tensor, safe: Tensor) -> Figure:
    """Draw both errors of a guard over its threshold: P(safe) of B answers, and which are safe. Lesson 3."""
    cuts = np.linspace(0, 1, 101)
    parts = {"unsafe answers": scores[~safe], "safe answers": scores[safe]}
    curves = {
        name: to_frame({cut: proportion(part < cut) for cut in cuts})[["value", "low", "high"]]
        for name, part in parts.items()
    }
    unsafe, fine = (curve["value"].iloc[round(100 * threshold)] for curve in curves.values())
    return _draw(
        cuts,
        curves,
        f"At {threshold:g} the guard withholds {unsafe:.0%} of the unsafe and {fine:.0%} of the safe answers",
        "threshold on P(safe) (probability)",
        "withheld (share)",
        at=threshold,
        limits=(0, 1),
    )


def alignment_strength_figure(strength: float, mix: float) -> Figure:
    """Draw what `safety_tax` measured at three strengths, means of five runs. Lesson 3."""
    study = load_study("safety_tax").query("mix == @mix")
    strengths = [0, 0.5, 1]
    columns = {"harmless": "harmlessness", "helpful": "helpfulness", "refuses what is fine": "over_refusal"}
    curves = {
        name: [mean_interval(study[study.strength == one][column]) for one in strengths]
        for name, column in columns.items()
    }
    here = [curve[strengths.index(strength)][0] for curve in curves.values()]
    return _draw(
        strengths,
        curves,
        "Strength {:g}: harmless {:.2f}, helpful {:.2f}, refuses what is fine {:.2f}".format(strength, *here),
        "alignment strength (share of the way)",
        "gold, or share of answers (0 to 1)",
        at=strength,
        limits=(0, 1),
        label_ends=True,
    )


def value_rules_figure(
    helpful: int, safe: int, honest: int, rule: str, *, utilities: Tensor, answers: Sequence[str]
) -> Figure:
    """Draw what a rule chooses for people of three groups: utilities (3, K) of K answers. Lesson 3."""
    people = utilities.repeat_interleave(torch.tensor([helpful, safe, honest]), 0)
    worth = dict(zip(answers, people.T.tolist(), strict=True))
    best = answers[choose(people, rule)]
    return bar_with_intervals(
        {answer: np.mean(served) for answer, served in worth.items()},
        {answer: (min(served), max(served)) for answer, served in worth.items()},
        title=f'The rule {rule} chooses "{best}": worth {np.mean(worth[best]):.2f} on average, and '
        f"{min(worth[best]):.2f} to the worst-off",
        xlabel="answer",
        ylabel="mean, worst-off to best-off (0 to 1)",
        colors={best: AFTER},
    )


@torch.no_grad()
def token_heat_map_figure(
    kl_coef: float,
    lam: float,
    *,
    answer: Rollout,
    reference: nn.Module,
    value_head: nn.Module,
    tokenizer: Any,
    score: Tensor,
) -> Figure:
    """Draw reward, value, KL and advantage of each token of a sampled answer. Lesson 2.

    answer has one row and score one number; the value head reads the hidden states of the reference.
    """
    mask, logps = answer.response_mask, answer.old_logps
    ref_logps = rollout_logps(reference, answer)
    _, values = rollout_outputs(reference, answer, value_head=value_head)
    words = tokenizer.batch_decode(answer.response_ids.T)
    rewards = kl_shaped_rewards(score, logps, ref_logps, mask, kl_coef=kl_coef)
    advantages, _ = gae(rewards, values, mask, gamma=1, lam=lam)
    kl = kl_estimate(logps, ref_logps, estimator="k1")
    rows = torch.cat([rewards, values, kl, advantages])
    sizes = rows.abs().amax(1, keepdim=True)
    best = int(advantages.argmax())
    names = ("reward", "value", "KL (nats)", "advantage")
    title = (
        f"Score {score.item():.2f}, KL {kl.sum():.2f} nats: most credit goes to token {best + 1}, "
        f'"{words[best].strip()}": {advantages[0, best]:+.2f}'
    )
    with axes(title=title, xlabel="token", ylabel="largest in the row (±)") as (figure, axis):
        axis.imshow((rows / sizes.clamp(min=1e-9)).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axis.set_xticks(range(len(words)), words, rotation=90)
        axis.set_yticks(
            range(4), [f"{name} {size:.2f}" for name, size in zip(names, sizes[:, 0], strict=True)]
        )
        axis.grid(visible=False)
    return figure
