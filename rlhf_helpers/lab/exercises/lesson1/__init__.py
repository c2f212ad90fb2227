"""Exercises of lesson 1: what training computes, and how labels and rewards are measured."""

from rlhf_helpers.lab.exercises.lesson1 import measuring, training

EXERCISES = training.EXERCISES | measuring.EXERCISES
