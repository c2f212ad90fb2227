"""Exercises of lesson 2: from advantages to a policy's losses, then preferences without RL."""

from rlhf_helpers.lab.exercises.lesson2 import kl, policy, preference

EXERCISES = policy.EXERCISES | kl.EXERCISES | preference.EXERCISES
