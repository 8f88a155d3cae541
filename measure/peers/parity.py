"""The reward of both sides. It takes a few microseconds, so that the trainers are compared, not their verifiers."""


def grade(text, answer):
    return float(len(text) % 2)
