"""Exercises of lesson 4: a guard and a gate, rewards for summaries, tests for programs."""

from rlhf_helpers.lab.exercises.lesson4 import chat, programs, summaries

EXERCISES = chat.EXERCISES | summaries.EXERCISES | programs.EXERCISES
