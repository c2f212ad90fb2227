"""A chatbot from data to server: answering with memory and a guard, training, honest evaluation."""

from rlhf_helpers.chatbot_rlhf.chatbot import (
    FALLBACK,
    PERSONALITIES,
    AlignedChatbot,
    Personality,
)
from rlhf_helpers.chatbot_rlhf.evaluation import evaluate_chatbot, memory_questions, with_history
from rlhf_helpers.chatbot_rlhf.serving import ChatServer
from rlhf_helpers.chatbot_rlhf.training import ChatbotTrainer, ChatSettings
from rlhf_helpers.guards import pick_answer
