"""For teachers: lessons without answers, and grades for what a class hands in."""
