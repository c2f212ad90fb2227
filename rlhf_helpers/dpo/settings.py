"""Settings of the loops that learn from preferences without a reward model."""

from dataclasses import dataclass

from rlhf_helpers.core.policy_losses import AdaptiveKLController, FixedKLController
from rlhf_helpers.core.training import TrainingSettings
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.dpo.objectives import OBJECTIVES


@dataclass(frozen=True)
class DPOSettings(TrainingSettings):
    """Which loss, how strongly it is held to the reference, how long; a bad value raises ValueError.

    loss: "dpo", "cdpo", "robust" (both with label_smoothing), "ipo", "hinge": pairs against a reference;
    "slic", "orpo", "simpo": pairs without one; "kto": unpaired rows; "listwise": rankings.
    """

    tiny_learning_rate: float = 3e-4
    schedule: str = "linear"  # the data are fixed, so there is an end to anneal towards
    loss: str = "dpo"  # pairs: also cdpo, robust, ipo, hinge, slic, orpo, simpo; else kto or listwise
    beta: float = 0.1  # larger stays closer to the reference; another scale in each loss, see its docstring
    label_smoothing: float = 0.0  # probability that a label is flipped, for "cdpo" and "robust" alone
    delta: float = 1.0  # "slic": the margin, in nats of log p
    reg_weight: float = 0.1  # "slic": weight of the likelihood of the chosen answer
    gamma: float = 0.5  # "simpo": the margin, in units of the reward
    desirable_weight: float = 1.0  # "kto": with many more undesirable rows, raise it
    undesirable_weight: float = 1.0  # "kto": the same for the undesirable rows
    kl_coef: float = 0.0  # what a nat of KL(policy || reference) costs, on the policy's own samples
    target_kl: float | None = None  # nats per response: beta rises while KL is above it, falls below it
    beta_horizon: float = 10.0  # steps over which beta moves by 20 % at most
    kl_samples: int = 16  # responses per step for either; few make a noisy KL, many a slow step
    max_new_tokens: int = 64  # of these samples
    epochs: int = 1  # passes over the rows; preferences are overfitted soon
    batch_size: int = 16  # rows per micro-batch; KTO takes its reference point from them, so more than one
    eval_every: int = 0  # steps between evaluations of val_rows; 0: at the end of each epoch

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        if self.loss not in OBJECTIVES:
            raise ValueError(f"DPOSettings.loss must be one of {tuple(OBJECTIVES)}, got {self.loss!r}")
        require_fields(self, "max_new_tokens", "epochs", whole=True, at_least=1)
        require_fields(self, "batch_size", whole=True, at_least=1 + (self.loss == "kto"))
        require_fields(self, "kl_samples", whole=True, at_least=2)
        require_fields(self, "eval_every", whole=True, at_least=0)
        require_fields(self, "beta_horizon", at_least=1)
        require_fields(self, "beta", "delta", "desirable_weight", "undesirable_weight", above=0)
        require_fields(self, "reg_weight", "gamma", "kl_coef", at_least=0)
        require_fields(self, "label_smoothing", at_least=0, below=0.5)
        if (self.label_smoothing > 0) != (self.loss in ("cdpo", "robust")):
            raise ValueError(
                'DPOSettings.label_smoothing must be > 0 for "cdpo" and "robust", and 0 for the others, '
                f"which ignore it; got {self.label_smoothing} for {self.loss!r}"
            )
        if self.target_kl is not None:
            require_fields(self, "target_kl", above=0)
        if self.target_kl is not None and not OBJECTIVES[self.loss].has_reference:
            raise ValueError(f"DPOSettings.target_kl must be None for {self.loss!r}, which has no reference")

    @property
    def needs_kl_samples(self) -> bool:
        """Whether each step samples from the policy to measure KL(policy || reference)."""
        return self.kl_coef > 0 or self.target_kl is not None

    @property
    def needs_reference(self) -> bool:
        """Whether the loss or a KL compares the policy with a reference."""
        return self.needs_kl_samples or OBJECTIVES[self.loss].has_reference

    def beta_controller(self) -> FixedKLController:
        """Return what holds beta: with target_kl, Ziegler's controller, since beta is the KL coefficient."""
        if self.target_kl is None:
            return FixedKLController(self.beta)
        return AdaptiveKLController(self.beta, self.target_kl, self.beta_horizon)
