"""Preference losses in their loops: on a table whose optimum is known, and on small models."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rlhf_helpers.dpo.data as data_module
import rlhf_helpers.dpo.training as training_module
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import frozen_copy, load_model
from rlhf_helpers.core.preference_losses import dpo_loss
from rlhf_helpers.core.tensors import token_logps
from rlhf_helpers.core.text import encode_prompt
from rlhf_helpers.dpo import (
    AdaptiveDPO,
    DPODataset,
    DPOSettings,
    DPOTrainer,
    OnlineDPOSettings,
    adaptive_dpo_training,
    online_dpo,
)
from tests.conftest import Killed, dies_at, resume_equals_whole, share_of_e, weights

PAIRS = [
    {"prompt": "Hello", "chosen": "Hello! How are you?", "rejected": "I am not sure."},
    {"prompt": "What is the capital of France?", "chosen": "It is Paris.", "rejected": "Who knows"},
    {"prompt": "Why?", "chosen": "Because.", "rejected": "That is no question for me, my friend."},
    {"prompt": "Tell me a story about a dog.", "chosen": "A dog ran home.", "rejected": "No"},
    {"prompt": "Where is it?", "chosen": "It is here.", "rejected": "Nowhere at all"},
    {"prompt": "Is it late?", "chosen": "Not at all.", "rejected": "What is it to you?"},
]
UNPAIRED = [
    {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
    for pair in PAIRS
    for key in ("chosen", "rejected")
]
RANKINGS = [
    {"prompt": pair["prompt"], "responses": [pair["chosen"], pair["rejected"], "Go away"][: 2 + i % 2]}
    for i, pair in enumerate(PAIRS)
]
ROWS = {"kto": UNPAIRED, "listwise": RANKINGS}
SMOOTHED = {"cdpo": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}
LOSSES = ["dpo", "cdpo", "robust", "ipo", "hinge", "slic", "orpo", "simpo", "kto", "listwise"]
SETTINGS = DPOSettings(learning_rate=3e-3, batch_size=3, epochs=2, progress=False)


def trainer_of(folder, **changes):
    model, tokenizer = load_model(folder, device="cpu")
    return DPOTrainer(model, None, tokenizer, settings=replace(SETTINGS, **changes))


def displace(model, factor=1.3):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)


# ---- a table: one prompt, answers of one letter, so that the whole distribution is a softmax of four numbers

LETTERS = "abcd"
PAD, EOS, PROMPT, FIRST = 0, 1, 2, 3


class Letters:
    """The tokenizer of the table."""

    chat_template = bos_token_id = cls_token_id = sep_token_id = None
    pad_token_id, eos_token_id, name_or_path = PAD, EOS, "letters"

    def __call__(self, text, **_):
        return {"input_ids": [FIRST + LETTERS.index(c) if c in LETTERS else PROMPT for c in text]}


class Table(nn.Module):
    """A policy over four answers, each followed by EOS with certainty."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.config = SimpleNamespace(max_position_embeddings=8)
        self.head = nn.Identity()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **_):
        """Predict a letter after the prompt, and EOS after a letter."""
        end = torch.full((FIRST + len(LETTERS),), -1e9).index_fill(0, torch.tensor(EOS), 0.0)
        letters = torch.cat([torch.full((FIRST,), -1e9), self.logits])
        return SimpleNamespace(logits=self.head(torch.where((input_ids == PROMPT)[..., None], letters, end)))

    def log_probs(self):
        return self.logits.detach().log_softmax(-1)


def table_trainer(model, **changes):
    common = {"batch_size": 12, "schedule": "cosine", "max_grad_norm": None, "progress": False}
    return DPOTrainer(model, None, Letters(), **common | changes)


@pytest.mark.slow
def test_dpo_reaches_the_closed_form_optimum():
    """pi* = ref exp(r / beta) / Z when pairs are labelled by Bradley-Terry with reward r."""
    reward, beta = torch.tensor([0.5, 0.0, -0.3, 0.2]), 0.5
    model = Table([0.3, -0.2, 0.1, 0.6])
    optimum = (model.log_probs() + reward / beta).softmax(-1)
    orders = [(i, j) for i in range(4) for j in range(4) if i != j]
    rows = [{"prompt": "?", "chosen": LETTERS[i], "rejected": LETTERS[j]} for i, j in orders]
    data = DPODataset(rows, Letters())
    data.weights = [torch.sigmoid(reward[i] - reward[j]).item() for i, j in orders]
    assert (model.log_probs().exp() - optimum).abs().max() > 0.05
    history = table_trainer(model, beta=beta, learning_rate=0.1, epochs=300).train(data)
    assert history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert (model.log_probs().exp() - optimum).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ipo", "dpo"])
def test_on_a_deterministic_preference_ipo_stops_and_dpo_does_not(loss):
    gaps = []
    for epochs in (300, 600):
        model = Table([0.3, -0.2, 0.1, 0.6])
        start = model.log_probs()
        rows = [{"prompt": "?", "chosen": "a", "rejected": "b"}]
        trainer = table_trainer(model, loss=loss, beta=0.5, learning_rate=0.05, epochs=epochs)
        trainer.train(rows)
        moved = model.log_probs() - start
        gaps.append((moved[0] - moved[1]).item())
    if loss == "ipo":
        assert gaps == pytest.approx([1.0, 1.0], abs=1e-3)  # 1 / (2 beta)
    else:
        assert gaps[0] > 5
        assert gaps[1] > gaps[0] + 1.5


def test_metrics_by_hand():
    model = Table([0.0, 0.0, 0.0, 0.0])
    trainer = table_trainer(model, beta=0.5)
    with torch.no_grad():
        model.logits.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]).log())
    rows = [{"prompt": "?", "chosen": c, "rejected": r} for c, r in ("ab", "dc")]
    # log-ratios to 1/4: a log 1.6, b log 1.2, c log 0.8, d log 0.4; log-odds of the pairs 0.143841, -0.346574
    assert trainer.evaluate(rows) == pytest.approx(
        {
            "eval_loss": (0.623810 + 0.881374) / 2,
            "eval_rewards/chosen": 0.5 * (0.470004 - 0.916291) / 2,
            "eval_rewards/rejected": 0.5 * (0.182322 - 0.223144) / 2,
            "eval_rewards/margins": (0.143841 - 0.346574) / 2,
            "eval_rewards/accuracies": 0.5,
            "eval_logps/chosen": (-0.916291 - 2.302585) / 2,
            "eval_logps/rejected": (-1.203973 - 1.609438) / 2,
        },
        abs=1e-5,
    )
    with torch.no_grad():
        model.logits.zero_()
    assert trainer.evaluate(rows)["eval_rewards/accuracies"] == 0, "a tie counts 0"


def test_rewards_without_a_reference_are_beta_times_the_mean_log_prob():
    model = Table([0.4, 0.3, 0.2, 0.1])
    with torch.no_grad():
        model.logits.copy_(model.logits.log())
    for loss, factor in (("simpo", 0.5), ("orpo", 0.5), ("slic", 1.0)):  # a letter and EOS are two tokens
        changes = {} if loss == "slic" else {"beta": 1.0}
        row = table_trainer(model, loss=loss, **changes).evaluate(
            [{"prompt": "?", "chosen": "a", "rejected": "b"}]
        )
        assert row["eval_rewards/chosen"] == pytest.approx(-0.916291 * factor, abs=1e-5)
        assert row["eval_logps/rejected"] == pytest.approx(-1.203973, abs=1e-5)


def test_metrics_of_a_ranking_are_means_over_its_pairs():
    model = Table([0.0, 0.0, 0.0, 0.0])
    trainer = table_trainer(model, loss="listwise", beta=1.0)
    with torch.no_grad():
        model.logits.copy_(torch.tensor([0.4, 0.1, 0.2, 0.3]).log())
    found = trainer.evaluate([{"prompt": "?", "responses": ["a", "b", "c"]}])
    # Plackett-Luce of 0.4, 0.1, 0.2: log(0.7 / 0.4) + log(0.3 / 0.1); a > b, a > c right, b > c wrong
    assert found["eval_loss"] == pytest.approx(0.559616 + 1.098612, abs=1e-5)
    assert found["eval_rewards/accuracies"] == pytest.approx(2 / 3)
    assert found["eval_rewards/margins"] == pytest.approx((1.386294 + 0.693147 - 0.693147) / 3, abs=1e-5)


# ---- at the start, and what may not matter


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["tiny_llama_dir", "tiny_gpt2_dir"])
@pytest.mark.parametrize(
    "loss, value",
    [("dpo", 0.693147), ("cdpo", 0.693147), ("robust", 0.693147), ("ipo", 25.0), ("hinge", 1.0)],
)
def test_the_first_loss_is_that_of_the_reference(folder, loss, value, request):
    trainer = trainer_of(request.getfixturevalue(folder), loss=loss, **SMOOTHED.get(loss, {}))
    row = trainer.train(PAIRS)[0]
    assert row["loss"] == pytest.approx(value, rel=1e-5)
    assert row["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert row["logps/chosen"] < -10, "sums over tokens, not means"


def test_no_learning_rate_no_drift(tiny_llama_dir):
    trainer = trainer_of(tiny_llama_dir, learning_rate=0.0, target_kl=1.0, kl_samples=4, max_new_tokens=4)
    before = weights(trainer.model)
    history = trainer.train(PAIRS)
    assert torch.equal(weights(trainer.model), before)
    assert all(abs(row["objective/kl"]) < 1e-4 for row in history)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_padding_and_micro_batches_change_no_metric_and_no_update(tiny_llama_dir, loss):
    rows, found, ends = ROWS.get(loss, PAIRS), [], []
    for batch_size, parts in ((6, 1), (2, 3)):
        changes = {"loss": loss, "batch_size": batch_size, "accumulation_steps": parts, "epochs": 1}
        trainer = trainer_of(tiny_llama_dir, max_grad_norm=None, **changes, **SMOOTHED.get(loss, {}))
        displace(trainer.model, 1.05)
        found.append(trainer.train(rows[:6], val_rows=rows[1:4])[0])
        ends.append(weights(trainer.model))
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=2e-4)
    assert (ends[0] - ends[1]).abs().max() < 3e-4  # Adam's first step is as long as the rate, 3e-3


def test_one_forward_a_step_and_one_reference_pass_in_all(tiny_llama_dir, monkeypatch):
    trainer = trainer_of(tiny_llama_dir)
    calls = {"policy": 0, "reference": 0}
    for name, model in (("policy", trainer.model), ("reference", trainer.run.ref_model)):
        model.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    trainer.train(PAIRS, epochs=3)
    assert calls == {"policy": 6, "reference": 1}, "2 batches, 3 epochs; 12 answers fit into one pass"
    assert not any(p.requires_grad for p in trainer.run.ref_model.parameters())


def test_a_row_that_is_changed_leaves_the_data_as_they_are():
    data = DPODataset(PAIRS, Letters())
    data[0]["chosen"] = "Other"
    assert data[0]["chosen"] == PAIRS[0]["chosen"] == data.rows[0]["chosen"]


def test_reference_log_probs_stay_with_the_data(tiny_llama_dir):
    trainer = trainer_of(tiny_llama_dir)
    data = trainer.dataset(PAIRS)
    known = trainer.get_ref_log_probs([row["prompt"] for row in PAIRS], [row["chosen"] for row in PAIRS])
    assert [chosen.item() for chosen, _ in data.ref_logps] == pytest.approx(known.tolist(), abs=1e-4)
    kept = data.ref_logps
    trainer.train(data)
    assert data.ref_logps is kept
    other = trainer_of(tiny_llama_dir)
    displace(other.run.ref_model)
    assert other.dataset(data).ref_logps is not kept, "another reference: computed anew"


def test_log_probs_are_sums_with_eos(tiny_llama_dir):
    trainer = trainer_of(tiny_llama_dir)
    logps = trainer.get_log_probs(["Hello", "Why?"], ["Hi there", "Because"])
    assert logps.requires_grad
    tokenizer = trainer.run.tokenizer
    prompt, answer = DPODataset(PAIRS, tokenizer).sequences[0][0]
    assert answer[-1] == tokenizer.eos_token_id
    ids = torch.tensor([prompt + answer])
    by_hand = token_logps(trainer.model(ids).logits[:, :-1], ids[:, 1:])[0, -len(answer) :].sum()
    mine = trainer.get_log_probs([PAIRS[0]["prompt"]], [PAIRS[0]["chosen"]])[0]
    torch.testing.assert_close(mine, by_hand, atol=1e-4, rtol=0)
    refs = trainer.get_ref_log_probs(["Hello"], ["Hi there"])
    assert not refs.requires_grad


# ---- learning


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_learns(tiny_llama_dir, loss):
    rows = ROWS.get(loss, PAIRS)
    trainer = trainer_of(tiny_llama_dir, loss=loss, epochs=6, batch_size=4, **SMOOTHED.get(loss, {}))
    before = trainer.evaluate(rows)
    trainer.train(rows)
    after = trainer.evaluate(rows)
    assert after["eval_loss"] < before["eval_loss"] - 0.02
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"] + 0.1
    if loss != "kto":
        assert after["eval_rewards/accuracies"] >= 0.8


def test_the_learners_own_loss_drives_the_same_training_and_a_flipped_sign_shows(tiny_llama_dir):
    def mine(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta):
        gap = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
        return -nn.functional.logsigmoid(beta * gap)

    def flipped(*logps, beta):
        return dpo_loss(logps[1], logps[0], logps[3], logps[2], beta=beta)

    ends = []
    for loss_fn in (None, mine, flipped):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        trainer = DPOTrainer(model, None, tokenizer, settings=SETTINGS, loss_fn=loss_fn, epochs=4)
        ends.append(trainer.train(PAIRS)[-1])
    assert ends[0] == ends[1]
    assert ends[0]["rewards/margins"] > 0.2
    assert ends[2]["rewards/margins"] < -0.2
    with pytest.raises(ValueError, match="loss has shape"):
        DPOTrainer(model, None, tokenizer, settings=SETTINGS, loss_fn=lambda *x, beta: x[0].mean()).train(
            PAIRS
        )


def test_listwise_on_pairs_is_dpo(tiny_llama_dir):
    rankings = [{"prompt": p["prompt"], "responses": [p["chosen"], p["rejected"]]} for p in PAIRS]
    histories = [
        trainer_of(tiny_llama_dir, loss=loss).train(rows)
        for loss, rows in (("dpo", PAIRS), ("listwise", rankings))
    ]
    for pair, ranking in zip(*histories, strict=True):
        assert ranking == pytest.approx(pair, rel=1e-4, abs=1e-6)


def test_train_step_learns_from_a_slice_of_columns(tiny_llama_dir):
    trainer = trainer_of(tiny_llama_dir, batch_size=6)
    columns = {name: [row[name] for row in PAIRS] for name in PAIRS[0]}
    losses = [trainer.train_step(columns)["loss"] for _ in range(4)]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[3] < losses[2] < losses[1] < losses[0]


def test_a_row_of_weight_0_teaches_nothing_and_counts_in_no_mean(tiny_llama_dir):
    rows, ends, histories = PAIRS[:3], [], []
    for kept in (rows, rows[:2]):
        trainer = trainer_of(tiny_llama_dir, epochs=1)
        data = DPODataset(kept, trainer.run.tokenizer)
        data.weights = [1.0, 0.5, 0.0][: len(kept)]
        histories.append(trainer.train(data)[0])
        ends.append(weights(trainer.model))
    assert histories[0] == pytest.approx(histories[1], rel=1e-4, abs=1e-5)
    assert (ends[0] - ends[1]).abs().max() < 3e-4


# ---- KL: measured, priced, and held at a target


@pytest.mark.slow
def test_kl_is_a_sum_over_the_tokens_of_the_policys_own_samples():
    """Of the shipped assistant, whose answers end at different lengths."""
    model, tokenizer = load_model("tiny", device="cpu")
    settings = {"target_kl": 1.0, "kl_samples": 64, "max_new_tokens": 24, "learning_rate": 0.0}
    trainer = DPOTrainer(model, None, tokenizer, batch_size=3, progress=False, **settings)
    displace(model, 1.1)
    first, second = trainer.train(PAIRS[:3], epochs=2)
    samples = generate(model, tokenizer, [row["prompt"] for row in PAIRS[:3]] * 20, max_new_tokens=24, seed=9)
    length = samples.response_lengths.float().mean().item()
    assert length < 20
    assert first["objective/kl"] > 0.1
    assert first["objective/kl"] / first["objective/kl_per_token"] == pytest.approx(length, rel=0.15)
    assert first["objective/kl"] != second["objective/kl"], "each step draws samples of its own"


@pytest.mark.parametrize(
    "kl_samples, drawn",
    [(2, ["b", "e"]), (4, ["a", "c", "d", "f"]), (6, list("abcdef")), (8, list("abcdefab"))],
)
def test_kl_is_sampled_on_prompts_of_every_length(tiny_llama_dir, kl_samples, drawn):
    """The prompts of a batch come sorted by length; the first ones alone would be the shortest."""
    model, tokenizer = load_model(tiny_llama_dir, device="cpu")
    settings = replace(SETTINGS, kl_samples=kl_samples, max_new_tokens=1)
    engine = SimpleNamespace(model=model, settings=settings, step_seed=0)
    rollout, _ = training_module.sample_log_ratios(engine, frozen_copy(model), tokenizer, list("abcdef"))
    assert rollout.prompts == drawn


def test_a_row_is_evaluated_at_the_beta_that_it_logs(tiny_llama_dir):
    """At a learning rate of 0 and a batch of all rows, both losses are the same."""
    settings = {"learning_rate": 0.0, "batch_size": 6, "target_kl": 500.0, "beta_horizon": 1.0}
    trainer = trainer_of(tiny_llama_dir, kl_samples=4, max_new_tokens=4, **settings)
    displace(trainer.run.ref_model)
    history = trainer.train(PAIRS, val_rows=PAIRS)
    assert [row["beta"] for row in history] == pytest.approx([0.1, 0.08])
    for row in history:
        assert row["eval_loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert row["eval_rewards/margins"] == pytest.approx(row["rewards/margins"], rel=1e-4)


@pytest.mark.parametrize("target, direction", [(0.05, 1), (500.0, -1)])
def test_beta_rises_when_kl_is_above_its_target_and_falls_below(tiny_llama_dir, target, direction):
    model, tokenizer = load_model(tiny_llama_dir, device="cpu")
    reference = frozen_copy(model)
    displace(model)
    settings = {"learning_rate": 1e-4, "progress": False, "kl_samples": 32, "max_new_tokens": 6}
    adaptive = AdaptiveDPO(
        model, reference, tokenizer, initial_beta=0.1, target_kl=target, beta_horizon=5.0, **settings
    )
    columns = [[row[name] for row in PAIRS] for name in ("prompt", "chosen", "rejected")]
    row = adaptive.train_step(*columns)
    assert row["beta"] == 0.1, "the beta that this update used"
    assert (row["objective/kl"] - target) * direction > 0
    assert adaptive.beta == pytest.approx(0.1 * (1 + direction * 0.2 / 5))
    adaptive.train_step(*columns)
    assert adaptive.beta == pytest.approx(0.1 * (1 + direction * 0.2 / 5) ** 2)


def test_adaptive_dpo_training_holds_a_policy_that_drifts(tiny_llama_dir):
    model, _ = load_model(tiny_llama_dir, device="cpu")
    history = adaptive_dpo_training(
        model,
        frozen_copy(model),
        PAIRS,
        target_kl=0.02,
        learning_rate=3e-3,
        epochs=8,
        progress=False,
        kl_samples=32,
        max_new_tokens=6,
        batch_size=6,
    )
    late = [row for row in history if row["objective/kl"] > 0.05]
    assert late, "this rate leaves the target behind"
    assert history[-1]["beta"] > 0.1
    assert all(row["loss"] == row["loss"] for row in history)


@pytest.mark.slow
def test_the_constraints_gradient_is_that_of_the_kl(tiny_llama_dir):
    """Of responses of one token the KL is a sum over the vocabulary."""
    model, tokenizer = load_model(tiny_llama_dir, device="cpu")
    reference = frozen_copy(model)
    displace(model, 1.3)
    settings = replace(SETTINGS, kl_coef=0.5, kl_samples=4096, max_new_tokens=1)
    # The seed that an Engine gives at seed 0, step 0.
    engine = SimpleNamespace(model=model, settings=settings, step_seed=1826701615)
    rollout, log_ratios = training_module.sample_log_ratios(engine, reference, tokenizer, ["Hello"])
    surrogate = 0.5 * training_module.kl_surrogate(model, rollout, log_ratios)
    ids = torch.tensor([encode_prompt(tokenizer, "Hello")])
    logps, ref_logps = (m(ids).logits[0, -1].log_softmax(-1) for m in (model, reference))
    kl = (logps.exp() * (logps - ref_logps)).sum()
    assert kl > 0.1
    assert log_ratios.mean().item() == pytest.approx(kl.item(), rel=0.1)
    exact, found = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        for loss in (0.5 * kl, surrogate)
    )
    assert torch.cosine_similarity(exact, found, dim=0) > 0.95
    assert found.norm() == pytest.approx(exact.norm().item(), rel=0.15)


@pytest.mark.slow
def test_a_price_on_kl_keeps_dpo_closer(tiny_llama_dir):
    ends = []
    for kl_coef in (0.0, 1.0):
        how = {
            "kl_coef": kl_coef,
            "target_kl": 1e9,
            "beta_horizon": 1e9,
            "kl_samples": 64,
            "max_new_tokens": 6,
        }
        history = trainer_of(tiny_llama_dir, batch_size=6, epochs=15, schedule="constant", **how).train(PAIRS)
        ends.append(sum(row["objective/kl"] for row in history[-3:]) / 3)
    assert ends[0] > 0.2
    assert ends[1] < 0.7 * ends[0]


# ---- KTO


def test_ktos_reference_point_reads_answers_to_other_prompts():
    rows = [{"prompt": p, "completion": c, "label": True} for p, c in ("1a", "1b", "2c", "3d")]
    data = DPODataset(rows, Letters())
    assert data.kind == "unpaired"
    others = [LETTERS[row[1][1][0] - FIRST] for row in data.sequences]
    assert others == ["c", "c", "d", "a"]
    with pytest.raises(ValueError, match="one prompt only"):
        DPODataset(rows[:2], Letters())


def test_ktos_reference_point_is_that_of_the_whole_batch_however_it_is_cut():
    """Of answers a to d with log-ratios log 1.6, log 1.2, log 0.8, log 0.4 to the reference's 1/4."""
    rows = [{"prompt": p, "completion": c, "label": True} for p, c in ("1a", "2b", "3a", "4d")]
    for parts in (1, 2, 4):
        model = Table([0.0, 0.0, 0.0, 0.0])
        changes = {"batch_size": 4, "accumulation_steps": parts, "learning_rate": 0.0}
        trainer = table_trainer(model, loss="kto", **changes)
        with torch.no_grad():
            model.logits.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]).log())
        # the mismatched answers are b, a, d, a: (0.182322 + 2 * 0.470004 - 0.916291) / 4
        assert trainer.train(rows)[0]["kl"] == pytest.approx(0.051510, abs=1e-5)
        assert trainer.evaluate(rows)["eval_kl"] == pytest.approx(0.051510, abs=1e-5)


def test_kto_takes_ten_bad_rows_for_a_good_one(tiny_llama_dir):
    rows = [row for row in UNPAIRED if not row["label"]] * 2 + [row for row in UNPAIRED if row["label"]][:1]
    trainer = trainer_of(tiny_llama_dir, loss="kto", desirable_weight=10.0, epochs=4)
    history = trainer.train(rows, val_rows=rows)
    assert all(row["kl"] >= 0 for row in history)
    without = [row for row in history if "rewards/chosen" not in row]
    assert without, "a batch without a desirable row has no mean over them"
    assert all("rewards/rejected" in row and "rewards/margins" not in row for row in without)
    assert history[-1]["eval_rewards/margins"] > 0.1


# ---- online


PROMPTS = [row["prompt"] for row in PAIRS]
ONLINE = OnlineDPOSettings(
    learning_rate=3e-3,
    steps=3,
    prompts_per_step=4,
    samples_per_prompt=3,
    max_new_tokens=6,
    batch_size=2,
    progress=False,
)


def mean_reward(model, tokenizer):
    new = ["Good morning", "Where are you now, my friend?", "Sing!"] * 16
    return share_of_e(new, generate(model, tokenizer, new, max_new_tokens=6, seed=5).responses).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
def test_online_dpo_earns_more_on_new_prompts(tiny, loss):
    model, tokenizer = tiny
    before = mean_reward(model, tokenizer)
    settings = replace(
        ONLINE, learning_rate=2e-2, steps=25, samples_per_prompt=8, batch_size=6, loss=loss, seed=1
    )
    history = online_dpo(model, tokenizer, PROMPTS, share_of_e, replace(settings, prompts_per_step=6))
    assert history[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert history[-1]["objective/kl"] > 0.2
    # Over six seeds IPO gained .03 to .12 here, so less is asked of it.
    assert mean_reward(model, tokenizer) > before + (0.02 if loss == "ipo" else 0.07)


def test_ties_teach_nothing(tiny):
    model, tokenizer = tiny
    before = weights(model)
    history = online_dpo(model, tokenizer, PROMPTS, lambda p, r: torch.zeros(len(p)), ONLINE)
    assert torch.equal(weights(model), before)
    assert history[0]["frac_reward_zero_std"] == 1
    assert history[0]["loss"] == 0


def test_pairs_are_the_best_and_the_worst_sample_with_their_sampled_ids(tiny):
    model, tokenizer = tiny
    rollout = generate(model, tokenizer, ["Hello"] * 3 + ["Why?"] * 3, max_new_tokens=6, seed=0)
    scores = torch.tensor([0.1, 0.9, 0.5, 2.0, 1.0, 1.5])
    logps = rollout.old_logps.sum(-1)
    data = DPODataset.from_rollout(rollout, scores, logps, group=3)
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in data.rows] == [
        ("Hello", rollout.responses[1], rollout.responses[0]),
        ("Why?", rollout.responses[3], rollout.responses[4]),
    ]
    assert data.ref_logps[1][0].item() == pytest.approx(logps[3].item())
    flat = [sequence for row in data.sequences for sequence in row]
    found = data_module.sum_logps(model, flat)
    torch.testing.assert_close(found.detach(), logps[[1, 0, 3, 4]], atol=1e-4, rtol=0)
    assert [len(answer) for _, answer in flat] == rollout.response_lengths[[1, 0, 3, 4]].tolist()


def test_columns_follow_their_prompts(tiny):
    def reward(prompts, responses, *, shouted):
        assert shouted == [prompt.upper() for prompt in prompts]
        return share_of_e(prompts, responses)

    columns = {"shouted": [prompt.upper() for prompt in PROMPTS]}
    online_dpo(*tiny, PROMPTS, reward, replace(ONLINE, steps=1), columns=columns)
    with pytest.raises(ValueError, match="'shouted' must hold one entry for each of 6 prompts, got 1"):
        online_dpo(*tiny, PROMPTS, reward, ONLINE, columns={"shouted": ["HELLO"]})


# ---- kill and resume


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"target_kl": 0.01, "kl_coef": 0.01, "kl_samples": 4}, {"loss": "kto"}]
)
def test_resumed_training_equals_uninterrupted_training(tiny_llama_dir, tmp_path, changes, monkeypatch):
    rows = ROWS.get(changes.get("loss"), PAIRS)

    def run(folder, rows=rows, *, resume=False):
        how = {"epochs": 3, "batch_size": 2, "max_new_tokens": 4, "schedule": "constant"} | changes
        trainer = trainer_of(tiny_llama_dir, run_dir=tmp_path / folder, checkpoint_every=2, **how)
        history = trainer.train(rows, val_rows=rows[:4], resume=resume)
        return history, weights(trainer.model), trainer.run.beta_controller.value

    history, final, beta = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(training_module, "dpo_update", dies_at(6, training_module.dpo_update))
        with pytest.raises(Killed):
            run("broken")
    resumed, resumed_final, resumed_beta = run("broken", resume=True)
    assert resumed == history
    assert torch.equal(resumed_final, final)
    assert resumed_beta == beta
    assert (beta != 0.1) == ("target_kl" in changes)
    with pytest.raises(ValueError, match="data was"):
        run("broken", [*rows[1:], rows[0]], resume=True)


@pytest.mark.slow
def test_resumed_online_run_equals_uninterrupted_one(tiny_llama_dir, tmp_path):
    def run(folder, reward_fn, **options):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        how = {"steps": 5, "run_dir": tmp_path / folder, "checkpoint_every": 3}
        return online_dpo(model, tokenizer, PROMPTS, reward_fn, replace(ONLINE, **how), **options), weights(
            model
        )

    resume_equals_whole(run, share_of_e, dies_at(5, share_of_e))


def test_another_reference_or_loss_is_another_run(tiny_llama_dir, tmp_path):
    how = {"run_dir": tmp_path, "checkpoint_every": 1}
    trainer_of(tiny_llama_dir, **how).train(PAIRS)
    with pytest.raises(ValueError, match="loss was dpo, now ipo"):
        trainer_of(tiny_llama_dir, loss="ipo", **how).train(PAIRS, resume=True)
    trainer = trainer_of(tiny_llama_dir, **how)
    displace(trainer.run.ref_model)
    with pytest.raises(ValueError, match="reference was"):
        trainer.train(PAIRS, resume=True)


def test_saved_models_come_back(tiny_llama_dir, tmp_path):
    trainer = trainer_of(tiny_llama_dir)
    trainer.train(PAIRS)
    trainer.save_model(tmp_path / "policy")
    fresh = trainer_of(tiny_llama_dir)
    assert not torch.equal(weights(fresh.model), weights(trainer.model))
    fresh.load_model(tmp_path / "policy")
    assert torch.equal(weights(fresh.model), weights(trainer.model))
    assert fresh.evaluate(PAIRS) == trainer.evaluate(PAIRS)


# ---- refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss": "ppo"}, "loss must be one of"),
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.1}, "label_smoothing must be > 0 for .*which ignore it"),
        ({"loss": "robust"}, "label_smoothing must be > 0"),
        ({"loss": "cdpo", "label_smoothing": 0.5}, "label_smoothing"),
        ({"loss": "kto", "batch_size": 1}, "batch_size"),
        ({"loss": "simpo", "target_kl": 1.0}, "target_kl must be None"),
        ({"target_kl": 0.0}, "target_kl"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"gamma": -0.1}, "gamma"),
    ],
)
def test_settings_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss": "kto"}, "one for pairs"),
        ({"target_kl": 1.0}, "target_kl"),
        ({"samples_per_prompt": 1}, "samples"),
    ],
)
def test_online_settings_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(ONLINE, **changes)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no rows"),
        ([{"question": "a", "chosen": "b", "rejected": "c"}], r"row 0 lacks \['prompt'\]"),
        ([*PAIRS, {"prompt": "a", "chosen": "b"}], r"row 6 lacks \['rejected'\]"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "row 0: answers must be at least two, no two"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": " "}],
            "row 0: prompt and answers must be non-empty texts",
        ),
        ({"prompt": ["a"], "chosen": ["b", "c"], "rejected": ["d"]}, "columns differ in length"),
        (UNPAIRED, r"row 0 lacks \['chosen', 'rejected'\]"),
    ],
)
def test_rows_are_refused_with_their_place(tiny, rows, message):
    with pytest.raises(ValueError, match=message):
        DPOTrainer(tiny[0], None, tiny[1]).train(rows)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "responses": "text"}, "must be non-empty texts"),
        ({"prompt": "a", "responses": ["b"]}, "at least two"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}, "ranks tie"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "label must be true"),
        ({"prompt": "a"}, "it needs the columns of one of"),
    ],
)
def test_other_kinds_are_refused_too(row, message):
    with pytest.raises(ValueError, match=message):
        DPODataset([row], Letters())


def test_what_else_is_refused(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="frozen_copy"):
        DPOTrainer(model, model, tokenizer)
    with pytest.raises(ValueError, match="frozen_copy"):
        online_dpo(model, tokenizer, PROMPTS, share_of_e, ONLINE, ref_model=model)
    with pytest.raises(TypeError, match="learning_rat"):
        DPOTrainer(model, None, tokenizer, learning_rat=1.0)
    with pytest.raises(ValueError, match="has no reference"):
        DPOTrainer(model, None, tokenizer, loss="orpo").get_ref_log_probs(["a"], ["b"])
    with pytest.raises(ValueError, match="learns from unpaired, these rows are pairs"):
        DPOTrainer(model, None, tokenizer, loss="kto").train(DPODataset(PAIRS, tokenizer))


def test_answers_of_a_row_follow_the_same_prompt(tiny):
    tokenizer, prompt = tiny[1], "What is the capital of France? I feel sad today. " * 3
    rows = [{"prompt": prompt, "chosen": "tea", "rejected": "water over the leaves, three minutes"}]
    (one, short), (two, long) = DPODataset(rows, tokenizer, max_length=40).sequences[0]
    assert one == two == encode_prompt(tokenizer, prompt)[-len(one) :]
    assert len(two) + len(long) == 40
    ranking = {"prompt": prompt, "responses": ["tea", "no", rows[0]["rejected"]]}
    assert [p for p, _ in DPODataset([ranking], tokenizer, max_length=40).sequences[0]] == [one] * 3
    # KTO compares no two answers to one prompt: each keeps as much of its prompt as it can.
    unpaired = [
        {"prompt": prompt, "completion": "tea", "label": True},
        {"prompt": "Hi", "completion": "no", "label": False},
    ]
    assert [len(p) + len(r) for p, r in DPODataset(unpaired, tokenizer, max_length=40).sequences[0]] == [
        40,
        40,
    ]
    assert short[-1] == long[-1] == tokenizer.eos_token_id


def test_what_cannot_be_encoded_names_its_row(tiny):
    tokenizer = tiny[1]
    long = "What is the capital of France? I feel sad today. " * 3
    rows = [*PAIRS, {"prompt": "a", "chosen": long + "yes", "rejected": long + "no"}]
    with pytest.raises(ValueError, match=r"row 6: two answers are the same tokens \(max_length=30\)"):
        DPODataset(rows, tokenizer, max_length=30)
    with pytest.raises(ValueError, match=r"row 6: .* without lone surrogates"):
        DPODataset([*PAIRS, {"prompt": "a", "chosen": "b \ud83d", "rejected": "c"}], tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"row 6: .* roles system, user \(no system\)"):
        DPODataset([*PAIRS, {"prompt": "System: b\n\nUser: a", "chosen": "b", "rejected": "c"}], tokenizer)


def test_answers_that_lost_their_end_are_counted(tiny, caplog):
    row = {"prompt": "a", "chosen": "What is the capital of France? " * 4, "rejected": "no"}
    DPODataset([*PAIRS, row], tiny[1], max_length=30)
    assert "1 of 14 answers lost their end at max_length=30" in caplog.text
