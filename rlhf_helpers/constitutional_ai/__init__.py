"""Constitutional AI: written principles instead of labels; a model that criticises and revises itself."""

from rlhf_helpers.constitutional_ai.constitution import (
    CHAT_TEMPLATES,
    CONSTITUTIONS,
    Constitution,
    Templates,
    create_constitution,
)
from rlhf_helpers.constitutional_ai.revision import (
    ConstitutionalAI,
    IterativeConstitutionalAI,
    MultiAgentConstitutionalAI,
    evaluate_alignment,
    follow_scores,
)
from rlhf_helpers.constitutional_ai.training import (
    ConstitutionalAITrainer,
    ConstitutionalSettings,
    constitutional_labels,
    soft_label,
    soft_preference_loss,
)
