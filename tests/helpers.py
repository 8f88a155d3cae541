"""What several test files use: the toy world's paths, model shapes, rows and batches made by hand, and ways to run a script."""

import ast
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
import types

import build
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from configurator import ROOT, configure
from data import Packed, packing_of

BASE = os.path.join(ROOT, "toy", "base")
TRAIN = os.path.join(ROOT, "toy", "train.parquet")
TRAIN_PY = os.path.join(ROOT, "train.py")

# ---------------------------------------------------------------- shapes of real models

QWEN_7B = Qwen2Config(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    vocab_size=152064, max_position_embeddings=16384, tie_word_embeddings=False,
)  # fmt: skip
QWEN_15B = Qwen2Config(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
QWEN_05B = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_17B = Qwen3Config(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_30B_A3B = Qwen3MoeConfig(
    hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
    num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
    max_position_embeddings=262144, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip

# ---------------------------------------------------------------- data


def a_row(**changes):
    """A row of LUFFY's schema: one question of the toy with a right trace."""
    return {
        "data_source": "toy",
        "prompt": [{"content": "12+34=?", "role": "user"}],
        "target": [{"content": "<think>\n12>46</think>\\boxed{46}", "role": "assistant"}],
        "ability": "math",
        "reward_model": {"ground_truth": "46", "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
        **changes,
    }


def write(path, rows, schema=build.SCHEMA):
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return str(path)


OPENR1 = pa.schema({
    "problem": pa.string(), "solution": pa.string(), "answer": pa.string(), "problem_type": pa.string(), "uuid": pa.string(),
    "is_reasoning_complete": pa.list_(pa.bool_()), "generations": pa.list_(pa.string()),
    "correctness_math_verify": pa.list_(pa.bool_()), "correctness_llama": pa.list_(pa.bool_()),
    "finish_reasons": pa.list_(pa.string()), "correctness_count": pa.int64(),
    "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
})  # fmt: skip
BAD = "\ufffdBAD"  # write_openr1 replaces it by bytes that are not UTF-8, of the same length


def openr1_trace(n, end="</think>\\boxed{1}"):
    """A trace of n tokens to the byte tokenizer, without EOS."""
    return "<think>\n" + "x" * (n - 8 - len(end)) + end


def openr1_row(problem, generations, correct=True, complete=True, **changes):
    """A row of OpenR1's schema. One flag stands for all generations."""
    flags = lambda value: value if isinstance(value, list) else [value] * len(generations or [])
    return {"problem": problem, "solution": "s", "answer": "1", "generations": generations, "correctness_llama": None,
            "correctness_math_verify": flags(correct), "is_reasoning_complete": flags(complete), **changes}  # fmt: skip


def write_openr1(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows, OPENR1), path, compression="none", use_dictionary=False, **options)
    content = path.read_bytes()
    path.write_bytes(content.replace(BAD.encode(), b"\xff\xfe\xfdBAD"))
    return path


def packed(n, **fields):
    """A micro-batch made by hand: n response tokens, all the policy's own, with zero advantages and zero behaviour log-probs;
    `fields` replace what they name."""
    no = torch.zeros(n, dtype=torch.bool)
    plain = dict(rows=[0], input_ids=torch.zeros(1, n, dtype=torch.long), position_ids=torch.arange(n)[None],
                 cu_seqlens=torch.tensor([0, n], dtype=torch.int32), loss_mask=~no, is_teacher=no, is_replay=no,
                 advantage=torch.zeros(n), behaviour_logp=torch.zeros(n))  # fmt: skip
    batch = Packed(**{**plain, **fields})
    batch.packing = packing_of(batch.cu_seqlens, batch.loss_mask)
    traces = batch.trace_lengths[batch.cu_seqlens[1:].long() - 1] > 0
    masks = batch.loss_mask, batch.loss_mask & batch.is_teacher, batch.is_own, traces
    batch.counts = tuple(mask.sum().item() for mask in masks)
    return batch


# ---------------------------------------------------------------- models


def byte_tokenizer(special, eos=None, **options):
    """A tokenizer over bytes; EOS is the first of the special tokens, or the one that is named."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos or special[0], **options)


def build_model(folder, kind=Qwen2Config, marks=("<|im_start|>", "<|im_end|>"), tied=True, dtype=torch.float32, eos=None,
                rows=288, shard="50GB", positions=512, **changes):  # fmt: skip
    """A random model over bytes, saved as real ones are, in files of at most `shard`. Its heads have 32 dimensions, as vLLM on
    a CPU requires. eos: a mark, in place of <|endoftext|>; rows: of the embedding."""
    tokenizer = byte_tokenizer(["<|endoftext|>", "<s>", *marks], eos, bos_token="<s>", model_max_length=positions)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = kind(
        vocab_size=rows, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=positions, rope_theta=1e4, tie_word_embeddings=tied, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.2, **changes,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def build_mixture(folder, **changes):
    """The weights and the config of a random mixture of 4 experts in each of 2 layers, 2 at work for a token."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, initializer_range=0.3, **changes,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- configs


def resolve(script, *argv):
    """The knobs of train.py or eval.py under these arguments, from its first lines alone."""
    path, scope = os.path.join(ROOT, script), {"__file__": script}
    exec(open(path).read().partition("\nfrom configurator import ")[0], scope)
    return configure(scope, list(argv), path)


def read_config(path):
    """The names that a config file sets itself, and the paths of the files that it includes."""
    body = ast.parse(open(path).read()).body
    included = [os.path.join(ROOT, node.value.args[0].value) for node in body if isinstance(node, ast.Expr)]
    return {node.targets[0].id for node in body if isinstance(node, ast.Assign)}, included


# ---------------------------------------------------------------- runs


def load_script(name, argv):
    """train.py, eval.py or bench.py as a fresh module, with its knobs set as the command line would set them."""
    path = os.path.join(ROOT, f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.config = configure(vars(module), argv, path)
    return module


def lines_of(path):
    """A file of JSON lines, as a list."""
    with open(path) as f:
        return [json.loads(line) for line in f]


def metrics(folder):
    return lines_of(os.path.join(folder, "metrics.jsonl"))


def rollouts_of(folder, step):
    return lines_of(os.path.join(folder, "rollouts", f"step_{step}.jsonl"))


def run(script, tmp_path, name, *argv):
    """train.py's main in this process: three steps by default, torch sampler, no evaluation. Returns its metrics."""
    out = tmp_path / name
    module = script(
        "train", ["--sampler=torch", f"--out_dir={out}", "--eval_data=", "--reward_workers=1", "--max_steps=3", *argv]
    )
    module.main()
    return metrics(out)


def launch(tmp_path, name, n_ranks, *argv, script=TRAIN_PY):
    """train.py, or a script that runs it, under torchrun with n_ranks processes, or plainly with one. Returns its metrics."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={n_ranks}", "--standalone"]
    command = [sys.executable, *(torchrun if n_ranks > 1 else []), script]
    argv = [*argv, "--reward_workers=1", f"--out_dir={tmp_path / name}"]
    done = subprocess.run([*command, *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return metrics(tmp_path / name)


def forked_ranks(n, main):
    """Call main() in n forked processes, each with the environment of one of n ranks. Returns their process ids, by rank. They
    start much faster than under torchrun, because torch is loaded once, and nothing ends the others if one dies. For a script
    of its own: nothing may have used torch's threads before."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sys.stdout.flush()
    children = []
    for rank in range(n):
        if (child := os.fork()) == 0:
            code = 1
            try:
                ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD": n}
                os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{n}", MASTER_ADDR="127.0.0.1",
                                  MASTER_PORT=f"{port}")  # fmt: skip
                modules = [m for m in list(sys.modules.values()) if type(m) is types.ModuleType]
                for scope in (main.__globals__, *map(vars, modules)):
                    scope.update({name: value for name, value in ours.items() if type(scope.get(name)) is int})
                code = main() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return children


def killed_runs(command, folder, n_chunks, kills):
    """Run a command until it ends by itself. Kill it `kills` times before that, each time after a few more chunks and at
    another moment of the next chunk. Returns how often it was killed while it worked."""
    rng, killed = random.Random(0), 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        count = lambda: len([f for f in os.listdir(folder) if f.endswith(".jsonl")]) if folder.exists() else 0
        before = count()
        while killed < kills and process.poll() is None:
            if count() >= min(n_chunks - 1, before + 1):
                time.sleep(rng.random() * 0.05)  # less than the remaining chunks take
                break
            time.sleep(0.002)
        if killed == kills or process.poll() is not None:
            assert process.wait() == 0
            return killed
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
