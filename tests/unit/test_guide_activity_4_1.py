"""Activity 4.1 as the hands-on guide calls it: on "tiny" and on models that the world knows nothing of."""

import pytest

from rlhf_helpers.chatbot_rlhf import AlignedChatbot, ChatbotTrainer, ChatSettings
from rlhf_helpers.policy_optimization import RLOOSettings
from rlhf_helpers.reward_model import create_reward_model


@pytest.mark.filterwarnings("ignore:.* cannot tell safe from unsafe answers")  # the random models
@pytest.mark.parametrize("name", ["tiny", "tiny_gpt2_dir", "tiny_llama_dir"])
def test_activity_4_1(name, request):
    name = name if name == "tiny" else str(request.getfixturevalue(name))
    reward_model = create_reward_model("basic", base_model_name=name)
    chat_data = [
        "How are you?",
        {"prompt": "Hello!", "chosen": "Hello to you!", "rejected": "What do you want?"},
    ]

    chatbot = AlignedChatbot(base_model=name, reward_model=reward_model, safety_threshold=0.7)
    short = ChatSettings(policy=RLOOSettings(max_new_tokens=8, samples_per_prompt=2))
    trainer = ChatbotTrainer(chatbot, short, progress=False)
    training_history = trainer.train(conversation_data=chat_data, num_epochs=5)
    response = chatbot.generate_response("What is the meaning of life?")

    assert len(training_history) == 5
    assert {"sft/loss", "policy/objective/scores"} <= set(training_history[-1])
    assert isinstance(response, str)
    assert response.strip()
    reply = chatbot.replies[-1]
    assert reply.allowed == (reply.score >= 0.7)
    assert reply.error is None
    assert len(reply.candidates) == 4
    assert (response == chatbot.fallback) or reply.allowed
