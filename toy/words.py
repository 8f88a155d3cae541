"""
Word problems for a small real language model, written by a program. A problem of two events, and its trace:

    Question: Ada has 9 plums, loses 3, breaks 5. How many plums are left?
    Answer: 9 - 3 = 6, 6 - 5 = 1. The answer is 1.

A trace that stops early ends after the first event: "9 - 3 = 6. The answer is 6."
"""

NAMES = "Mia Leo Ada Tom Zoe Sam Eva Max Ida Ben".split()
THINGS = "plums shells coins books cards stamps eggs beads".split()
MORE, LESS = "finds buys gets wins".split(), "loses sells drops breaks".split()
LARGEST, MOST = 9, 19  # numbers in a question run to LARGEST, totals from 1 to MOST


def problem(rng, events):
    """A random problem: its question, the steps of its working, the total after each event."""
    total, thing = rng.randint(2, LARGEST), rng.choice(THINGS)
    question, steps, totals = f"{rng.choice(NAMES)} has {total} {thing}", [], []
    for _ in range(events):
        choices = [n for n in range(-LARGEST, LARGEST + 1) if n and 1 <= total + n <= MOST]
        change = rng.choice(choices)
        question += f", {rng.choice(MORE if change > 0 else LESS)} {abs(change)}"
        steps.append(f"{total} {'+' if change > 0 else '-'} {abs(change)} = {total + change}")
        totals.append(total := total + change)
    return f"{question}. How many {thing} are left?", steps, totals


def build_rows(rng, n, events, seen, early=0.0, given=0):
    """n problems of so many events that are not in the set `seen`, which grows by them, as rows of LUFFY's schema. A share
    `early` of the traces (exactly, rounded) stops one event early. They are never right: an event changes the total. The first
    `given` steps of the working are in the prompt, and the trace goes on from there."""
    rows, stop_early = [], set(rng.sample(range(n), round(early * n)))
    while len(rows) < n:
        question, steps, totals = problem(rng, events)
        end = events - (len(rows) in stop_early)
        if question in seen:
            continue
        seen.add(question)
        begun = f" {', '.join(steps[:given])}," if given else ""
        trace = f" {', '.join(steps[given:end])}. The answer is {totals[end - 1]}."
        rows.append({
            "data_source": f"{events} events" if events > 1 else "1 event",
            "prompt": [{"role": "user", "content": f"Question: {question}\nAnswer:{begun}"}],
            "target": [{"role": "assistant", "content": trace}],
            "reward_model": {"ground_truth": str(totals[-1])},
        })  # fmt: skip
    return rows
