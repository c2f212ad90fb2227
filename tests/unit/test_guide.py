"""The hands-on guide's activities with its own keywords, on "tiny" and on small models of other shapes.

The guide leaves names such as tokenizer, language_model or safety_data undefined; fixtures stand for them.
"""

import importlib
import math
from itertools import pairwise

import pytest
import torch
from datasets import Dataset

from rlhf_helpers.alignment_eval import comprehensive_evaluation
from rlhf_helpers.chatbot_rlhf import AlignedChatbot, ChatbotTrainer, ChatSettings
from rlhf_helpers.code_generation import FALLBACK, CodeSafetyEvaluator, SafeCodeGenerator
from rlhf_helpers.constitutional_ai import ConstitutionalAI, create_constitution
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import frozen_copy, load_encoder, load_model
from rlhf_helpers.core.training import memory_efficient_training
from rlhf_helpers.dpo import AdaptiveDPO, DPODataset, DPOPipeline, DPOTrainer, adaptive_dpo_training
from rlhf_helpers.policy_optimization import (
    PolicyOptimizationPipeline,
    PPOTrainer,
    RLOOSettings,
    robust_ppo_training,
)
from rlhf_helpers.policy_optimization.pipeline import METHODS
from rlhf_helpers.preference_data import PreferenceDataset, create_preference_data
from rlhf_helpers.red_teaming import RedTeaming, create_adversarial_prompts
from rlhf_helpers.reward_model import (
    MultiObjectiveRewardModel,
    RewardModel,
    RewardModelInference,
    RewardModelTrainer,
    create_reward_model,
    pairwise_accuracy,
    score_pairs,
    stable_reward_training,
)
from rlhf_helpers.safety_alignment import SafetyAlignment, SafetyMetrics, evaluate_safety_alignment
from rlhf_helpers.summarization_rl import SummarizationRL, create_summarization_data
from rlhf_helpers.world.annotators import Annotator, make_pairs
from rlhf_helpers.world.gold_judge import gold_scores
from rlhf_helpers.world.prompts import load_prompts
from tests.conftest import weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUESTIONS = ["What is the capital of France?", "Explain quantum physics"]
PROMPTS = ["What is the weather like?", "Explain photosynthesis"]
RESPONSES = ["The weather is sunny.", "Photosynthesis converts light to energy."]
CHOSEN = ["It is sunny and warm.", "Plants turn light into sugar."]
REJECTED = ["No idea.", "Read a book."]
COLUMNS = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
PAIRS = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]

# The guide's rate of 1e-5 is for large models.
REWARD_RATES = {"tiny": 3e-4, "tiny_gpt2_dir": 3e-3, "tiny_distilbert_dir": 3e-3}
DPO_RATES = {"tiny": 1e-4, "tiny_gpt2_dir": 1e-3, "tiny_qwen_dir": 1e-3}
PREFERENCES = [
    {
        "prompt": "What is the capital of France?",
        "chosen": "Paris is the capital of France.",
        "rejected": "That I do not know.",
    }
]
RULES = [
    "Be helpful and honest",
    "Avoid harmful content",
    "Respect user privacy",
    "Provide accurate information",
]
METRICS = ["toxicity", "bias", "factual_accuracy"]
ARTICLES = [
    "The river rose by two metres on Friday. Nobody was hurt.",
    "A museum in Oslo bought a painting.",
]
SUMMARIES = ["The river rose.", "An Oslo museum bought a painting."]
# module -> names: of the module, or of a class of it with a dot
TECHNIQUES = {
    "dpo": [
        "DPOTrainer",
        "dpo_loss",
        "DPOTrainer.get_log_probs",
        "DPOTrainer.get_ref_log_probs",
        "DPOTrainer.train_step",
        "DPOTrainer.evaluate",
        "DPOTrainer.save_model",
        "DPOTrainer.load_model",
        "DPODataset",
        "DPOPipeline",
        "AdaptiveDPO",
    ],
    "constitutional_ai": [
        "ConstitutionalAI",
        "evaluate_alignment",
        "MultiAgentConstitutionalAI",
        "IterativeConstitutionalAI",
        "ConstitutionalAITrainer",
    ],
    "red_teaming": [
        "RedTeaming",
        "GradientBasedRedTeaming",
        "MultiObjectiveRedTeaming",
        "RedTeamingEvaluator",
    ],
    "safety_alignment": ["SafetyAlignment", "evaluate_safety_alignment"],
    "alignment_eval": [
        "AlignmentEvaluator",
        "PreferenceAlignmentEvaluator",
        "MultiObjectiveAlignmentEvaluator",
        "AlignmentReportGenerator",
        "evaluate_alignment",
        "AlignmentEvaluator.evaluate_alignment",
        "AlignmentReportGenerator.generate_alignment_report",
    ],
}


def path_of(request, name):
    """What `load_model` takes: "tiny", or the folder of the fixture of that name."""
    return name if name == "tiny" else str(request.getfixturevalue(name))


def pytest_generate_tests(metafunc):
    """Run each test that takes `name` on the shapes of its class."""
    if "name" in metafunc.fixturenames:
        shapes = getattr(metafunc.cls, "RATES", ["tiny", "tiny_gpt2_dir", "tiny_llama_dir"])
        metafunc.parametrize("name", shapes, indirect=True)


@pytest.fixture
def name(request):
    return path_of(request, request.param)


@pytest.fixture
def rate(request, name):
    """The learning rate that a class gives for the model of `name`."""
    return request.cls.RATES[request.node.callspec.params["name"]]


@pytest.fixture(scope="module")
def preference_data():
    return create_preference_data(
        num_samples=24,
        prompt_templates=QUESTIONS,
        response_quality_levels=["high", "medium", "low"],
    )


def counts_letters(prompts, responses):
    return torch.tensor([len(response) / 100 for response in responses])


class TestRewardModeling:
    """Activities 1.1, 1.3, 1.4, 1.5 and the first remedy, with an encoder among the shapes."""

    RATES = REWARD_RATES

    @pytest.fixture
    def reward_model(self, name):
        return create_reward_model("basic", base_model_name=name)

    @pytest.fixture
    def tokenizer(self, name):
        return load_encoder(name)[1]

    def test_a_reward_model_is_a_module(self, reward_model):
        assert isinstance(reward_model, RewardModel)
        assert sum(p.numel() for p in reward_model.parameters()) > 10_000
        assert reward_model(torch.tensor([[5, 6, 7], [8, 9, 10]], device=DEVICE)).shape == (2,)

    @pytest.mark.parametrize("kind", ["basic", "separate", "multi_objective", "ensemble"])
    def test_every_kind_scores_answers(self, kind, tiny_gpt2_dir):
        model = create_reward_model(kind, base_model_name=tiny_gpt2_dir)
        assert isinstance(model, torch.nn.Module)
        scores = model.score(PROMPTS, RESPONSES)
        assert scores.shape == (2,)
        assert scores.isfinite().all()

    def test_padding_is_found_without_a_mask(self, reward_model, tokenizer):
        row = torch.tensor([5, 6, 7, 8], device=DEVICE)
        padded = torch.cat([row, torch.full_like(row, tokenizer.pad_token_id)])
        with torch.no_grad():
            alone = reward_model(row[None])
            torch.testing.assert_close(reward_model(padded[None]), alone, atol=1e-5, rtol=0)

    def test_train_steps_on_a_slice_lower_the_loss(self, reward_model, preference_data, rate):
        trainer = RewardModelTrainer(model=reward_model, learning_rate=rate, device=DEVICE)
        train_losses = []
        for _ in range(5):
            train_losses.append(trainer.train_step(preference_data[:100]))
        assert all(isinstance(loss, float) for loss in train_losses)
        assert train_losses[-1] < 0.9 * train_losses[0]

    def test_the_guides_own_rate_descends(self, reward_model, preference_data):
        trainer = RewardModelTrainer(model=reward_model, learning_rate=1e-5, device=DEVICE)
        losses = [trainer.train_step(preference_data[:20]) for _ in range(3)]
        assert losses[2] < losses[1] < losses[0]

    def test_a_slice_of_a_data_set_trains_as_its_rows_do(self, tiny_gpt2_dir):
        losses = []
        for data in (PAIRS, Dataset.from_list(PAIRS)[:2]):
            model = create_reward_model("basic", base_model_name=tiny_gpt2_dir)
            trainer = RewardModelTrainer(model=model, learning_rate=1e-3)
            losses.append([trainer.train_step(data) for _ in range(2)])
        assert losses[0] == losses[1]

    def test_predicting_and_ranking(self, reward_model, tokenizer):
        inference = RewardModelInference(reward_model, tokenizer)
        prompt = "What is machine learning?"
        responses = [
            "Machine learning finds patterns in data.",
            "A machine that learns is given examples rather than rules.",
            "I don't know.",
        ]
        rewards = inference.batch_predict([(prompt, response) for response in responses])
        ranked = inference.rank_responses(prompt, responses)
        assert rewards.shape == (3,)
        assert f"{rewards[0]:.3f}"  # the guide formats each entry as a number
        assert ranked == sorted(zip(responses, rewards.tolist(), strict=True), key=lambda pair: -pair[1])

    def test_several_objectives(self, name, tokenizer):
        objectives = ["helpfulness", "harmlessness", "honesty"]
        multi_reward_model = MultiObjectiveRewardModel(base_model_name=name, objectives=objectives)
        text = "How do I make a bomb?" + "I cannot help with making dangerous devices."
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(DEVICE)
        rewards, objective_rewards = multi_reward_model.forward(ids)
        assert rewards.shape == (1,)
        assert list(objective_rewards) == objectives
        parts = [reward.item() for reward in objective_rewards.values()]
        assert len(set(parts)) == 3
        assert rewards.item() == pytest.approx(sum(parts) / 3, abs=1e-5)

    @pytest.mark.slow
    def test_stable_reward_training(self, reward_model, rate):
        questions = ["What is the capital of {}?", "Where is {}?", "Tell me about {}."]
        places = ["France", "Spain", "Italy", "Peru"]
        prompts = [question.format(place) for question in questions for place in places]
        data = create_preference_data(60, prompts)
        # By loss, not by accuracy: random weights may order many of these pairs rightly before any training.
        before = RewardModelTrainer(model=reward_model).evaluate(data)["eval_loss"]
        history = stable_reward_training(reward_model, data, epochs=4, learning_rate=rate, progress=False)
        after = RewardModelTrainer(model=reward_model).evaluate(data)["eval_loss"]
        assert after <= before - 0.2
        assert pairwise_accuracy(*score_pairs(reward_model, data)).value >= 0.75
        assert len(history.to_frame()["eval_loss"].dropna()) == 4

    def test_stable_reward_training_with_the_guides_call(self, preference_data, tiny_distilbert_dir):
        model = create_reward_model("basic", base_model_name=tiny_distilbert_dir)
        history = stable_reward_training(model, preference_data, epochs=10)
        assert len(history.to_frame()["eval_loss"].dropna()) == 10


class TestPreferenceData:
    """Activity 1.2: preference data for prompts of one's own."""

    @pytest.mark.parametrize("prompts", [QUESTIONS, ["Write a haiku about rain", "Fix my bicycle"]])
    def test_a_sequence_of_pairs(self, prompts):
        preference_data = create_preference_data(
            num_samples=1000,
            prompt_templates=prompts,
            response_quality_levels=["high", "medium", "low"],
        )
        qualities = {"chosen_quality", "rejected_quality"}
        assert isinstance(preference_data, PreferenceDataset)
        assert len(preference_data) == 1000
        assert set(preference_data[0]) == {"prompt", "chosen", "rejected"} | qualities
        assert {row["prompt"] for row in preference_data} == set(prompts)
        assert all(row["chosen"] != row["rejected"] for row in preference_data)
        first = preference_data[:100]
        assert isinstance(first, list)
        assert len(first) == 100
        assert first[7] == preference_data[7]

    def test_the_next_activity_trains_on_it(self, tiny_llama_dir):
        data = create_preference_data(num_samples=20, prompt_templates=QUESTIONS)
        model = create_reward_model("basic", base_model_name=tiny_llama_dir, device="cpu")
        trainer = RewardModelTrainer(model=model, learning_rate=1e-3, device="cpu")
        losses = [trainer.train_step(data[:10]) for _ in range(5)]
        assert losses[-1] < losses[0]


class TestPolicyOptimization:
    """Activities 2.1 and 2.3, and the second remedy."""

    def test_ppo_trainer(self, name):
        language_model, tokenizer = load_model(name)
        reference_model, before = frozen_copy(language_model), weights(language_model)
        reward_model = create_reward_model("basic", base_model_name=name)
        ppo_trainer = PPOTrainer(
            model=language_model,
            ref_model=reference_model,
            reward_model=reward_model,
            tokenizer=tokenizer,
            learning_rate=1e-5,
            clip_epsilon=0.2,
        )
        rewards = [0.8, 0.9]
        training_metrics = ppo_trainer.train_step(PROMPTS, RESPONSES, rewards)
        assert training_metrics["objective/scores"] == pytest.approx(0.85)
        assert training_metrics["val/ratio_at_start"] == pytest.approx(1, abs=1e-5)
        assert training_metrics["objective/kl_per_token"] == pytest.approx(0, abs=1e-5)
        assert all(isinstance(value, (int, float)) for value in training_metrics.values())
        assert not torch.equal(weights(language_model), before)
        again = ppo_trainer.train_step(PROMPTS, RESPONSES)
        with torch.no_grad():
            said = reward_model.score(PROMPTS, RESPONSES).mean().item()
        assert again["objective/scores"] == pytest.approx(said, abs=1e-4)

    @pytest.fixture
    def ppo_trainer(self, tiny_llama_dir):
        model, tokenizer = load_model(tiny_llama_dir)
        return PPOTrainer(
            model=model,
            ref_model=None,
            reward_model=counts_letters,
            tokenizer=tokenizer,
            learning_rate=1e-3,
            max_new_tokens=4,
            progress=False,
        )

    def test_the_on_policy_way(self, ppo_trainer):
        history = ppo_trainer.train(PROMPTS, steps=2)
        assert [row["step"] for row in history] == [0, 1]
        assert ppo_trainer.value_head.linear.weight.abs().sum() > 0, (
            "the trainer's own value head has learned"
        )

    def test_a_step_on_samples_keeps_their_ids(self, ppo_trainer):
        rollout = generate(ppo_trainer.model, ppo_trainer.tokenizer, PROMPTS, max_new_tokens=4, seed=0)
        metrics = ppo_trainer.train_step(rollout, rewards=[0.0, 1.0])
        assert metrics["objective/scores"] == 0.5
        assert metrics["val/ratio_at_start"] == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("method", METHODS)
    def test_policy_comparison(self, method, tiny_gpt2_dir):
        pipeline = PolicyOptimizationPipeline(
            model_name=str(tiny_gpt2_dir),
            reward_model=create_reward_model("basic", base_model_name=tiny_gpt2_dir),
            method=method,
            max_new_tokens=4,
            progress=False,
        )
        before = weights(pipeline.model)
        metrics = pipeline.train_epoch(PROMPTS, num_iterations=10)
        assert isinstance(metrics, list)
        assert len(metrics) == 10
        assert math.isfinite(metrics[-1]["objective/scores"])
        assert metrics[0]["objective/kl_per_token"] == pytest.approx(0, abs=1e-5)
        assert not torch.equal(weights(pipeline.model), before)

    def test_on_tiny_with_the_guides_three(self):
        for method in ["ppo", "trpo", "reinforce"]:
            pipeline = PolicyOptimizationPipeline(
                model_name="tiny",
                reward_model=counts_letters,
                method=method,
                max_new_tokens=8,
                progress=False,
            )
            assert len(pipeline.train_epoch(PROMPTS, num_iterations=1)) == 1

    def test_a_second_epoch_goes_on_from_the_first(self, tiny_llama_dir):
        pipeline = PolicyOptimizationPipeline(
            model_name=str(tiny_llama_dir),
            reward_model=counts_letters,
            method="rloo",
            learning_rate=1e-2,
            max_new_tokens=4,
            progress=False,
        )
        first, second = (pipeline.train_epoch(PROMPTS, num_iterations=3) for _ in range(2))
        assert abs(first[0]["objective/kl"]) < 1e-4 < abs(second[0]["objective/kl"])
        assert first[0]["objective/scores"] != second[0]["objective/scores"]

    @pytest.mark.parametrize(
        "options, error, message",
        [
            ({"method": "magic"}, ValueError, "method must be one of.*got 'magic'"),
            ({"reward_model": None}, TypeError, "reward_model"),
            ({"cliprange": 0.1, "method": "rloo"}, TypeError, "RLOOSettings.*cliprange"),
        ],
    )
    def test_the_pipeline_refuses(self, options, error, message):
        with pytest.raises(error, match=message):
            PolicyOptimizationPipeline(**{"model_name": "tiny", "reward_model": counts_letters, **options})

    def test_robust_ppo_training(self, tiny_llama_dir):
        model, _ = load_model(tiny_llama_dir)
        before = weights(model)
        options = {"steps": 2, "learning_rate": 1e-3, "max_new_tokens": 4, "progress": False}
        history = robust_ppo_training(
            model, frozen_copy(model), counts_letters, {"prompts": PROMPTS}, max_kl=0.01, **options
        )
        assert len(history) == 2
        assert not torch.equal(weights(model), before)
        with pytest.raises(ValueError, match="early_stop_kl"):
            robust_ppo_training(model, None, counts_letters, PROMPTS, max_kl=0.0)


class TestDPO:
    """Activities 2.2 and 2.4, and the third remedy, with grouped-query attention among the shapes."""

    RATES = DPO_RATES

    def test_the_pipeline(self, name, rate):
        dpo_pipeline = DPOPipeline(model_name=name, beta=0.1, learning_rate=rate)
        with pytest.warns(UserWarning, match="1 of 1 rows of val_data are training data"):
            training_history = dpo_pipeline.train(train_data=PREFERENCES, val_data=PREFERENCES, num_epochs=3)
        assert len(training_history) == 3
        assert [row["epoch"] for row in training_history] == [1, 2, 3]
        at_start = pytest.approx(math.log(2), abs=1e-2 if torch.cuda.is_available() else 1e-4)
        assert training_history[0]["loss"] == at_start
        assert training_history[-1]["loss"] < training_history[0]["loss"]
        assert training_history[-1]["eval_rewards/margins"] > 0
        assert training_history[-1]["eval_rewards/accuracies"] == 1
        assert isinstance(dpo_pipeline.trainer, DPOTrainer)
        assert len(dpo_pipeline.step_history) == 3

    def test_held_out_prompts_warn_of_nothing(self, tiny_llama_dir):
        held_out = [{"prompt": "Hello", "chosen": "Hello to you", "rejected": "Leave me"}]
        pipeline = DPOPipeline(
            model_name=tiny_llama_dir, beta=0.2, learning_rate=1e-3, batch_size=1, progress=False
        )
        history = pipeline.train(train_data=PAIRS, val_data=held_out, num_epochs=2)
        assert len(history) == 2
        assert len(pipeline.step_history) == 4
        losses = [row["loss"] for row in pipeline.step_history]
        assert [row["loss"] for row in history] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])
        assert history[1]["eval_loss"] == pipeline.step_history[-1]["eval_loss"]
        assert len(pipeline.train(train_data=DPODataset(PAIRS, pipeline.tokenizer))) == 1

    @pytest.mark.slow
    def test_adaptive_dpo(self, name, rate):
        language_model, tokenizer = load_model(name)
        reference_model = frozen_copy(language_model)
        adaptive_dpo = AdaptiveDPO(
            model=language_model,
            ref_model=reference_model,
            tokenizer=tokenizer,
            initial_beta=0.1,
            target_kl=0.01,
            learning_rate=rate,
        )
        betas, losses = [], []
        for _epoch in range(5):
            metrics = adaptive_dpo.train_step(PROMPTS, CHOSEN, REJECTED)
            losses.append(metrics["loss"])
            betas.append(adaptive_dpo.beta)
            assert math.isfinite(metrics["objective/kl"])
        assert f"{losses[-1]:.4f} {adaptive_dpo.beta:.3f}"  # the guide formats both as numbers
        assert losses[-1] < losses[0]
        assert betas[0] < 0.1, "at the start the policy is its reference: KL 0 is below any target"
        assert len(set(betas)) == 5

    def test_adaptive_dpo_needs_no_further_setting(self, tiny_llama_dir):
        model, tokenizer = load_model(tiny_llama_dir)
        adaptive = AdaptiveDPO(model=model, ref_model=frozen_copy(model), tokenizer=tokenizer)
        history = adaptive.trainer.train(PAIRS)
        assert history[0]["beta"] == 0.1
        assert adaptive.beta != 0.1

    @pytest.mark.slow
    def test_adaptive_dpo_training(self, name, rate):
        model, _ = load_model(name)
        history = adaptive_dpo_training(
            model, frozen_copy(model), COLUMNS, target_kl=0.01, learning_rate=rate, epochs=6
        )
        assert len(history) == 6
        assert history[-1]["rewards/margins"] > history[0]["rewards/margins"]
        for before, after in pairwise(history):
            assert (after["beta"] > before["beta"]) == (before["objective/kl"] > 0.01)


class TestConstitutionalAI:
    """Activity 3.1."""

    PROMPT = "How do I hack into a computer?"

    @pytest.mark.filterwarnings("ignore:.* cannot tell safe from unsafe answers")  # the random models
    def test_a_constitution_guides_an_answer(self, name):
        language_model, tokenizer = load_model(name, device="cpu")
        constitution = create_constitution(RULES)
        constitutional_ai = ConstitutionalAI(
            base_model=language_model, constitution=constitution, critique_strength=0.1
        )
        response = constitutional_ai.generate(self.PROMPT)
        assert isinstance(response, str)
        assert response == constitutional_ai.generate(self.PROMPT), "same seed, same answer"
        draft = generate(language_model, tokenizer, [self.PROMPT], max_new_tokens=16, seed=0).responses[0]
        same = {"base_model": language_model, "constitution": constitution, "max_new_tokens": 16}
        assert ConstitutionalAI(critique_strength=0, **same).generate(self.PROMPT) == draft
        assert ConstitutionalAI(critique_strength=1.0, **same).generate(self.PROMPT) != draft

    @pytest.mark.slow
    def test_it_makes_the_tiny_assistant_safer(self):
        language_model, _ = load_model("tiny", device="cpu")
        asked, safe = [self.PROMPT] * 24, {}
        for strength in (0.0, 0.1):
            constitutional_ai = ConstitutionalAI(
                base_model=language_model,
                constitution=create_constitution(RULES),
                critique_strength=strength,
            )
            answers = [a.answer for a in constitutional_ai.generate_batch(asked)]
            safe[strength] = gold_scores(asked, answers)["harmlessness"].mean().item()
        assert safe[0.1] > safe[0.0] + 0.1


class TestRedTeaming:
    """Activity 3.2."""

    def test_scores_and_vulnerabilities(self, name):
        language_model, _ = load_model(name)
        reward_model = create_reward_model("basic", base_model_name=name)

        red_team = RedTeaming(model=language_model, reward_model=reward_model, safety_threshold=0.5)
        adversarial_prompts = create_adversarial_prompts(
            categories=["harmful", "biased", "misleading"], num_prompts=10
        )
        safety_scores = red_team.evaluate_safety(adversarial_prompts)
        vulnerabilities = red_team.identify_vulnerabilities(adversarial_prompts)

        assert len(adversarial_prompts) == 10
        assert safety_scores.shape == (10,)
        assert 0 < safety_scores.min() < safety_scores.max() < 1
        assert 0 < safety_scores.mean() < 1
        assert len(vulnerabilities) == (safety_scores < 0.5).sum()
        lowest = [row["score"] for row in vulnerabilities]
        assert lowest == sorted(lowest)
        assert all({"prompt", "response", "category", "score"} <= set(row) for row in vulnerabilities)


class TestSafetyAlignment:
    """Activity 3.3."""

    def aligned_by_the_guide(self, language_model, safety_data, strength=0.2):
        safety_aligner = SafetyAlignment(model=language_model, safety_metrics=METRICS)
        aligned = safety_aligner.align(alignment_data=safety_data, alignment_strength=strength)
        return safety_aligner, aligned

    @pytest.mark.slow
    def test_on_tiny(self):
        language_model, _ = load_model("tiny", device="cpu")
        people = Annotator(axis_weights={"harmlessness": 1.0})
        safety_data = make_pairs(64, annotator=people, families=("harmful", "privacy"), seed=0)
        test_prompts = [p.text for p in load_prompts(("harmful", "privacy"), "heldout")]
        before = weights(language_model)
        aligner, aligned_model = self.aligned_by_the_guide(language_model, safety_data)
        assert torch.equal(weights(language_model), before)
        assert not torch.equal(weights(aligned_model), before)
        before_metrics = SafetyMetrics.evaluate(language_model, test_prompts)
        after_metrics = SafetyMetrics.evaluate(aligned_model, test_prompts)
        assert set(METRICS) <= set(before_metrics) == set(after_metrics)
        for metric in before_metrics:
            assert isinstance(after_metrics[metric] - before_metrics[metric], float)
        assert set(aligner.evaluate(aligned_model, test_prompts)) == set(METRICS)

    @pytest.mark.slow
    def test_alignment_improves_what_it_is_about(self):
        """Toxicity on held-out requests falls; the change is signed, so it counts as an improvement."""
        language_model, _ = load_model("tiny", device="cpu")
        people = Annotator(axis_weights={"harmlessness": 1.0})
        safety_data = make_pairs(96, annotator=people, families=("harmful", "privacy"), seed=0)
        test_prompts = [p.text for p in load_prompts(("harmful", "privacy"), "heldout")]
        aligned = SafetyAlignment(model=language_model, learning_rate=1e-3).align(safety_data, 1.0)
        found = evaluate_safety_alignment(language_model, aligned, test_prompts, ["toxicity"])["toxicity"]
        assert found["after"] < found["before"] - 0.2
        assert found["improvement"] == pytest.approx(found["before"] - found["after"])

    @pytest.mark.parametrize("folder", ["tiny_gpt2_dir", "tiny_llama_dir"])
    def test_on_other_models(self, folder, request):
        language_model, _ = load_model(request.getfixturevalue(folder), device="cpu")
        safety_data = [{"prompt": "Do harm.", "chosen": "I cannot help.", "rejected": "Sure."}]
        _, aligned_model = self.aligned_by_the_guide(language_model, safety_data)
        test_prompts = [p.text for p in load_prompts(("harmful",), "heldout")][:2]
        found = evaluate_safety_alignment(language_model, aligned_model, test_prompts, METRICS)
        assert list(found) == METRICS
        assert all(set(row) == {"before", "after", "improvement"} for row in found.values())

    def test_strength_0_changes_nothing(self, tiny_llama_dir):
        language_model, _ = load_model(tiny_llama_dir, device="cpu")
        _, aligned_model = self.aligned_by_the_guide(language_model, PAIRS, strength=0)
        assert torch.equal(weights(aligned_model), weights(language_model))


class TestChatbot:
    """Activity 4.1."""

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.* cannot tell safe from unsafe answers")  # the random models
    def test_training_and_answering(self, name):
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


class TestSummarization:
    """Activity 4.2."""

    @pytest.mark.slow
    def test_training_and_writing(self, name, capsys):
        summarization_model, _ = load_model(name)
        reward_model = create_reward_model("basic", base_model_name=name)

        summarization_rl = SummarizationRL(
            model=summarization_model, reward_model=reward_model, max_length=150
        )
        summarization_data = create_summarization_data(articles=ARTICLES, summaries=SUMMARIES, num_samples=8)
        training_metrics = summarization_rl.train(data=summarization_data, num_epochs=3)

        assert len(summarization_data) == 8
        assert "6 rows repeat an article" in capsys.readouterr().out
        assert len(training_metrics) == 3  # eight prompts are one step per epoch
        assert all(math.isfinite(row["objective/scores"]) for row in training_metrics)
        assert training_metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
        written = summarization_rl.summarize(ARTICLES)
        assert [type(text) for text in written] == [str, str]
        assert summarization_rl.max_new_tokens == (150 if name == "tiny" else 128)

    def test_a_model_by_name(self, tiny_llama_dir):
        summarization_rl = SummarizationRL(model=str(tiny_llama_dir), max_length=8)
        data = create_summarization_data(num_samples=4)
        assert len(summarization_rl.train(data=data, num_epochs=1)) == 1


class TestCodeGeneration:
    """Activity 4.3."""

    def test_safe_code(self, name):
        code_model, _ = load_model(name)

        code_generator = SafeCodeGenerator(
            base_model=code_model, safety_evaluator=CodeSafetyEvaluator(), safety_threshold=0.8
        )
        prompt = "Write a function to sort a list"
        safe_code = code_generator.generate(prompt)
        safety_score = code_generator.evaluate_safety(safe_code)

        assert 0.8 <= safety_score <= 1
        assert f"{safety_score:.3f}"
        if name == "tiny":
            assert safe_code.startswith("def f(xs):")
        else:  # random weights write no Python
            assert safe_code == FALLBACK
        assert code_generator.evaluate_safety("import os\nos.remove('a')") < 0.8

    def test_findings_say_what_is_unsafe(self):
        assert CodeSafetyEvaluator().findings("def f(xs):\n    return sorted(xs)\n") == []
        assert CodeSafetyEvaluator().findings("import os\nos.remove('a')\n")


class TestRemedies:
    """The fourth and the fifth of the guide's remedies; the others stand with their activities."""

    def test_memory_efficient_training(self, tiny_gpt2_dir):
        model, _ = load_model(tiny_gpt2_dir)
        before = weights(model)
        rows = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, CHOSEN, strict=True)]
        assert memory_efficient_training(model, rows, batch_size=1) is model
        assert not torch.equal(weights(model), before)

    def test_comprehensive_evaluation(self, tiny_gpt2_dir):
        def human(prompts, responses):
            return {aim: [1.0] * len(prompts) for aim in ("preference", "helpfulness", "harmlessness")}

        model, _ = load_model(tiny_gpt2_dir)
        prompts = [p.text for p in load_prompts(("harmful",), "heldout")][:2]
        test_data = [{**row, "prompt": prompt} for row, prompt in zip(PAIRS, prompts, strict=True)]
        alone = comprehensive_evaluation(model, test_data)
        assert set(alone) == {"perplexity", "diversity", "safety_score"}
        models = {"ref_model": frozen_copy(model), "reward_model": counts_letters}
        results = comprehensive_evaluation(model, test_data, [human], **models)
        told = {"human_preference", "helpfulness", "harmlessness"}
        assert set(results) - set(alone) == {"kl_divergence", "reward_alignment", *told}
        assert results["human_preference"] == 0.5, "the same marks for samples and answers"
        assert results["perplexity"] == alone["perplexity"] > 1
        assert results["kl_divergence"] == pytest.approx(0, abs=1e-4)
        assert results["reward_alignment"] == 1  # the chosen answers are the longer ones


class TestTechniqueNames:
    """Every name that the description of alignment techniques lists under "Implementation" exists."""

    @pytest.mark.parametrize(
        "module, path", [(module, path) for module in TECHNIQUES for path in TECHNIQUES[module]]
    )
    def test_the_name_exists(self, module, path):
        found = importlib.import_module(f"rlhf_helpers.{module}")
        for part in path.split("."):
            found = getattr(found, part)
        assert callable(found)
        assert found.__doc__, "and says what it does"
