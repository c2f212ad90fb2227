"""The separate encoder: prompt and answer are read apart and meet only in the head."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from rlhf_helpers.core.models import encode_pair
from rlhf_helpers.core.tensors import pad_right
from rlhf_helpers.core.text import opening_ids
from rlhf_helpers.reward_model.model import RewardModel


class SeparateRewardModel(RewardModel):
    """One trunk reads the prompt and the answer apart: `model(prompt_ids, response_ids)` -> rewards (B,).

    r(x, y) = w . [h(x), h(y), h(x) * h(y)] + b, with h the pooled hidden state of one text

    The term of h(x) alone cancels in every comparison of two answers, that of h(y) alone knows no prompt:
    what fits the prompt is seen by the product only. A prompt is read once however many answers it has, and
    vectors can be stored; but no token of the answer ever looks at one of the prompt, as all do in
    `RewardModel` (bi-encoders against cross-encoders: Humeau et al. 2020). Arguments as in `RewardModel`.
    Lesson 1.
    """

    kind, vectors = "separate", 3

    def forward(
        self,
        prompt_ids: Int[Tensor, "B P"],
        response_ids: Int[Tensor, "B T"],
        prompt_mask: Shaped[Tensor, "B P"] | None = None,
        response_mask: Shaped[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B"]:
        """Rewards (B,), float32; padding and masks as in `RewardModel.forward`."""
        return self._compare(self._read(prompt_ids, prompt_mask), self._read(response_ids, response_mask))

    def _compare(self, prompts: Float[Tensor, "B d"], responses: Float[Tensor, "B d"]) -> Float[Tensor, "B"]:
        return self._judge(torch.cat([prompts, responses, prompts * responses], 1)).squeeze(-1)

    def encode(self, prompt: str, response: str) -> list[int]:
        """[P, *prompt ids, *response ids]: the first number says how many of them are the prompt's."""
        prompt_ids, response_ids = encode_pair(self.tokenizer, prompt, response, max_length=self.max_length)
        return [len(prompt_ids), *prompt_ids, *opening_ids(self.tokenizer), *response_ids]

    def rewards_of(self, sequences: Sequence[Sequence[int]]) -> Float[Tensor, "B"]:
        """Rewards of sequences from `encode`, each distinct prompt read once; keeps the gradient."""
        prompts = [tuple(row[1 : 1 + row[0]]) for row in sequences]
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        pad, device = self.tokenizer.pad_token_id, self.trunk.device
        vectors = self._read(*pad_right(list(places), pad, device=device))
        responses = self._read(*pad_right([row[1 + row[0] :] for row in sequences], pad, device=device))
        return self._compare(vectors[[places[prompt] for prompt in prompts]], responses)
