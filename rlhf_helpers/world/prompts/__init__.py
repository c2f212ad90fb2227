"""Every prompt of the world, and answers to it from best to worst.

    load_prompts(["facts"], split="heldout")     the prompts of a family
    best_answer(prompt)                          the reference: nothing scores above it
    sample_answer(prompt, rng, quality="medium") an answer of a chosen quality
    sample_answer(prompt, rng)                   an answer as the unaligned assistant writes it

The held-out part is fixed. Facts, steps and opinions of held-out prompts are in the pretraining text (an
assistant knows things before anybody aligns it); held-out programs and articles combine known parts in ways
that no training text shows.
"""

from rlhf_helpers.world.prompts.answers import best_answer, sample_answer
from rlhf_helpers.world.prompts.base import Prompt, split_sentences
from rlhf_helpers.world.prompts.registry import CONVERSATION, FAMILIES, find_prompt, load_prompts

__all__ = [
    "CONVERSATION", "FAMILIES", "Prompt", "best_answer", "find_prompt", "load_prompts", "sample_answer", "split_sentences",
]  # fmt: skip
