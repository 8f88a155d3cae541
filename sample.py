"""
Ask a model: its thought and its answer, k times, and the verifier's verdicts if you give the right answer.

    python sample.py --question="12+34=?"                               the newest checkpoint of out_dir
    python sample.py --question="12+34=?" --answer=46 --k=8 --model=toy/base
    python sample.py --question=FILE:questions.txt --thought=False      a question on each line
"""

import os
import sys
from contextlib import nullcontext

from runtime.process import begin, lost_output

if __name__ == "__main__":
    begin()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # must be set before torch loads; see docs/faq.md, Troubleshooting

question = ""  # or FILE:PATH, a file with a question on each line
answer = ""  # the right one, of all questions; "" grades nothing
model = ""  # a folder in Hugging Face format, or a hub name; "" is the newest checkpoint of out_dir
out_dir = "out/toy"  # a run's folder
template = "own"  # own: the model's chat template; qwen, simplerl, prime, prime_sft, no (config/templates.toml)
thought = True  # False shows only what is graded: what follows "</think>", if the prompt opens a thought
k = 1  # samples per question [> 0]
temperature = 0.6  # 0 is greedy [0 or 0.01, 100]
max_tokens = 8192  # response tokens at most [> 0]
seed = 0  # of the samples [0, 4294967295]
grader = "math_verify"  # or oat, or a Python file that defines grade(text, answer)
sampler = "auto"  # auto: vllm where it is installed [auto | vllm | torch]
device = "auto"  # the GPU if there is one, and vLLM is not the one for CPUs [auto | cpu | cuda]
dtype = "auto"  # of weights and matrix products; auto: bfloat16 on a GPU [auto | float32 | bfloat16]

from configurator import UserError, configure, printable, repo_path, run

if __name__ == "__main__":
    config = run(lambda: configure(globals(), sys.argv[1:], __file__))

from data import THINK
from eval import renderer
from reward import Verifier, graded_text
from rollout import open_sampler, pick_device, request_seed
from runtime.files import load_config, model_path
from runtime.tokenizer import load_tokenizer, response_text


def main():
    path = question.removeprefix("FILE:")
    lines = [question] if path == question else open(repo_path(path), encoding="utf-8", errors="replace")
    asked, newest = [line.strip() for line in lines if line.strip()], os.path.join(out_dir, "latest")
    if not asked:
        raise UserError(f'question={question!r} asks nothing: write --question="12+34=?" or --question=FILE:questions.txt')
    if k > 1 and not temperature:
        raise UserError(f"k={k} samples are all the same with temperature=0: set k=1, or a temperature")
    if not model and not os.path.isdir(repo_path(newest)):
        raise UserError(f"there is no checkpoint {repo_path(newest)}: train, set out_dir to a run's folder, or set model")
    name, (_, precision) = model_path(model or newest), pick_device(device, dtype)
    tokenizer, context = load_tokenizer(name), load_config(name).max_position_embeddings
    render = renderer(tokenizer, template, system="keep")
    texts = [render([{"role": "user", "content": q}], answer, source="")[0] for q in asked]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    if (longest := max(map(len, prompts))) >= context:
        raise UserError(f"a question has {longest} tokens, its template counted, and the model's context {context}: shorten it")
    opened = texts[0].endswith(THINK)  # then a thought must close, in what is shown as in what is graded
    tries = [(n, i) for n in range(len(asked)) for i in range(k)]
    seeds, verdicts = [request_seed(seed, "sample", asked[n], i) for n, i in tries], [None] * len(tries)
    with Verifier(1, require_think=opened, grader=grader) if answer else nullcontext() as verifier:  # its faults show now
        engine = open_sampler(name, tokenizer.stop_ids, min(context, longest + max_tokens), sampler, precision, gpu_memory=0.85)
        samples = engine.generate([prompts[n] for n, _ in tries], seeds, temperature, max_tokens, stamp=name)
        engine.close()
        responses = [response_text(tokenizer, s.ids) for s in samples]
        if answer:
            verdicts = verifier.score(responses, [answer] * len(tries))
    for (n, i), s, response, verdict in zip(tries, samples, responses, verdicts, strict=True):
        graded = graded_text(response, opened)
        facts = [f"{len(s.ids)} tokens", "cut off" if s.finish_reason == "length" else "", verdict.reason if verdict else ""]
        print(printable(f"--- {asked[n][:60]} ({i + 1} of {k}: {', '.join(filter(None, facts))})"))
        print(printable(THINK * opened + response if thought else "(its thought did not close)" if graded is None else graded))
    if answer:
        print(f"--- {sum(v.reason == 'correct' for v in verdicts)} of {len(tries)} correct")


if __name__ == "__main__":
    sys.exit(run(main) or lost_output())
