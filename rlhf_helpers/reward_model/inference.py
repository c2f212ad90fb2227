"""A trained reward model in use: score pairs, rank answers."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_helpers.core.models import as_reward_fn, tokenizer_for
from rlhf_helpers.core.text import is_text


class RewardModelInference:
    """Scores and ranks with a reward model, batched and without gradient.

    Rewards order the answers to one prompt; across prompts, and as bare numbers, they mean nothing.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Take a model with `score(prompts, responses)`; it knows its tokenizer, which may be left out here.

        Raises ValueError where `tokenizer` has another vocabulary than the model's own (ids do not cross
        tokenizers), TypeError where the model has no `score`.
        """
        if tokenizer is not None and tokenizer.get_vocab() != tokenizer_for(model).get_vocab():
            raise ValueError(
                f"the tokenizer given ({len(tokenizer)} tokens) is not the model's own "
                f"({len(tokenizer_for(model))} tokens): leave it out"
            )
        self.model = model
        self._reward_fn = as_reward_fn(model)

    def batch_predict(self, pairs: Sequence[tuple[str, str]]) -> Float[Tensor, "B"]:
        """Rewards (B,) of (prompt, response) pairs, on the CPU; ValueError where one is not two texts."""
        if not pairs:
            raise ValueError("there are no pairs to score: give a list of (prompt, response)")
        for index, pair in enumerate(pairs):
            if isinstance(pair, str) or len(pair) != 2 or not all(map(is_text, pair)):
                raise ValueError(f"pair {index} must be two texts (prompt, response), got {pair!r}")
        prompts, responses = (list(side) for side in zip(*pairs, strict=True))
        return self._reward_fn(prompts, responses).cpu()

    def rank_responses(self, prompt: str, responses: Sequence[str]) -> list[tuple[str, float]]:
        """Responses with their rewards, best first, ties in their order; ValueError for no response."""
        rewards = self.batch_predict([(prompt, response) for response in responses]).tolist()
        return sorted(zip(responses, rewards, strict=True), key=lambda scored: -scored[1])
