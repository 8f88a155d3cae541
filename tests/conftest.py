"""Shared by all tests: the toy world's parts, one vLLM engine for the session, and a tiny byte-level model."""

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from configurator import ROOT, configure
from data import load_problems, load_tokenizer
from model import load_policy
from rollout import TorchSampler, VLLMSampler

BASE = os.path.join(ROOT, "toy", "base")
TRAIN = os.path.join(ROOT, "toy", "train.parquet")


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
    """The real engine, fp32, on this machine's CPU. Its start takes seconds, so all tests share it."""
    pytest.importorskip("vllm")
    return VLLMSampler(BASE, tokenizer.eos_token_id, max_model_len=256)


@pytest.fixture
def torch_sampler(policy, tokenizer):
    """The other sampler, with the policy's weights as they are, stamped 0."""
    sampler = TorchSampler(policy.hf.config, tokenizer.eos_token_id, 128)
    sampler.load(policy.hf, 0)
    return sampler


def load_script(name, argv):
    """train.py or eval.py as a fresh module with its knobs set, as the command line would set them."""
    path = os.path.join(ROOT, f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.config = configure(vars(module), argv, path)
    return module


@pytest.fixture
def script():
    return load_script


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory):
    """A random Qwen2 over bytes, saved as a real model is; its prompt ends in <think>."""
    folder = str(tmp_path_factory.mktemp("byte_model"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
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
