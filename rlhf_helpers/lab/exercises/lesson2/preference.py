"""Preferences without a reward model: DPO's loss."""

import torch.nn.functional as F
from torch import tensor

from rlhf_helpers.core import preference_losses
from rlhf_helpers.lab.exercises.exercise import LOG_LOSS_MISTAKES, as_asked, exercise, table

dpo_loss = as_asked(preference_losses.dpo_loss, "policy_chosen_logps", "policy_rejected_logps")


# no margin is 0 or 1 / beta: a loss written with max or abs has a kink there
LOGPS = tensor(
    [
        [-12.0, -30.5, -8.0, -21.0],
        [-14.0, -28.0, -8.5, -25.0],
        [-13.0, -29.0, -8.3, -19.0],
        [-13.5, -29.5, -9.1, -28.0],
    ]
)

EXERCISES = {
    "dpo_loss": exercise(
        dpo_loss,
        table(
            (*LOGPS, 0.1),
            (*LOGPS[:, :2], 0.5),
            (*LOGPS[:, 3:], 0.3),
            # where log(sigmoid) gives -inf
            ([-210.0, -60.0], [-40.0, -190.0], [-50.0, -62.0], [-55.0, -65.0], 1.0),
        ),
        "the sign is flipped: chosen and rejected, or policy and reference, changed places",
        lambda gap: -F.logsigmoid(-gap),
        *LOG_LOSS_MISTAKES,
        "beta stands outside the sigmoid: there it only scales the loss, it belongs to the difference",
        lambda beta, ratios: -beta * F.logsigmoid(ratios),
        "beta never enters",
        lambda ratios: -F.logsigmoid(ratios),
        "the difference was divided by beta: the implicit reward is beta log(pi / ref)",
        lambda beta, ratios: -F.logsigmoid(ratios / beta),
        "the reference never enters: nothing holds the policy near it",
        lambda policy_part, beta: -F.logsigmoid(beta * policy_part),
        "the reference's difference was added: subtract it from the policy's",
        lambda policy_part, ratios, beta: -F.logsigmoid(beta * (2 * policy_part - ratios)),
        "beta multiplies the policy's part alone: a bracket is missing",
        lambda policy_part, ratios, beta: -F.logsigmoid(beta * policy_part + ratios - policy_part),
        "the two log-ratios were added: what counts is chosen MINUS rejected",
        lambda chosen, rejected: -F.logsigmoid(chosen + rejected),
        "this is IPO, a squared distance to 1 / (2 beta): DPO takes -logsigmoid",
        lambda ratios, beta: (ratios - 1 / (2 * beta)) ** 2,
        chosen=lambda policy_chosen_logps, ref_chosen_logps, beta: (
            beta * (policy_chosen_logps - ref_chosen_logps)
        ),
        rejected=lambda policy_rejected_logps, ref_rejected_logps, beta: (
            beta * (policy_rejected_logps - ref_rejected_logps)
        ),
        gap=lambda chosen, rejected: chosen - rejected,
        ratios=lambda gap, beta: gap / beta,
        policy_part=lambda policy_chosen_logps, policy_rejected_logps: (
            policy_chosen_logps - policy_rejected_logps
        ),
    ),
}
