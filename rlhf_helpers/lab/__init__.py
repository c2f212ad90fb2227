"""What people see: plots, small tables, exercise checks, quizzes and widgets for the lessons."""
