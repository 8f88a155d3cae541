import contextlib
import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import build
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import BASE, TRAIN, TRAIN_PY, a_row, launch, metrics, rollouts_of, run, write
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import eval
from configurator import ROOT, UserError
from data import Rollout, load_problems, set_aside
from reward import Verifier
from runtime import preflight
from runtime.metrics import Phases, batch_warnings, rollout_metrics, step_line
from runtime.preflight import check_traces
from runtime.run import Run
from runtime.tokenizer import load_tokenizer
from runtime.torch_sampler import TorchSampler


@pytest.mark.slow
def test_rescue_in_the_real_engine(script, engine, monkeypatch, tmp_path):
    """LUFFY, through vLLM, learns in 22 steps what its base never shows; GRPO does not."""
    final = {}
    for method in ("luffy", "grpo"):
        out = tmp_path / method
        module = script("train", [f"config/method/{method}.py", "--max_steps=22", "--eval_k=0", "--eval_interval=0",
                                  f"--out_dir={out}", "--sampler=vllm", "--reward_workers=1"])  # fmt: skip
        monkeypatch.setattr(engine, "close", lambda: None)
        module.main(open_sampler=lambda *a, **k: engine)
        rows = metrics(out)
        assert [r["step"] for r in rows] == list(range(23))
        assert rows[0]["eval/greedy"] <= 0.05
        assert max(r["mismatch/abs"] for r in rows[1:]) < 1e-4  # engine and trainer are one policy at every step
        assert max(r["mismatch/canary"] for r in rows if "mismatch/canary" in r) < 1e-4
        final[method] = rows[-1]["eval/greedy"]
    assert final["luffy"] >= 0.6 and final["grpo"] <= 0.05

    out = tmp_path / "luffy"
    assert sorted(os.listdir(out)) == [
        ".lock",
        "ckpt_22",
        "config.json",
        "eval_0.json",
        "eval_22.json",
        "latest",
        "metrics.jsonl",
        "rollouts",
    ]
    config = json.load(open(out / "config.json"))
    assert config["max_steps"] == 22 and config["gamma"] == 0.1 and config["torch"] and config["world_size"] == 1
    table = json.load(open(out / "eval_22.json"))
    assert table["toy"]["n"] == 200 and table["toy"]["greedy"] == final["luffy"]
    rollouts = [json.loads(line) for line in open(out / "rollouts" / "step_5.jsonl")]
    assert len(rollouts) == 128 and sum(r["teacher_tokens"] > 0 for r in rollouts) == 16
    for i in range(0, 128, 8):  # a group: seven samples and the trace, rewards minus their mean
        group = rollouts[i : i + 8]
        assert len({r["problem"] for r in group}) == 1 and group[7]["teacher_tokens"] == len(group[7]["response_ids"])
        mean = sum(r["reward"] for r in group) / 8
        assert all(abs(r["advantage"] - (r["reward"] - mean)) < 1e-6 for r in group)


def test_what_a_hook_does_counts_in_no_phase():
    """A tool may wait for its turn there: bench.py peers does."""
    guard = SimpleNamespace(phase=lambda step, name: None)
    phases = Phases(1, guard, hook=lambda step, name, record: time.sleep(0.5))
    phases.begin("sync")
    phases.begin("update")
    phases.end()
    assert phases.record["time/sync"] < 0.25 and phases.record["time/update"] < 0.25


def test_a_phase_ends_when_the_gpu_has_done_its_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.3))
    monkeypatch.setattr("runtime.metrics.measured_memory", lambda: (0, 0))
    phases = Phases(1, SimpleNamespace(phase=lambda step, name: None), hook=lambda step, name, record: None)
    phases.begin("update")
    phases.end()
    assert phases.record["time/update"] >= 0.3


def test_a_phases_peak_is_without_a_sleeping_engine(monkeypatch):
    """torch counts what the engine has given back. In the rollout it is awake, so there all counts."""
    monkeypatch.setattr("runtime.metrics.measured_memory", lambda: (90 * 2**30, 40 * 2**30))
    engine, guard = SimpleNamespace(given_back=60 * 2**30), SimpleNamespace(phase=lambda step, name: None)
    phases = Phases(1, guard, lambda step, name, record: None, engine)
    for name, given_back in (("sync", 0), ("rollout", 60), ("update", 60)):
        phases.begin(name)
        engine.given_back = given_back * 2**30
    phases.end()
    peaks = [phases.record[f"memory/{name}"] for name in ("sync", "rollout", "update")]
    assert peaks == [90, 90, 30] and phases.record["memory/update_after"] == 40


def test_a_held_out_selection_set(script, tmp_path):
    """Questions set aside are evaluated, and never trained on."""
    rows = run(script, tmp_path, "out", "--holdout=480", "--eval_k=2", "--eval_interval=2", "--max_steps=2")
    assert [r["step"] for r in rows if "eval/greedy" in r] == [0, 2]
    table = json.load(open(tmp_path / "out" / "eval_2.json"))
    assert list(table) == ["holdout"] and (table["holdout"]["n"], table["holdout"]["k"]) == (480, 2)
    trained = {json.loads(line)["problem"] for n in (1, 2) for line in open(tmp_path / "out" / "rollouts" / f"step_{n}.jsonl")}
    problems = load_problems(TRAIN, load_tokenizer(BASE), log=print)
    held = {p.id for p in set_aside(problems, 480)[1]}
    assert len(trained) == 32 and not trained & held and len(problems) == 512
    with pytest.raises(UserError, match="holdout=512 leaves nothing"):
        run(script, tmp_path, "none", "--holdout=512")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["config/method/sft.py"],
        ["config/method/sft.py", "--sft_per_sequence=True"],
        ["--update_batches=2", "--clip_high=0.2", "--entropy_coef=0.01"],
        ["--teacher_top_entropy=0.3", "--shaping=log", "--gamma=1.0"],
    ],
)
def test_the_token_budget_does_not_matter(script, tmp_path, argv):
    """Loss, gradient norm and the weights after three steps are the same however a batch is cut."""
    whole = run(script, tmp_path, "whole", *argv)
    cut = run(script, tmp_path, "cut", *argv, "--micro_tokens=300")
    for a, b in zip(whole[1:], cut[1:], strict=True):
        for key in ("loss", "grad_norm", "entropy/teacher", "teacher/p"):
            assert abs(a[key] - b[key]) <= 1e-4 * abs(a[key]) + 1e-7, key
    x, y = (load_file(tmp_path / n / "ckpt_3" / "model.safetensors") for n in ("whole", "cut"))
    assert all(torch.allclose(x[k], y[k], atol=1e-4) for k in x)


def by_hand(rows, k):
    """The first step's loss and gradient norm from its dumped rollouts, by the equations alone."""
    hf = AutoModelForCausalLM.from_pretrained("toy/base", dtype=torch.float32)
    tokenizer = load_tokenizer("toy/base")
    policy = entropy_sum = nll = n = n_teacher = 0
    traces = []
    for start in range(0, len(rows), k["n_rollouts"]):
        group = rows[start : start + k["n_rollouts"]]
        rewards = torch.tensor([r["reward"] for r in group])
        base = torch.tensor([r["reward"] for r in group if k["baseline"] == "group" or not r["teacher_tokens"]])
        advantages = rewards - base.mean() if len(group) > 1 else rewards
        if k["use_std"] and rewards.std() > 0:
            advantages = advantages / (rewards.std() + 1e-6)
        for r, advantage in zip(group, advantages, strict=True):
            prompt = tokenizer.encode(r["prompt"])
            ids = torch.tensor([prompt + r["response_ids"]])
            logprobs = (hf(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / k["temperature"]).log_softmax(-1)
            logp = logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0]
            entropy_sum, n = entropy_sum - (logprobs.exp() * logprobs).sum(), n + len(logp)
            if not r["teacher_tokens"]:
                f = lambda x: x.exp() / (x.exp() + k["gamma"]) if k["shape_own"] else x.exp()
                policy = policy - (advantage * f(logp) / f(logp.detach())).sum()
            elif k["sft_coef"]:
                learnt = {"log": logp, "none": logp.exp(), "phi": logp.exp() * (1 - logp.exp() / 2)}[k["sft_shaping"]]
                nll, n_teacher = nll - learnt.sum(), n_teacher + len(logp)
                traces.append(-learnt.mean())
            else:
                p, entropy = logp.exp(), -(logprobs.exp() * logprobs).sum(-1).detach()
                f = {"luffy": p / (p + k["gamma"]), "none": p, "sqrt": p.sqrt()}[k["shaping"]]
                top = entropy.argsort(descending=True)[: math.ceil(k["teacher_top_entropy"] * len(p))]
                policy = policy - (advantage * f[top]).sum()
    loss = k["policy_coef"] * policy / (k["loss_constant"] or n) - k["entropy_coef"] * entropy_sum / n
    likelihood = torch.stack(traces).mean() if k["sft_per_sequence"] else nll / max(n_teacher, 1)
    loss = loss + k["sft_coef"] * likelihood
    loss.backward()
    return loss.item(), torch.stack([p.grad.norm() for p in hf.parameters()]).norm().item()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--temperature=1.7"],
        ["--use_std=True"],
        ["--shaping=none"],
        ["--shaping=sqrt"],
        ["--gamma=0.5"],
        ["--teacher_top_entropy=0.2"],
        ["--loss_constant=77.0"],
        ["--loss_constant=0.0"],
        ["--entropy_coef=0.3"],
        ["--sft_coef=0.7"],
        ["--sft_coef=0.7", "--sft_per_sequence=True"],
        ["--sft_coef=0.7", "--sft_shaping=none"],
        ["--sft_coef=0.7", "--sft_shaping=phi", "--sft_per_sequence=True"],
        ["--baseline=own"],
        ["--shape_own=True"],
        ["--policy_coef=0.3"],
        ["--n_teacher=0", "--entropy_coef=0.1"],
        ["--n_rollouts=4", "--seed=3"],
    ],
)
def test_each_knob_reaches_the_loss(script, tmp_path, argv):
    rows = run(script, tmp_path, "x", "--max_steps=1", "--prompts_per_step=4", *argv)
    dumped = [json.loads(line) for line in open(tmp_path / "x" / "rollouts" / "step_1.jsonl")]
    loss, norm = by_hand(dumped, json.load(open(tmp_path / "x" / "config.json")))
    assert rows[1]["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert rows[1]["grad_norm"] == pytest.approx(norm, rel=1e-3, abs=1e-6)


def test_a_teachers_log_probs_are_pi_phi(script, tmp_path):
    """Without shaping a trace's token counts p / pi_phi: with pi_phi = 1/2 everywhere the loss is twice that of 1, and so is
    teacher/f, the mean of f(p / pi_phi). Under verified_only each trace keeps its own, and the rollouts' file has them."""
    schema = build.SCHEMA.append(pa.field("target_logps", pa.list_(pa.list_(pa.float64()))))
    ids = load_problems(write(tmp_path / "plain.parquet", [a_row()]), load_tokenizer(BASE), log=str)[0].teacher[0]
    wrong = {"content": "<think>\n12>46</think>\\boxed{47}", "role": "assistant"}
    loss = {}
    for name, logps in (("one", None), ("half", [[-3.0] * len(ids), [math.log(0.5)] * len(ids)])):
        rows = [a_row(target=[wrong, *a_row()["target"]], target_logps=logps)] * 4
        argv = [f"--data={write(tmp_path / f'{name}.parquet', rows, schema)}", "--n_rollouts=1", "--shaping=none"]
        argv += ["--prompts_per_step=4", "--max_steps=1", "--verified_only=True", "--min_teacher_pass=0.1"]
        step = run(script, tmp_path, name, *argv)[1]
        loss[name] = step["loss"]
        assert step["teacher/f"] == pytest.approx(step["teacher/p"] * (2 if logps else 1), rel=1e-5)
        assert [r["target_logps"] for r in rollouts_of(tmp_path / name, 1)] == [logps[1] if logps else []] * 4
    assert loss["one"] < 0 and loss["half"] == pytest.approx(2 * loss["one"], rel=1e-5)


def test_the_clip_acts_where_the_policy_has_moved(script, tmp_path):
    """Two updates at a large learning rate: the second finds ratios outside the clip. Every own sample fails here
    (A < 0), so the lower side changes the loss and the upper one, which acts where A > 0, does not."""
    argv = ["--update_batches=2", "--learning_rate=0.01", "--warmup_steps=0", "--max_steps=1"]
    clips = ("", "--clip_low=0.2", "--clip_high=0.2")
    free, low, high = (run(script, tmp_path, f"x{clip}", *argv, *clip.split()) for clip in clips)
    assert free[1]["reward/own"] == 0 == free[1]["ratio/outside_clip"]
    for clipped in (low, high):
        assert clipped[1]["ratio/outside_clip"] > 0.01 and clipped[1]["ratio/own"] == pytest.approx(free[1]["ratio/own"])
    assert low[1]["loss"] > free[1]["loss"] * (1 + 1e-3) and high[1]["loss"] == pytest.approx(free[1]["loss"])


def test_the_optimizer_gets_its_knobs(script, tmp_path, monkeypatch):
    seen = {}
    adamw, clip = torch.optim.AdamW, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, **k: seen.update(k) or adamw(p, lr, **k))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: seen.update(clip=norm) or clip(p, norm))
    rows = run(script, tmp_path, "x", "--beta1=0.5", "--beta2=0.6", "--weight_decay=0.7", "--grad_clip=0.8",
               "--learning_rate=0.001", "--warmup_steps=4", "--canary_interval=2", "--save_interval=2")  # fmt: skip
    assert seen == {"betas": (0.5, 0.6), "weight_decay": 0.7, "fused": True, "clip": 0.8}
    assert [r["lr"] for r in rows[1:]] == pytest.approx([0.00025, 0.0005, 0.00075])
    assert ["mismatch/canary" in r for r in rows] == [True, False, True, False]
    assert {"ckpt_2", "ckpt_3"} <= set(os.listdir(tmp_path / "x"))


def test_seeds_choose_problems_and_samples(script, tmp_path):
    def first(name, *argv):
        run(script, tmp_path, name, "--max_steps=1", *argv)
        rows = [json.loads(line) for line in open(tmp_path / name / "rollouts" / "step_1.jsonl")]
        return [r["problem"] for r in rows], [r["response"] for r in rows if not r["teacher_tokens"]]

    (problems, samples), again, other = first("a"), first("b"), first("c", "--seed=1")
    assert (problems, samples) == again
    assert problems != other[0] and samples != other[1]
    assert len(set(samples)) > len(samples) / 3  # neighbours do not repeat each other


def test_evaluation_knobs(script, tmp_path, monkeypatch):
    out = tmp_path / "x"
    module = script("train", ["--sampler=torch", f"--out_dir={out}", "--max_steps=1", "--reward_workers=1",
                              "--eval_max_problems=30", "--eval_k=3", "--eval_temperature=1.5"])  # fmt: skip
    calls, real = [], eval.evaluate
    evaluate = lambda problems, *a, **k: calls.append((len(problems), k["k"], k["temperature"])) or real(problems, *a, **k)
    monkeypatch.setattr("eval.evaluate", evaluate)
    module.main()
    assert calls == [(30, 1, 0.0), (30, 3, 1.5)] * 2
    assert json.load(open(out / "eval_1.json"))["toy"]["n"] == 30


def test_no_evaluation_is_none(script, tmp_path):
    rows = run(script, tmp_path, "x", "--eval_data=toy/test.parquet", "--eval_greedy=False", "--eval_k=0", "--max_steps=1")
    assert not [name for row in rows for name in row if name.startswith("eval/")]


def test_the_step_lines_columns_stand_still():
    """However long a phase takes and an answer is, whatever a reward: the same columns."""
    quick = {"step": 3, "reward/own": 0.5, "length/own": 29.0, "time/rollout": 0.25, "time/update": 1.5, "grad_norm": 0.1}
    slow = {**quick, "step": 499, "reward/own": -0.25, "length/own": 16384.0, "time/rollout": 3120.4, "time/update": 99.99}
    lines = [step_line(m, 500, eta) for m, eta in ((quick, 65), (slow, 77 * 3600 + 61))]
    assert len({line.index("ETA") for line in lines}) == 1
    assert lines[0].endswith("ETA 1:05") and lines[1].endswith("ETA 77:01:01") and "gen   3120 s" in lines[1]


def test_each_source_is_a_metric_where_there_are_several(script, tmp_path):
    few = ["config/toy/shaping.py", "--eval_max_problems=5", "--max_steps=1", f"--out_dir={tmp_path / 'x'}"]
    rows = run(script, tmp_path, "x", *few)
    names = sorted(name for name in rows[1] if name.startswith("eval/"))
    assert names == ["eval/greedy", "eval/greedy/easy", "eval/greedy/hard"]
    assert rows[1]["eval/greedy"] == (rows[1]["eval/greedy/easy"] + rows[1]["eval/greedy/hard"]) / 2


def test_updates_that_are_not_finite_stop_the_run(script, tmp_path, capsys):
    with pytest.raises(FloatingPointError, match="3 updates in a row were skipped"):
        run(script, tmp_path, "x", "--entropy_coef=1e40", "--max_steps=5")
    assert "update skipped, 2 in a row: loss " in capsys.readouterr().out
    assert not [f for f in os.listdir(tmp_path / "x") if f.startswith("ckpt")] and len(metrics(tmp_path / "x")) == 3


class Waits(TorchDispatchMode):
    """Notes operations whose result the host must see before it can go on, so that it would wait for a GPU."""

    READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.masked_select)

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        by_mask = op.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if op.overloadpacket in self.READS or by_mask:
            self.found.append(str(op))
        return op(*args, **(kwargs or {}))


def test_an_update_waits_for_a_gpu_once(script, tmp_path, monkeypatch):
    """However many micro-batches it has: all that the host must know comes in one transfer, before the optimizer's step."""
    out = tmp_path / "x"
    module = script("train", ["--sampler=torch", f"--out_dir={out}", "--eval_data=", "--reward_workers=1", "--max_steps=2",
                              "--micro_tokens=800", "--update_batches=2", "--recompute=True", "--clip_high=0.2",
                              "--teacher_top_entropy=0.5"])  # fmt: skip
    real, to_host, calls = module.update, module.metrics.to_host, []

    def update(*arguments, **options):
        calls.append([])
        with Waits() as waits:
            result = real(*arguments, **{**options, "tick": lambda: None})  # the guard's flags are on the CPU
        calls[-1] += waits.found
        assert len(result.logps) > 2
        return result

    module.update = update
    monkeypatch.setattr(module.metrics, "to_host", lambda *a: calls[-1].append("to_host") or to_host(*a))
    module.main()
    assert calls == [["to_host"]] * 4


@pytest.mark.parametrize("fault", ["loss", "gradient", "norm"])
def test_a_bad_update_is_skipped_and_leaves_no_trace(script, tmp_path, fault):
    """Of two updates a step the second of step 2 is spoilt: weights and moments are those of a run that never took it."""
    argv = ["--update_batches=2", "--max_steps=3", "--rollout_interval=0"]
    runs = {}
    for name in ("skipped", "left_out"):
        module = script(
            "train", ["--sampler=torch", f"--out_dir={tmp_path / name}", "--eval_data=", "--reward_workers=1", *argv]
        )
        real, calls = module.update, []

        def update(policy, *rest, real=real, calls=calls, module=module, name=name, **more):
            calls.append(1)
            if len(calls) != 4:
                return real(policy, *rest, **more)
            if name == "left_out":
                return module.Update(stepped=False, norm=0.0, loss=0.0, sums={}, logps=[])
            if fault == "norm":
                more["skip_norm"] = 1e-9
            elif fault == "gradient":
                handle = policy.hf.lm_head.weight.register_hook(lambda g: g * float("nan"))
            else:
                loss, module.batch_loss = module.batch_loss, lambda *a, **k: loss(*a, **k) * float("inf")
            result = real(policy, *rest, **more)
            if fault == "gradient":
                handle.remove()
            elif fault == "loss":
                module.batch_loss = loss
            assert not result.stepped
            return result

        module.update = update
        module.main()
        runs[name] = load_file(tmp_path / name / "ckpt_3" / "model.safetensors")
        rows = metrics(tmp_path / name)
        assert [r["updates/skipped"] for r in rows[1:]] == [0, 1, 0] and "loss" in rows[2]
    assert all(torch.equal(runs["skipped"][k], runs["left_out"][k]) for k in runs["skipped"])


@pytest.mark.parametrize(("drift", "words"), [(0.01, "0.01"), (math.nan, "nan")])
def test_an_engine_that_disagrees_over_a_batch_ends_the_run(script, tmp_path, drift, words):
    """The canary's one prompt may agree where the batch does not; the step is not saved."""
    out = tmp_path / "x"
    module = script("train", ["--sampler=torch", f"--out_dir={out}", "--eval_data=", "--reward_workers=1", "--max_steps=4",
                              "--save_interval=1"])  # fmt: skip

    class Drifting(TorchSampler):
        def decode(self, prompts, *rest):
            off = drift if len(prompts) > 1 and self.stamp >= 2 else 0.0  # from step 3 on
            for i, s in super().decode(prompts, *rest):
                yield i, s._replace(logps=[x + off for x in s.logps])

    with pytest.raises(RuntimeError, match=f"disagree by {words} in mean .* over a batch, canary_limit is 0.001"):
        module.main(open_sampler=lambda model, stop_ids, max_model_len, **k: Drifting(model, stop_ids, max_model_len))
    assert sorted(n for n in os.listdir(out) if n.startswith("ckpt")) == ["ckpt_1", "ckpt_2"]


def test_bfloat16_passes_the_canary_by_default(script, tmp_path, capsys):
    """The engine and the trainer round differently there, more than float32's limit allows; a GPU's default is bfloat16."""
    rows = run(script, tmp_path, "x", "--dtype=bfloat16", "--max_steps=1", "--canary_interval=1", "--prompts_per_step=4")
    assert "(limit 0.1)" in capsys.readouterr().out
    gaps = [r[name] for r in rows for name in ("mismatch/canary", "mismatch/abs") if name in r]
    assert len(gaps) == 3 and 1e-3 < max(gaps) < 0.1


@pytest.mark.slow
def test_ranks_die_with_their_torchrun(tmp_path):
    """Killed outright, torchrun cannot end its ranks: they must not go on, holding GPUs and writing files."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
    argv = ["--sampler=torch", "--reward_workers=1", "--max_steps=100000", f"--out_dir={tmp_path / 'x'}"]
    process = subprocess.Popen([*command, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert any(line.startswith("step ") for line in process.stdout)  # it is at work

    def alive():
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it may end meanwhile
                found += [entry] * (str(tmp_path / "x").encode() in open(f"/proc/{entry}/cmdline", "rb").read())
        return found

    assert len(alive()) >= 3
    process.kill()
    process.wait()
    for _ in range(100):
        if not alive():
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {alive()}")


SPOILT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/toy", {tests!r}]
from helpers import load_script
train = load_script("train", sys.argv[1:])
real, calls = train.batch_loss, []

def batch_loss(*a, **k):
    calls.append(1)
    return real(*a, **k) * (float("nan") if train.RANK == 1 and len(calls) == 2 else 1.0)

train.batch_loss = batch_loss
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_one_ranks_nan_skips_the_update_on_all(tmp_path, shard):
    (tmp_path / "spoilt.py").write_text(SPOILT.format(root=ROOT, tests=os.path.join(ROOT, "tests")))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        tmp_path / "spoilt.py",
    ]
    argv = ["--sampler=torch", "--eval_data=", "--reward_workers=1", "--max_steps=3", f"--shard={shard}"]
    done = subprocess.run([*command, *argv, f"--out_dir={tmp_path / 'x'}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert [r["updates/skipped"] for r in metrics(tmp_path / "x")[1:]] == [0, 1, 0]
    assert done.stdout.count("update skipped, 1 in a row") == 1


def test_batches_of_which_nothing_can_be_learnt_are_named():
    own = lambda finish, reason: Rollout(0, [0], [1], sampler_logps=[0.0], finish_reason=finish, reason=reason)
    teacher = Rollout(0, [0], [1], "teacher", 1, reward=1.0, reason="correct")
    assert batch_warnings([own("stop", "wrong"), own("length", "timeout"), teacher]) == [] == batch_warnings([teacher])
    cases = {("length", "no_think"): ["max_tokens", "</think>"], ("stop", "timeout"): ["reward_timeout"],
             ("stop", "error"): ["failed in the grader or killed its worker"]}  # fmt: skip
    for case, words in cases.items():
        rollout = own(*case)
        found = batch_warnings([rollout, rollout, teacher])
        assert len(found) == len(words) and all(w in line for w, line in zip(words, found, strict=True))


def test_samples_that_never_end_are_named_where_that_costs_nothing(script, tmp_path, capsys):
    """Under skip_truncated a policy that does not end loses nothing. More than half of a batch without an end is said; and the
    knob is what the run's warning reads."""
    own = lambda finish: Rollout(0, [0], [1], sampler_logps=[0.0], finish_reason=finish, reason="wrong")
    batch = lambda n: [own("length")] * n + [own("stop")] * (4 - n)
    assert [len(batch_warnings(batch(n), skip_truncated=True)) for n in range(5)] == [0, 0, 0, 1, 1]
    assert [len(batch_warnings(batch(n))) for n in range(5)] == [0, 0, 0, 0, 1]
    assert "not ending costs nothing" in batch_warnings(batch(3), skip_truncated=True)[0]
    for knob in ("True", "False"):
        run(script, tmp_path, knob, "--max_steps=1", "--prompts_per_step=2", "--max_tokens=5", f"--skip_truncated={knob}")
        assert ("not ending costs nothing" in capsys.readouterr().out) == (knob == "True")


def test_a_warning_that_repeats_is_counted(monkeypatch, tmp_path):
    """Printed the first time, the tenth, the hundredth; each kind for itself. So are files that cannot be written."""
    monkeypatch.setattr("runtime.run.step_line", lambda *_: "step")
    monkeypatch.setattr("runtime.run.memory_ledger", lambda *_: "memory")
    own = lambda finish, reason: [Rollout(0, [0], [1], sampler_logps=[0.0], finish_reason=finish, reason=reason)]
    found, progress = [], Run(SimpleNamespace(path=str(tmp_path), check=lambda: None), {})
    for step in range(1, 1001):
        batch = own("stop", "timeout" if step == 500 else "no_think" if step % 2 else "wrong")
        found.append(progress.report({"step": step}, batch, 1000, False))
    warned = {step: text.split("\n")[0] for step, text in enumerate(found, 1) if "warning" in text}
    assert list(warned) == [1, 19, 199, 500]  # odd steps: the first, the tenth, the hundredth
    assert "lacks </think>" in warned[1] and "times so far" not in warned[1] and "reward_timeout" in warned[500]
    assert warned[19] == warned[1] + " (10 times so far)" and warned[199] == warned[1] + " (100 times so far)"


def test_writes_that_fail_again_are_counted(tmp_path, capsys):
    progress = Run(SimpleNamespace(path=str(tmp_path), check=lambda: None), {})
    (tmp_path / "rollouts").write_text("in the way")
    for step in range(11):
        progress.write_rollouts(step, [], {}, {}, None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("warning: write_rollouts: ") for line in lines)
    assert lines[1].endswith(" (10 times so far)")


def test_two_updates_make_the_second_off_policy(script, tmp_path):
    """The first update's ratio is one by construction; the second finds a policy that has moved."""
    one = run(script, tmp_path, "one", "--learning_rate=0.003", "--warmup_steps=0")
    two = run(script, tmp_path, "two", "--learning_rate=0.003", "--warmup_steps=0", "--update_batches=2")
    assert all(r["ratio/own"] == 1 for r in one[1:])
    assert all(abs(r["ratio/own"] - 1) > 1e-6 for r in two[1:])
    assert one[1]["mismatch/abs"] < 1e-5 and two[1]["mismatch/abs"] < 1e-5  # old log-probs are from before the first update


def test_verified_only_drops_the_wrong_traces(script, tmp_path):
    rows = run(script, tmp_path, "sft", "config/method/sft_verified.py")
    assert all(r["reward/teacher"] == 1.0 for r in rows[1:])
    assert "reward/own" not in rows[1]


def test_a_runs_identity_names_the_rows_that_were_read(script, tmp_path, tokenizer):
    """Not those that lie under the name later, nor the file: the same rows as JSON lines are the same data."""
    read, path = [], tmp_path / "train.parquet"
    rows = pq.read_table(TRAIN).to_pylist()[:20]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, changed in ((path, rows), (tmp_path / "rows.jsonl", rows), (path, [*rows[:-1], a_row(target=None)])):
        write(path, changed)
        module = script("train", [f"--data={name}", f"--eval_data={path}"])
        problems, _, digests = module.load_data(tokenizer)
        write(path, rows[:5])
        with Verifier(workers=1) as verifier:
            inputs = module.identify(module.config, problems, digests, "torch", "float32", verifier, None)["inputs"]
        assert inputs["data"] == digests["data"]
        read.append(digests)
    assert read[0]["data"] == read[0]["eval_data"] == read[1]["data"] != read[2]["data"]


def test_an_earlier_run_is_moved_aside(script, tmp_path):
    run(script, tmp_path, "run", "--max_steps=1")
    run(script, tmp_path, "run", "--max_steps=2")
    assert len(metrics(tmp_path / "run")) == 3 and len(metrics(tmp_path / "run.1")) == 2


def bad(tmp_path, name):
    """A data file with something wrong, by name."""
    wrong = a_row(target=[{"content": "<think>\n1</think>\\boxed{1}", "role": "assistant"}])
    rows = {"no_teacher": [a_row(target=None)] * 20, "wrong_teacher": [wrong] * 5 + [a_row()] * 5, "few": [a_row()] * 3}[name]
    return write(tmp_path / f"{name}.parquet", rows)


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--data={no_teacher}"], "no_teacher.parquet has no teacher trace"),
        (["--data={wrong_teacher}"], "only 50.0% of the teacher traces"),
        (["--data={few}"], "prompts_per_step=16 but .*few.parquet has only 3"),
        (["--data=nowhere.parquet"], "no data file"),
        (["--data="], "data is empty: name a file"),
        (["--model=nowhere/at_all"], "model nowhere/at_all .nor is there a folder /.*/nowhere/at_all, as python prepare.py"),
        (["--model=nowhere"], "there is no model folder .*nowhere"),
        (["--learning_rate=-1"], "learning_rate=-1.0 must be above zero"),
        (["--update_batches=0"], "update_batches=0 must be above zero"),
        (["--sampler=tf"], "choose auto, vllm or torch"),
        (["--shaping=lufy"], "unknown shaping 'lufy'"),
        (["--n_teacher=9"], "n_teacher=9 must lie between"),
        (["--update_batches=3"], "prompts_per_step=16 must be a multiple of update_batches=3"),
        (["--max_tokens=300", "--max_teacher_tokens=10"], "the context of .* is 256"),
        (["--micro_tokens=64"], "micro_tokens=64 cannot hold"),
        (["--max_prompt_tokens=5"], "no usable row"),
        (["--tensor_parallel=2"], "tensor_parallel=2 must divide the 1 process"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(script, tmp_path, argv, words):
    argv = [a.format(**{n: bad(tmp_path, n) for n in ("no_teacher", "wrong_teacher", "few")}) for a in argv]
    with pytest.raises(UserError, match=words):
        run(script, tmp_path, "bad", *argv)
    assert not (tmp_path / "bad").exists()


def test_a_folder_that_cannot_be_written(script):
    module = script("train", ["--sampler=torch", "--out_dir=/proc/nope", "--reward_workers=1", "--eval_data="])
    with pytest.raises(UserError, match="out_dir /proc/nope cannot be written"):
        module.main()


def test_failing_teachers_are_shown(script, tmp_path):
    with pytest.raises(UserError) as e:
        run(script, tmp_path, "bad", f"--data={bad(tmp_path, 'wrong_teacher')}", "--prompts_per_step=1")
    assert str(e.value).count("row ") == 3 and "answer '46', trace ends '1</think>\\\\boxed{1}'" in str(e.value)
    assert len(str(e.value).splitlines()) == 2


def test_the_canary_stops_a_deaf_engine(script, tmp_path):
    """An engine whose weights are not the policy's is found out before the first step."""
    module = script("train", ["--sampler=torch", f"--out_dir={tmp_path / 'x'}", "--reward_workers=1", "--eval_data="])

    class Deaf(TorchSampler):
        def load(self, hf, stamp):
            super().load(hf, stamp)
            self.decoder.norm = 0.3 * self.decoder.norm

    with pytest.raises(RuntimeError, match="engine and trainer disagree"):
        module.main(open_sampler=lambda model, stop_ids, max_model_len, **k: Deaf(model, stop_ids, max_model_len))


@pytest.mark.parametrize(
    ("place", "argv"),
    [("canary", ["--canary_interval=1"]), ("evaluation", ["--eval_data=toy/test.parquet", "--eval_interval=1"])],
)
def test_a_load_that_fails_outside_of_sync_says_where(script, tmp_path, capsys, place, argv):
    """Weights are loaded for the canary and for an evaluation, too."""
    argv = ["--sampler=torch", f"--out_dir={tmp_path / 'x'}", "--reward_workers=1", "--eval_data=", "--eval_max_problems=1",
            "--prompts_per_step=1", *argv]  # fmt: skip
    module = script("train", argv)

    class Failing(TorchSampler):
        def load(self, hf, stamp):
            if stamp == 1:
                raise OSError("no more memory")
            super().load(hf, stamp)

    with pytest.raises(OSError, match="no more memory"):
        module.main(open_sampler=lambda model, stop_ids, max_model_len, **k: Failing(model, stop_ids, max_model_len))
    assert f"rank 0 failed in step 1, {place}" in capsys.readouterr().err


def close(one, two, tolerance, keys=("loss", "grad_norm", "entropy/own", "teacher/p", "reward/own")):
    for a, b in zip(one, two, strict=True):
        for key in keys:
            assert abs(a[key] - b[key]) <= tolerance * abs(a[key]) + 1e-7, (a["step"], key, a[key], b[key])


@pytest.mark.slow
def test_one_and_two_ranks_train_alike(tmp_path):
    """torchrun with two processes, each with its engine: the same rollouts, metrics and accuracy as one process."""
    argv = ["--max_steps=22", "--eval_k=0", "--sampler=vllm"]
    one, two = launch(tmp_path, "one", 1, *argv), launch(tmp_path, "two", 2, *argv, "--shard=fsdp")
    close(one[1:6], two[1:6], 1e-3)
    assert one[-1]["eval/greedy"] >= 0.6 and abs(one[-1]["eval/greedy"] - two[-1]["eval/greedy"]) <= 0.1
    rows = [json.loads(line) for line in open(tmp_path / "two" / "rollouts" / "step_1.jsonl")]
    assert len(rows) == 128


COMPILED = """
import functools, os, runpy, sys, torch
sys.path.insert(0, os.path.dirname({train!r}))
torch.compile = functools.partial(torch.compile, backend="eager")  # Inductor would take half a minute for each graph
sys.argv[0] = {train!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_any_number_of_ranks_and_shards_takes_the_same_steps(tmp_path):
    """Three optimizer steps, clipped, with an entropy bonus: 1, 2 and 4 ranks, DDP and FSDP2, any token budget, layers compiled
    or not, agree to 1e-4 in every metric and in the weights. What two ranks saved, one loads, and the reverse. Ranks whose
    micro-batches differ compile other graphs at other times, and do not wait for each other in vain."""
    compiled = tmp_path / "compiled.py"
    compiled.write_text(COMPILED.format(train=TRAIN_PY))
    argv = ["--max_steps=3", "--update_batches=2", "--sampler=torch", "--eval_data=", "--entropy_coef=0.01", "--grad_clip=0.05"]
    runs = {"one": launch(tmp_path, "one", 1, *argv)}
    for name, n_ranks, more in (
        ("ddp2", 2, ["--shard=ddp"]),
        ("fsdp1", 1, ["--shard=fsdp"]),
        ("fsdp2", 2, ["--shard=fsdp", "--recompute=True"]),
        ("fsdp4", 4, ["--shard=fsdp", "--micro_tokens=300"]),
        ("compiled2", 2, ["--shard=fsdp", "--recompute=True", "--compile=yes", "--micro_tokens=300"]),
    ):
        script = compiled if "compiled" in name else TRAIN_PY
        runs[name] = launch(tmp_path, name, n_ranks, *argv, *more, script=script)
        close(runs["one"][1:], runs[name][1:], 1e-4)
        x, y = (load_file(tmp_path / n / "ckpt_3" / "model.safetensors") for n in ("one", name))
        assert x.keys() == y.keys() and all(torch.allclose(x[k], y[k], atol=1e-4) for k in x), name
    # Two ranks go on from what one saved, one from what two saved.
    argv = ["--max_steps=1", "--sampler=torch", "--eval_data="]
    two = launch(tmp_path, "from_one", 2, *argv, "--shard=fsdp", f"--model={tmp_path / 'one' / 'ckpt_3'}")
    one = launch(tmp_path, "from_two", 1, *argv, f"--model={tmp_path / 'fsdp2' / 'ckpt_3'}")
    close(one[1:], two[1:], 1e-3)


@pytest.mark.slow
def test_bfloat16_shards_are_saved_in_full(tmp_path):
    """FSDP2 in bfloat16: a checkpoint right after the canary's forward pass holds the fp32 weights all the same."""
    argv = ["--max_steps=1", "--sampler=torch", "--eval_data=", "--dtype=bfloat16", "--canary_limit=1.0", "--shard=fsdp"]
    runs = [launch(tmp_path, f"canary{n}", 2, *argv, f"--canary_interval={n}") for n in (0, 1)]
    assert "mismatch/canary" in runs[1][1]
    x, y = (load_file(tmp_path / f"canary{n}" / "ckpt_1" / "model.safetensors") for n in (0, 1))
    assert all(v.dtype == torch.float32 for v in y.values()) and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.slow
def test_a_rank_with_nothing_to_do_does_not_hang(tmp_path):
    """One sequence an update on two ranks: the other runs a dummy, in DDP and FSDP alike, and the step is the same."""
    argv = [
        "config/method/sft.py",
        "--prompts_per_step=2",
        "--update_batches=2",
        "--max_steps=2",
        "--sampler=torch",
        "--eval_data=",
    ]
    one = launch(tmp_path, "one", 1, *argv)
    for shard in ("ddp", "fsdp"):
        close(one[1:], launch(tmp_path, shard, 2, *argv, f"--shard={shard}")[1:], 1e-4, ("loss", "grad_norm", "teacher/p"))


THREE_SEQUENCES = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/toy", {tests!r}]
from helpers import forked_ranks, load_script
for n, shard in ((1, "none"), (8, "ddp"), (8, "fsdp")):
    train = load_script("train", [*sys.argv[2:], "--shard=" + shard, "--out_dir=" + sys.argv[1] + "/" + shard])
    train.worth_training = lambda rollouts: rollouts[6:9]
    if any([os.waitpid(child, 0)[1] for child in forked_ranks(n, train.main)]):
        sys.exit(1)
"""


@pytest.mark.slow
def test_eight_ranks_and_three_sequences(tmp_path):
    """As skip_equal_groups may leave them: five ranks run a dummy, in DDP and FSDP alike, and the steps are those of one."""
    (tmp_path / "three.py").write_text(THREE_SEQUENCES.format(root=ROOT, tests=os.path.join(ROOT, "tests")))
    argv = ["--prompts_per_step=8", "--max_steps=2", "--sampler=torch", "--eval_data=", "--reward_workers=1",
            "--hang_timeout=60"]  # fmt: skip
    done = subprocess.run([sys.executable, tmp_path / "three.py", tmp_path, *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    one = metrics(tmp_path / "none")
    assert all(r["grad_norm"] > 0 for r in one[1:])
    for shard in ("ddp", "fsdp"):
        close(one[1:], metrics(tmp_path / shard)[1:], 1e-4, ("loss", "grad_norm", "reward/own", "teacher/p"))


@pytest.mark.slow
def test_sharded_training_with_a_tensor_parallel_engine(tmp_path):
    """Two FSDP ranks share one engine of two halves: its log-probs are the trainer's, and the toy is learnt as ever."""
    rows = launch(tmp_path, "tp", 2, "--shard=fsdp", "--tensor_parallel=2", "--sampler=vllm", "--max_steps=22", "--eval_k=0")
    assert max(r["mismatch/abs"] for r in rows[1:]) < 1e-4
    assert rows[0]["eval/greedy"] <= 0.05 and rows[-1]["eval/greedy"] >= 0.6
    # vLLM's shared memory has a fixed name: a run that left it would bar the next.
    launch(tmp_path, "again", 2, "--shard=fsdp", "--tensor_parallel=2", "--sampler=vllm", "--max_steps=1", "--eval_data=")


@pytest.mark.slow
def test_the_demo_runs(tmp_path):
    """toy/demo.py end to end at a fraction of its length: every method, the table, the picture, the honest notes."""
    done = subprocess.run(
        [sys.executable, os.path.join(build.HERE, "demo.py"), "--max_steps=4", f"--out={tmp_path}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr  # four steps solve nothing, and it says so
    for words in ("sft_verified", "MISSED LUFFY solves it", "holds  GRPO stays at chance", "built on purpose", "picture:"):
        assert words in done.stdout, done.stdout


def test_a_reward_for_format_solves_nothing(tmp_path):
    """Neither a group nor a trace is solved by a reward below solved_at."""
    rows = [Rollout(q, [2], [1], reward=r, reason="correct" if r >= 1 else "wrong")
            for q, rewards in enumerate([(0.1, 0.1), (0.1, 1.0), (1.0, 2.0)]) for r in rewards]  # fmt: skip
    found = rollout_metrics(rows, rows)
    assert found["groups/none_solved"] == found["groups/all_solved"] == pytest.approx(1 / 3)
    assert found["reward/own"] == pytest.approx(4.3 / 6)

    (tmp_path / "own.py").write_text("def grade(text, answer):\n    return 1.0 if f'{{{answer}}}' in text else 0.1")
    tokenizer = load_tokenizer(BASE)
    problems = load_problems(TRAIN, tokenizer, log=lambda *_: None)[:40]
    knobs = SimpleNamespace(data=TRAIN, n_teacher=1, n_rollouts=8, verified_only=True, preflight_traces=0, seed=0,
                            tensor_parallel=1, min_teacher_pass=0.5)  # fmt: skip
    with Verifier(workers=1, grader=str(tmp_path / "own.py")) as verifier:
        kept = [p for p in check_traces(knobs, problems, tokenizer, verifier) if p.teacher]
        assert 20 <= len(kept) < 40  # 70 % of the toy's traces are right
        for p in kept:
            p.answer = "none"
        with pytest.raises(UserError, match="only 0.0% of the teacher traces .*\n.*: wrong, reward 0.1, answer 'none'"):
            check_traces(knobs, kept, tokenizer, verifier)


@pytest.mark.parametrize(
    "threads,ranks,cores,others,quota,warned",
    [
        (1, 1, 2, 2.0, "max", False),  # one thread waits for no other
        (2, 1, 2, 0.0, "max", False),
        (2, 1, 2, 0.3, "max", False),  # an idle machine is never quite idle
        (2, 1, 2, 1.0, "max", True),
        (2, 1, 4, 1.9, "max", False),
        (8, 1, 4, 0.0, "max", True),  # its own threads are too many already
        (2, 2, 2, 0.0, "max", True),
        (4, 1, 8, 0.0, "200000", True),  # a container that may use two of eight cores
        (2, 1, 8, 5.0, "200000", False),
    ],
)
def test_threads_beside_busy_cores(tmp_path, monkeypatch, capsys, threads, ranks, cores, others, quota, warned):
    """Two looks at the cores' clocks, with `others` of them at work in between; one more core is not this process's to use."""
    clock = [0]

    def write_stat(_=0):
        clock[0] += 100
        shares = [min(1, max(0, others - i)) for i in range(cores)] + [1]
        rows = [f"cpu{i} {int(x * clock[0])} 0 0 {int((1 - x) * clock[0])} 0 0 0 0 0 0" for i, x in enumerate(shares)]
        (tmp_path / "stat").write_text("\n".join(["cpu  9 9 9 9 9 9 9 9 9 9", *rows, "intr 5"]))

    write_stat()
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    monkeypatch.setattr(preflight, "CORES", str(tmp_path / "stat"))
    monkeypatch.setattr(preflight, "QUOTA", str(tmp_path / "cpu.max"))
    monkeypatch.setattr("time.sleep", write_stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    preflight.warn_of_busy_cores("cpu")
    printed = capsys.readouterr().out
    assert printed.count("\n") == warned and ("OMP_NUM_THREADS=1" in printed) == warned
    assert not warned or (
        f"{threads * ranks} threads" in printed and f"other processes keep {others:.1f} of them busy" in printed
    )
    preflight.warn_of_busy_cores("cuda")
    (tmp_path / "stat").unlink()  # not Linux
    preflight.warn_of_busy_cores("cpu")
    assert capsys.readouterr().out == ""


def test_commands_look_at_the_cores_first(script, monkeypatch, tmp_path):
    for name in ("train", "eval"):
        asked = []
        module = script(name, ["--sampler=torch", "--data=nowhere.parquet", f"--out_dir={tmp_path / 'x'}"])
        monkeypatch.setattr(preflight, "warn_of_busy_cores", asked.append)
        monkeypatch.setattr(module, "warn_of_busy_cores", asked.append, raising=False)
        with pytest.raises(UserError, match="nowhere.parquet"):
            module.main()
        assert asked == ["cpu"]
