"""prepare.py export makes a folder that others take as it is, and a card that says what was recorded."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import build_model, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import prepare
from configurator import ROOT, UserError
from runtime.card import defaults
from runtime.files import weights_digest
from runtime.tokenizer import load_tokenizer


def export(model, out, *argv, round_trip=False):
    prepare.main(prepare.parse(["export", f"--model={model}", f"--out={out}", f"--round_trip={round_trip}", *argv]))
    return (out / "README.md").read_text()


@pytest.fixture
def ckpt(tmp_path, script):
    """The checkpoint of a short run, with an evaluation at its step."""
    argv = ("--max_steps=1", "--prompts_per_step=4", "--max_tokens=20", "--eval_data=toy/test.parquet", "--eval_max_problems=8")
    run(script, tmp_path, "run", *argv, "--gamma=0.2", "--n_teacher=2")
    return tmp_path / "run" / "ckpt_1"


def bf16_logits(folder, dtype):
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return hf.to(torch.bfloat16)(torch.tensor([[5, 6, 15, 7, 8, 16, 2]])).logits, hf


def test_a_checkpoint_becomes_a_plain_model_in_bfloat16(ckpt, tmp_path):
    """transformers loads it without a word of what it is: the checkpoint's weights, rounded once, and its tokens and ends."""
    export(ckpt.parent / "latest", tmp_path / "out")
    ours, theirs = load_file(ckpt / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys() and {t.dtype for t in theirs.values()} == {torch.bfloat16}
    assert all(torch.equal(ours[name].to(torch.bfloat16), theirs[name]) for name in ours)
    (wanted, _), (found, hf) = bf16_logits(ckpt, torch.float32), bf16_logits(tmp_path / "out", "auto")
    assert torch.equal(wanted, found) and hf.config.dtype == torch.bfloat16
    a, b = AutoTokenizer.from_pretrained(ckpt), AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = [{"role": "user", "content": "12+34=?"}]
    assert a.apply_chat_template(prompt, tokenize=False) == b.apply_chat_template(prompt, tokenize=False)
    assert a.get_vocab() == b.get_vocab() and b.eos_token == "<eos>"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1]
    assert not (tmp_path / "out" / "state").exists() and len(os.listdir(tmp_path)) == 2  # no lock, nothing partial


def test_the_card_says_what_was_recorded(ckpt, tmp_path):
    card = export(ckpt, tmp_path / "my-model", "--base=Qwen/Qwen2.5-Math-7B")
    assert re.match(r"---\n(.*\n)+base_model: Qwen/Qwen2.5-Math-7B\n---\n\n# my-model\n", card)
    knobs = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", card, re.M))
    assert knobs == {"gamma": "0.2", "n_teacher": "2", "prompts_per_step": "4", "max_tokens": "20"}
    assert (
        "| `gamma` | 0.2 | 0.1 |" in card and "| steps | 1 |" in card and "| data | toy/train.parquet, 512 problems |" in card
    )
    row = json.loads((ckpt.parent / "eval_1.json").read_text())["toy"]
    assert f"| toy | 8 | 4 | {row['greedy']:.3f} | {row['avg@k']:.3f} |" in card and "at step 1, samples at T=1" in card
    assert "the cast model was not evaluated" in card and "opens a thought" in card and str(tmp_path) not in card
    assert set(defaults(os.path.join(ROOT, "train.py"))) >= {"gamma", "loss_constant", "beta2", "gpu_memory"}


def test_the_card_takes_an_evaluation_of_these_weights_only(ckpt, tmp_path):
    folder = tmp_path / "eval"
    folder.mkdir()
    written = {
        "settings": {"weights": weights_digest(str(ckpt))},
        "knobs": {"model": "m", "temperature": 0.6, "data": "/x/amc.p"},
    }
    (folder / "settings.json").write_text(json.dumps(written))
    (folder / "eval.json").write_text(
        json.dumps({"amc": {"n": 3, "k": 2, "avg@k": 0.5, "pass@k": 2 / 3, "problems": {"1": 0.5}}})
    )
    card = export(ckpt, tmp_path / "a", f"--eval={folder}")
    assert "| amc | 3 | 2 | 0.500 | 0.667 |" in card and "By `eval.py` (data=amc.p, temperature=0.6):" in card
    named = export(ckpt, tmp_path / "b", f"--eval={folder / 'eval.json'}")  # the file will do, too
    assert named == card.replace("# a\n", "# b\n")
    other = json.dumps({**written, "settings": {"weights": 1}})
    for name, text, words in (("settings.json", other, "is of other weights"),
                              ("settings.json", '{"knobs": {}}', "does not tell which model"),
                              ("eval.json", "[]", "is not an eval.json")):  # fmt: skip
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=words):
            export(ckpt, tmp_path / "c", f"--eval={folder}")
    assert not (tmp_path / "c").exists()


def test_several_files_of_weights_and_several_ends(tmp_path):
    """The index has the new size. generation_config.json names all ids that end a response, and nothing of the base's: vLLM
    would cut responses and sample by it."""
    source = build_model(tmp_path / "source", tied=False, shard="50KB")
    config = json.loads((source / "config.json").read_text())
    ends = [load_tokenizer(str(source)).convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>")]
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    (source / "generation_config.json").write_text('{"max_new_tokens": 20, "repetition_penalty": 1.05, "top_k": 20}')
    card = export(source, tmp_path / "out")
    assert "What is known of its training is not in the folder" in card and "None is recorded." in card
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    tensors = {name: t for file in files for name, t in load_file(tmp_path / "out" / file).items()}
    assert len(files) > 2 and index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert (
        GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
        == ends
        == load_tokenizer(str(tmp_path / "out")).stop_ids
    )
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()).keys() == {"eos_token_id", "pad_token_id"}
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, tensors[name]) for name, p in hf.named_parameters())


def test_export_mistakes_leave_nothing(ckpt, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    bad = shutil.copytree(ckpt, tmp_path / "bad")
    content = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = sorted(os.listdir(tmp_path))
    for model, out, argv, words in (
        (tmp_path / "nowhere", "out", [], "there is no model folder"),
        (ckpt.parent, "out", [], "no \\*.safetensors"),
        (bad, "out", [], "model.safetensors is not the one that was written"),
        (ckpt, "full", [], "is not an empty folder"),
        (ckpt, "out", ["--base=a\nb"], "USER/NAME"),
        (ckpt, "out", ["--dtype=float16"], "invalid choice"),
        (ckpt, "out", [f"--eval={tmp_path / 'nowhere'}"], "No such file"),
    ):
        with pytest.raises(UserError, match=words) as e:
            export(model, tmp_path / out, *argv)
        assert str(e.value).count("\n") <= 1
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.slow
def test_the_engine_takes_the_exported_folder(ckpt, tmp_path):
    """vLLM and transformers give the tokens of the exported model the same log-probs."""
    pytest.importorskip("vllm")
    argv = ["prepare.py", "export", f"--model={ckpt}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " by transformers" in done.stdout and "tokens are the same, log-probs differ by at most" in done.stdout
