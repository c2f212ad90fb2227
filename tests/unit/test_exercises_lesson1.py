"""The functions that lesson 1's exercises compare with: values by hand, other libraries, enumeration."""

import math

import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from rlhf_helpers.lab.exercises import EXERCISES
from rlhf_helpers.reward_model import RewardModelTrainer, create_reward_model
from rlhf_helpers.world.annotators import make_pairs

sft_labels, cohen_kappa, calibration_error, best_of_n_gold, reward_step, pair_loss = (
    EXERCISES[name].reference
    for name in (
        "sft_labels",
        "cohen_kappa",
        "calibration_error",
        "best_of_n_gold",
        "reward_step",
        "pair_loss",
    )
)


def value(x):
    return pytest.approx(x, abs=1e-6)


def test_sft_labels_by_hand():
    ids, mask = torch.tensor([[5, 6, 7, 2, 0]]), torch.tensor([[0, 0, 1, 1, 0]])
    assert sft_labels(ids, mask).tolist() == [[-100, -100, 7, 2, -100]]
    assert ids.tolist() == [[5, 6, 7, 2, 0]]


def test_kappa_by_hand_and_as_sklearn():
    # both 1: 2, both 0: 1, they differ once; shares 3/4 and 1/2, so chance 1/2 and (3/4 - 1/2) / (1 - 1/2)
    assert cohen_kappa(torch.tensor([1, 1, 1, 0]), torch.tensor([1, 1, 0, 0])).item() == value(0.5)
    draw = torch.Generator().manual_seed(0)
    for share in (0.3, 0.7, 0.9):
        first = (torch.rand(60, generator=draw) < share).long()
        second = torch.where(torch.rand(60, generator=draw) < 0.6, first, 1 - first)
        assert cohen_kappa(first, second).item() == value(cohen_kappa_score(first, second))
    assert math.isnan(cohen_kappa(torch.ones(3), torch.ones(3)).item())


def test_calibration_error_by_hand():
    confidence, correct = torch.tensor([0.6, 0.8, 0.9, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    # bins of one fifth: 0.6 alone (gap 0.4, one quarter); 0.8, 0.9, 1.0 (mean 0.9, right 2/3, three quarters)
    assert calibration_error(confidence, correct, 5).item() == value(0.4 / 4 + (0.9 - 2 / 3) * 3 / 4)
    assert calibration_error(confidence, correct, 1).item() == value(abs(0.825 - 0.75))


def encoded(model, rows):
    return [[model.encode(row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected")]


@pytest.mark.slow
def test_a_step_in_parts_is_the_trainers_step():
    rows, new = make_pairs(8, seed=0), make_pairs(20, seed=1)
    mine, trainers = (create_reward_model(seed=0) for _ in range(2))
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-3, weight_decay=0.0)
    loss = reward_step(mine.rewards_of, optimizer, *encoded(mine, rows), 3)
    trainer = RewardModelTrainer(model=trainers, learning_rate=1e-3, max_grad_norm=None, progress=False)
    assert loss == pytest.approx(trainer.train_step(rows), abs=1e-5)
    for side in encoded(mine, new):
        torch.testing.assert_close(mine.rewards_of(side), trainers.rewards_of(side), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_the_loss_of_pairs_is_the_trainers():
    rows, model = make_pairs(6, seed=0), create_reward_model(seed=0)

    def values_of(ids):
        return model.head(model.trunk(input_ids=ids).last_hidden_state)[..., None]

    wanted = RewardModelTrainer(model=model).evaluate(rows)["eval_loss"]
    loss = pair_loss(values_of, *encoded(model, rows), model.tokenizer.eos_token_id)
    assert loss.item() == pytest.approx(wanted, abs=1e-4)


def test_best_of_n_gold_by_hand():
    proxy, gold = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([10.0, 20.0, 40.0])
    # n = 2, three subsets: {0, 1} -> 10, {0, 2} -> 10, {1, 2} -> 40
    assert [best_of_n_gold(proxy, gold, n).item() for n in (1, 2, 3)] == value([70 / 3, 20.0, 10.0])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: sft_labels(torch.ones(1, 3).long(), torch.ones(1, 2)), r"response_mask has shape \(1, 2\)"),
        (
            lambda: sft_labels(torch.ones(1, 1).long(), torch.tensor([[7]])),
            "response_mask must hold .* got 7",
        ),
        (lambda: cohen_kappa(torch.tensor([0, 1]), torch.tensor([0, 2])), "second must hold .* got 2"),
        (lambda: calibration_error(torch.tensor([1.2]), torch.ones(1), 5), r"confidence.*1\.2"),
        (lambda: calibration_error(torch.ones(2), torch.ones(2), 0), "bins.*0"),
        (lambda: best_of_n_gold(torch.ones(3), torch.ones(3), 4), "n .*4"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
