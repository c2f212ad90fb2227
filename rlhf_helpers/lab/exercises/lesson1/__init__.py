"""Exercises of lesson 1, in its order: what training computes, and how labels and rewards are measured."""

from rlhf_helpers.lab.exercises.lesson1 import measuring, training

ORDER = (
    "sft_labels",
    "cohen_kappa",
    "bradley_terry",
    "plackett_luce",
    "last_token",
    "calibration_error",
    "pessimistic",
    "best_of_n_gold",
)
EXERCISES = tuple(sorted((*training.EXERCISES, *measuring.EXERCISES), key=lambda e: ORDER.index(e.name)))
