"""Exercises of lesson 3, in its order: AI labels, attacks, safety metrics, trade-offs, values, patching."""

from rlhf_helpers.lab.exercises.lesson3 import choosing, measuring, reading

EXERCISES = (
    reading.SOFT_LABEL,
    measuring.ATTACK_RATE,
    reading.SWAP_SCORES,
    measuring.REFUSAL_ERRORS,
    measuring.BBQ_BIAS,
    *choosing.EXERCISES,
    reading.PATCHING_EFFECT,
)
