"""How goals that pull apart are weighed: a price on a limit, the points worth having, the fairest option."""

import math

import torch
from torch import Tensor, tensor

from rlhf_helpers.alignment_eval import objectives
from rlhf_helpers.alignment_eval.objectives import pareto_front
from rlhf_helpers.lab.exercises.exercise import Function, as_asked, as_tensor, each, exercise, table
from rlhf_helpers.safety_alignment.constrained import next_multiplier
from rlhf_helpers.safety_alignment.values import fairest

FLOORS = -math.inf, 0.0  # a mistake is made with and without keeping the result at or above 0
hypervolume = as_asked(objectives.hypervolume)


def _stairs(front: Tensor, share: float) -> float:
    """Slabs between neighbours of the front: `share` of the right one's height, the rest the left one's."""
    x, y = front.flip(0).unbind(1)
    heights = share * y + (1 - share) * torch.cat([y[:1], y[:-1]])
    return (x.diff(prepend=torch.zeros(1)) * heights).sum().item()


def _swept(sides: Tensor, *, highest: bool = False) -> float:
    """The sweep from the largest x to the smallest: each y is compared with the one before or the highest."""
    x, y = sides.unbind(1)
    y = torch.cat([y.new_zeros(1), y])
    if highest:
        y = y.cummax(0).values
    return (x * y.diff()).sum().item()


def _among_best(value: Function) -> Function:
    """Of the options best for the worst-off group, the last one that `value` prefers."""
    return lambda utilities, tied: max(tied, key=lambda k: (value(utilities[:, k]), k))


POINTS = tensor([[0.3, 0.9], [0.8, 0.5], [0.6, 0.7], [0.5, 0.6], [0.95, 0.1], [0.1, 0.97]])
EQUAL = tensor([[0.5, 0.75], [0.5, 0.3], [0.613, 0.427], [0.331, 0.427]])  # in x, and in y

EXERCISES = {
    "next_multiplier": exercise(
        next_multiplier,
        [
            (0.5, 0.3, 0.2, 0.5),
            (0.0, 0.7, 0.1, 2.0),
            (3.0, 0.9, 0.2, 5.0),
            (0.002, 0.31, 0.3, 0.01),
            (1.2, 0.1, 0.4, 0.4),
            (0.1, 0.05, 0.25, 3.0),
            (0.7, 0.2, 0.2, 0.1),
        ],
        "the multiplier fell below 0: that would PAY for using up what is left of the limit",
        lambda multiplier, step: multiplier + step,
        "the sign is flipped: a cost above its limit must RAISE the multiplier",
        *each(lambda floor, multiplier, step: max(floor, multiplier - step), *FLOORS),
        "step_size never enters: multiply the difference by it",
        *each(lambda floor, multiplier, excess: max(floor, multiplier + excess), *FLOORS),
        "min stands where max belongs: the multiplier may be anything from 0 up",
        lambda multiplier, step: min(0.0, multiplier + step),
        "the multiplier was multiplied: once it is 0 it would stay 0; add the step",
        lambda multiplier, step: multiplier * (1 + step),
        lambda multiplier, step: multiplier * math.exp(step),
        "the STEP was kept above 0, so the multiplier never falls: keep the result above 0",
        lambda multiplier, step: multiplier + max(0.0, step),
        "the old multiplier is forgotten: the step moves it, and does not replace it",
        *each(lambda floor, step: max(floor, step), *FLOORS),
        "the limit never enters: a cost that is allowed must not raise the multiplier",
        lambda multiplier, step_size, cost: multiplier + step_size * cost,
        "the cost was divided by its limit: the step is their difference",
        *each(
            lambda floor, multiplier, step, limit: max(floor, multiplier + step / limit),
            *FLOORS,
        ),
        "step_size scales the old multiplier as well: it belongs to the difference alone",
        *each(
            lambda floor, multiplier, step_size, excess: max(floor, step_size * (multiplier + excess)),
            *FLOORS,
        ),
        "below 0 it was mirrored to above 0: it must be 0 there",
        lambda multiplier, step: abs(multiplier + step),
        "the multiplier was kept below 1: it is a price, and has no upper limit",
        lambda right: min(right, 1.0),
        "this is the penalty of the loss: return the multiplier's next value",
        lambda multiplier, excess: multiplier * excess,
        "this is a tensor: return a Python number, with .item()",
        as_tensor,
        excess=lambda cost, limit: cost - limit,
        step=lambda excess, step_size: step_size * excess,
    ),
    "pareto_front": exercise(
        pareto_front,
        [
            (tensor(rows) / 10,)
            for rows in (
                [[1, 5], [2, 4], [2, 4], [4, 3], [4, 2], [3, 3], [0, 5], [1, 1], [5, 0]],
                [[1, 2], [3, 3], [2, 3]],  # one point is best in everything
                [[3, 1, 2], [1, 3, 2], [2, 2, 2], [2, 1, 3], [2, 1, 2], [0, 0, 5], [3, 0, 2], [1, 2, 2]],
                [[-1, -2], [-2, -1], [-3, -3]],
                [[0, 1, 2, 1], [0, 1, 2, 3]],  # only the last of four objectives differs
                [[-2, -1, -3]],
            )
        ],
        "equal points threw each other out: to dominate, a point must be BETTER in one objective",
        lambda at_least: at_least.sum(0) == 1,
        "each point dominates itself: at least as good in all is not enough, it must be better in one",
        lambda at_least: ~at_least.any(0),
        "a point better in one objective and equal in the others dominates, too: not all need be better",
        lambda better: ~better.all(-1).any(0),
        "this is the other side: lower was taken as better, or these are points that dominate none",
        lambda points: pareto_front(-points),
        "this is the point with the largest sum: a front needs no weights",
        lambda points: points.sum(1) == points.sum(1).max(),
        "only some of the objectives were compared: a front needs all of them",
        *each(lambda k, points: points[:, k] == points[:, k].max(), 0, 1, -1),
        lambda points: pareto_front(points[:, :2]),
        "only the best of each objective were kept: points in between may be undominated as well",
        lambda points: (points == points.amax(0)).any(1),
        "a point fell out because another is better in ANY objective: that one must not be worse anywhere",
        lambda better: ~better.any(-1).any(0),
        "these are the points that ARE dominated",
        lambda right: ~right,
        "these are the points that dominate some other one: return those that no other one dominates",
        lambda points: ~pareto_front(-points),
        "of equal points only one was kept: neither dominates the other",
        lambda right, at_least: right & ~(at_least & at_least.T).tril(-1).any(1),
        "these are indices, or the points themselves: return True or False for each point, shape (N,)",
        lambda right: right.nonzero()[:, 0],
        lambda right: right.nonzero(),
        lambda right, points: points[right],
        "these are numbers: return bool, since points[front] would take 0 and 1 as indices",
        *each(lambda kind, right: right.to(kind), torch.long, torch.int, torch.float),
        better=lambda points: points[:, None] > points[None],
        at_least=lambda points: (points[:, None] >= points[None]).all(-1),  # [i, j]: i than j
    ),
    "hypervolume": exercise(
        hypervolume,
        table(
            (POINTS, [0.2, 0.3]),
            (POINTS, [0.05, 0.02]),
            (POINTS[1:4], [0.0, 0.0]),
            (EQUAL, [0.1, 0.2]),
            ([[-0.2, 0.5], [0.3, -0.1], [-0.5, 1.0]], [-0.4, -0.6]),
            (EQUAL[:1], [0.2, 0.1]),
            (POINTS, [0.8, 0.6]),  # no point is above the reference
        ),
        "the rectangles were summed: count what lies in several of them only once",
        lambda sides: sides.prod(1).sum().item(),
        lambda sides: sides.clamp(min=0).prod(1).sum().item(),
        lambda sides, edge: sides[edge].clamp(min=0).prod(1).sum().item(),
        "this is the bounding box: no point is as good in both objectives as its corner",
        lambda box: box,
        "the reference never enters: the area begins there, not at 0",
        lambda points: hypervolume(points, torch.zeros(2)),
        "this is the largest rectangle alone: the others add what sticks out of it",
        lambda sides: sides.prod(1).max().item(),
        "dominated points moved the edge: a point below the highest y so far adds nothing",
        lambda sides: _swept(sides[(sides > 0).all(1)]),
        lambda sides: _swept(sides),
        "points not above the reference in BOTH objectives were counted, with a sign: leave them out",
        lambda sides, edge: _swept(sides[edge]),
        lambda sides: _swept(sides, highest=True),
        "neighbors were joined by slanted lines: no point dominates the triangles under them",
        lambda front: _stairs(front, 0.5),
        "the stairs are too high: a slab is as high as the point that reaches over it to the right",
        lambda front: _stairs(front, 0.0),
        "this is the rest of the bounding box: the area that is NOT dominated",
        lambda box, right: box - right,
        "this is a share of the bounding box: return the area itself",
        lambda box, right: right / box,
        "lower was taken as better: the area lies between the reference and points above it",
        lambda points, reference: hypervolume(-points, -reference),
        "this is a tensor: return a Python number, with .item()",
        as_tensor,
        sides=lambda points, reference: (points - reference)[points[:, 0].argsort(descending=True)],
        edge=lambda sides: pareto_front(sides),
        front=lambda sides, edge: sides[edge & (sides > 0).all(1)],
        box=lambda sides: sides.amax(0).prod().item(),
    ),
    "fairest": exercise(
        fairest,
        [
            *[
                (tensor(rows) / 10,)
                for rows in (  # in each, several options help the worst-off group equally well
                    [[6, 9, 1, 2, 2], [2, 7, 7, 9, 2], [8, 1, 6, 2, 5], [2, 2, 8, 3, 4]],
                    [[3, 8, 5, 3, 9], [8, 2, 7, 3, 3], [4, 9, 3, 5, 2], [7, 8, 4, 4, 9]],
                    [[2, 8, 2, 5, 8], [1, 4, 3, 7, 8], [7, 1, 2, 2, 2], [7, 1, 9, 4, 4]],
                    [[9, 6, 9, 1, 8], [4, 2, 9, 8, 2], [2, 8, 5, 7, 6], [6, 2, 1, 1, 3]],
                )
            ],
            # More groups than options, here one option per line. The median, the product, the second-worst
            # group and a rounded minimum would settle the tie of the first two for another option than the
            # mean does.
            (
                tensor(
                    [
                        [20, 35, 35, 35, 35, 35],
                        [20, 20, 20, 20, 60, 95],
                        [17, 90, 90, 90, 90, 90],
                        [20, 20, 20, 30, 20, 20],
                    ]
                ).T
                / 100,
            ),
            (tensor([[-50, 40, 20], [-30, -30, 10]]).T / 100,),
        ],
        "this maximizes the mean (or sum) of the groups: one group may pay for the others",
        lambda utilities: utilities.mean(0).argmax().item(),
        "this maximizes the product (Nash): look at the worst-off group alone",
        lambda utilities: utilities.prod(0).argmax().item(),
        "argmin: this is the option whose worst-off group is WORST off",
        lambda worst: worst.argmin().item(),
        "this pleases the BEST-off group: take the smallest utility over the groups, not the largest",
        lambda utilities: utilities.amax(0).argmax().item(),
        lambda utilities: utilities.argmax().item() % utilities.shape[1],
        "the wrong dimension: groups are rows and options are columns; return an option",
        lambda utilities: utilities.amin(1).argmax().item(),
        lambda utilities: utilities.mean(1).argmax().item(),
        "a tie went to the first or the last option: of equally fair ones take that of the larger mean",
        lambda worst: worst.argmax().item(),
        lambda tied: max(tied),
        "a tie went to the SMALLER mean",
        _among_best(lambda option: -option.mean()),
        "a tie went to the option with the largest single utility: compare means",
        _among_best(torch.max),
        "a tie went to the option whose other groups are best off from the bottom up: compare means",
        _among_best(lambda option: option.sort().values.tolist()),
        "one group was called the poorest and got its favorite: which group is worst off depends on the "
        "option",
        lambda utilities: utilities[utilities.mean(1).argmin()].argmax().item(),
        "this is the most EQUAL option: all may be equally badly off",
        lambda utilities, worst: (utilities.amax(0) - worst).argmin().item(),
        lambda utilities: utilities.var(0).argmin().item(),
        "this counts votes, one per group: a minority may get what it likes least",
        lambda utilities: utilities.argmax(1).bincount().argmax().item(),
        "this looks at the median group: look at the worst-off one",
        lambda utilities: utilities.median(0).values.argmax().item(),
        "the mean was added to the worst utility: it only settles ties",
        lambda utilities, worst: (worst + utilities.mean(0)).argmax().item(),
        "this is a utility: return the option's index",
        lambda worst: worst.max().item(),
        lambda worst: worst.max(),
        "options are counted from 0",
        lambda right: right + 1,
        "this is a tensor: return a Python int, with int(...) or .item()",
        as_tensor,
        worst=lambda utilities: utilities.amin(0),
        tied=lambda worst: (worst == worst.max()).nonzero()[:, 0].tolist(),
    ),
}
