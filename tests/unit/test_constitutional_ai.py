"""Constitutional AI: what asks for a revision, what is kept, and that a model learns from itself."""

import math
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from rlhf_helpers.constitutional_ai import (
    CHAT_TEMPLATES,
    CONSTITUTIONS,
    ConstitutionalAI,
    ConstitutionalAITrainer,
    ConstitutionalSettings,
    IterativeConstitutionalAI,
    MultiAgentConstitutionalAI,
    Templates,
    constitutional_labels,
    create_constitution,
    evaluate_alignment,
    follow_scores,
    soft_label,
    soft_preference_loss,
)
from rlhf_helpers.core.choices import choice_logps
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.preference_losses import bradley_terry_loss
from rlhf_helpers.core.training import TrainingSettings
from rlhf_helpers.policy_optimization import RLOOSettings
from rlhf_helpers.preference_data import ai_labels
from rlhf_helpers.reward_model import RewardSettings
from rlhf_helpers.world.gold_judge import gold_scores
from rlhf_helpers.world.prompts import load_prompts, meta
from tests.conftest import weights

SAFE = create_constitution(["Avoid harmful content"])
HARMFUL = [p.text for p in load_prompts(("harmful", "privacy"), "heldout")]
HARMLESS = [p.text for p in load_prompts(("facts", "lookalike"), "heldout")][:9]


@pytest.fixture(scope="module")
def assistant():
    return load_model("tiny", device="cpu")


def harmlessness(prompts, responses):
    return gold_scores(prompts, responses)["harmlessness"].mean().item()


# ---- the constitution


def test_known_rules_have_an_axis_and_others_are_their_own():
    made = create_constitution(["Avoid harmful content.", "Speak like a pirate"], weights=[1, 4])
    assert [(p.text, p.axis, p.weight) for p in made.principles] == [
        ("Avoid harmful content", "harmless", 0.25),
        ("Speak like a pirate", "Speak like a pirate", 1.0),
    ]
    assert made.texts == ["Avoid harmful content", "Speak like a pirate"]


def test_presets_hold_rules_that_the_assistant_was_taught():
    assert len(CONSTITUTIONS) >= 3
    for constitution in CONSTITUTIONS.values():
        assert set(constitution.texts) <= set(meta.PRINCIPLES)
        assert max(p.weight for p in constitution.principles) == 1
    assert CONSTITUTIONS["guide"].texts == [
        "Be helpful and honest",
        "Avoid harmful content",
        "Respect user privacy",
        "Provide accurate information",
    ]


@pytest.mark.parametrize(
    "rules, weights, message",
    [
        ([], None, "at least one rule"),
        ("Be kind", None, "list of at least one rule"),
        (["Be kind", "Be kind."], None, "different texts"),
        (["Be kind", " . "], None, "say something"),
        (["Be kind"], [1, 2], "1 positive numbers"),
        (["Be kind", "Be fair"], [1, 0], "positive"),
    ],
)
def test_constitution_refuses(rules, weights, message):
    with pytest.raises(ValueError, match=message):
        create_constitution(rules, weights=weights)


def test_templates_show_all_that_they_are_given():
    rule = create_constitution(["Be kind"]).principles[0]
    for templates in (Templates(), CHAT_TEMPLATES):
        assert all(text in templates.critique("Q?", "Ans", "Be kind") for text in ("Q?", "Ans", "Be kind"))
        assert all(text in templates.revision("Q?", "Ans", "Bad") for text in ("Q?", "Ans", "Bad"))
        asked = templates.comparison("Q?", "One", "Two", rule)
        assert asked.index("Q?") < asked.index("One") < asked.index("Two")
        assert "Be kind" in asked
    assert Templates().comparison("Q?", "One", "Two", SAFE.principles[0]).endswith("more harmless, A or B?")
    assert Templates().verdict(rule) == "No. It breaks the rule: Be kind."
    assert Templates().verdict(SAFE.principles[0]) == "No. It helps to do harm."


# ---- the critic


def test_scores_of_a_model_are_its_own_yes_against_no(assistant):
    model, tokenizer = assistant
    asked = meta.critique_text(HARMFUL[0], "Sure, here is how.", "Avoid harmful content")
    yes, no = choice_logps(model, tokenizer, [asked], ("Yes.", "No."))[0].tolist()
    scores = follow_scores(model, HARMFUL[:1], ["Sure, here is how."], SAFE)
    assert scores.shape == (1, 1)
    assert scores.item() == pytest.approx(1 / (1 + math.exp(no - yes)), abs=1e-5)
    refused = follow_scores(model, HARMFUL[:1], ["I cannot help with that."], SAFE)
    assert refused.item() > 0.5 > scores.item()


def test_a_function_is_asked_once_a_rule():
    rules = create_constitution(["First", "Second"])

    def critic(prompts, responses, rule):
        return torch.tensor([0.25, 1.0]) if rule == "First" else torch.zeros(2)

    assert follow_scores(critic, ["p", "q"], ["a", "b"], rules).tolist() == [[0.25, 0], [1, 0]]
    for wrong in (torch.tensor([0.5]), torch.tensor([0.5, 1.5]), torch.tensor([0.5, math.nan])):
        with pytest.raises(ValueError, match=r"2 numbers in \[0, 1\]"):
            follow_scores(lambda *row, wrong=wrong: wrong, ["p", "q"], ["a", "b"], rules)


def test_a_model_as_critic_is_measured_in_its_wording(assistant, tiny):
    model = assistant[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConstitutionalAI(model, SAFE)
    for guessing in ({"critic": tiny[0]}, {"templates": CHAT_TEMPLATES}):
        with pytest.warns(UserWarning, match="(tiny|assistant).* cannot tell safe from unsafe"):
            ConstitutionalAI(model, SAFE, **guessing)


# ---- revising


def scripted(monkeypatch, **said):
    """Replace sampling: the reviser says what `said` maps the text it revises to; returns its requests."""
    requests = []

    def write(self, model, prompts, **options):
        requests.append(list(prompts))
        return [said.get(prompt, "draft") for prompt in prompts]

    monkeypatch.setattr(ConstitutionalAI, "_write", write)
    return requests


PLAIN = Templates(revision=lambda question, answer, critique: answer)
WORTH = {"draft": 0.2, "better": 0.7, "worse": 0.4, "best": 0.9}


def worth(prompts, responses, rule):
    return torch.tensor([WORTH[response] for response in responses])


def test_the_loop_stops_where_the_rules_are_satisfied(monkeypatch, assistant):
    requests = scripted(monkeypatch, draft="worse", worse="better", better="best")
    found = ConstitutionalAI(assistant[0], SAFE, 0.5, worth, templates=PLAIN, rounds=5)
    answer = found.generate_batch(["Hi"])[0]
    assert answer.answers == ("draft", "worse", "better")
    assert (answer.draft, answer.answer, answer.revised) == ("draft", "better", True)
    assert answer.critiques == (("Avoid harmful content", "No. It helps to do harm."),) * 2
    assert answer.before["Avoid harmful content"] == pytest.approx(0.2)
    assert answer.after["Avoid harmful content"] == pytest.approx(0.7)
    assert requests == [["Hi"], ["draft"], ["worse"]]


def test_iterative_keeps_the_best_that_it_saw(monkeypatch, assistant):
    scripted(monkeypatch, draft="better", better="worse", worse="worse")
    iterative = IterativeConstitutionalAI(
        assistant[0], constitution=SAFE, criterion=0.8, max_rounds=3, critic=worth, templates=PLAIN
    )
    answer = iterative.generate_batch(["Hi"])[0]
    assert answer.answers == ("draft", "better", "worse", "worse")
    assert answer.answer == "better"
    last = ConstitutionalAI(assistant[0], SAFE, 0.8, worth, templates=PLAIN, rounds=3)
    assert last.generate("Hi") == "worse"


def test_the_rule_furthest_below_its_mark_is_criticised(monkeypatch, assistant):
    rules = create_constitution(["First", "Second", "Third"], weights=[1, 1, 0.1])
    scores = {"First": 0.3, "Second": 0.2, "Third": 0.06}  # marks 0.5, 0.5, 0.05: the third is satisfied
    scripted(monkeypatch)
    found = ConstitutionalAI(
        assistant[0], rules, 0.5, lambda p, r, rule: torch.tensor([scores[rule]]), templates=PLAIN
    )
    assert [rule for rule, _ in found.generate_batch(["Hi"])[0].critiques] == ["Second"]
    alone = ConstitutionalAI(assistant[0], rules, 0.5, lambda p, r, rule: torch.tensor([0.51]))
    assert not alone.generate_batch(["Hi"])[0].revised


@pytest.mark.slow
def test_strength_zero_changes_nothing_one_always_asks(assistant):
    model, tokenizer = assistant
    drafts = generate(model, tokenizer, HARMFUL, max_new_tokens=64, seed=3).responses
    never = ConstitutionalAI(model, SAFE, 0.0, lambda p, r, rule: torch.zeros(len(p)), seed=3)
    assert [a.answer for a in never.generate_batch(HARMFUL)] == drafts
    always = ConstitutionalAI(model, SAFE, 1.0, lambda p, r, rule: torch.ones(len(p)), seed=3)
    found = always.generate_batch(HARMFUL)
    assert [a.draft for a in found] == drafts
    assert all(a.revised for a in found)
    assert [a.answer for a in always.generate_batch(HARMFUL, drafts=drafts, seed=3)] == [
        a.answer for a in found
    ]


@pytest.mark.slow
def test_more_strength_revises_more_and_harms_less(assistant):
    model, tokenizer = assistant
    asked = HARMFUL * 3
    drafts = generate(model, tokenizer, asked, max_new_tokens=64, seed=0).responses
    shares, gold = [], []
    for strength in (0.0, 0.1, 0.5, 0.9):
        found = ConstitutionalAI(model, SAFE, strength).generate_batch(asked, drafts=drafts)
        shares.append(sum(a.answer != a.draft for a in found) / len(found))
        gold.append(harmlessness(asked, [a.answer for a in found]))
    assert all(more > less for less, more in pairwise(shares))
    assert shares[0] == 0
    assert shares[3] > 0.5
    assert gold[2] > gold[0] + 0.25, "asked where the critic says No, harm goes down"


def test_each_part_is_done_by_its_own_model(assistant, tiny):
    model, small = assistant[0], tiny[0]
    agents = MultiAgentConstitutionalAI(
        generator=small,
        critic=model,
        reviser=model,
        constitution=SAFE,
        critique_strength=1.0,
        max_new_tokens=8,
    )
    answer = agents.generate_batch(["Hello"])[0]
    assert answer.draft == generate(*tiny, ["Hello"], max_new_tokens=8, seed=0).responses[0]
    _, critique = answer.critiques[0]
    assert critique.split()[0] in ("Yes.", "No.")
    text = meta.revision_text("Hello", answer.draft, critique)
    assert answer.answer == generate(*assistant, [text], max_new_tokens=8, seed=1).responses[0]


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_refuses_a_strength(assistant, strength):
    with pytest.raises(ValueError, match="critique_strength must be"):
        ConstitutionalAI(assistant[0], SAFE, strength)


def test_refuses_what_is_no_constitution(assistant):
    with pytest.raises(ValueError, match="create_constitution"):
        ConstitutionalAI(assistant[0], ["Be kind"])


@pytest.mark.slow
def test_evaluation_reports_critic_and_gold(assistant):
    model, tokenizer = assistant
    report = evaluate_alignment(model, HARMFUL, CONSTITUTIONS["guide"], seed=1)
    said = generate(model, tokenizer, HARMFUL, max_new_tokens=64, seed=1).responses
    assert report["n"] == len(HARMFUL)
    assert report["gold"]["harmlessness"] == pytest.approx(harmlessness(HARMFUL, said))
    assert list(report["principles"]) == CONSTITUTIONS["guide"].texts
    assert report["lowest"] <= min(report["principles"].values())
    given = {"critic": lambda p, r, rule: torch.full((len(p),), 0.5)}
    judged = evaluate_alignment(model, ["Ahoy"], SAFE, gold=False, **given)
    assert judged["principles"] == {"Avoid harmful content": 0.5}
    assert "gold" not in judged
    with pytest.raises(ValueError, match="no prompt"):
        evaluate_alignment(model, ["Ahoy"], SAFE, **given)


# ---- labels and losses


def test_soft_label_by_hand():
    a, b = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([-2.0, -2.0, -3.0])
    swapped_a, swapped_b = torch.tensor([-3.0, -2.0, 0.0]), torch.tensor([-1.0, -2.0, -3.0])
    # (1 + 2) / 2 = 1.5; a tie; always A, whatever stands there: nothing is left of it.
    assert soft_label(a, b, swapped_a, swapped_b).tolist() == pytest.approx([0.817574, 0.5, 0.5], abs=1e-6)
    turned = soft_label(swapped_a, swapped_b, a, b)
    assert torch.allclose(soft_label(a, b, swapped_a, swapped_b), 1 - turned)
    with pytest.raises(ValueError, match="shape"):
        soft_label(a, b, swapped_a[:, None], swapped_b)


def test_soft_loss_by_hand_and_its_lowest_point():
    rewards, zero, sure = torch.tensor([2.0, -1.0]), torch.zeros(2), torch.ones(2)
    torch.testing.assert_close(
        soft_preference_loss(rewards, zero, margin=sure), bradley_terry_loss(rewards, zero)
    )
    # 0.75 ln(1 + e^-2) + 0.25 ln(1 + e^2) = 0.75 * 0.126928 + 0.25 * 2.126928
    loss = soft_preference_loss(rewards[:1], zero[:1], margin=torch.tensor([0.75]))
    assert loss.item() == pytest.approx(0.626928, abs=1e-5)
    gap = torch.tensor([math.log(3.0)], requires_grad=True)  # sigmoid = 0.75: the label itself
    soft_preference_loss(gap, torch.zeros(1), margin=torch.tensor([0.75])).sum().backward()
    assert gap.grad.item() == pytest.approx(0, abs=1e-6)


def test_labels_are_those_of_ai_labels_in_the_words_of_a_rule(assistant):
    model, tokenizer = assistant
    rows = [
        {"prompt": p, "first": "I cannot help with that.", "second": "Sure, here is how."} for p in HARMFUL
    ]
    rule = create_constitution(["Be better"])
    words = Templates(comparison=lambda q, a, b, principle: meta.comparison_text(q, a, b))
    found = constitutional_labels(model, rows, rule, templates=words)
    torch.testing.assert_close(found, ai_labels(model, tokenizer, rows))
    safer = constitutional_labels(model, rows, SAFE)
    assert (safer > 0.6).all()
    turned = [{**row, "first": row["second"], "second": row["first"]} for row in rows]
    torch.testing.assert_close(constitutional_labels(model, turned, SAFE), 1 - safer)


# ---- training

QUIET = {"progress": False}
SMALL = ConstitutionalSettings(
    drafts_per_prompt=2,
    rounds=2,
    sft=TrainingSettings(learning_rate=1e-3, **QUIET),
    sft_epochs=3,
    pairs_per_prompt=1,
    reward=RewardSettings(epochs=1, **QUIET),
    policy=RLOOSettings(learning_rate=1e-3, steps=2, prompts_per_step=4, **QUIET),
)


@pytest.mark.slow
def test_first_answers_learn_from_revised_ones(assistant):
    """Harmlessness of first answers to held-out requests: 0.4 at the start, the revisions' own at the end."""
    model, tokenizer = assistant
    before = weights(model)
    prompts = [p.text for p in load_prompts(("harmful", "privacy"), "train")][::2]
    trainer = ConstitutionalAITrainer(model, SAFE, settings=replace(SMALL, rounds=3))
    revisions = trainer.revise(prompts)
    assert [a.prompt for a in revisions[:4]] == [prompts[0]] * 2 + [prompts[1]] * 2
    history = trainer.supervised(revisions)
    assert history[-1]["loss"] < history[0]["loss"]
    assert torch.equal(before, weights(model)), "the given model is not changed"
    asked = HARMFUL * 5
    first, trained = (
        harmlessness(asked, generate(m, tokenizer, asked, max_new_tokens=64, seed=5).responses)
        for m in (model, trainer.sft_model)
    )
    assert first < 0.6
    assert trained > first + 0.25


@pytest.mark.slow
def test_train_runs_every_phase(assistant):
    model, _ = assistant
    trainer = ConstitutionalAITrainer(model, SAFE, settings=replace(SMALL, sft_epochs=1, rounds=1))
    run = trainer.train(HARMFUL[:4] + HARMLESS[:4])
    assert set(run["histories"]) == {"supervised", "reward", "policy"}
    assert len(run["histories"]["policy"]) == 2
    assert all(0.5 <= row["margin"] <= 1 for row in run["labels"])
    assert any(row["margin"] < 0.99 for row in run["labels"]), "the labels stay soft"
    assert run["reward_model"].score([HARMLESS[0]], ["Yes."]).shape == (1,)
    assert not torch.equal(weights(run["model"]), weights(run["sft_model"]))
    assert not torch.equal(weights(model), weights(run["sft_model"]))
