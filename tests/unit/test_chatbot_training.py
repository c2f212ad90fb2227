"""Training a chatbot: which data give which stage, and that it learns."""

import pytest
import torch

from rlhf_helpers.chatbot_rlhf import AlignedChatbot, ChatbotTrainer, ChatSettings
from rlhf_helpers.core.training import TrainingSettings
from rlhf_helpers.dpo import DPOSettings
from rlhf_helpers.policy_optimization import RLOOSettings
from tests.conftest import share_of_e, weights

SMALL = ChatSettings(policy=RLOOSettings(max_new_tokens=6, prompts_per_step=2, samples_per_prompt=2))
ASKED = {"role": "user", "content": "a"}
PAIR = {"prompt": "Hello", "chosen": "Good day.", "rejected": "What?"}


def safe(prompts, responses, **columns):
    return torch.ones(len(prompts))


def bot(tiny, reward=share_of_e, **settings):
    return AlignedChatbot(tiny[0], reward, safety_fn=safe, max_new_tokens=6, n=2, **settings)


def trained(chatbot, data, epochs=1, settings=SMALL, **changes):
    trainer = ChatbotTrainer(chatbot, settings, **{"progress": False, **changes})
    return trainer.train(data, num_epochs=epochs), trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    "data, reward, stages",
    [
        (["Hello", "Bye"], share_of_e, ["policy"]),
        ([PAIR], share_of_e, ["sft", "policy"]),
        ([PAIR], None, ["sft", "pairs"]),
        ([{"prompt": "Hello", "response": "Good day."}], None, ["sft"]),
        ([{"messages": [ASKED, {"role": "assistant", "content": "b"}]}], None, ["sft"]),
        ([{"messages": [ASKED]}, "b"], share_of_e, ["policy"]),
    ],
)
def test_data_decide_the_stages(tiny, data, reward, stages):
    chatbot = bot(tiny, reward)
    before = weights(tiny[0])
    history, trainer = trained(chatbot, data, epochs=3)
    assert len(history) == 3
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert list(trainer.histories) == stages
    for stage in stages:
        assert len(trainer.histories[stage]) == 3
        assert any(key.startswith(f"{stage}/") for key in history[-1])
    assert torch.equal(weights(tiny[0]), before)  # the given model is left alone
    assert not torch.equal(weights(chatbot.model), before)


def test_a_row_is_the_mean_of_its_pass(tiny):
    history, trainer = trained(bot(tiny), ["a", "b", "c", "d"], epochs=2)
    scores = [row["objective/scores"] for row in trainer.histories["policy"]]
    assert len(scores) == 4
    assert history[0]["policy/objective/scores"] == pytest.approx((scores[0] + scores[1]) / 2)
    assert history[1]["policy/objective/scores"] == pytest.approx((scores[2] + scores[3]) / 2)


def test_the_last_message_of_an_assistant_is_the_answer(tiny, monkeypatch):
    from rlhf_helpers.chatbot_rlhf import training

    seen, talk = [], [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    monkeypatch.setattr(training, "sft", lambda model, tokenizer, rows, *_, **__: seen.extend(rows) or [{}])
    trained(bot(tiny, None), [{"messages": [{"role": r, "content": c} for r, c in talk]}])
    assert seen == [{"prompt": "User: a\n\nAssistant: b\n\nUser: c", "completion": "d"}]


@pytest.mark.parametrize(
    "data, told",
    [
        ([PAIR, {"prompt": " ", "response": "b"}], r"conversation_data\[1\].*prompt"),
        ([PAIR, {"prompt": "a", "response": ""}], r"\[1\].*completion must be"),
        ([PAIR, 7], r"\[1\].*got 7"),
        ([{**PAIR, "label": "up"}], r"\[0\].*label must be"),
        ([PAIR, {"prompt": "a", "label": True}], r"\[1\].*needs prompt and completion"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "label": True}], r"\[0\].*no rejected"),
        (["word " * 300], r"\[0\].*shorten"),
        ("Hello", "list of conversations"),
        ([], "nothing to learn"),
    ],
)
def test_faulty_data_are_named(tiny, data, told):
    chatbot = bot(tiny)
    before = weights(chatbot.model)
    with pytest.raises(ValueError, match=told):
        trained(chatbot, data)
    assert torch.equal(weights(chatbot.model), before)


def test_settings_reach_every_stage(tiny):
    trainer = ChatbotTrainer(bot(tiny), learning_rate=1e-9, seed=7)
    stages = (trainer.settings.sft, trainer.settings.policy, trainer.settings.pairs, trainer.settings.thumbs)
    assert {(s.learning_rate, s.seed) for s in stages} == {(1e-9, 7)}
    assert trainer.settings.thumbs.loss == "kto"
    with pytest.raises(TypeError, match="beta"):
        ChatbotTrainer(bot(tiny), beta=0.1)


THUMBS = [
    {"prompt": prompt, "completion": f"Well, {prompt}", "label": prompt in ("Hello", "Why?")}
    for prompt in ("Hello", "Bye", "Why?", "How?")
]


def test_thumbs_are_learned_from_beside_other_data(tiny, monkeypatch):
    seen = []
    real = ChatbotTrainer._prefer
    monkeypatch.setattr(
        ChatbotTrainer,
        "_prefer",
        lambda self, rows, *rest: seen.append(list(rows)) or real(self, rows, *rest),
    )
    history, trainer = trained(bot(tiny), THUMBS)
    assert seen == [THUMBS]
    assert history[-1]["thumbs"] == 4
    assert list(trainer.histories) == ["thumbs"], "a thumb is not a prompt to be answered"
    history, trainer = trained(bot(tiny), [*THUMBS, "Hello", "More"])
    assert seen[1] == THUMBS
    assert list(trainer.histories) == ["policy", "thumbs"]


def test_thumbs_on_one_prompt_are_left_out(tiny):
    with pytest.raises(ValueError, match="nothing to learn"):
        trained(bot(tiny), THUMBS[:1] * 2)
    history, trainer = trained(bot(tiny), [*THUMBS[:1], "Hello", "Bye"])
    assert history[-1]["thumbs"] == 0
    assert list(trainer.histories) == ["policy"]


def test_the_reward_is_scaled_and_unsafe_answers_cost(tiny, monkeypatch):
    from rlhf_helpers.chatbot_rlhf import training

    found = []
    monkeypatch.setattr(training, "rloo", lambda m, t, asked, reward, s, **_: found.append(reward) or [{}])
    chatbot = bot(tiny, lambda p, r, **k: 100 + 7 * share_of_e(p, r))
    trained(chatbot, ["Hello", "Bye"])
    scores = chatbot.reward(["a", "a"], ["e", "x"])
    assert (scores[0] - scores[1]) * chatbot.reward.std == pytest.approx(7, rel=1e-4)
    before = found[0](["a"], ["e"])
    chatbot = bot(tiny)
    chatbot.safety_fn = lambda prompts, responses, **columns: torch.full((len(prompts),), 0.1)
    trained(chatbot, ["Hello", "Bye"])
    assert (chatbot.reward(["a"], ["e"]) - found[1](["a"], ["e"])).item() == pytest.approx(2)
    assert before.shape == (1,)


@pytest.mark.slow
def test_it_learns_what_the_reward_likes(tiny):
    policy = RLOOSettings(learning_rate=3e-3, max_new_tokens=8, samples_per_prompt=16, kl_coef=0.0)
    settings = ChatSettings(policy=policy)
    chatbot = bot(tiny)
    asked = ["Hello", "How are you?", "What is this?", "Goodbye"]
    history, _ = trained(chatbot, asked, epochs=30, settings=settings)
    start, end = (history[i]["policy/objective/scores"] for i in (0, -1))
    assert end > start + 0.7  # in standard deviations of the untrained answers


def test_thumbs_move_the_policy_their_way(tiny):
    settings = ChatSettings(thumbs=DPOSettings(loss="kto", learning_rate=1e-3, batch_size=4))
    history, _ = trained(bot(tiny, None), THUMBS, epochs=8, settings=settings)
    assert history[0]["thumbs/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert history[-1]["thumbs/rewards/margins"] > 0.05
    assert isinstance(ChatSettings().sft, TrainingSettings)
