"""Everything from outside is treated as data: model output, datasets, model folders, secrets in the environment."""

import ast
import glob
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import BASE, a_row, write
from safetensors.torch import load_file

from configurator import ROOT, UserError, printable, run
from data import load_problems
from measure import hostile_answers
from model import load_policy
from runtime.files import load_config
from runtime.tokenizer import load_tokenizer

EVIL = "\x1b]0;owned\x07\x1b[2J\r\u202e"


def test_printable():
    assert printable("Ärger 東京 \\boxed{2}\n½") == "Ärger 東京 \\boxed{2}\n½"
    shown = printable(EVIL + "\x00\u2028\ud800")
    assert shown.isprintable() and shown.startswith("\\x1b]0;owned\\x07") and "\\u202e" in shown


@pytest.mark.slow
def test_control_characters_never_reach_the_terminal(tmp_path, capsys, byte_model):
    """In a source's name, a prompt, a trace and an answer: in a whole run, and in an error."""
    rows = [
        a_row(
            data_source=f"x{EVIL}",
            prompt=[{"role": "user", "content": f"{i}{EVIL}=?"}],
            target=[{"role": "assistant", "content": f"a</think>\\boxed{{{EVIL}}}"}],
            reward_model={"ground_truth": f"1{EVIL}", "style": "rule"},
        )
        for i in range(4)
    ]
    path = write(tmp_path / "evil.parquet", rows)
    problems = load_problems(path, load_tokenizer(byte_model), 10_000, 10_000)
    assert all(p.source.isprintable() for p in problems) and EVIL in problems[0].answer
    argv = ["--sampler=torch", f"--data={path}", f"--eval_data={path}", "--max_steps=1", "--prompts_per_step=4", "--eval_k=0",
            "--max_prompt_tokens=100", "--max_teacher_tokens=100", f"--model={byte_model}",
            f"--out_dir={tmp_path / 'out'}"]  # fmt: skip
    for more, code in ((["--min_teacher_pass=0"], 0), (["--min_teacher_pass=0.99"], 2)):
        done = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *argv, *more], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        shown = done.stdout + done.stderr
        assert "\x1b" not in shown and "\u202e" not in shown and "\x07" not in done.stdout
    assert "owned" in done.stderr  # the failing rows are shown, as text


def test_errors_are_printable(capsys):
    with pytest.raises(SystemExit):
        run(lambda: (_ for _ in ()).throw(UserError(f"no column {EVIL}")))
    assert capsys.readouterr().err.strip().isprintable()


def test_a_models_own_code_is_not_run(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder)
    config = json.load(open(folder / "config.json"))
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    json.dump(config | {"model_type": "evil", "auto_map": names}, open(folder / "config.json", "w"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    for load in (load_config, load_policy):
        with pytest.raises(UserError, match="from model"):
            load(str(folder))
    tokens = json.load(open(folder / "tokenizer_config.json"))
    tokens |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Evil"}
    json.dump(tokens, open(folder / "tokenizer_config.json", "w"))
    assert load_tokenizer(str(folder)).encode("1+1") == load_tokenizer(BASE).encode("1+1")  # as tokenizer.json says
    assert not os.path.exists(tmp_path / "owned")


class Owned:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_weights_are_not_unpickled(tmp_path):
    """Of pytorch_model.bin only tensors are read; no other object in it is built."""
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder)
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    torch.save(tensors | {"evil": Owned(str(tmp_path / "owned"))}, folder / "pytorch_model.bin")
    with pytest.raises(UserError):
        load_policy(str(folder))
    assert not os.path.exists(tmp_path / "owned")
    pickle.loads(pickle.dumps(Owned(str(tmp_path / "owned")))).close()
    assert os.path.exists(tmp_path / "owned")  # it would have shown


def test_no_eval_and_no_pickle_in_the_code():
    """Except for a config file, which is Python as README says, and for the user's own grader."""
    allowed = {("configurator.py", "exec"), ("configurator.py", "compile"), ("reward.py", "exec"), ("reward.py", "compile")}
    found = set()
    for path in (*glob.glob(os.path.join(ROOT, "*.py")), *glob.glob(os.path.join(ROOT, "runtime", "*.py"))):
        for node in ast.walk(ast.parse(open(path).read())):
            name = None
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
            elif isinstance(node, ast.Import):
                name = next((a.name for a in node.names if a.name in ("pickle", "marshal", "shelve", "dill")), None)
            if name in ("eval", "exec", "compile", "__import__", "torch.load", "torch.save", "runpy.run_path", "os.system",
                        "pickle", "marshal", "shelve", "dill", "parse_expr", "sympify"):  # fmt: skip
                found.add((os.path.basename(path), name))
            assert not isinstance(node, ast.keyword) or node.arg != "shell"
            assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code") or node.value.value is False
    assert found == allowed


@pytest.mark.slow
def test_secrets_stay_in_the_environment(tmp_path):
    secrets = {"HF_TOKEN": "hf_secretA", "WANDB_API_KEY": "secretB", "AWS_SECRET_ACCESS_KEY": "secretC"}
    argv = ["--sampler=torch", "--eval_data=", "--max_steps=1", f"--out_dir={tmp_path / 'out'}"]
    command = [sys.executable, os.path.join(ROOT, "train.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **secrets})
    assert done.returncode == 0, done.stderr
    written = [open(p, "rb").read() for p in glob.glob(str(tmp_path / "out" / "**"), recursive=True) if os.path.isfile(p)]
    assert len(written) > 8
    for text in (*written, done.stdout.encode(), done.stderr.encode()):
        assert not any(secret.encode() in text for secret in secrets.values())


@pytest.mark.slow
@pytest.mark.parametrize("grader", ["math_verify", "oat"])
def test_ten_thousand_malformed_answers(grader):
    right, peak = hostile_answers.under_fire(grader)
    assert right == 0 and peak <= hostile_answers.MEMORY and not os.path.exists(hostile_answers.OWNED)
