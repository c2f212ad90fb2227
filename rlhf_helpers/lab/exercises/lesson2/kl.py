"""What ties a policy to the reference: the coefficient of the KL, and a loss to repair."""

import torch
from torch import Tensor, tensor

from rlhf_helpers.lab.exercises.exercise import Function, as_asked, exercise, negated
from rlhf_helpers.lab.exercises.lesson2.policy import LOGPS, rloo
from rlhf_helpers.lab.studies.record import load_study


def stored_search(kl_coef: float) -> str:
    """Say what gold does in the runs of `rl_overoptimisation` at a KL coefficient, mean over the seeds.

    Returns:
        "gold hardly rises": it never gains 0.1; "gold falls": it ends more than 0.1 below its highest value;
        else "gold is kept".

    Raises:
        ValueError: there is no run at this coefficient; the message lists those there are.
    """
    runs = load_study("rl_overoptimisation")
    coefs = runs.cure.replace("none", "KL coefficient 0").str.extract(r"KL coefficient (.*)")[0].astype(float)
    gold = runs[coefs == kl_coef].groupby("step").gold.mean()
    if gold.empty:
        raise ValueError(f"there are runs at {sorted(coefs.dropna().unique().tolist())}, not at {kl_coef}")
    if gold.max() < gold.iloc[0] + 0.1:
        return "gold hardly rises"
    return "gold falls" if gold.iloc[-1] < gold.max() - 0.1 else "gold is kept"


def safe_search(search: Function) -> str:
    """Search at a KL coefficient that keeps gold. Lesson 2."""
    return search(0.3)


def _choice(answer: Function, search: Function) -> str:
    """Return what an answer finds, if it finds it with the one coefficient of its choice."""
    tried: dict[float, str] = {}
    found = answer(lambda kl_coef: tried.setdefault(kl_coef, search(kl_coef)))
    if len(tried) > 1:
        return "tried out"
    return found if found is None or [*tried.values()] == [found] else "written by hand"


def repaired_loss(
    logps: Tensor, old_logps: Tensor, ref_logps: Tensor, mask: Tensor, scores: Tensor, kl_coef: float
) -> Tensor:
    """RLOO's loss, with the KL in the reward: mean over all answers of -A sum_t logps, a scalar.

    A: score - kl_coef sum_t (old_logps - ref_logps), minus the mean of the others of its row. All tensors but
    scores (P, G) are (P, G, T); mask is 0 on padding. Lesson 2.
    """
    kl = ((old_logps - ref_logps) * mask).sum(-1)
    log_pi = (logps * mask).sum(-1)
    return -(rloo(scores - kl_coef * kl) * log_pi).mean()


GAPS = tensor([[0.5, -0.4, 0.3, 1.5, -0.9], [0.1, -1.7, 0.8, -0.2, 2.2]])
# two prompts with three answers of at most four tokens; padding is not 0: mask it
OLD = torch.stack([LOGPS[:, :4], LOGPS[:, 1:], LOGPS[:, :4].flip(1)], 1)
REF = OLD - torch.stack([GAPS[:, :4], GAPS[:, 1:], GAPS[:, 1:].flip(1)], 1)
MASK = tensor([[[4], [2], [1]], [[3], [4], [2]]]) > torch.arange(4)
ANSWERS = OLD + 0.1, OLD, REF, MASK, tensor([[0.7, -1.2, 3.0], [0.2, 0.9, 0.4]])

# What may be left of the broken loss: each fault as an edit of the repaired one.
KL_ADDED = ("scores -", "scores +")
MEAN_KL = ("((old_logps - ref_logps) * mask).sum(-1)", "(old_logps - ref_logps).mean(-1)")
MEAN_LOG_PI = ("(logps * mask).sum(-1)", "logps.mean(-1)")
PADDED_KL = ("ref_logps) * mask", "ref_logps)")
PADDED_LOG_PI = ("logps * mask", "logps")

EXERCISES = {
    "safe_search": exercise(
        safe_search,
        [(stored_search,)],
        "gold falls: it ends far below its highest value, while the reward rises; a nat must cost more",
        lambda search: search(0.0),
        "gold hardly rises: a nat costs so much that the policy learns next to nothing",
        lambda search: search(1.0),
        "several coefficients were tried: choose ONE before you know any result, and search once",
        lambda search: search(1.0) and search(0.3),
        "this is not what a search gave: return what `search` gives for the coefficient of your choice",
        lambda: "gold is kept",
        trial=_choice,
    ),
    "repaired_loss": exercise(
        as_asked(repaired_loss, "logps"),
        [
            (*ANSWERS, 0.1),
            (*(part[:, :2] for part in ANSWERS), 0.5),
            (*(part.transpose(0, 1) for part in ANSWERS), 1.0),
        ],
        "the KL is still ADDED to the score, so that leaving the reference is rewarded",
        KL_ADDED,
        KL_ADDED + MEAN_KL,
        KL_ADDED + MEAN_LOG_PI,
        KL_ADDED + MEAN_KL + MEAN_LOG_PI,
        "the KL of an answer is still a mean over all columns: it is the SUM over its real tokens",
        MEAN_KL,
        MEAN_KL + MEAN_LOG_PI,
        "log pi of an answer is still a mean over all columns: it is the SUM over its real tokens",
        MEAN_LOG_PI,
        "this is a mean per token: a token of a short answer then weighs more than one of a long answer",
        ("log_pi)", "log_pi / mask.sum(-1))"),
        "padding counts: multiply by the mask before you sum",
        PADDED_LOG_PI,
        PADDED_KL,
        PADDED_KL + PADDED_LOG_PI,
        "the advantages are missing: compare each reward with the others of its row",
        ("rloo(", "("),
        "the sign of the loss is flipped: an optimizer lowers it, so good answers become rarer",
        negated,
        "return one mean over all answers",
        (".mean()", ".sum()"),
        (".mean()", ""),
    ),
}
