"""
Word problems for a small real language model, written by a program. A problem of three events, and its trace:

    Question: Ada has 6 plums, loses 3, breaks 1, finds 5. How many plums are left?
    Answer: 6 - 3 = 3, 3 - 1 = 2, 2 + 5 = 7. The answer is 7.

A trace that stops after two events: "6 - 3 = 3, 3 - 1 = 2. The answer is 2."
"""

NAMES = "Mia Leo Ada Tom Zoe Sam Eva Max Ida Ben".split()
THINGS = "plums shells coins books cards stamps eggs beads".split()
MORE, LESS = "finds buys gets wins".split(), "loses sells drops breaks".split()
LARGEST, MOST = 6, 12  # numbers in a question run to LARGEST, totals from 1 to MOST


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


def build_rows(rng, n, events, seen, given=0, stop=0, share=0.0):
    """n problems of so many events that are not in the set `seen`, which grows by them, as rows of LUFFY's schema. The first
    `given` steps of the working are in the prompt, and the trace goes on from there. A share of the traces (exactly, rounded)
    stops after `stop` events. These are never right: no earlier total is the answer."""
    rows, stops = [], set(rng.sample(range(n), round(share * n)))
    while len(rows) < n:
        question, steps, totals = problem(rng, events)
        if question in seen or totals[-1] in totals[:-1]:
            continue
        seen.add(question)
        end = stop if len(rows) in stops else events
        begun = f" {', '.join(steps[:given])}," if given else ""
        trace = f" {', '.join(steps[given:end])}. The answer is {totals[end - 1]}."
        rows.append({
            "data_source": "words",
            "prompt": [{"role": "user", "content": f"Question: {question}\nAnswer:{begun}"}],
            "target": [{"role": "assistant", "content": trace}],
            "reward_model": {"ground_truth": str(totals[-1])},
        })  # fmt: skip
    return rows
