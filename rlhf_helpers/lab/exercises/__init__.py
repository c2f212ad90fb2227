"""The exercises of all lessons by name: a lesson adds its own module here."""

from rlhf_helpers.lab.exercises import lesson1, lesson2, lesson3, lesson4
from rlhf_helpers.lab.exercises.exercise import Exercise, Mistake

_ALL = (*lesson1.EXERCISES, *lesson2.EXERCISES, *lesson3.EXERCISES, *lesson4.EXERCISES)
EXERCISES: dict[str, Exercise] = {exercise.name: exercise for exercise in _ALL}
