import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import LLAMA_8B, QWEN3_30B_A3B, QWEN_05B, QWEN_7B, QWEN_15B
from transformers import Qwen2Config

from configurator import ROOT, UserError
from runtime.plan import GIB, count_parameters, kv_cache, measured_memory, print_plan, show, training_memory, worth_compiling


def test_parameters_of_the_released_7b():
    n, n_embedding, n_layer, active = count_parameters(QWEN_7B)
    assert n == 7_615_616_512  # what Qwen2.5-7B has
    assert active == n and n_embedding == 152064 * 3584 and n_layer * 28 + 2 * n_embedding + 3584 == n


def test_tgpos_own_pair_fits_eight_gpus(script):
    """A Qwen2.5-Math-7B that learns from Qwen3-30B-A3B: 30.5 B parameters, 3.3 B of them for a token, as its card says."""
    teacher = count_parameters(QWEN3_30B_A3B)
    assert teacher.all == 30_532_122_624 and teacher.active == pytest.approx(3.35e9, rel=0.01)
    words = {}
    for offload in ("False", "True"):
        lines, argv = [], ["config/tgpo_7b.py", "config/method/tgpo.py", f"--teacher_offload={offload}"]
        assert print_plan(script("train", argv).config, QWEN_7B, 0, 8, True, 80, lines.append, teacher_config=QWEN3_30B_A3B)
        words[offload] = "\n".join(lines)
    # 3.04 B multiplications a token (the embedding is only read) beside four times 7.07 B.
    assert "30532.12 M parameters, 3353.03 M at work for a token; to ask it adds 11% to" in words["False"]
    assert "teacher model's weights                7.1 GiB" in words["False"]
    assert "teacher model's weights" not in words["True"] and "each micro-batch takes 7.1 GiB from the host" in words["True"]
    # Alone on a GPU it comes whole.
    lines = []
    knobs = script("train", [*argv, "--shard=none"]).config
    print_plan(knobs, QWEN_05B, 0, 1, True, 80, lines.append, teacher_config=QWEN3_30B_A3B)
    asked = float(re.search(r"asking the teacher model ([\d.]+) GiB", lines[-1])[1])
    assert asked == pytest.approx((12 * count_parameters(QWEN_05B).all + 2 * teacher.all) / GIB, abs=0.1)


def test_sharding_divides_what_persists():
    whole = training_memory(QWEN_7B, 32768, 8, False, 2, True)
    shard = training_memory(QWEN_7B, 32768, 8, True, 2, True)
    key = "weights, gradients, Adam (fp32)"
    assert whole[key] == 16 * 7_615_616_512 and shard[key] == whole[key] // 8
    assert sum(whole.values()) > 80 * GIB > sum(shard.values())
    without = training_memory(QWEN_7B, 32768, 8, True, 2, False)
    kept = "activations kept for backward"
    assert without[kept] > 10 * shard[kept]  # all of a layer's activations, not only its input
    assert shard["one chunk of logits, or one layer"] < 32768 * 152064 * 4  # the logits of all tokens: 18.6 GiB


def test_forecast_against_a_simulation():
    """Peaks that measure/track_memory.py found: 1.5B and 32,768 tokens, 33.9 GiB; 0.5B and 16,384 tokens, 10.5 GiB."""
    for config, tokens, tracked in ((QWEN_15B, 32768, 33.9), (QWEN_05B, 16384, 10.5)):
        assert sum(training_memory(config, tokens, 1, False, 2, True).values()) == pytest.approx(tracked * GIB, rel=0.05)


def test_cache_of_the_7b():
    _, tokens = kv_cache(QWEN_7B, 24 * GIB, 1, 2)
    assert tokens == int((24 * GIB - 2 * 7_615_616_512 - 2 * GIB) / (2 * 28 * 4 * 128 * 2))
    assert kv_cache(QWEN_7B, 10 * GIB, 1, 2)[1] == 0
    # Four key-value heads: ranks five to eight hold copies.
    assert kv_cache(QWEN_7B, 64 * GIB, 8, 2)[1] < 1.2 * kv_cache(QWEN_7B, 64 * GIB, 4, 2)[1]


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--plan_gpus=0"], "plan_gpus=0 must be above zero"),
        (["--plan_gpus=-8"], "plan_gpus=-8 must be above zero"),
        (["--plan_gib=0"], "plan_gib=0.0 must be above zero"),
        (["--plan_gpus=2", "--tensor_parallel=4"], "tensor_parallel=4 must divide the 2 process"),
        (["--data={cut}"], "is not a whole parquet file"),
        (["--model={gpt2}"], "gpt2 models are not supported"),
    ],
)
def test_bad_dry_runs(script, tmp_path, argv, words):
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    argv = [a.format(cut=tmp_path / "cut.parquet", gpt2=tmp_path / "gpt2") for a in argv]
    with pytest.raises(UserError, match=words):
        script("train", ["--dry_run=True", *argv]).main()


@pytest.mark.parametrize("shard,answer", [("fsdp", "yes"), pytest.param("ddp", "NO", marks=pytest.mark.slow)])
def test_dry_run_needs_only_a_config(tmp_path, shard, answer):
    """No weights, no tokenizer, no data: the plan of the 7B run, in seconds."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B.to_dict()))
    argv = [
        "train.py",
        "config/luffy_7b.py",
        "--dry_run=True",
        f"--model={tmp_path}",
        f"--shard={shard}",
        "--out_dir=/nowhere/at/all",
    ]
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "128 prompts x (7 own + 1 teacher) = 1024 sequences a step, 2 update(s) of 512, 8 rank(s)" in done.stdout
    # Eight: the one being written, the newest two, and those of every 100th of 500 steps.
    assert "checkpoints: 85.1 GiB each, 680.9 GiB at most" in done.stdout
    assert f"fits in 80 GiB: {answer}" in done.stdout and "not a measurement" in done.stdout


@pytest.mark.parametrize(
    "name,model,n_gpus,gib",
    [
        ("luffy_7b", QWEN_7B, 8, 80),
        ("grpo_7b", QWEN_7B, 8, 80),
        ("luffy_llama8b", LLAMA_8B, 8, 80),
        ("relift_7b", QWEN_7B, 8, 80),
        ("luffy_1gpu", QWEN_05B, 1, 24),
    ],
)
def test_every_config_fits_where_it_says(script, name, model, n_gpus, gib):
    lines = []
    knobs = script("train", [f"config/{name}.py"]).config
    assert print_plan(knobs, model, 0, n_gpus, True, gib, lines.append)
    assert not print_plan(knobs, model, 0, n_gpus, True, gib / 4, lines.append)
    assert any(f"fits in {gib} GiB: yes" in line for line in lines) and f"fits in {gib // 4} GiB: NO" in lines[-1]


def test_the_config_for_one_gpu_plans_for_one(script, tmp_path, capsys):
    """Without further knobs; and the plan counts the work, because nothing is known of the time."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_05B.to_dict()))
    argv = ["config/luffy_1gpu.py", "--dry_run=True", f"--model={tmp_path}", f"--data={tmp_path}/none.parquet"]
    assert script("train", argv).main() == 0
    shown = capsys.readouterr().out
    assert "= 256 sequences a step, 2 update(s) of 128, 1 rank(s)" in shown and "fits in 24 GiB: yes" in shown
    n, tokens = count_parameters(QWEN_05B).all, 256 * (512 + 1024)
    assert f"at most {tokens} tokens and {6 * n * tokens / 1e15:.2g} PFLOP in its updates" in shown
    assert f"{32 * 7 * 1024} tokens to sample at most; hours: not measured" in shown
    page = open(os.path.join(ROOT, "docs", "one_gpu.md")).read()
    takes, rolls = re.search(r"the update takes (\S+ GiB), the rollout (\S+ GiB)", shown).groups()
    for number in (f"{takes} in the update", f"{rolls} in the rollout", "at most 1.2 PFLOP", f"{32 * 7 * 1024:,} tokens"):
        assert number in page.replace("\n", " "), number


@pytest.mark.parametrize(
    "argv,n_ranks,tokens",
    [
        ([], 1, 8192),  # 128 sequences of 104 tokens fill a micro-batch
        (["--prompts_per_step=8", "--n_rollouts=4"], 1, 32 * 104),
        (["--prompts_per_step=8", "--n_rollouts=4", "--update_batches=2"], 1, 16 * 104),
        (["--prompts_per_step=8", "--n_rollouts=4"], 2, 16 * 104),
        (["--prompts_per_step=8", "--n_rollouts=4", "--micro_tokens=500"], 1, 500),
        (["--prompts_per_step=8", "--n_rollouts=4", "--max_tokens=80"], 1, 32 * 144),
        (["--prompts_per_step=4", "--n_rollouts=4", "--n_teacher=0", "--sft_buffer=30"], 1, 30 * 104),  # ReLIFT's SFT step
    ],
)
def test_a_micro_batch_is_no_larger_than_the_update(script, argv, n_ranks, tokens):
    """The memory of a small run is that of the tokens it has, not of micro_tokens."""
    lines, knobs = [], script("train", argv).config
    print_plan(knobs, QWEN_05B, 0, n_ranks, False, 0, lines.append)
    kept = training_memory(QWEN_05B, tokens, n_ranks, False, 4, False)["activations kept for backward"]
    assert f"activations kept for backward{show(kept):>17}" in "\n".join(lines)
    assert f"micro-batches of at most {tokens} tokens" in "\n".join(lines)


def test_ddps_buckets_stay_through_the_rollout(script):
    """DDP's buckets hold the gradients, 4 bytes a parameter. Without them the engine has that memory during the rollout."""
    knobs, rollout = script("train", ["config/luffy_1gpu.py"]).config, {}
    for shard, n_ranks in (("none", 1), ("ddp", 1), ("ddp", 2)):
        lines = []
        print_plan({**knobs, "shard": shard}, QWEN_05B, 0, n_ranks, True, 80, lines.append)
        rollout[shard, n_ranks] = float(re.search(r"the rollout ([\d.]+) GiB", lines[-1])[1])
    n = count_parameters(QWEN_05B).all
    assert rollout["none", 1] == rollout["ddp", 1] == pytest.approx(rollout["ddp", 2] - 4 * n / 2**30, abs=0.11)


def test_relifts_second_optimizer_is_counted(script):
    """The SFT step's own two moments, 8 bytes a parameter, are there in the update and in the rollout."""
    found = {}
    for name in ("luffy_7b", "relift_7b"):
        lines = []
        print_plan(script("train", [f"config/{name}.py"]).config, QWEN_7B, 0, 8, True, 80, lines.append)
        found[name] = [float(x) for x in re.search(r"update takes ([\d.]+) .*rollout ([\d.]+) ", lines[-1]).groups()]
    own = count_parameters(QWEN_7B).all / 2**30  # 8 bytes, a share of an eighth
    assert [a - b for a, b in zip(found["relift_7b"], found["luffy_7b"], strict=True)] == pytest.approx([own, own], abs=0.11)


def test_memory_is_measured():
    measured_memory()
    block = bytearray(200 << 20)
    peak, now = measured_memory()
    assert now >= 200 << 20 and peak >= now
    del block
    measured_memory()
    peak, later = measured_memory()
    assert later < now - (150 << 20) and peak < now - (100 << 20)  # the high-water mark was reset


def test_small_models_are_not_compiled(monkeypatch):
    """Neither by torch nor by vLLM, unless one says so."""
    small = Qwen2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=1000)
    choices = lambda: [[worth_compiling(choice, config) for choice in ("auto", "yes", "no")] for config in (small, QWEN_05B)]
    assert choices() == [[False, True, False]] * 2  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choices() == [[False, True, False], [True, True, False]]
