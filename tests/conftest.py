"""Fixtures that all tests share: the toy world's parts, one vLLM engine for the session, and a tiny byte-level model."""

import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# All tests run on the CPU, with a GPU in the machine or without; with `-m gpu` those that want one run on it. Before torch.
ON_GPU = "gpu" in sys.argv
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from helpers import BASE, TRAIN, byte_tokenizer, load_script
from transformers import Qwen2Config, Qwen2ForCausalLM

from data import load_problems
from model import load_policy
from rollout import TorchSampler, VLLMSampler
from runtime.tokenizer import load_tokenizer

# Under nohup, or as a job in the background, tests ignore these signals, and so would the programs that they start. A
# handler that does nothing protects the tests alike, but is not inherited.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def pytest_report_header():
    return "device: " + ("the GPU" if ON_GPU else "the CPU; make test-gpu has the others")


def pytest_collection_modifyitems(items):
    """Tests that share the engine run in one worker of pytest-xdist, or each worker would start its own."""
    for item in items:
        if "engine" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("engine"))


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(BASE)


@pytest.fixture(scope="session")
def problems(tokenizer):
    return load_problems(TRAIN, tokenizer, log=lambda line: None)


@pytest.fixture
def policy():
    return load_policy(BASE)


@pytest.fixture(scope="session")
def engine(tokenizer):
    """The real engine in fp32, on this machine's CPU. Starting it takes seconds, so all tests share it."""
    pytest.importorskip("vllm")
    return VLLMSampler(BASE, [tokenizer.eos_token_id], max_model_len=256)


@pytest.fixture
def torch_sampler(policy, tokenizer):
    """The other sampler. It holds the policy's weights, stamped 0."""
    sampler = TorchSampler(BASE, [tokenizer.eos_token_id], 128)
    sampler.load(policy.hf, 0)
    return sampler


@pytest.fixture
def script():
    return load_script


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory):
    """A random Qwen2 over bytes, saved as a real model is; its prompt ends in <think>."""
    folder = str(tmp_path_factory.mktemp("byte_model"))
    fast = byte_tokenizer(["<|endoftext|>"], pad_token="<|endoftext|>")
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=fast.eos_token_id, pad_token_id=fast.eos_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder
