"""A chatbot from data to thumbs: answering with memory and a guard, training in rounds, honest evaluation."""

# ruff: noqa: I001
from rlhf_helpers.chatbot_rlhf.chatbot import (
    FALLBACK, PERSONALITIES, AlignedChatbot, ChatReply, Personality, kept_turns,
)  # fmt: skip
from rlhf_helpers.chatbot_rlhf.evaluation import evaluate_chatbot, memory_questions, spoken
from rlhf_helpers.chatbot_rlhf.serving import ChatServer
from rlhf_helpers.chatbot_rlhf.training import ChatbotTrainer, ChatSettings
from rlhf_helpers.guards import pick_answer

__all__ = [
    "FALLBACK", "PERSONALITIES", "AlignedChatbot", "ChatReply", "ChatServer", "ChatSettings",
    "ChatbotTrainer", "Personality", "evaluate_chatbot", "kept_turns", "memory_questions", "pick_answer",
    "spoken",
]  # fmt: skip
