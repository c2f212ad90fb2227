"""Labels given by people: a form, a store that loses nothing, and what the labels follow."""

from rlhf_helpers.lab.labeling.annotator import Annotator, rate_pairs
from rlhf_helpers.lab.labeling.store import Item, Label, LabelStore

__all__ = ["Annotator", "Item", "Label", "LabelStore", "rate_pairs"]
