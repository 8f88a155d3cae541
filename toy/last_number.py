"""A grader for `make demo-real`: the last number of the answer counts."""

import re


def grade(text, answer):
    numbers = re.findall(r"-?\d+", text)
    return bool(numbers) and int(numbers[-1]) == int(answer)
