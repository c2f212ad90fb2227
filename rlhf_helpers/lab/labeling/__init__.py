"""Labels given by people: a form, a store that loses nothing, and what the labels follow."""

from rlhf_helpers.lab.labeling.annotator import Annotator, rate_pairs
from rlhf_helpers.lab.labeling.payoff import (
    MIN_LABELS,
    decided,
    draw_pairs,
    follow_taste,
    labels_in_use,
    learn_taste,
    polite_choices,
    traits,
)
from rlhf_helpers.lab.labeling.store import Item, Label, LabelStore
