"""DPO under the hands-on guide's names: a class that keeps model, reference, optimizer and beta."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.training import History
from rlhf_helpers.core.training.distributed import save_model
from rlhf_helpers.dpo.data import Data, DPODataset
from rlhf_helpers.dpo.objectives import LossFn
from rlhf_helpers.dpo.settings import DPOSettings
from rlhf_helpers.dpo.training import (
    answer_logps,
    dpo_pass,
    evaluate_dpo,
    load_policy,
    prepare_data,
    ref_answer_logps,
    start_dpo,
    train_dpo,
)


class DPOTrainer:
    """Trains `model` in place on preferences by any loss of `DPOSettings`; flat keywords win over settings.

    >>> DPOTrainer(model, beta=0.1).train(rows, epochs=3)   # doctest: +SKIP

    DPO: -logsigmoid(beta [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)]), sums with EOS; ln 2 at
    the start. Its implicit reward beta log(pi / ref) is known up to beta log Z(x), so only differences mean
    something. The log-prob of the chosen answer may fall while margins rise. Rafailov et al. 2023. Lesson 2.

    Constrained DPO: kl_coef > 0 adds kl_coef KL(policy || reference) per response, through its gradient on
    the policy's own samples; the loss that is logged does not contain it.

    Args:
        ref_model: None: a frozen copy of `model` as it is given or, with LoRA, `model` without its
            adapters, if the loss or a KL needs one. Its log-probs are computed once per data set: hand in a
            `DPODataset` to keep them from call to call.
        loss_fn: your own loss, called as the loss named in the settings is: for "dpo"
            loss_fn(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=)
            -> (B,).

    Raises:
        TypeError: a keyword that is not a field of `DPOSettings`.
        ValueError: a bad value, or ref_model is `model`.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        tokenizer: Any = None,
        *,
        settings: DPOSettings | None = None,
        loss_fn: LossFn | None = None,
        **changes: Any,
    ) -> None:
        """Start the run; it holds the rest."""
        settings = replace(settings or DPOSettings(), **changes)
        self.run = start_dpo(model, ref_model, tokenizer, settings, loss_fn)
        self.model = model

    def dataset(self, rows: Data) -> DPODataset:
        """Tokenize rows and add the reference's log-probs (`prepare_data`)."""
        return prepare_data(self.run, rows)

    def train(self, rows: Data, **options: Any) -> History:
        """Minimize the mean loss over the rows, from settings.beta on (`train_dpo`).

        Args:
            options: val_rows, evaluated after the update of every eval_every-th step, or at the end of each
                epoch; epochs; resume, which continues from the newest checkpoint of settings.run_dir: give
                model and ref_model as at the start.

        Returns:
            One row per step, measured before its update, by TRL's names: loss, rewards/chosen,
            rewards/rejected, rewards/margins, rewards/accuracies (a tie counts 0, as in TRL, but 1/2 in our
            reward models: at the start policy and reference tie on every pair), logps/chosen,
            logps/rejected (sums, nats); beta; for KTO kl (its reference point) and no accuracies; where the
            policy is sampled, objective/kl (nats per response, a sum over its tokens) and
            objective/kl_per_token. Rewards: beta log(pi / ref); for "orpo" and "simpo" beta times the mean
            log-prob, for "slic" the log-prob.

        Raises:
            ValueError: as `DPODataset`.
        """
        return train_dpo(self.run, rows, **options)

    def train_step(self, rows: Data) -> dict[str, float]:
        """Make one pass over `rows`, settings.batch_size of them per update (`dpo_pass`)."""
        return dpo_pass(self.run, rows)

    def evaluate(self, rows: Data) -> dict[str, float]:
        """Return loss and metrics as in `train`, on rows that are not trained on; names start with eval_."""
        return evaluate_dpo(self.run, self.dataset(rows), self.run.beta_controller.value)

    def get_log_probs(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "B"]:
        """Return log p(response | prompt) under the policy: sums with EOS, nats, with gradient."""
        return answer_logps(self.run, self.model, prompts, responses)

    def get_ref_log_probs(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "B"]:
        """Return the same under the reference, without gradient; ValueError if there is none."""
        return ref_answer_logps(self.run, prompts, responses)

    def save_model(self, folder: str | Path, **options: Any) -> None:
        """Write policy and tokenizer as a Hugging Face folder (`core.training.distributed.save_model`)."""
        save_model(self.model, folder, tokenizer=self.run.tokenizer, **options)

    def load_model(self, folder: str | Path) -> None:
        """Put saved weights into the policy (`load_policy`)."""
        load_policy(self.run, folder)
