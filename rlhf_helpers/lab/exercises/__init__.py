"""The exercises of all lessons by name: a lesson adds its own module here."""

from rlhf_helpers.lab.exercises import lesson1
from rlhf_helpers.lab.exercises.exercise import Exercise, Mistake

EXERCISES: dict[str, Exercise] = {exercise.name: exercise for exercise in (*lesson1.EXERCISES,)}

__all__ = ["EXERCISES", "Exercise", "Mistake"]
