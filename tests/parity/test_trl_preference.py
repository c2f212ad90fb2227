"""Losses, metrics and advantages against TRL 1.16.0's own code, and each difference in definition.

TRL's losses live inside its trainers' methods. They are called here as they stand, on a stand-in for `self`
that holds the settings they read; advantages come from real trainers on a tiny model. What TRL 1.16.0 lacks
(GAE, whitening, the adaptive KL controller, Plackett-Luce) is compared with other projects' numbers in
test_recorded_numbers.py.
"""

import os
from collections import defaultdict
from types import MethodType, SimpleNamespace

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from trl import (
    DPOTrainer as TRLDPO,
)
from trl import (
    GRPOConfig,
    GRPOTrainer,
    KTOTrainer,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

from rlhf_helpers.core.models import frozen_copy, load_model
from rlhf_helpers.core.policy_losses import (
    clipped_policy_loss,
    group_advantages,
    kl_estimate,
    rloo_advantages,
)
from rlhf_helpers.core.preference_losses import (
    bradley_terry_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from rlhf_helpers.core.tensors import masked_mean, pad_right, token_logps
from rlhf_helpers.dpo import DPODataset, DPOTrainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

BETA, ROWS, LENGTH = 0.3, 6, 7
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def stand_in(**settings):
    common = {"model": SimpleNamespace(training=False), "accelerator": ACCELERATOR, "aux_loss_enabled": False}
    counters = {"_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0, "_tp_size": 1}
    return SimpleNamespace(**common | counters | {"beta": BETA, "label_smoothing": 0.0} | settings)


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- DPO's kin on random per-token log-probs


@pytest.fixture(scope="module")
def batch():
    """Per-token log-probs of chosen, then rejected answers of 1 to LENGTH tokens; their sums and lengths."""
    lengths = torch.randint(1, LENGTH + 1, (2 * ROWS,), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(LENGTH) < lengths[:, None]
    policy, ref = (-noise(2 * ROWS, LENGTH, seed=s).abs() * 3 * mask for s in (1, 2))
    sums = [part for x in (policy, ref) for part in x.sum(-1).chunk(2)]
    return SimpleNamespace(policy=policy, mask=mask, lengths=lengths, sums=sums)


def dpo_stand_in(loss_type, **settings):
    weights = {"ld_alpha": None, "precompute_ref_logps": True, "use_weighting": False, "loss_weights": [1.0]}
    return stand_in(f_divergence_type="reverse_kl", loss_types=[loss_type], **weights | settings)


def trl_dpo(batch, loss_type, **settings):
    """Return TRL's loss of the whole batch, of one prompt token and then the answer, per row."""
    first = torch.ones(len(batch.mask), 1, dtype=torch.long)
    found = {"log_probs": batch.policy, "entropy": batch.policy, "mean_logits": batch.policy}
    outputs = SimpleNamespace(**found, is_top1=batch.mask)
    inputs = {
        "input_ids": torch.cat([first, first.expand(-1, LENGTH)], 1),
        "attention_mask": torch.cat([first, batch.mask.long()], 1),
        "completion_mask": torch.cat([0 * first, batch.mask.long()], 1),
        "ref_chosen_logps": batch.sums[2],
        "ref_rejected_logps": batch.sums[3],
    }
    return TRLDPO._compute_loss(dpo_stand_in(loss_type, **settings), lambda **_: outputs, inputs, False)


@pytest.mark.parametrize(
    "ours, loss_type, smoothing",
    [(dpo_loss, "sigmoid", None), (hinge_loss, "hinge", None), (robust_dpo_loss, "robust", 0.2)],
)
def test_dpo_hinge_and_robust_dpo_are_trls(batch, ours, loss_type, smoothing):
    options = {} if smoothing is None else {"label_smoothing": smoothing}
    mine = ours(*batch.sums, beta=BETA, **options).mean()
    assert_close(mine, trl_dpo(batch, loss_type, **options), atol=1e-5, rtol=0)


def test_ipo_sums_where_trl_averages_over_tokens(batch):
    theirs = trl_dpo(batch, "ipo")
    lengths = batch.lengths.chunk(2) * 2
    means = [x / n for x, n in zip(batch.sums, lengths, strict=True)]
    assert_close(ipo_loss(*means, beta=BETA).mean(), theirs, atol=1e-5, rtol=0)
    assert (ipo_loss(*batch.sums, beta=BETA).mean() - theirs).abs() > 1


def test_label_smoothing_is_ignored_by_trls_sigmoid_and_taken_by_ours(batch):
    theirs = trl_dpo(batch, "sigmoid", label_smoothing=0.3)
    assert_close(theirs, dpo_loss(*batch.sums, beta=BETA).mean(), atol=1e-5, rtol=0)
    assert (dpo_loss(*batch.sums, beta=BETA, label_smoothing=0.3).mean() - theirs).abs() > 0.01


def test_conservative_dpo_is_trls_aot_on_a_single_pair(batch):
    """AOT sorts the log-ratios of a batch, which does nothing to one pair, and takes label_smoothing."""
    rows = [2, 2 + ROWS]
    one = SimpleNamespace(
        policy=batch.policy[rows],
        mask=batch.mask[rows],
        lengths=batch.lengths[rows],
        sums=[x[2:3] for x in batch.sums],
    )
    mine = dpo_loss(*one.sums, beta=BETA, label_smoothing=0.3).mean()
    assert_close(mine, trl_dpo(one, "aot", label_smoothing=0.3), atol=1e-5, rtol=0)


# ---- losses without a reference


def mean_logps():
    return [-noise(ROWS, seed=s).abs() - 0.01 for s in (3, 4)]


def test_orpo_adds_the_cross_entropy_and_turns_the_sign():
    """TRL's odds_ratio_loss is beta logsigmoid(log-odds ratio), to be maximised, and no more."""
    chosen, rejected = mean_logps()
    theirs = ORPOTrainer.odds_ratio_loss(stand_in(), chosen, rejected)[0]
    assert (theirs < 0).all()
    assert_close(orpo_loss(chosen, rejected, beta=BETA), -chosen - theirs, atol=1e-5, rtol=0)


def test_orpos_cross_entropy_counts_the_prompt_in_trl_and_not_here(tiny_llama_dir):
    model, _ = load_model(tiny_llama_dir, device="cpu")
    prompt, answers = [20, 21, 22], ([30, 31, 1], [40, 41, 42, 1])
    rows = {}
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        ids = torch.tensor([prompt + answer])
        rows[f"{side}_input_ids"], rows[f"{side}_attention_mask"] = ids, torch.ones_like(ids)
        rows[f"{side}_labels"] = torch.tensor([[-100] * len(prompt) + answer])
    trl = stand_in(is_encoder_decoder=False, padding_value=0)
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(trl, name, getattr(ORPOTrainer, name))
    for name in ("concatenated_forward", "odds_ratio_loss"):
        setattr(trl, name, MethodType(getattr(ORPOTrainer, name), trl))
    theirs, metrics = ORPOTrainer.get_batch_loss_metrics(trl, model, rows)
    ids = rows["chosen_input_ids"]
    logps = token_logps(model(ids).logits[:, :-1], ids[:, 1:])
    answer = logps[0, -len(answers[0]) :].mean()
    assert metrics["logps/chosen"] == pytest.approx(answer.item(), abs=1e-5)
    means = [torch.tensor([metrics[f"logps/{side}"]]) for side in ("chosen", "rejected")]
    without = (
        theirs + logps.mean() - answer
    )  # the answer's cross-entropy in place of that of prompt and answer
    assert_close(orpo_loss(*means, beta=BETA)[0], without.detach(), atol=1e-5, rtol=0)
    assert (logps.mean() - answer).abs() > 0.01


def test_simpos_gamma_is_in_units_of_the_reward_in_both():
    """TRL subtracts gamma / beta inside beta (...), which is gamma; the authors' code takes the ratio."""
    chosen, rejected = mean_logps()
    trl = stand_in(alpha=0.0, loss_type="simpo", simpo_gamma=0.7)
    theirs = CPOTrainer.cpo_loss(trl, chosen, rejected)[0]
    assert_close(simpo_loss(chosen, rejected, beta=BETA, gamma=0.7), theirs, atol=1e-5, rtol=0)
    assert (simpo_loss(chosen, rejected, beta=BETA, gamma=0.7 / BETA) - theirs).abs().min() > 0.1


@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_is_trls_reward_loss(with_margin):
    chosen, rejected, margin = (noise(ROWS, seed=s) for s in (5, 6, 7))
    margin = margin if with_margin else None
    trl = stand_in(args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {"attention_mask": torch.ones(2 * ROWS, 1)} | ({"margin": margin} if with_margin else {})
    logits = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
    theirs = RewardTrainer.compute_loss(trl, lambda **_: logits, inputs)
    assert_close(bradley_terry_loss(chosen, rejected, margin=margin).mean(), theirs, atol=1e-5, rtol=0)


# ---- the whole way from token ids to loss and metrics


PAIRS = [
    {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "I do not know, sorry."},
    {"prompt": "Hello", "chosen": "Hello! How are you today?", "rejected": "No."},
    {"prompt": "Why?", "chosen": "Because it is so.", "rejected": "Why not"},
]
UNPAIRED = [
    {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
    for pair, key in zip(
        PAIRS * 2, ["chosen", "rejected", "chosen", "chosen", "chosen", "rejected"], strict=True
    )
]
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def moved_policy(folder, **settings):
    """Return one of our trainers whose policy has left its reference, and a copy with TRL's head."""
    model, tokenizer = load_model(folder, device="cpu")
    trainer = DPOTrainer(model, None, tokenizer, beta=BETA, progress=False, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    fused = frozen_copy(model)
    add_fused_lm_head(fused, outputs=FIELDS)
    return trainer, fused


def padded(sequences, prefix=""):
    ids, mask = pad_right([p + r for p, r in sequences], 0)
    answers, _ = pad_right([[0] * len(p) + [1] * len(r) for p, r in sequences], 0)
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask, f"{prefix}completion_mask": answers}


def same_metrics(trl, loss, mine, names):
    theirs = {name: values[-1] for name, values in trl._metrics["eval"].items()}
    assert mine["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert {n: mine[f"eval_{n}"] for n in names} == pytest.approx({n: theirs[n] for n in names}, abs=1e-4)


def test_loss_and_metrics_of_dpo_from_token_ids(tiny_llama_dir):
    trainer, fused = moved_policy(tiny_llama_dir)
    data = trainer.dataset(PAIRS)
    inputs = padded([row[0] for row in data.sequences] + [row[1] for row in data.sequences])
    refs = torch.stack(data.ref_logps)
    inputs |= {"ref_chosen_logps": refs[:, 0], "ref_rejected_logps": refs[:, 1]}
    trl = dpo_stand_in("sigmoid")
    loss = TRLDPO._compute_loss(trl, fused, inputs, False)
    names = [f"{of}/{side}" for of in ("rewards", "logps") for side in ("chosen", "rejected")]
    same_metrics(trl, loss, trainer.evaluate(data), [*names, "rewards/margins", "rewards/accuracies"])
    assert (loss - 0.6931).abs() > 1e-3, "a policy at its reference would show nothing"


def test_loss_reference_point_and_metrics_of_kto_from_token_ids(tiny_llama_dir):
    trainer, fused = moved_policy(tiny_llama_dir, loss="kto", undesirable_weight=1.5)
    data = DPODataset(UNPAIRED, trainer.run.tokenizer)
    data.add_reference(trainer.run.ref_model)
    inputs = padded([row[0] for row in data.sequences]) | padded([row[1] for row in data.sequences], "KL_")
    refs = torch.stack(data.ref_logps)
    inputs |= {"ref_logps": refs[:, 0], "ref_KL_logps": refs[:, 1]}
    inputs["label"] = torch.tensor([row["label"] for row in UNPAIRED])
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.5, "loss_type": "kto"}
    trl = stand_in(calculate_KL=True, precompute_ref_logps=True, **weights)
    trl._compute_kl_logps = MethodType(KTOTrainer._compute_kl_logps, trl)
    loss = KTOTrainer._compute_loss(trl, fused, inputs, False)
    names = ["kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"]
    same_metrics(trl, loss, trainer.evaluate(data), names)


# ---- advantages and the clipped loss


REWARDS = [0.3, 1.2, -0.4, 0.9, 2.0, 2.0, 2.0, 2.0]  # two prompts, four samples each; the second group ties


def trl_advantages(trainer_class, config_class, folder, out, **settings):
    common = {"output_dir": str(out), "use_cpu": True, "bf16": False, "report_to": [], "num_generations": 4}
    common |= {"per_device_train_batch_size": 8, "max_completion_length": 2, "beta": 0.0}
    model, tokenizer = load_model(folder, device="cpu")
    prompts, args = Dataset.from_dict({"prompt": ["Hello", "Why?"]}), config_class(**common | settings)
    trainer = trainer_class(
        model=model,
        processing_class=tokenizer,
        args=args,
        train_dataset=prompts,
        reward_funcs=lambda prompts, **_: REWARDS,
    )
    rows = [{"prompt": prompt} for prompt in ("Hello", "Why?") for _ in range(4)]
    return trainer._generate_and_score_completions(rows)["advantages"].view(2, 4)


def test_rloo_advantages_are_trls(tiny_llama_dir, tmp_path):
    theirs = trl_advantages(RLOOTrainer, RLOOConfig, tiny_llama_dir, tmp_path, normalize_advantages=False)
    assert_close(rloo_advantages(torch.tensor(REWARDS).view(2, 4)), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages_are_trls(tiny_llama_dir, tmp_path, scale):
    how = {"scale_rewards": "group" if scale else "none"}
    theirs = trl_advantages(GRPOTrainer, GRPOConfig, tiny_llama_dir, tmp_path, **how)
    assert_close(group_advantages(torch.tensor(REWARDS).view(2, 4), scale=scale), theirs, atol=1e-5, rtol=0)


def policy_inputs(logps, old_logps, ref_logps, advantages, mask):
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.long()}
    inputs |= {"old_per_token_logps": old_logps, "ref_per_token_logps": ref_logps, "advantages": advantages}
    return inputs | {"old_logps": (old_logps * mask).sum(-1)}


def policy_stand_in(logps, **settings):
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None)
    common = {"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "args": args}
    common |= {"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False}
    common |= {"current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False, "loss_type": "bnpo"}
    trl = stand_in(**common | settings)
    trl._get_per_token_logps_and_entropies = lambda *_, **__: (logps, logps.detach(), None)
    return trl


def policy_batch():
    logps = -noise(ROWS, LENGTH, seed=8).abs()
    old_logps, ref_logps = (logps + 0.3 * noise(ROWS, LENGTH, seed=s) for s in (9, 10))
    mask = torch.arange(LENGTH) < torch.tensor([7, 1, 4, 2, 7, 5])[:, None]
    return logps.requires_grad_(), old_logps.detach(), ref_logps.detach(), noise(ROWS, seed=11), mask


def test_clipped_loss_with_k3_is_trls_grpo():
    logps, old_logps, ref_logps, advantages, mask = policy_batch()
    trl = policy_stand_in(logps, beta=0.04)
    theirs = GRPOTrainer._compute_loss(
        trl, None, policy_inputs(logps, old_logps, ref_logps, advantages, mask)
    )
    spread = advantages[:, None].expand_as(logps)
    mine = clipped_policy_loss(logps, old_logps, spread, cliprange=0.2)
    mine = masked_mean(mine + 0.04 * kl_estimate(logps, ref_logps, estimator="k3"), mask)
    assert_close(mine, theirs, atol=1e-5, rtol=0)
    gradients = [torch.autograd.grad(loss, logps, retain_graph=True)[0] for loss in (mine, theirs)]
    assert_close(*gradients, atol=1e-5, rtol=0)


def test_trls_rloo_clips_one_ratio_a_response_and_agrees_with_reinforce_where_it_is_one():
    """Ours samples anew for each update, so its ratio is 1; TRL multiplies the ratios of all tokens."""
    logps, old_logps, ref_logps, advantages, mask = policy_batch()
    inputs = policy_inputs(logps, logps.detach(), ref_logps, advantages, mask)
    theirs = torch.autograd.grad(RLOOTrainer._compute_loss(policy_stand_in(logps), None, inputs), logps)[0]
    reinforce = (-(advantages[:, None] * logps) * mask).sum(-1).mean()
    assert_close(torch.autograd.grad(reinforce, logps)[0], theirs, atol=1e-5, rtol=0)
    inputs = policy_inputs(logps, old_logps, ref_logps, advantages, mask)
    off_policy = RLOOTrainer._compute_loss(policy_stand_in(logps), None, inputs)
    ratio = ((logps - old_logps) * mask).sum(-1).exp()
    whole = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages).mean()
    assert_close(off_policy, whole, atol=1e-5, rtol=0)
