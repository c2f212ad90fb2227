"""Every prompt of the world, and answers to it from best to worst.

    load_prompts(["facts"], split="heldout")     the prompts of a family
    best_answer(prompt)                          the reference: nothing scores above it
    sample_answer(prompt, rng, quality="medium") an answer of a chosen quality
    sample_answer(prompt, rng)                   an answer as the unaligned assistant writes it

The held-out part is fixed. Facts, steps and opinions of held-out prompts are in the pretraining text (an
assistant knows things before anybody aligns it); held-out programs and articles combine known parts in ways
that no training text shows.

The sentences themselves are tables in assets/world; the modules here put prompts together from them.
"""

from rlhf_helpers.world.prompts.answers import best_answer, sample_answer
from rlhf_helpers.world.prompts.base import Prompt, split_sentences
from rlhf_helpers.world.prompts.registry import (
    CONVERSATION,
    FAMILIES,
    find_prompt,
    known_prompt,
    load_prompts,
    prompt_texts,
)
