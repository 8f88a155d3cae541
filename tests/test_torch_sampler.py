"""The torch sampler computes what transformers does, for every family that it accepts."""

import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from configurator import UserError
from runtime.requests import StaleWeights
from runtime.torch_sampler import Decoder, TorchSampler

SHAPE = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=50, max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
MODELS = {
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=False),
    "llama": LlamaConfig(**SHAPE, rope_parameters=LLAMA3, rms_norm_eps=1e-5),
    "llama, biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, head_dim=16, sliding_window=None),
    "one key-value head": Qwen2Config(**{**SHAPE, "num_key_value_heads": 1}),
    "as many key-value heads": Qwen2Config(**{**SHAPE, "num_key_value_heads": 4}),
}


def build(config):
    """Random weights. None is an identity, which could hide an error."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.add_(0.2 * torch.randn(p.shape) if "norm" in name or "bias" in name else 0.1 * torch.randn(p.shape))
    return hf.eval()


@pytest.fixture
def sampler_of(tmp_path):
    """sampler_of(hf, max_model_len): a sampler for the model, which lies in a folder as real ones do. Token 1 is EOS."""

    def make(hf, max_model_len=60, dtype="float32"):
        hf.save_pretrained(tmp_path)
        return TorchSampler(str(tmp_path), [1], max_model_len, dtype)

    return make


@torch.no_grad()
def theirs(hf, ids):
    return hf(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_samples_have_transformers_log_probs(name, sampler_of):
    """Prompts of several lengths, some of them twice; responses of several, so that rows leave and the cache grows."""
    hf, g = build(MODELS[name]), torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 50, (n,), generator=g).tolist() for n in (3, 9, 1, 9, 14)]
    prompts += [prompts[1], prompts[1], prompts[2]]
    sampler = sampler_of(hf, 100)
    sampler.load(hf, "now")
    for temperature in (0.7, 0.0):
        samples = sampler.generate(prompts, list(range(8)), temperature, [40, 3, 60, 9, 30, 60, 2, 5], "now")
        assert len({len(s.ids) for s in samples}) > 3
        for prompt, s in zip(prompts, samples, strict=True):
            rows = theirs(hf, prompt + s.ids)[len(prompt) - 1 : -1]
            logps = (rows / (temperature or 1.0)).log_softmax(-1)
            wanted = logps[range(len(s.ids)), s.ids]
            torch.testing.assert_close(torch.tensor(s.logps), wanted, rtol=0, atol=2e-5)
            if not temperature:
                assert torch.all(wanted > logps.max(-1).values - 2e-5)


def test_it_copies_the_weights(sampler_of):
    """The trainer's later changes have no effect until they are loaded."""
    hf = build(MODELS["qwen2"])
    sampler = sampler_of(hf)
    sampler.load(hf, 1)
    before = sampler.generate([[5, 6]], [0], 1.0, 20, 1)
    with torch.no_grad():
        for p in hf.parameters():
            p.mul_(1.5)
    assert sampler.generate([[5, 6]], [0], 1.0, 20, 1) == before
    with pytest.raises(StaleWeights, match="stamped 1, not 2"):
        sampler.generate([[5, 6]], [0], 1.0, 20, 2)
    sampler.load(hf, 2)
    assert sampler.generate([[5, 6]], [0], 1.0, 20, 2) != before


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_the_folders_weights_are_those_that_load_brings(name, sampler_of):
    """With a head of its own and with a tied one, in both dtypes; under the folder's name until the first load()."""
    hf = build(MODELS[name])
    for dtype in ("float32", "bfloat16"):
        fresh, loaded = sampler_of(hf, dtype=dtype), sampler_of(hf, dtype=dtype)
        loaded.load(hf, 5)
        assert fresh.stamp == fresh.model and loaded.stamp == 5
        assert fresh.generate([[5, 6]], [0], 1.0, 20, fresh.model) == loaded.generate([[5, 6]], [0], 1.0, 20, 5)
        with pytest.raises(StaleWeights):
            fresh.generate([[5, 6]], [0], 1.0, 20, 5)


def test_missing_weights_are_not_made_up(sampler_of, tmp_path):
    sampler = sampler_of(build(MODELS["qwen2"]))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no causal LM loads from model .*lack 1 tensor\(s\), model.norm.weight among them"):
        sampler.generate([[5, 6]], [0], 1.0, 20, sampler.model)


def test_half_precision_stays_close(sampler_of):
    hf = build(MODELS["qwen3"])
    exact, half = (sampler_of(hf, dtype=dtype) for dtype in ("float32", "bfloat16"))
    for sampler in (exact, half):
        sampler.load(hf, 0)
    (a,), (b,) = (sampler.generate([[5, 6, 7]], [0], 1.0, 20, 0) for sampler in (exact, half))
    n = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y), len(a.ids))
    assert n and max(abs(x - y) for x, y in zip(a.logps[:n], b.logps[:n], strict=True)) < 0.2


def test_rows_that_have_ended_do_not_run_out_of_positions(sampler_of):
    """They stay until a quarter has ended, here for more steps than there are positions."""
    hf = build(MODELS["llama"])
    sampler = sampler_of(hf, 40)
    sampler.load(hf, 0)
    samples = sampler.generate([[5] * 30, *([3, 4, i] for i in range(2, 10))], list(range(9)), 0.0, 30, 0)
    assert len(samples[0].ids) <= 10 and max(len(s.ids) for s in samples) > 20


@pytest.mark.parametrize("prompt", [[5] * 60, [5] * 61, [50], []])
def test_an_impossible_prompt_is_named(prompt, sampler_of):
    hf = build(MODELS["qwen2"])
    sampler = sampler_of(hf)
    sampler.load(hf, 0)
    with pytest.raises(ValueError, match="request 1 has"):
        sampler.generate([[5], prompt], [0, 0], 1.0, 4, 0)


def test_sleep_frees_the_weights(sampler_of):
    """After it load() is needed, for the folder's weights, too."""
    hf = build(MODELS["qwen2"])
    sampler = sampler_of(hf)
    sampler.load(hf, 0)
    weights = weakref.ref(sampler.decoder.embedding)
    sampler.sleep()
    assert weights() is None
    for stamp in (0, sampler.model):
        with pytest.raises(StaleWeights, match="stamped None, not"):
            sampler.generate([[5]], [0], 1.0, 4, stamp)
    sampler.load(hf, 1)
    assert sampler.generate([[5]], [0], 1.0, 4, 1)


SLIDING = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=0)
DYNAMIC = Qwen2Config(**SHAPE, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))  # depends on the length


@pytest.mark.parametrize("config", [GemmaConfig(**SHAPE), MistralConfig(**SHAPE, sliding_window=16), SLIDING,
                                    LlamaConfig(**SHAPE, hidden_act="gelu"), DYNAMIC])  # fmt: skip
def test_what_it_does_not_compute_is_refused(config):
    with pytest.raises(UserError, match="the torch sampler computes llama, mistral, qwen2, qwen3 .* install vLLM"):
        Decoder(config)
