"""The separate encoder: prompt and answer are read apart and meet only in the head."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from rlhf_helpers.core.tensors import pad_right
from rlhf_helpers.core.text import encode_answers, opening_ids
from rlhf_helpers.reward_model.model import RewardModel, distinct_rows


class SeparateRewardModel(RewardModel):
    """One trunk reads the prompt and the answer apart: `model(prompt_ids, response_ids)` -> rewards (B,).

    r(x, y) = w . [h(x), h(y), h(x) * h(y)] + b, with h the pooled hidden state of one text

    The term of h(x) alone cancels in every comparison of two answers, that of h(y) alone knows no prompt:
    what fits the prompt is seen by the product only. A prompt is read once however many answers it has, and
    vectors can be stored; but no token of the answer ever looks at one of the prompt, as all do in
    `RewardModel` (bi-encoders against cross-encoders: Humeau et al. 2020). Arguments as in `RewardModel`.
    Lesson 1.
    """

    kind = "separate"
    num_hidden_inputs = 3

    def forward(
        self,
        prompt_ids: Int[Tensor, "B P"],
        response_ids: Int[Tensor, "B T"],
        prompt_mask: Shaped[Tensor, "B P"] | None = None,
        response_mask: Shaped[Tensor, "B T"] | None = None,
        prompt_index: list[int] | None = None,
    ) -> Float[Tensor, "B"]:
        """Rewards (B,), float32; padding and masks as in `RewardModel.forward`.

        prompt_index: which row of prompt_ids is the prompt of each response; None: they come in pairs.
        """
        prompts = self._read(prompt_ids, prompt_mask)
        responses = self._read(response_ids, response_mask)
        if prompt_index is not None:
            prompts = prompts[prompt_index]
        return self._judge(torch.cat([prompts, responses, prompts * responses], 1)).sum(-1)  # of one column

    def encode_answers(self, prompt: str, responses: Sequence[str]) -> list[list[int]]:
        """[P, *prompt ids, *response ids] of each response: the first number counts the prompt's ids."""
        prompt_ids, answers = encode_answers(self.tokenizer, prompt, responses, max_length=self.max_length)
        head = [len(prompt_ids), *prompt_ids, *opening_ids(self.tokenizer)]
        return [head + ids for ids in answers]

    def _batch(self, sequences: Sequence[list[int]]) -> dict[str, Any]:
        """Lay out sequences for `forward`: each distinct prompt once, and the prompt of each response."""
        prompts, prompt_index = distinct_rows([row[1 : 1 + row[0]] for row in sequences])
        pad, device = self.tokenizer.pad_token_id, self.trunk.device
        prompt_ids, prompt_mask = pad_right(prompts, pad, device=device)
        response_ids, response_mask = pad_right([row[1 + row[0] :] for row in sequences], pad, device=device)
        return {
            "prompt_ids": prompt_ids,
            "response_ids": response_ids,
            "prompt_mask": prompt_mask,
            "response_mask": response_mask,
            "prompt_index": prompt_index,
        }
