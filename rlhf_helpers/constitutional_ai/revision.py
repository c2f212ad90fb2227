"""Draft, critique, revise: a model that holds its own answers against written principles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.alignment_eval.judges import ask_judge, model_judge
from rlhf_helpers.alignment_eval.measuring import sample_answers
from rlhf_helpers.constitutional_ai.constitution import Constitution, Principle, Templates
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.guards import measured_check
from rlhf_helpers.world.gold_judge import gold_scores

# A language model, or a function (prompts, responses, text of a principle) -> (B,) in [0, 1].
Critic = nn.Module | Callable[[list[str], list[str], str], Tensor]
CRITIQUE_TOKENS = 24


@dataclass(frozen=True)
class Answer:
    """What became of one prompt.

    answers: the draft and what each revision made of it; answer: the one kept. critiques: (rule, critique),
    one per revision. before, after: P(follows) of each rule, of the draft and of the answer.
    """

    prompt: str
    draft: str
    answer: str
    answers: tuple[str, ...]
    critiques: tuple[tuple[str, str], ...]
    before: dict[str, float]
    after: dict[str, float]

    @property
    def revised(self) -> bool:
        """Whether any principle asked for a revision."""
        return bool(self.critiques)


def follow_scores(
    critic: Critic,
    prompts: Sequence[str],
    responses: Sequence[str],
    constitution: Constitution,
    *,
    templates: Templates | None = None,
) -> Float[Tensor, "B K"]:
    """P(follows), (B, K) in [0, 1], of B answers under K principles, without gradient, on the CPU. Lesson 3.

    Of a language model: p("Yes.") / (p("Yes.") + p("No.")) in reply to templates.critique (`model_judge`).

    Raises:
        ValueError: a function gives no (B,) of such numbers.
    """
    prompts, responses = list(prompts), list(responses)
    templates = templates or Templates()
    by_model = isinstance(critic, nn.Module)
    judge = model_judge(critic, text=templates.critique, verdicts=templates.verdicts) if by_model else critic
    scores = []
    for rule in constitution.texts:
        asked = [rule] * len(prompts) if by_model else rule  # a function takes one rule for all rows
        scores.append(torch.tensor(ask_judge(judge, prompts, responses, asked)).float())
    return torch.stack(scores, 1)


class ConstitutionalAI:
    """Answers through drafts that are criticised and revised; no model is changed.

    critique_strength s in [0, 1]: rule k asks for a revision of an answer where P(follows k) <= s w_k, w_k
    its weight. So 0 never asks, and the answer is exactly the draft; 1 always asks; more strength asks no
    less often; 0.5 asks where the critic says No rather than Yes. Of several rules that ask, the one furthest
    below its mark is criticised; `rounds` times at most, and an answer that satisfies all is left alone. Bai
    et al. 2022 drew a rule at random and always revised.

    A model as critic is measured first (`guards.measured_check`), in the wording of `templates`: where it may
    be guessing, a UserWarning names it.
    """

    def __init__(
        self,
        base_model: nn.Module,
        constitution: Constitution,
        critique_strength: float = 0.5,
        critic: Critic | None = None,
        *,
        reviser: nn.Module | None = None,
        rounds: int = 1,
        keep_best: bool = False,
        templates: Templates | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
    ) -> None:
        """Take the models, which must know their tokenizers.

        Args:
            base_model: Writes the drafts.
            constitution: From `create_constitution`.
            critique_strength: In [0, 1], see the class.
            critic: None: the base model itself; another model, which writes its likeliest critique; or a
                function, which has no words (`Templates.verdict` stands in).
            reviser: None: the base model.
            rounds: Revisions of a draft at most.
            keep_best: Keep the answer whose worst rule is furthest above its mark, of a tie the first;
                otherwise the last.
            templates: The texts of the questions; None: the tiny assistant's own wording.
            max_new_tokens: Of an answer.
            seed: Of sampling.

        Raises:
            ValueError: the strength is outside [0, 1], rounds < 0, or there is no constitution.
        """
        require_number("critique_strength", critique_strength, at_least=0, at_most=1)
        require_number("rounds", rounds, at_least=0)
        if not isinstance(constitution, Constitution):
            raise ValueError(f"constitution must come from create_constitution, got {constitution!r}")
        self.base_model = base_model
        self.constitution = constitution
        self.critic = critic or base_model
        self.reviser = reviser or base_model
        self.critique_strength = critique_strength
        self.rounds = rounds
        self.keep_best = keep_best
        self.templates = templates or Templates()
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        if isinstance(self.critic, nn.Module):
            measured_check(self.critic, wordings=[(self.templates.critique, self.templates.verdicts)])

    def generate(self, prompt: str, *, seed: int | None = None) -> str:
        """Answer one prompt; seed None: that of the object."""
        return self.generate_batch([prompt], seed=seed)[0].answer

    def generate_batch(
        self, prompts: Sequence[str], *, drafts: Sequence[str] | None = None, seed: int | None = None
    ) -> list[Answer]:
        """Answer several prompts, with all that was thought on the way; drafts: given ones to start from."""
        seed, rules = self.seed if seed is None else seed, self.constitution.principles
        drafts = self._write(self.base_model, prompts, seed=seed) if drafts is None else list(drafts)
        marks = self.critique_strength * torch.tensor([rule.weight for rule in rules])
        trails, critiques = [[draft] for draft in drafts], [[] for _ in prompts]
        scores = [[row] for row in self.score(prompts, drafts)]
        for turn in range(self.rounds if self.critique_strength > 0 else 0):
            shortfall = marks - torch.stack([row[-1] for row in scores])
            asked = (shortfall.amax(1) >= 0).nonzero().flatten().tolist()
            if not asked:
                break
            texts, last = [prompts[i] for i in asked], [trails[i][-1] for i in asked]
            worst = [rules[k] for k in shortfall[asked].argmax(1).tolist()]
            said = self._criticise(texts, last, worst)
            wanted = [self.templates.revision(*row) for row in zip(texts, last, said, strict=True)]
            revised = self._write(self.reviser, wanted, seed=seed + 1 + turn)
            for place, found in enumerate(self.score(texts, revised)):
                trails[asked[place]].append(revised[place])
                scores[asked[place]].append(found)
                critiques[asked[place]].append((worst[place].text, said[place]))
        return [self._answer(*row, marks) for row in zip(prompts, trails, scores, critiques, strict=True)]

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "B K"]:
        """P(follows) under the critic, `follow_scores`."""
        return follow_scores(self.critic, prompts, responses, self.constitution, templates=self.templates)

    def _answer(
        self, prompt: str, trail: list[str], scores: list[Tensor], critiques: list, marks: Tensor
    ) -> Answer:
        best = int(torch.stack([(row - marks).min() for row in scores]).argmax())
        kept, rules = best if self.keep_best else len(trail) - 1, self.constitution.texts
        before, after = (dict(zip(rules, scores[i].tolist(), strict=True)) for i in (0, kept))
        return Answer(prompt, trail[0], trail[kept], tuple(trail), tuple(critiques), before, after)

    def _criticise(self, prompts: list[str], responses: list[str], rules: list[Principle]) -> list[str]:
        if not isinstance(self.critic, nn.Module):
            return [self.templates.verdict(rule) for rule in rules]
        rows = zip(prompts, responses, rules, strict=True)
        asked = [self.templates.critique(prompt, answer, rule.text) for prompt, answer, rule in rows]
        return self._write(self.critic, asked, max_new_tokens=CRITIQUE_TOKENS, greedy=True)

    def _write(self, model: nn.Module, prompts: Sequence[str], **options: Any) -> list[str]:
        options = {"max_new_tokens": self.max_new_tokens, **options}
        return sample_answers(model, list(prompts), **options)


class MultiAgentConstitutionalAI(ConstitutionalAI):
    """`ConstitutionalAI` by three models; critic: a model or a function. Lesson 3.

    A critic that did not write the answer does not share its blind spots; it may have others.
    """

    def __init__(self, generator: nn.Module, critic: Critic, reviser: nn.Module, **options: Any) -> None:
        """Take the other keywords of `ConstitutionalAI`, constitution= among them, and raise what it does."""
        super().__init__(generator, critic=critic, reviser=reviser, **options)


class IterativeConstitutionalAI(ConstitutionalAI):
    """`ConstitutionalAI` that revises until P(follows k) > criterion w_k for every rule k. Lesson 3.

    It gives up after max_rounds; the best answer on the way is kept, by the critic's scores: a later one may
    be worse. Takes the other keywords of `ConstitutionalAI`, constitution= among them.
    """

    def __init__(
        self, base_model: nn.Module, criterion: float = 0.5, max_rounds: int = 4, **options: Any
    ) -> None:
        """Raise what `ConstitutionalAI` raises."""
        options |= {"critique_strength": criterion, "rounds": max_rounds, "keep_best": True}
        super().__init__(base_model, **options)


def evaluate_alignment(
    model: nn.Module,
    prompts: Sequence[str],
    constitution: Constitution,
    *,
    critic: Critic | None = None,
    gold: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Sample one answer to each prompt and say how well they follow the constitution. Lesson 3.

    Args:
        model: The policy.
        prompts: At least one.
        constitution: From `create_constitution`.
        critic: A learned judge; None: the model itself, which flatters what it was trained to please.
        gold: False for prompts that are not the world's.
        seed: Of sampling.

    Returns:
        principles (text -> mean P(follows)) and lowest (mean of each answer's worst), by the critic; gold
        (axis -> mean, by the world's judge); n answers.

    Raises:
        ValueError: gold is asked for prompts that are not the world's.
    """
    # With strength 0 nothing is revised: every answer is a scored draft.
    answers = ConstitutionalAI(model, constitution, 0.0, critic, seed=seed).generate_batch(prompts)
    scores = pd.DataFrame([answer.before for answer in answers])
    report = {
        "principles": scores.mean().to_dict(),
        "lowest": scores.min(axis=1).mean(),
        "n": len(answers),
    }
    if gold:
        truth = gold_scores(prompts, [a.answer for a in answers])
        report["gold"] = {axis: values.mean().item() for axis, values in truth.items()}
    return report
