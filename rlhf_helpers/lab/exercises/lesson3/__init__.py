"""Exercises of lesson 3: AI labels, attacks, safety metrics, trade-offs, values, patching."""

from rlhf_helpers.lab.exercises.lesson3 import choosing, measuring, reading

EXERCISES = reading.EXERCISES | measuring.EXERCISES | choosing.EXERCISES
