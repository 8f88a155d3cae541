import json
import subprocess
import sys

import pytest
import torch
from transformers import Qwen2Config

import bench
from configurator import ROOT, UserError


def test_flops_by_hand():
    """One sequence through one layer, every product counted: 2 m n k forward, and three times that with backward."""
    c = Qwen2Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                    vocab_size=50, tie_word_embeddings=False)  # fmt: skip
    n, response = 10, 9
    products = 8 * 8 + 2 * (8 * 4) + 8 * 8 + 3 * 8 * 12  # q, k and v, out, the MLP's three
    vectors = 8 + 2 * 4 + 3 * 8  # biases and norms, which 6 N counts too
    attention = 2 * (2 * n * n * 8) / 2  # scores and values, half of them masked
    forward = 2 * n * (products + vectors) + attention
    head = 2 * response * 50 * 8
    assert bench.flops(c, [n], response, False) == 3 * (forward + head)
    assert bench.flops(c, [n], response, True) == 3 * (forward + head) + forward + head  # recompute is on by default


def test_sequences_fill_the_budget():
    rollouts = bench.sequences(100)
    lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
    assert sum(lengths) == bench.tokens and min(lengths) >= 32
    assert max(rollouts[0].prompt_ids) < 100


@pytest.mark.parametrize(
    "machine,tflops",
    [
        ("NVIDIA H200", 989.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_datasheets_rate(machine, tflops):
    assert bench.datasheet_rate(machine, torch.bfloat16) == (tflops and tflops * 1e12)
    assert bench.datasheet_rate(machine, torch.float32) is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command(tmp_path, dtype):
    argv = [
        "bench.py",
        f"--dtype={dtype}",
        "--size=toy",
        "--tokens=512",
        "--repeats=1",
        "--syncs=2",
        "--sampler=torch",
        "--rollout_prompts=2,5",
        f"--out={tmp_path / 'r.jsonl'}",
    ]
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"CPU thread(s), {dtype}: matrix product 512 x 64 x 256 at" in done.stdout
    assert "MFU" in done.stdout and "not measured on a CPU" in done.stdout
    row = json.loads((tmp_path / "r.jsonl").read_text())
    assert row["head"]["ours"][0] > 0 and "head, ours: 512 x 64 x 32 in" in done.stdout
    assert list(row["rollout_tokens_per_s"]) == ["2", "5"] and "tokens/s of 5 at once" in done.stdout
    assert row["matrix_flops"] > 0 and row["update"]["packed_sdpa"]["tokens_per_s"] > 0 and row["torch"]


@pytest.mark.parametrize(
    "argv,words",
    [
        ("--tokens=0", "tokens=0 must be above zero"),
        ("--repeats=0", "repeats=0 must be above zero"),
        ("--syncs=-1", "syncs=-1 must be zero or more"),
        ("--rollout_prompts=2,0", "rollout_prompts='2,0': write numbers above zero"),
        ("--rollout_prompts=all", "rollout_prompts='all': write numbers above zero"),
        ("--rollout_tokens=0", "rollout_tokens=0 must be above zero"),
        ("--shortest=300", "take 32 or more, and shortest <= longest"),
        ("--tokens=1", "take 32 or more"),
        ("--size=9b", "size='9b': choose tiny, toy"),
        ("--shard=ddp", "choose none or fsdp"),
        ("--sampler=foo", "sampler='foo'"),
        ("--out=/proc/nope/x.json", "cannot be written"),
    ],
)
def test_bad_knobs(script, argv, words):
    with pytest.raises(UserError, match=words):
        script("bench", [argv]).main()
