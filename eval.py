"""
avg@k and pass@k per benchmark.

    python eval.py --model=out/toy/ckpt_60 --data=toy/test.parquet --k=4
    python eval.py --model=DIR --data=valid.all.parquet --temperature=0.6 --max_tokens=8192 --max_problems=100

Writes out_dir/eval.json (per source n, avg@k, pass@k), out_dir/samples.jsonl and out_dir/config.json.
Rows that repeat a problem, as the released avg@32 files do, count once: k says how often it is tried.
"""

import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # must be set before torch loads; see README, Troubleshooting

# ---------------------------------------------------------------- what to evaluate
data = "toy/test.parquet"  # problems, in LUFFY's parquet schema
model = "toy/base"  # a folder in Hugging Face format, or a hub name
out_dir = "out/eval"  # where the results go
max_problems = 0  # per source; 0 takes all
# ---------------------------------------------------------------- how
k = 8  # samples per problem
temperature = 1.0  # 0 is greedy
max_tokens = 8192  # response tokens at most
require_think = True  # the prompt must end in "<think>\n" and the response must close its thought
sampler = "auto"  # vllm, torch, or auto: vllm where it is installed
seed = 0  # of the samples
dtype = "auto"  # weights and matrix products: float32, bfloat16, or auto: bfloat16 on a GPU
gpu_memory = 0.85  # share of the GPU's memory that vLLM may take
reward_workers = 2  # verifier processes
reward_timeout = 5.0  # seconds of grading per answer

from configurator import UserError, configure, provenance, repo_path, require, run

if __name__ == "__main__":  # before the slow imports, so that --help and mistakes answer at once
    config = run(lambda: configure(globals(), sys.argv[1:], __file__))

import torch

from data import load_problems, load_tokenizer, response_text
from model import load_config, load_policy, model_path
from reward import Verifier
from rollout import TorchSampler, VLLMSampler, request_seed, wants_vllm


def load_benchmark(path, tokenizer, max_problems, max_prompt_tokens, require_think, log=print):
    """load_problems without repeats of the same prompt and answer, then at most max_problems per source (0: all)."""
    first = {}
    for p in load_problems(path, tokenizer, max_prompt_tokens, require_think=require_think, log=log):
        first.setdefault((tuple(p.prompt_ids), p.answer), p)
    counts, kept = {}, []
    for p in first.values():
        counts[p.source] = counts.get(p.source, 0) + 1
        if not max_problems or counts[p.source] <= max_problems:
            kept.append(p)
    log(f"{path}: {len(kept)} distinct problems to evaluate, of {', '.join(sorted(counts))}")
    return kept


def evaluate(problems, sampler, verifier, tokenizer, stamp, k, temperature, max_tokens, seed):
    """Try each problem k times. Returns one dict per problem: id, source, answer, and per sample the response,
    its length, reward and reason."""
    prompts = [p.prompt_ids for p in problems for _ in range(k)]
    seeds = [request_seed(seed, "eval", p.id, i) for p in problems for i in range(k)]
    samples = sampler.generate(prompts, seeds, temperature, max_tokens, stamp)
    texts = [response_text(tokenizer, s.ids) for s in samples]
    verdicts = verifier.score(texts, [p.answer for p in problems for _ in range(k)])
    return [
        {
            "id": p.id,
            "source": p.source,
            "answer": p.answer,
            "reward": [v.reward for v in verdicts[i * k : (i + 1) * k]],
            "reason": [v.reason for v in verdicts[i * k : (i + 1) * k]],
            "length": [len(s.ids) for s in samples[i * k : (i + 1) * k]],
            "response": texts[i * k : (i + 1) * k],
        }
        for i, p in enumerate(problems)
    ]


def summarize(rows, k):
    """{source: {n, k, avg@k, pass@k}}: the mean reward, and the share of problems solved by one sample of k."""
    table = {}
    for source in sorted({r["source"] for r in rows}):
        rewards = [r["reward"] for r in rows if r["source"] == source]
        n = len(rewards)
        table[source] = {
            "n": n,
            "k": k,
            "avg@k": sum(sum(r) / k for r in rewards) / n,
            "pass@k": sum(max(r) for r in rewards) / n,
        }
    return table


def main():
    require(globals(), "k max_tokens reward_workers reward_timeout gpu_memory", "temperature max_problems")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}: choose auto, float32 or bfloat16")
    wants_vllm(sampler)
    name = model_path(model)
    tokenizer = load_tokenizer(name)
    context = load_config(name).max_position_embeddings
    problems = load_benchmark(repo_path(data), tokenizer, max_problems, context - 1, require_think)
    longest = max(len(p.prompt_ids) for p in problems)
    if longest + max_tokens > context:
        print(f"note: responses are cut where the model's context of {context} tokens ends; the longest prompt has {longest}")
    folder = make_folder(repo_path(out_dir))
    on_gpu = torch.cuda.is_available()
    kind = dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32"
    if wants_vllm(sampler):
        engine = VLLMSampler(name, tokenizer.eos_token_id, min(context, longest + max_tokens), kind, gpu_memory, seed)
    else:
        policy = load_policy(name, device="cuda" if on_gpu else "cpu")
        engine = TorchSampler(policy.hf.to(getattr(torch, kind)), tokenizer.eos_token_id, context)
    with Verifier(reward_workers, reward_timeout, require_think) as verifier:
        rows = evaluate(problems, engine, verifier, tokenizer, name, k, temperature, max_tokens, seed)
    engine.close()
    table = summarize(rows, k)
    with open(os.path.join(folder, "samples.jsonl"), "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    write_json(os.path.join(folder, "config.json"), {**config, **provenance()})
    write_json(os.path.join(folder, "eval.json"), table)
    print(f"{'source':<20}{'n':>6}{f'avg@{k}':>10}{f'pass@{k}':>10}")
    for source, row in table.items():
        print(f"{source:<20}{row['n']:>6}{row['avg@k']:>10.3f}{row['pass@k']:>10.3f}")


def make_folder(folder):
    """Make an output folder before there is anything to lose. Raises UserError if it cannot be written."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"out_dir {folder} cannot be written: {e.strerror}") from None
    return folder


def write_json(path, value):
    """Whole or not at all."""
    with open(path + ".partial", "w") as f:
        json.dump(value, f, indent=1, allow_nan=False)
    os.replace(path + ".partial", path)


if __name__ == "__main__":
    run(main)
