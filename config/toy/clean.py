# The toy world with a teacher that is always correct: the demo's problems and base, every trace complete.
data = "toy/clean.parquet"
min_teacher_pass = 0.99
