"""The reward of both sides: a few microseconds, so that the trainers are compared and not their verifiers."""


def grade(text, answer):
    return float(len(text) % 2)
