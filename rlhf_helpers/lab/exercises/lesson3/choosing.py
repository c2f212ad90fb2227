"""How goals that pull apart are weighed: a price on a limit, the points worth having, the fairest option."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_helpers.alignment_eval import objectives
from rlhf_helpers.alignment_eval.objectives import pareto_front
from rlhf_helpers.lab.exercises.exercise import Exercise, named
from rlhf_helpers.safety_alignment.constrained import next_multiplier
from rlhf_helpers.safety_alignment.values import fairest


def hypervolume(points: Tensor, reference: Tensor) -> float:
    """`alignment_eval.objectives.hypervolume` of points (N, 2), whether they carry a gradient or not."""
    return objectives.hypervolume(points.detach(), reference.detach())


def _multiplier_probes() -> list[tuple[float, float, float, float]]:
    rising = [(0.5, 0.3, 0.2, 0.5), (0.0, 0.7, 0.1, 2.0), (3.0, 0.9, 0.2, 5.0), (0.002, 0.31, 0.3, 0.01)]
    falling = [(1.2, 0.1, 0.4, 0.4), (0.1, 0.05, 0.25, 3.0)]
    return [*rising, *falling, (0.7, 0.2, 0.2, 0.1)]


def _front_probes() -> list[tuple[Tensor]]:
    flat = [[1, 5], [2, 4], [2, 4], [4, 3], [4, 2], [3, 3], [0, 5], [1, 1], [5, 0]]
    lone = [[1, 2], [3, 3], [2, 3]]  # one point is best in everything
    deep = [[3, 1, 2], [1, 3, 2], [2, 2, 2], [2, 1, 3], [2, 1, 2], [0, 0, 5], [3, 0, 2], [1, 2, 2]]
    low = [[-1, -2], [-2, -1], [-3, -3]]
    wide = [[0, 1, 2, 1], [0, 1, 2, 3]]  # only the last of four objectives differs
    return [(torch.tensor(rows) / 10,) for rows in (flat, lone, deep, low, wide, [[-2, -1, -3]])]


def _volume_probes() -> list[tuple[Tensor, Tensor]]:
    rows = [[0.3, 0.9], [0.8, 0.5], [0.6, 0.7], [0.5, 0.6], [0.95, 0.1], [0.1, 0.97]]
    points = torch.tensor(rows)
    equal = torch.tensor([[0.5, 0.75], [0.5, 0.3], [0.613, 0.427], [0.331, 0.427]])  # in x, and in y
    below_0 = torch.tensor([[-0.2, 0.5], [0.3, -0.1], [-0.5, 1.0]])
    return [
        (points, torch.tensor([0.2, 0.3])),
        (points, torch.tensor([0.05, 0.02])),
        (points[1:4], torch.zeros(2)),
        (equal, torch.tensor([0.1, 0.2])),
        (below_0, torch.tensor([-0.4, -0.6])),
        (equal[:1], torch.tensor([0.2, 0.1])),
        (points, torch.tensor([0.8, 0.6])),  # no point is above the reference
    ]


def _utility_probes() -> list[tuple[Tensor]]:
    tables = [  # in each, several options help the worst-off group equally well
        [[6, 9, 1, 2, 2], [2, 7, 7, 9, 2], [8, 1, 6, 2, 5], [2, 2, 8, 3, 4]],
        [[3, 8, 5, 3, 9], [8, 2, 7, 3, 3], [4, 9, 3, 5, 2], [7, 8, 4, 4, 9]],
        [[2, 8, 2, 5, 8], [1, 4, 3, 7, 8], [7, 1, 2, 2, 2], [7, 1, 9, 4, 4]],
        [[9, 6, 9, 1, 8], [4, 2, 9, 8, 2], [2, 8, 5, 7, 6], [6, 2, 1, 1, 3]],
    ]
    # More groups than options, here one option per line. The median, the product, the second-worst group and
    # a rounded minimum would settle the tie of the first two for another option than the mean does.
    tall = [
        [20, 35, 35, 35, 35, 35],
        [20, 20, 20, 20, 60, 95],
        [17, 90, 90, 90, 90, 90],
        [20, 20, 20, 30, 20, 20],
    ]
    below_0 = [[-50, 40, 20], [-30, -30, 10]]
    columns = [(torch.tensor(table).T / 100,) for table in (tall, below_0)]
    return [*((torch.tensor(table) / 10,) for table in tables), *columns]


def _kept(wrong: Callable[..., float]) -> list[Callable[..., float]]:
    """`wrong` as it is, and kept from falling below 0."""
    return [wrong, lambda *given: max(0.0, wrong(*given))]


MULTIPLIER_MISTAKES = named(
    "the multiplier fell below 0: that would PAY for using up what is left of the limit",
    lambda m, c, limit, step: m + step * (c - limit),
    "the sign is flipped: a cost above its limit must RAISE the multiplier",
    *_kept(lambda m, c, limit, step: m - step * (c - limit)),
    "step_size never enters: multiply the difference by it",
    *_kept(lambda m, c, limit, step: m + c - limit),
    "min stands where max belongs: the multiplier may be anything from 0 up",
    lambda m, c, limit, step: min(0.0, m + step * (c - limit)),
    "the multiplier was multiplied: once it is 0 it would stay 0; add the step",
    *_kept(lambda m, c, limit, step: m * (1 + step * (c - limit))),
    lambda m, c, limit, step: m * math.exp(step * (c - limit)),
    "the STEP was kept above 0, so the multiplier never falls: keep the result above 0",
    lambda m, c, limit, step: m + step * max(0.0, c - limit),
    "the old multiplier is forgotten: the step moves it, and does not replace it",
    *_kept(lambda m, c, limit, step: step * (c - limit)),
    "the limit never enters: a cost that is allowed must not raise the multiplier",
    lambda m, c, limit, step: m + step * c,
    "the cost was divided by its limit: the step is their difference",
    *_kept(lambda m, c, limit, step: m + step * (c / limit - 1)),
    "step_size scales the old multiplier as well: it belongs to the difference alone",
    *_kept(lambda m, c, limit, step: step * (m + c - limit)),
    "below 0 it was mirrored to above 0: it must be 0 there",
    lambda m, c, limit, step: abs(m + step * (c - limit)),
    "the multiplier was kept below 1: it is a price, and has no upper limit",
    lambda m, c, limit, step: min(max(m + step * (c - limit), 0.0), 1.0),
    "this is the penalty of the loss: return the multiplier's next value",
    lambda m, c, limit, step: m * (c - limit),
    "this is a tensor: return a Python number, with .item()",
    lambda *given: torch.tensor(next_multiplier(*given)),
)


def _at_least(points: Tensor) -> Tensor:
    """[i, j]: point i is at least as good as j in every objective, (N, N); each is so to itself."""
    return (points[:, None] >= points[None]).all(-1)


FRONT_MISTAKES = named(
    "equal points threw each other out: to dominate, a point must be BETTER in one objective",
    lambda p: _at_least(p).sum(0) == 1,
    "each point dominates itself: at least as good in all is not enough, it must be better in one",
    lambda p: ~_at_least(p).any(0),
    "a point better in one objective and equal in the others dominates, too: not all need be better",
    lambda p: ~(p[:, None] > p[None]).all(-1).any(0),
    "this is the other side: lower was taken as better, or these are points that dominate none",
    lambda p: pareto_front(-p),
    "this is the point with the largest sum: a front needs no weights",
    lambda p: p.sum(1) == p.sum(1).max(),
    "only some of the objectives were compared: a front needs all of them",
    *(lambda p, k=k: p[:, k] == p[:, k].max() for k in (0, 1, -1)),
    lambda p: pareto_front(p[:, :2]),
    "only the best of each objective were kept: points in between may be undominated as well",
    lambda p: (p == p.amax(0)).any(1),
    "a point fell out because another is better in ANY objective: that one must not be worse anywhere",
    lambda p: ~(p[:, None] > p[None]).any(-1).any(0),
    "these are the points that ARE dominated",
    lambda p: ~pareto_front(p),
    "these are the points that dominate some other one: return those that no other one dominates",
    lambda p: ~pareto_front(-p),
    "of equal points only one was kept: neither dominates the other",
    lambda p: pareto_front(p) & ~(_at_least(p) & _at_least(p).T).tril(-1).any(1),
    "these are indices, or the points themselves: return True or False for each point, shape (N,)",
    *(lambda p: pareto_front(p).nonzero()[:, 0], lambda p: pareto_front(p).nonzero()),
    lambda p: p[pareto_front(p)],
    "these are numbers: return bool, since points[front] would take 0 and 1 as indices",
    *(lambda p, kind=kind: pareto_front(p).to(kind) for kind in (torch.long, torch.int, torch.float)),
)


def _by_sides(*wrong: Callable[[Tensor], Tensor]) -> list[Callable[..., float]]:
    """Each `wrong` of the sides (N, 2) of the rectangles, with and without those of negative sides."""
    cut = [lambda p, ref, fn=fn: fn((p - ref).clamp(min=0)).item() for fn in wrong]
    return [*cut, *(lambda p, ref, fn=fn: fn(p - ref).item() for fn in wrong)]


def _box(points: Tensor, reference: Tensor) -> float:
    return (points - reference).amax(0).prod().item()


def _stairs(points: Tensor, reference: Tensor, share: float) -> float:
    """Slabs between neighbours of the front: `share` of the right one's height, the rest the left one's."""
    kept = points[pareto_front(points) & (points > reference).all(1)]
    x, y = (kept[kept[:, 0].argsort()] - reference).unbind(1)
    heights = share * y + (1 - share) * torch.cat([y[:1], y[:-1]])
    return (torch.cat([x[:1], x.diff()]) * heights).sum().item()


def _swept(points: Tensor, reference: Tensor) -> float:
    """The sweep over all points, from the largest x to the smallest."""
    x, y = (points[points[:, 0].argsort(descending=True)] - reference).unbind(1)
    return (x * torch.cat([y.new_zeros(1), y]).cummax(0).values.diff()).sum().item()


def _signed(points: Tensor, reference: Tensor) -> float:
    """The sweep without a running maximum: each point's rise, or fall, over the point before."""
    x, y = (points[points[:, 0].argsort(descending=True)] - reference).unbind(1)
    return (x * torch.cat([y[:1], y.diff()])).sum().item()


VOLUME_MISTAKES = named(
    "the rectangles were summed: count what lies in several of them only once",
    *_by_sides(lambda sides: sides.prod(1).sum()),
    lambda p, ref: (p[pareto_front(p)] - ref).clamp(min=0).prod(1).sum().item(),
    "this is the bounding box: no point is as good in both objectives as its corner",
    _box,
    "the reference never enters: the area begins there, not at 0",
    lambda p, ref: hypervolume(p, torch.zeros(2)),
    "this is the largest rectangle alone: the others add what sticks out of it",
    *_by_sides(lambda sides: sides.prod(1).max()),
    "dominated points moved the edge: a point below the highest y so far adds nothing",
    *(lambda p, ref: _signed(p[(p > ref).all(1)], ref), _signed),
    "points not above the reference in BOTH objectives were counted, with a sign: leave them out",
    *(lambda p, ref: _signed(p[pareto_front(p)], ref), _swept),
    "neighbors were joined by slanted lines: no point dominates the triangles under them",
    lambda p, ref: _stairs(p, ref, 0.5),
    "the stairs are too high: a slab is as high as the point that reaches over it to the right",
    lambda p, ref: _stairs(p, ref, 0.0),
    "this is the rest of the bounding box: the area that is NOT dominated",
    lambda p, ref: _box(p, ref) - hypervolume(p, ref),
    "this is a share of the bounding box: return the area itself",
    lambda p, ref: hypervolume(p, ref) / _box(p, ref),
    "lower was taken as better: the area lies between the reference and points above it",
    lambda p, ref: hypervolume(-p, -ref),
    "this is a tensor: return a Python number, with .item()",
    lambda p, ref: torch.tensor(hypervolume(p, ref)),
)


def _among_best(*prefer: Callable[[Tensor], Any]) -> list[Callable[[Tensor], int]]:
    """Of the options best for the worst-off group, the last one that each of `prefer` values most."""

    def pick(u: Tensor, value: Callable[[Tensor], Any]) -> int:
        worst = u.amin(0)
        return max((worst == worst.max()).nonzero()[:, 0].tolist(), key=lambda k: (value(u[:, k]), k))

    return [lambda u, value=value: pick(u, value) for value in prefer]


FAIREST_MISTAKES = named(
    "this maximizes the mean (or sum) of the groups: one group may pay for the others",
    lambda u: int(u.mean(0).argmax()),
    "this maximizes the product (Nash): look at the worst-off group alone",
    lambda u: int(u.prod(0).argmax()),
    "argmin: this is the option whose worst-off group is WORST off",
    lambda u: int(u.amin(0).argmin()),
    "this pleases the BEST-off group: take the smallest utility over the groups, not the largest",
    *(lambda u: int(u.amax(0).argmax()), lambda u: int(u.argmax()) % u.shape[1]),
    "the wrong dimension: groups are rows and options are columns; return an option",
    *(lambda u: int(u.amin(1).argmax()), lambda u: int(u.mean(1).argmax())),
    "a tie went to the first or the last option: of equally fair ones take that of the larger mean",
    *(lambda u: int(u.amin(0).argmax()), *_among_best(lambda option: 0.0)),
    "a tie went to the SMALLER mean",
    *_among_best(lambda option: -option.mean().item()),
    "a tie went to the option with the largest single utility: compare means",
    *_among_best(lambda option: option.max().item()),
    "a tie went to the option whose other groups are best off from the bottom up: compare means",
    *_among_best(lambda option: option.sort().values.tolist()),
    "one group was called the poorest and got its favorite: which group is worst off depends on the option",
    lambda u: int(u[u.mean(1).argmin()].argmax()),
    "this is the most EQUAL option: all may be equally badly off",
    *(lambda u: int((u.amax(0) - u.amin(0)).argmin()), lambda u: int(u.var(0).argmin())),
    "this counts votes, one per group: a minority may get what it likes least",
    lambda u: int(torch.bincount(u.argmax(1), minlength=u.shape[1]).argmax()),
    "this looks at the median group: look at the worst-off one",
    lambda u: int(u.median(0).values.argmax()),
    "the mean was added to the worst utility: it only settles ties",
    lambda u: int((u.amin(0) + u.mean(0)).argmax()),
    "this is a utility: return the option's index",
    *(lambda u: u.amin(0).max().item(), lambda u: u.amin(0).max()),
    "options are counted from 0",
    lambda u: fairest(u) + 1,
    "this is a tensor: return a Python int, with int(...) or .item()",
    lambda u: torch.tensor(fairest(u)),
)

EXERCISES = (
    Exercise("next_multiplier", 3, next_multiplier, _multiplier_probes, MULTIPLIER_MISTAKES),
    Exercise("pareto_front", 3, pareto_front, _front_probes, FRONT_MISTAKES),
    Exercise("hypervolume", 3, hypervolume, _volume_probes, VOLUME_MISTAKES),
    Exercise("fairest", 3, fairest, _utility_probes, FAIREST_MISTAKES),
)
