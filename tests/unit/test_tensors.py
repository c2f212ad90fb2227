import math

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped
from torch.testing import assert_close

from rlhf_helpers.core.tensors import (
    as_bool_mask,
    masked_mean,
    masked_whiten,
    pad_left,
    pad_right,
    require_number,
    require_shapes,
    token_entropies,
    token_logps,
)

NAN = math.nan


def mean_entropy(logits, mask, **options):
    return masked_mean(token_entropies(logits, mask, **options), mask)


def test_masked_mean_literal_value_and_gradient():
    x = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    mean = masked_mean(x, mask)
    assert_close(mean, torch.tensor(3.0))
    mean.backward()
    assert_close(x.grad, torch.tensor([[1 / 3, 1 / 3, 0.0], [1 / 3, 0.0, 0.0]]))


def test_masked_mean_per_row_is_not_the_mean_over_tokens():
    x = torch.tensor([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert_close(masked_mean(x, mask, dim=-1), torch.tensor([1.5, 6.0]))
    assert_close(masked_mean(x, mask, dim=(0, 1)), torch.tensor(3.0))


@pytest.mark.parametrize(("dim", "place"), [(None, "anywhere"), (-1, "row 1")])
def test_masked_mean_of_nothing_is_refused(dim, place):
    mask = torch.tensor([[1, 1], [0, 0]]) if dim else torch.zeros(2, 2)
    with pytest.raises(ValueError, match=place):
        masked_mean(torch.ones(2, 2), mask, dim=dim)


@pytest.mark.parametrize("strange", [torch.tensor([0.5, 1.0]), torch.tensor([-100, 1]), torch.tensor([2, 1])])
def test_what_is_no_mask_is_refused(strange):
    with pytest.raises(ValueError, match=r"only 0 and 1, got (0\.5|-100|2)"):
        masked_mean(torch.ones(2), strange)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_masks_of_every_dtype_mean_the_same(dtype):
    assert as_bool_mask(torch.tensor([1, 0, 1]).to(dtype)).tolist() == [True, False, True]


def test_masked_whiten_literal():
    x = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    shifted = masked_whiten(x, mask)
    # The mean is 3, the variance with n - 1 is 7: (1 - 3) / sqrt(7) = -0.7559289.
    assert_close(shifted, torch.tensor([[-0.7559289, -0.3779645, 0.0], [1.1338934, 0.0, 0.0]]))
    unshifted = masked_whiten(x, mask, shift_mean=False)  # 3 more on each
    assert_close(unshifted, torch.tensor([[2.2440711, 2.6220355, 0.0], [4.1338934, 0.0, 0.0]]))


def test_masked_whiten_of_equal_values_is_0_and_of_one_is_refused():
    assert_close(
        masked_whiten(torch.full((2, 3), 0.1), torch.ones(2, 3)), torch.zeros(2, 3), atol=1e-3, rtol=0
    )
    with pytest.raises(ValueError, match="at least two positions, the mask selects 1"):
        masked_whiten(torch.ones(1, 2), torch.tensor([[1, 0]]))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=4), min_size=1, max_size=4),
    st.integers(0, 3),
    st.booleans(),
)
def test_padding_changes_no_masked_statistic(rows, extra, left):
    width = max(map(len, rows))

    def padded(width, filler):
        x, mask = torch.full((len(rows), width), filler), torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            at = slice(width - len(row), None) if left else slice(len(row))
            x[i, at], mask[i, at] = torch.tensor(row), 1
        return x, mask

    plain, wide = padded(width, 0.0), padded(width + extra, 1e30)
    assert_close(masked_mean(*wide), masked_mean(*plain))
    assert_close(masked_mean(*wide, dim=-1), masked_mean(*plain, dim=-1))
    white, mask = masked_whiten(*plain), plain[1].bool()
    assert_close(masked_whiten(*wide)[wide[1].bool()], white[mask], atol=2e-3, rtol=1e-3)
    assert (white[~mask] == 0).all()


def test_token_logps_literal_value_and_gradient():
    logits = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    logps = token_logps(logits, torch.tensor([[1, 2]]))
    assert_close(logps, torch.tensor([[-0.4076060, -1.0986123]]))
    logps[0, 0].backward()
    assert_close(logits.grad[0, 0], torch.tensor([-0.2447285, 0.3347590, -0.0900306]))
    assert (logits.grad[0, 1] == 0).all()  # each label reads its own position: aligned means no shift inside


def test_token_logps_divides_the_logits_by_the_temperature():
    logits = torch.tensor([[[1.0, 2.0, 0.0]]], requires_grad=True)
    logps = token_logps(logits, torch.tensor([[0]]), temperature=2.0)
    assert_close(logps, torch.tensor([[-1.1802697]]))
    logps.sum().backward()
    assert_close(logits.grad, torch.tensor([[[0.3464021, -0.2532402, -0.0931619]]]))


def test_token_logps_of_half_precision_are_summed_in_float32():
    logits = torch.zeros(1, 1, 1000, dtype=torch.bfloat16)
    assert_close(token_logps(logits, torch.tensor([[7]])), torch.tensor([[-6.9077553]]))


def test_token_logps_survive_extreme_logits():
    logits = torch.tensor([[[1e4, -1e4, 1e4]]], requires_grad=True)
    logps = token_logps(logits, torch.tensor([[0]]))
    assert_close(logps, torch.tensor([[-0.6931472]]))
    logps.sum().backward()
    assert_close(logits.grad, torch.tensor([[[0.5, 0.0, -0.5]]]))


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_token_logps_refuse_labels_that_are_no_token(label):
    with pytest.raises(ValueError, match=rf"\[0, 3\), got {label}"):
        token_logps(torch.zeros(1, 2, 3), torch.tensor([[0, label]]))


def test_logits_shifted_without_their_labels_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 4, 3\).*shifted"):
        token_logps(torch.zeros(2, 5, 3)[:, :-1], torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 4, 3\)"):
        mean_entropy(torch.zeros(2, 4, 3), torch.ones(2, 5))


def test_entropy_literal_value_and_gradient():
    logits = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]], requires_grad=True)
    entropy = mean_entropy(logits, torch.tensor([[1, 1, 0]]))
    assert_close(entropy, torch.tensor((0.8323956 + 1.0986123) / 2))
    entropy.backward()
    assert_close(logits.grad[0, 0], torch.tensor([0.1407704, -0.2825875, 0.1418171]) / 2)
    assert (logits.grad[0, 2] == 0).all()
    warm = mean_entropy(logits[:, :1], torch.ones(1, 1), temperature=2.0)
    assert_close(warm, torch.tensor(1.0201913))


def test_entropy_with_impossible_tokens_is_finite_in_value_and_gradient():
    logits = torch.tensor([[[0.0, 0.0, -math.inf], [1e4, -1e4, 0.0]]], requires_grad=True)
    entropy = mean_entropy(logits, torch.ones(1, 2))
    assert_close(entropy, torch.tensor(0.3465736))
    entropy.backward()
    assert torch.isfinite(logits.grad).all()


def test_padding_on_either_side():
    ids, mask = pad_right([[5, 6, 7], [8]], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad_left([[5, 6, 7], [8]], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.long


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_a_real_token_that_looks_like_padding_stays_real(pad):
    _, mask = pad([[5, 2], [6, 7, 2]], pad_id=2)  # pad = eos: a mask from the ids would hide every end
    assert mask.sum(-1).tolist() == [2, 3]


@pytest.mark.parametrize("rows", [[], [[], []]])
def test_padding_nothing_is_refused(rows):
    with pytest.raises(ValueError, match="nothing to pad"):
        pad_right(rows, pad_id=0)


@pytest.mark.parametrize("shape", [(4, 1), (1,), (1, 4), ()])
def test_shapes_that_would_broadcast_are_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"mask has shape .* but x has shape \(4,\)"):
        masked_mean(torch.ones(4), torch.ones(shape))
    with pytest.raises(ValueError, match=r"mask has shape .* but x has shape \(4,\)"):
        masked_whiten(torch.ones(4), torch.ones(shape))


def test_require_shapes_names_rank_type_and_both_shapes():
    with pytest.raises(ValueError, match=r"b must have shape \(B\), got \(4, 1\)"):
        require_shapes("B", a=torch.ones(4), b=torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"b has shape \(3, 2\) but a has shape \(2, 3\)"):
        require_shapes("B T", a=torch.ones(2, 3), b=torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"a must be a tensor .* got list"):
        require_shapes("B", a=[1.0])


@pytest.mark.parametrize("value", [0, -1, 1, math.inf, NAN, "0.5", None, True, torch.tensor(0.5)])
def test_require_number_names_setting_rule_and_value(value):
    with pytest.raises(ValueError, match=r"rate must be a finite number > 0 and < 1, got"):
        require_number("rate", value, above=0, below=1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        token_logps(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long), temperature=temperature)
    with pytest.raises(ValueError, match="temperature"):
        mean_entropy(torch.zeros(1, 1, 2), torch.ones(1, 1), temperature=temperature)


def test_the_annotated_shapes_are_the_real_ones():
    checked = {f: jaxtyped(typechecker=beartype)(f) for f in (token_logps, masked_whiten, pad_left)}
    labels, _ = checked[pad_left]([[1, 2], [0]], 0)
    logps = checked[token_logps](torch.zeros(2, 2, 3), labels)
    checked[masked_whiten](logps, torch.ones(2, 2))
    with pytest.raises(TypeCheckError):
        checked[token_logps](torch.zeros(2, 2, 3), labels.float())
