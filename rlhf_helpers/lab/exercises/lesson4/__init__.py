"""Exercises of lesson 4: a chatbot's turns, summaries, programs."""

from rlhf_helpers.lab.exercises.lesson4 import chat, programs, summaries

EXERCISES = chat.EXERCISES | summaries.EXERCISES | programs.EXERCISES
