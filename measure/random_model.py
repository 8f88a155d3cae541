"""
A model with random weights in the shape of a real one, over bytes, and questions with traces for it: what a measurement needs
where nobody has downloaded a model.

    python measure/random_model.py FOLDER SIZE      writes FOLDER/model and FOLDER/train.parquet; SIZE is as bench.py has it
"""

import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bench import SHAPES, model_config
from configurator import UserError, run


def build_model(folder, shape, dtype=torch.float32, device="cpu"):
    """Save a random Qwen2 and its tokenizer: bytes, and a vocabulary filled up to its size. shape: as bench.SHAPES has them;
    an engine reads `dtype` in the folder and computes in it."""
    config = model_config(shape)
    pieces = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    assert pieces[config.eos_token_id] == "<eos>"
    pieces += [f"w{i}" for i in range(config.vocab_size - len(pieces))]  # no text has these, but the model may write them
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


def numbers(n, shortest, longest):
    """n questions of shortest to longest bytes, each a number."""
    return [f"{i * 7919:0{shortest + i % (longest - shortest + 1)}d}" for i in range(n)]


def write_rows(parquet, questions, traces=None):
    """A file of LUFFY's schema. The answer is 1, and so is that of every trace."""
    rows = [{"data_source": "random", "prompt": [{"role": "user", "content": q}], "reward_model": {"ground_truth": "1"}}
            for q in questions]  # fmt: skip
    for row, trace in zip(rows, traces or (), strict=traces is not None):
        row["target"] = [{"role": "assistant", "content": trace}]
    pq.write_table(pa.Table.from_pylist(rows), parquet)


def main(folder, size):
    sizes = [s for s, shape in SHAPES.items() if shape[5] > 258]  # a token for each byte, and two more
    if size not in sizes:
        raise UserError(f"{size!r}: choose {', '.join(sizes)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    build_model(os.path.join(folder, "model"), SHAPES[size], torch.bfloat16 if device == "cuda" else torch.float32, device)
    rng = random.Random(0)
    traces = ["".join(rng.choices("0123456789+-=* ", k=rng.randint(700, 1400))) + "\\boxed{1}" for _ in range(256)]
    write_rows(os.path.join(folder, "train.parquet"), numbers(256, 48, 56), traces)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run(lambda: main(*sys.argv[1:]))
