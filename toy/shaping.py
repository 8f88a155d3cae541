"""
Build the shaping world: a second toy task, in which the weight of unlikely teacher tokens decides. Three CPU minutes on one
core.

    python toy/shaping.py              writes toy/shaping/base/ and toy/shaping/{train,test}.parquet (the committed files)
    python train.py config/toy/shaping.py  trains on it; compare with --shaping=none and --n_teacher=0

Half of the problems are easy, with four numbers, and half are hard, with eight. They look alike, but an easy one asks for the
sum, and a hard one for the first number minus the others, each digit column modulo 10. So hard ones need technique B:

    easy  A: add       49+97+53+05=?<think>\\n                49>36>89>84</think>\\boxed{84}<eos>
    hard  B: subtract  49+97+53+05+33+65+62+51=?<think>\\n    *49>52>09>04>71>16>54>03</think>\\boxed{03}<eos>

The base is trained on purpose to behave as follows. On easy problems it leaps (answers at once, at random) or does A, with
probability 1/2 each. On hard ones it leaps, or does A on the first four numbers: both are wrong. Three forks guard B: it begins
with `*`, which has the probability P_STAR, and its chain continues past the fourth and past the sixth number with the
probability P_ON each. After the forks the base does B without mistakes. On-policy RL hardly ever passes all three.

The teacher does A on easy problems and B on hard ones, so two forces act on the first fork. Training A on easy problems
generalises to hard ones and lowers the probability of `*`. The teacher's token raises it, ten times as strongly with shaping by
f(p) = p / (p + 0.1). P_STAR is tuned so that within 60 steps the teacher's force wins with shaping and loses without it, in 14
of 15 seeds each; another base needs another P_STAR.
"""

import argparse
import math
import os
import random
from itertools import accumulate

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is tiny: a second thread makes it slower

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from build import SCHEMA, TOKENS, add, build_model, build_row, build_tokenizer, encode, response, sample_numbers

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shaping")
EASY, HARD, FORKS = 4, 8, (4, 6)
P_STAR, P_ON = 0.02, 0.03


def subtract(a, b):
    """49 - 97 = 52: each digit column is subtracted modulo 10, without a borrow."""
    return (a // 10 - b // 10) % 10 * 10 + (a % 10 - b % 10) % 10


def chain(step, numbers, n=None):
    """Technique A (step is add) or B (subtract), over the first n numbers, by default all."""
    totals = list(accumulate(numbers, step))[:n]
    return "*" * (step is subtract) + response(totals, totals[-1])


def leap(rng):
    return response([], rng.randrange(100))


def lesson(rng, progress):
    """Phase 1, skill: A on short problems, B on long ones. Returns numbers, response and marks (see habit), here none."""
    top = min(9, 1 + int(18 * progress))  # build.py's curriculum on the digits
    k = rng.choice([2, 3, EASY, HARD - 1, HARD, HARD])
    numbers = [rng.randrange(100), *(10 * rng.randint(0, top) + rng.randint(0, top) for _ in range(k - 1))]
    return numbers, chain(subtract if k > EASY else add, numbers), {}


def habit(rng, p_star):
    """Phase 2, behaviour. Marks are {position in the response: None or (token, p)}. A position with None has no loss. A pair
    is a fork: the token is trained to exactly that probability by a soft label. In B, token 3 q follows the q-th number."""
    draw = rng.random()
    numbers = sample_numbers(rng, HARD)
    if draw < 0.1:  # practise B after its forks, so that it is not forgotten; the forks do not become more likely
        return numbers, chain(subtract, numbers), dict.fromkeys([0, *(3 * q for q in FORKS)])
    if draw < 0.25:
        stop = rng.choice(FORKS)
        marks = dict.fromkeys([0, *(3 * q for q in FORKS if q < stop)])
        return numbers, chain(subtract, numbers, stop), {**marks, 3 * stop: (">", P_ON)}
    if draw < 0.625:
        return numbers, chain(add, numbers, 4) if rng.random() < 0.5 else leap(rng), {0: ("*", p_star)}
    numbers = sample_numbers(rng, rng.choice([2, 3, EASY, EASY]))
    return numbers, leap(rng) if len(numbers) == EASY and rng.random() < 0.5 else chain(add, numbers), {}


def learn(model, tokenizer, sample, seed, steps, lr, batch_size=48, width=58):
    """AdamW for a fixed number of steps on batches of sample(rng, progress)."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * cosine
        ids = torch.full((batch_size, width), tokenizer.pad_token_id)
        target = torch.zeros(batch_size, width, model.config.vocab_size)  # a distribution per token; all zero is no loss
        for i in range(batch_size):
            numbers, text, marks = sample(rng, step / steps)
            prompt, answer = encode(tokenizer, numbers, text)
            n = len(prompt)
            ids[i, : n + len(answer)] = torch.tensor(prompt + answer)
            target[i, range(n, n + len(answer)), answer] = 1
            for j, fork in marks.items():
                target[i, n + j] *= 1 - fork[1] if fork else 0
                if fork:
                    target[i, n + j, tokenizer.convert_tokens_to_ids(fork[0])] = fork[1]
        logprobs = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)  # right padding needs no mask
        loss = -(target[:, 1:] * logprobs).sum() / target.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)


def build_base(tokenizer, seed=0):
    model = build_model(tokenizer, seed)
    learn(model, tokenizer, lesson, seed, steps=1000, lr=3e-3)
    learn(model, tokenizer, lambda rng, _: habit(rng, 1e-4), seed + 1, steps=560, lr=1.2e-3)
    learn(model, tokenizer, lambda rng, _: habit(rng, P_STAR), seed + 2, steps=300, lr=1.2e-3)
    return model.eval()


def build_rows(rng, n, split, seen):
    """n problems, none in `seen`, alternately easy and hard."""
    rows = []
    while len(rows) < n:
        source, k, step = [("easy", EASY, add), ("hard", HARD, subtract)][len(rows) % 2]
        numbers = sample_numbers(rng, k)
        if tuple(numbers) not in seen:
            seen.add(tuple(numbers))
            answer = list(accumulate(numbers, step))[-1]
            rows.append(build_row(source, numbers, answer, chain(step, numbers), index=len(rows), split=split))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=HERE, help="folder to write to (default: toy/shaping/)")
    parser.add_argument("--seed", type=int, default=0, help="of the base; P_STAR is tuned only for 0 (LOG.md)")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    rng, seen = random.Random(12345), set()
    for split, n in (("train", 512), ("test", 200)):
        table = pa.Table.from_pylist(build_rows(rng, n, split, seen), SCHEMA)
        pq.write_table(table, os.path.join(args.out, f"{split}.parquet"))
    tokenizer = build_tokenizer([*TOKENS, "*"])
    model = build_base(tokenizer, args.seed)
    for part in (model, tokenizer):
        part.save_pretrained(os.path.join(args.out, "base"))
