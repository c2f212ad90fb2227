"""Exercises of lesson 3: AI labels, revisions, hardening, guards, refusals, limits, attacks, debate."""

from rlhf_helpers.lab.exercises.lesson3 import deciding, labeling, writing

EXERCISES = labeling.EXERCISES | writing.EXERCISES | deciding.EXERCISES
