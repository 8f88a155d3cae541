"""What keeps a run alive: processes, files, checkpoints, checks, logs. No equation is in here; read train.py without it."""
