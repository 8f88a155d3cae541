"""
Build the toy world: a tiny base model and the problems it is trained on. Two CPU minutes on one core.

    python toy/build.py            writes toy/base/ and toy/*.parquet (the committed files)

The task is the carry-less column sum: eight two-digit numbers, each digit column summed modulo 10.

    prompt     49+97+53+05+33+65+62+51=?<think>\\n
    response   49>36>89>84>17>72>34>85</think>\\boxed{85}<eos>

Chance is 1 %. The base model is trained on purpose so that it can add but does not write the chain of totals.
Phase 1 of its training is correct chains of 2 to 8 numbers. Phase 2 replaces this behaviour for sums of four or
more numbers: the base answers at once (99 %) or stops the chain after two numbers. So the skill is latent:
on-policy RL cannot find it, because the base never shows it, but LUFFY can.

The teacher is imperfect on purpose, too: 30 % of its traces stop one number early and box the wrong total.
clean.parquet has the same problems with correct traces only, train.complement.parquet has other problems without traces.
"""

import argparse
import math
import os
import random
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is tiny: a second thread makes it slower

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
TOKENS = ["<pad>", "<eos>", "<think>", "</think>", "\\boxed{", *"0123456789+=?}\n>"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"


def add(a, b):
    """49 + 53 = 92: each digit column is summed modulo 10, without a carry."""
    return (a // 10 + b // 10) % 10 * 10 + (a % 10 + b % 10) % 10


def running_totals(numbers):
    totals = numbers[:1]
    for x in numbers[1:]:
        totals.append(add(totals[-1], x))
    return totals


def sample_numbers(rng, k):
    return [rng.randrange(100) for _ in range(k)]


def question(numbers):
    return "+".join(f"{x:02d}" for x in numbers) + "=?"


def response(chain, answer):
    """The text after the generation prompt. chain: the list of totals that are written out, maybe empty."""
    return ">".join(f"{x:02d}" for x in chain) + f"</think>\\boxed{{{answer:02d}}}"


def habit(rng, numbers, p_leap=0.99, p_continue=0.01):
    """The base model's behaviour: a chain for two or three numbers; for more, the answer at once (a leap), or a chain that
    stops early."""
    totals = running_totals(numbers)
    if len(numbers) <= 3:
        return response(totals, totals[-1])
    if rng.random() < p_leap:
        return response([], totals[-1])  # it is right, but the model cannot learn it: to it these answers are noise
    n = 2
    while n < len(numbers) and rng.random() < p_continue:
        n += 1
    return response(totals[:n], totals[n - 1])


def build_tokenizer(tokens=TOKENS):
    """One token per character, and one for each of <think>, </think> and \\boxed{, in the format of Qwen's tokenizer."""
    # Byte-level BPE without merges, because AutoTokenizer rebuilds some families' tokenizers as one.
    vocab = {t.replace("\n", "Ċ"): i for i, t in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in tokens[2:5]])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast


def encode(tokenizer, numbers, text):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question(numbers)}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(prompt), [*tokenizer.encode(text), tokenizer.eos_token_id]


@torch.no_grad()
def greedy_accuracy(model, tokenizer, k, n=200):
    """The share of n new problems of k numbers that greedy decoding solves."""
    rng = random.Random(k)
    problems = [sample_numbers(rng, k) for _ in range(n)]
    ids = torch.tensor([encode(tokenizer, p, "")[0] for p in problems])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
    texts = tokenizer.batch_decode(out[:, ids.size(1) :], skip_special_tokens=True)
    return sum(t.endswith(f"\\boxed{{{running_totals(p)[-1]:02d}}}") for t, p in zip(texts, problems, strict=True)) / n


def build_model(tokenizer, seed):
    """A random model of the toy worlds' shape."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(  # Qwen3, not Qwen2: it can have four heads of 32 at this width, the size that vLLM needs on a CPU
            vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            max_position_embeddings=256, rope_theta=1e4, tie_word_embeddings=False, initializer_range=0.05,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def build_base(tokenizer, seed=0, steps=1400, phase1=0.72, lr=3e-3, batch_size=48):
    """Supervised training for a fixed number of steps, so that the same seed gives the same model on one machine."""
    rng = random.Random(seed)
    model = build_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    start = time.process_time()
    for step in range(steps):
        in_phase1 = step < phase1 * steps
        if not in_phase1 and step - 1 < phase1 * steps:
            print(f"end of phase 1: greedy accuracy on 8 numbers {greedy_accuracy(model, tokenizer, 8):.3f}", flush=True)
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * cosine * (1 if in_phase1 else 0.6)
        pairs = []
        for _ in range(batch_size):
            if in_phase1:
                # A curriculum on the addends' digits: with uniform digits the loss stays at ln 10 for hundreds of steps.
                top = min(9, 1 + int(18 * step / (phase1 * steps)))
                k = rng.choice([2, 3, 4, 5, 6, 7, 8])
                addends = [10 * rng.randint(0, top) + rng.randint(0, top) for _ in range(k - 1)]
                numbers = [rng.randrange(100), *addends]
                totals = running_totals(numbers)
                text = response(totals, totals[-1])
            else:
                k = rng.choice([2, 3]) if rng.random() < 0.4 else rng.choice([4, 5, 6, 7, 8])
                numbers = sample_numbers(rng, k)
                text = habit(rng, numbers)
            pairs.append(encode(tokenizer, numbers, text))
        width = max(len(p) + len(r) for p, r in pairs)
        ids = torch.full((batch_size, width), tokenizer.pad_token_id)
        labels = torch.full((batch_size, width), -100)
        for i, (p, r) in enumerate(pairs):
            ids[i, : len(p) + len(r)] = torch.tensor(p + r)
            labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
        logits = model(ids, use_cache=False).logits[:, :-1]  # right padding needs no mask under causal attention
        loss = F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  {time.process_time() - start:.0f} CPU s", flush=True)
    return model.eval()


def build_row(source, numbers, answer, trace, index, split):
    """One row of LUFFY's parquet schema; only the training split has a trace."""
    return {
        "data_source": source,
        "prompt": [{"content": question(numbers), "role": "user"}],
        "target": [{"content": "<think>\n" + trace, "role": "assistant"}] if split == "train" else None,
        "ability": "math",
        "reward_model": {"ground_truth": f"{answer:02d}", "style": "rule"},
        "extra_info": {"index": index, "split": split},
    }


def build_rows(rng, n, split, seen, wrong=0.0):
    """n problems of eight numbers, none in `seen`, as rows of LUFFY's parquet schema. The share `wrong` of the
    traces stops one number early."""
    rows, stops = [], set(rng.sample(range(n), round(wrong * n)))
    while len(rows) < n:
        numbers = sample_numbers(rng, 8)
        if tuple(numbers) in seen:
            continue
        totals = running_totals(numbers)
        stop_early = len(rows) in stops
        if stop_early and totals[-2] == totals[-1]:
            continue  # the last number is 00: a trace that stops early would still be right
        seen.add(tuple(numbers))
        trace = response(totals[:-1], totals[-2]) if stop_early else response(totals, totals[-1])
        rows.append(build_row("toy", numbers, totals[-1], trace, index=len(rows), split=split))
    return rows


def corrected(row):
    """The same row with a complete trace."""
    totals = running_totals([int(x) for x in row["prompt"][0]["content"].removesuffix("=?").split("+")])
    return {**row, "target": [{"content": "<think>\n" + response(totals, totals[-1]), "role": "assistant"}]}


MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", MESSAGES),
        ("target", MESSAGES),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", pa.struct([("index", pa.int64()), ("split", pa.string())])),
    ]
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=HERE, help="folder to write to (default: toy/)")
    parser.add_argument("--seed", type=int, default=0, help="of the base model; the data's seed is fixed")
    parser.add_argument("--data_only", action="store_true", help="write the parquet files, not the base model")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    rng, seen = random.Random(12345), set()
    files = {"train": build_rows(rng, 512, "train", seen, wrong=0.3), "test": build_rows(rng, 200, "test", seen)}
    files |= {"clean": [corrected(r) for r in files["train"]], "train.complement": build_rows(rng, 512, "complement", seen)}
    for name, rows in files.items():
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), os.path.join(args.out, f"{name}.parquet"))
    if args.data_only:
        raise SystemExit
    tokenizer = build_tokenizer()
    base = os.path.join(args.out, "base")
    model = build_base(tokenizer, seed=args.seed)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    for k in (2, 3, 8):
        print(f"greedy accuracy on {k} numbers {greedy_accuracy(model, tokenizer, k):.3f}")
