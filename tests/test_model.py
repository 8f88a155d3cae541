import functools
import inspect
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import BASE, build_mixture, packed
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, Qwen2Config

import data
import model
from configurator import UserError
from data import Rollout, pack
from model import ask_teacher, load_policy, mean_entropies
from rollout import as_named
from runtime.tensors import read_parameter, tensor_files


def traces(problems, n=6):
    """The first n problems' traces as rollouts."""
    whole = lambda p, ids: Rollout(p.id, p.prompt_ids, ids, source="teacher", n_teacher_tokens=len(ids))
    return [whole(p, p.teacher[0]) for p in problems[:n]]


def own(prompt_ids, response_ids):
    return Rollout(0, prompt_ids, response_ids, sampler_logps=[0.0] * len(response_ids))


def test_packed_equals_unpacked(policy, problems):
    """Log-probs, entropies and gradients equal those of each sequence alone, from transformers' own forward."""
    rollouts = traces(problems)
    logp, entropy = policy(pack(rollouts))
    (logp.sum() + entropy.sum()).backward()
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    want_logp, want_entropy = [], []
    for r in rollouts:
        ids = torch.tensor([r.prompt_ids + r.response_ids])
        logprobs = plain(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        n = len(r.prompt_ids)
        want_logp += [torch.zeros(n), logprobs[n - 1 :].gather(-1, ids[0, n:, None])[:, 0]]
        want_entropy += [torch.zeros(n), -(logprobs.exp() * logprobs).sum(-1)[n - 1 :]]
    want_logp, want_entropy = torch.cat(want_logp), torch.cat(want_entropy)
    (want_logp.sum() + want_entropy.sum()).backward()
    torch.testing.assert_close(logp, want_logp, rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy, want_entropy, rtol=0, atol=2e-5)
    for (name, p), q in zip(policy.hf.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernels need a GPU")
@pytest.mark.parametrize("kernel", ["FA2", "FA3", "FA4"])
def test_kernels_equal_sdpa(problems, kernel):
    """Each installed kernel gives the log-probs and gradients of packed_sdpa, to bfloat16's precision."""
    if kernel != "FA2":
        try:
            torch.nn.attention.activate_flash_attention_impl(kernel)
        except Exception as e:
            pytest.skip(f"{kernel} is not installed: {e}")
    batch, results = pack(groups(problems)).to("cuda"), []
    for name in ("packed_sdpa", "packed_varlen"):
        policy = load_policy(BASE, dtype=torch.bfloat16, device="cuda")
        policy.hf.set_attn_implementation(name)
        logp, _ = policy(batch)
        logp.sum().backward()
        results.append((logp.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])))
    (logp, grad), (want_logp, want_grad) = results[1], results[0]
    assert (logp - want_logp).abs().mean() < 0.05
    assert torch.nn.functional.cosine_similarity(grad, want_grad, dim=0) > 0.99


def groups(problems):
    """Several responses to some of the prompts, not side by side."""
    rollouts = traces(problems)
    return [*rollouts[:2], *(own(r.prompt_ids, r.response_ids[3:]) for r in rollouts[:3]), *rollouts[:4]]


def run_backward(policy, batch):
    weights = torch.linspace(0.5, 1.5, batch.loss_mask.numel())
    policy.zero_grad()
    logp, entropy = policy(batch)
    ((logp + 0.3 * entropy) * weights).sum().backward()
    return [logp, entropy, *(p.grad.clone() for p in policy.parameters())]


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * (1 + b.abs().max().item()))


def test_a_shared_prompt_is_computed_once(policy, problems, monkeypatch):
    """The result is the same as when it is computed for each sequence."""
    batch, seen, forward = pack(groups(problems)), [], policy.hf.get_decoder().forward

    def counted(**options):
        seen.append(options["input_ids"].numel())
        return forward(**options)

    monkeypatch.setattr(policy.hf.get_decoder(), "forward", counted)
    found = run_backward(policy, batch)
    assert pack(traces(problems)).packing["where"] is None
    monkeypatch.setattr(data, "pays_to_share", lambda n_saved, n: False)
    assert_same(found, run_backward(policy, pack(groups(problems))))
    n_responses = sum(len(r.response_ids) for r in groups(problems))
    prompts = {tuple(r.prompt_ids) for r in groups(problems)}
    assert seen == [n_responses + sum(map(len, prompts)), batch.input_ids.numel()] and len(prompts) == 4


# What torch's flash kernel computes, a sequence at a time, as an operator that the compiler does not look into, like that one.
# H queries' heads share H_kv heads of keys; a causal mask is aligned at a sequence's end.


def attend(q, k, v, cu_q, cu_k, scale):
    """For each sequence its slices of queries and keys, and q, k, v and attention weights as (H_kv, H / H_kv, length, ...)."""
    groups = q.size(1) // k.size(1)
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        x = q[a:b].transpose(0, 1).unflatten(0, (-1, groups))
        y, z = (t[c:d].transpose(0, 1)[:, None] for t in (k, v))
        future = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
        yield slice(a, b), slice(c, d), x, y, z, (scale * x @ y.mT).masked_fill(future, -torch.inf).softmax(-1)


@torch.library.custom_op("tests::varlen", mutates_args=())
def varlen_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int,
              max_k: int, scale: float) -> torch.Tensor:  # fmt: skip
    assert len(q) == cu_q[-1] and len(k) == len(v) == cu_k[-1]
    assert (cu_q.diff().max(), cu_k.diff().max()) == (max_q, max_k)
    out = torch.empty(q.shape)
    for queries, _, _, _, z, p in attend(q, k, v, cu_q, cu_k, scale):
        out[queries] = (p @ z).flatten(0, 1).transpose(0, 1)
    return out


@torch.library.custom_op("tests::varlen_backward", mutates_args=())
def varlen_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor,
                    cu_k: torch.Tensor, max_q: int, max_k: int, scale: float) -> list[torch.Tensor]:  # fmt: skip
    found = [torch.empty(x.shape) for x in (q, k, v)]
    for queries, keys, x, y, z, p in attend(q, k, v, cu_q, cu_k, scale):
        g = grad[queries].transpose(0, 1).unflatten(0, x.shape[:2])
        slope = p * (g @ z.mT - (g * (p @ z)).sum(-1, keepdim=True)) * scale
        found[0][queries] = (slope @ y).flatten(0, 1).transpose(0, 1)
        found[1][keys], found[2][keys] = (t.sum(1).transpose(0, 1) for t in (slope.mT @ x, p.mT @ g))
    return found


varlen_op.register_fake(lambda q, *rest: q.new_empty(q.shape))
varlen_backward.register_fake(lambda grad, *inputs: [x.new_empty(x.shape) for x in inputs[:3]])


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


varlen_op.register_autograd(
    lambda ctx, grad: (*varlen_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.rest), *[None] * 5),
    setup_context=keep_for_backward,
)


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    assert window_size == (-1, 0) and enable_gqa is True
    return varlen_op(q, k, v, cu_q, cu_k, max_q, max_k, scale)


def test_the_kernel_gets_what_it_wants(policy, problems, monkeypatch):
    """packed_varlen with shared prompts and without."""
    monkeypatch.setattr(model, "varlen_attn", varlen)
    for batch in (pack(groups(problems)), pack(traces(problems))):
        wanted = run_backward(policy, batch)
        policy.hf.set_attn_implementation("packed_varlen")
        assert_same(run_backward(policy, batch), wanted)
        policy.hf.set_attn_implementation("packed_sdpa")


def test_a_flash_kernel_that_is_not_installed(monkeypatch):
    """auto does without; one that is named must be there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert model.use_flash_kernel("auto") == model.use_flash_kernel("FA2") == "FA2"
    with pytest.raises(UserError, match="flash_kernel=FA3 does not load: .*: set flash_kernel=auto"):
        model.use_flash_kernel("FA3")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["packed_sdpa", "packed_varlen"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_are_the_plain_ones(problems, monkeypatch, backend, recompute):
    """Over batches of other lengths, with shared prompts and without, with gradients and without: few graphs, none broken."""
    monkeypatch.setattr(model, "varlen_attn", varlen)
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    plain, compiled = (load_policy(BASE, recompute=recompute, compiled=how) for how in (False, True))
    for policy in (plain, compiled):
        policy.hf.set_attn_implementation(backend)
    torch._dynamo.reset()
    cut = lambda n, m: [own(r.prompt_ids, r.response_ids[:m]) for r in groups(problems)[:n]]
    for rollouts in (groups(problems), traces(problems), cut(5, 3), traces(problems, 1), cut(7, 9), [], traces(problems, 3)):
        batch = pack(rollouts)
        assert_same(run_backward(compiled, batch), run_backward(plain, batch))
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch)[0], plain(batch)[0], rtol=1e-4, atol=1e-4)
    assert 1 < counter.frame_count <= 8


def test_repeated_keys_have_the_gradient_of_a_plain_pick(problems):
    """And in bfloat16 the copies' gradients are summed in fp32: one rounding, not one per copy."""
    packing = pack(groups(problems)).packing
    named = [packing[name] for name in ("where", "computed", "copied", "copies")]
    x = torch.randn(len(packing["computed"]), 2, 3, requires_grad=True)
    weigh = torch.randn(len(packing["where"]), 2, 3)
    grads = [torch.autograd.grad((y * weigh).sum(), x)[0] for y in (x[packing["where"]], model.Repeat.apply(x, *named))]
    torch.testing.assert_close(*grads)
    low = weigh.bfloat16()
    (found,) = torch.autograd.grad((model.Repeat.apply(h := x.bfloat16(), *named) * low).float().sum(), h)
    assert torch.equal(found, torch.zeros_like(x).index_add(0, packing["where"], low.float()).bfloat16())


def test_packed_sequences_do_not_see_each_other(policy, problems):
    first, second, third = traces(problems, 3)
    with torch.no_grad():
        before, _ = policy(pack([first, second, third]))
        after, _ = policy(pack([first, own([6, 7, 8], [5] * 20), third]))
    n0, n2 = (len(r.prompt_ids) + len(r.response_ids) for r in (first, third))
    torch.testing.assert_close(after[:n0], before[:n0])
    torch.testing.assert_close(after[-n2:], before[-n2:])


def test_chunks_and_dummy(policy, problems, monkeypatch):
    batch = pack(traces(problems))
    whole, _ = policy(batch)
    monkeypatch.setattr(model, "chunk_of", lambda hidden, weight: 7)
    logp, _ = policy(batch)
    torch.testing.assert_close(logp, whole)
    nothing, _ = policy(pack([]))  # a rank without sequences: a loss of zero, and a gradient for every parameter
    nothing.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_a_chunk_fits_where_it_is_computed():
    """On a CPU an eighth of a GPU's chunk, whatever the vocabulary; more where the logits stay within 4 MiB."""
    on_cpu = torch.zeros(1)
    for vocabulary, n in ((151_936, 256), (4096, 256), (64, 16384)):
        assert model.chunk_of(on_cpu, torch.empty(vocabulary, 0)) == n
    assert model.chunk_of(SimpleNamespace(is_cuda=True), torch.empty(64, 0)) == 2048


@pytest.mark.parametrize("how", ["logp", "entropy", "both"])
def test_the_heads_gradient_is_the_finite_difference(monkeypatch, how):
    """In double precision, over several chunks, for several targets per token."""
    monkeypatch.setattr(model, "chunk_of", lambda hidden, weight: 2)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in ((5, 3), (11, 3)))
    targets = torch.randint(0, 11, (5, 2), generator=g)
    take = {"logp": slice(0, 2), "entropy": slice(2, 3), "both": slice(0, 3)}[how]
    torch.autograd.gradcheck(lambda h, w: model.Head.apply(h, w, targets)[:, take], (hidden, weight))


def head_and_reference(dtype, n, device, d=24, vocabulary=1003):
    """The head in a dtype and plain torch in float64 from the same numbers, two targets per token: results, gradients of
    hidden and weight, for each. Among the rows: the last column as target, a target twice, one that is nearly certain."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g) for shape in ((n, d), (vocabulary, d)))
    targets = torch.randint(0, vocabulary, (n, 2), generator=g)
    targets[0], targets[1] = vocabulary - 1, targets[1, 0]
    hidden[2] = weight[targets[2, 0]]
    weigh = torch.randn(n, 3, generator=g)
    found = []
    for number, head in ((dtype, model.Head.apply), (torch.float64, plain_head)):
        h, w = (x.to(dtype).to(number).to(device).detach().requires_grad_() for x in (hidden, weight))
        out = head(h, w, targets.to(device))
        (out * weigh.to(out)).sum().backward()
        found.append([x.double().cpu() for x in (out.detach(), h.grad, w.grad)])
    assert found[1][0][2, 0] > -0.05  # it is nearly certain
    return found


def plain_head(hidden, weight, targets):
    logp = (hidden @ weight.T).log_softmax(-1)
    return torch.cat([logp.gather(-1, targets), -(logp.exp() * logp).sum(-1, keepdim=True)], -1)


# bfloat16 has 8 bits: a logit of 32 to 64 is rounded by at most 0.125, and a gradient then by some per cent.
BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (2e-5, 1e-5), torch.bfloat16: (0.13, 0.02)}


def check_head(dtype, n=70, device="cpu"):
    """Log-probs and entropies within an absolute bound, gradients within a relative one."""
    (out, *grads), (want, *want_grads) = head_and_reference(dtype, n, device)
    absolute, relative = BOUNDS[dtype]
    torch.testing.assert_close(out, want, rtol=0, atol=absolute)
    for found, wanted in zip(grads, want_grads, strict=True):
        assert (found - wanted).norm() <= relative * wanted.norm()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("chunk", [7, 70, 100])
def test_the_head_is_the_plain_computation(monkeypatch, dtype, chunk):
    """Whatever the chunk."""
    monkeypatch.setattr(model, "chunk_of", lambda hidden, weight: chunk)
    check_head(dtype)


def test_a_certain_tokens_gradient_is_not_lost_to_rounding():
    """Near p = 1 a target's two parts, 1 and -p, cancel: in bfloat16 they are summed before they are rounded."""
    hidden, targets = torch.tensor([[8.0]], dtype=torch.bfloat16), torch.tensor([[0]])
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    model.Head.apply(hidden, weight, targets)[0, 0].backward()
    p = torch.tensor(8.0).sigmoid()  # 0.99966, which is 1 in bfloat16
    torch.testing.assert_close(weight.grad[:, 0].float(), 8 * torch.stack([1 - p, p - 1]), rtol=0.01, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_on_a_gpu_is_the_plain_computation(monkeypatch, dtype):
    monkeypatch.setattr(model, "chunk_of", lambda hidden, weight: 32)
    check_head(dtype, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_head_is_the_plain_computation(monkeypatch, dtype):
    """What a GPU runs, compiled here for the CPU: several chunks, of which the last is shorter, in few variants."""
    for name in ("statistics", "to_slope"):
        plain = getattr(model, name)
        monkeypatch.setattr(model, name, torch.compile(inspect.getclosurevars(plain).nonlocals["function"]))
    monkeypatch.setattr(model, "chunk_of", lambda hidden, weight: 32)
    torch._dynamo.reset()
    check_head(dtype)
    for n in (40, 50, 33, 61):
        check_head(dtype, n)
    assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(inspect.getclosurevars(plain).nonlocals["function"])) <= 3


@pytest.mark.parametrize("tied", [False, True])
def test_chunked_head_is_the_full_head_at_a_real_vocabulary(monkeypatch, tied):
    """151,936 tokens, chunks of 7: log-probs, entropies and every gradient equal those from the whole logits."""
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="packed_sdpa", dtype=torch.float32)
    policy = model.Policy(hf, temperature=0.7)
    ids = torch.randint(2, 151_936, (20,)).tolist()
    batch = pack([own(ids[:3], ids[3:])])
    monkeypatch.setattr(model, "chunk_of", lambda hidden, weight: 7)
    logp, entropy = policy(batch)
    (logp.sum() - 0.3 * entropy.sum()).backward()
    grads = {n: p.grad.clone() for n, p in hf.named_parameters()}
    hf.zero_grad()
    hidden = hf.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False,
                      packing=batch.packing).last_hidden_state[0]  # fmt: skip
    logprobs = (hf.lm_head(hidden[2:-1]).double() / 0.7).log_softmax(-1)
    want = logprobs.gather(-1, batch.input_ids[0, 3:, None])[:, 0]
    want_entropy = -(logprobs.exp() * logprobs).sum(-1)
    (want.sum() - 0.3 * want_entropy.sum()).backward()
    torch.testing.assert_close(logp[3:].double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy[3:].double(), want_entropy, rtol=0, atol=1e-5)
    for name, p in hf.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-5)


def test_recomputation_changes_nothing(problems):
    batch = pack(traces(problems))
    grads = []
    for recompute in (False, True):
        policy = load_policy(BASE, recompute=recompute)
        logp, entropy = policy(batch)
        (logp.sum() + entropy.sum()).backward()
        grads.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_temperature_divides_the_logits(problems):
    batch = pack(traces(problems, 2))
    with torch.no_grad():
        hot, _ = load_policy(BASE, temperature=2.0)(batch)
        plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        (r,) = traces(problems, 1)
        ids, n = torch.tensor([r.prompt_ids + r.response_ids]), len(r.prompt_ids)
        want = (plain(ids).logits[0, :-1] / 2).log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(hot[n : ids.size(1)], want[n - 1 :], rtol=0, atol=2e-5)


def test_bfloat16_is_what_it_says(policy, problems):
    """Products in bfloat16 are close to the fp32 result, but not equal. Log-probs and weights stay in fp32."""
    batch = pack(traces(problems))
    half = load_policy(BASE, dtype=torch.bfloat16)
    with torch.no_grad():
        (a, _), (b, _) = policy(batch), half(batch)
    assert b.dtype == torch.float32 and all(p.dtype == torch.float32 for p in half.parameters())
    gap = (a - b).abs()[batch.loss_mask]
    assert 1e-4 < gap.mean() < 0.1


def test_mean_entropies(policy, problems):
    """The mean over each response, not the sum, in the order of the request, however the rollouts are cut."""
    rollouts, want = [own(p.prompt_ids, p.teacher[0][: 5 + 4 * i]) for i, p in enumerate(problems[:5])], []
    for r in rollouts:
        with torch.no_grad():
            _, entropy = policy(pack([r]))
        want.append(entropy.sum().item() / len(r.response_ids))
    for micro_tokens in (110, 10_000):
        assert mean_entropies(policy, rollouts, micro_tokens) == pytest.approx(want, abs=1e-5)


def test_a_teachers_choices_that_the_policy_lacks_count_as_none():
    """Its vocabulary may be padded. It is moved to where the batch is for as long as it is asked."""
    places = []
    teacher = SimpleNamespace(to=places.append, judge=lambda batch: (torch.full((3,), -0.5), torch.tensor([2, 20, 21])))
    batch, other = packed(3), packed(3)
    ask_teacher(teacher, [batch], want_top1=True, n_tokens=21, offload=False)
    assert batch.top1.tolist() == [2, 20, -1] and batch.teacher_logp.tolist() == [-0.5] * 3 and places == []
    ask_teacher(teacher, [other], want_top1=False, n_tokens=21, offload=True)
    assert other.top1 is None and other.teacher_logp.tolist() == [-0.5] * 3 and places == [torch.device("cpu"), "cpu"]


def test_experts_are_read_one_by_one(tmp_path):
    """Files have each expert by itself, a model stacks them. Under FSDP the parameters are read by read_parameter."""
    folder = build_mixture(tmp_path, vocab_size=16)
    want, files = dict(load_policy(str(folder), frozen=True).hf.named_parameters()), tensor_files(str(folder))
    experts = "model.layers.0.mlp.experts."
    assert f"{experts}gate_up_proj" not in files and want[f"{experts}gate_up_proj"].shape == (4, 32, 32)
    for name, parameter in want.items():
        read_parameter(files, name, found := torch.empty_like(parameter))
        assert torch.equal(found, parameter), name
    lacking = {name: file for name, file in files.items() if name != f"{experts}3.up_proj.weight"}
    with pytest.raises(OSError, match="its weights lack model.layers.0.mlp.experts.3.up_proj.weight"):
        read_parameter(lacking, f"{experts}gate_up_proj", torch.empty(4, 32, 32))
    with pytest.raises(OSError, match=r"experts.0.down_proj.weight is \[32, 16\] in the file, \[32, 8\] by config.json"):
        read_parameter(files, f"{experts}down_proj", torch.empty(4, 32, 8))
    with pytest.raises(OSError, match=r"its weights lack model.more.weight: files of this kind .* \(--shard=ddp\)"):
        read_parameter(files, "model.more.weight", torch.empty(1))


def test_bad_models(tmp_path):
    with pytest.raises(UserError, match="no causal LM"):
        load_policy(str(tmp_path / "nowhere"))
    tensors = load_file(os.path.join(BASE, "model.safetensors"))
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    shutil.copytree(BASE, tmp_path / "short")
    save_file(tensors, tmp_path / "short" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lack 1 tensor.*layers.1.mlp.up_proj"):  # transformers would fill it at random
        load_policy(str(tmp_path / "short"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="no causal LM"):
        load_policy(str(tmp_path))


def rewrite(folder, *parts, index=None):
    """Write weights in several files, with an index; by default a right one."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for i, part in enumerate(parts):
        save_file(part, folder / f"{i}.safetensors", {"format": "pt"})
    index = index or {name: f"{i}.safetensors" for i, part in enumerate(parts) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda f, t: rewrite(f, t, index=dict.fromkeys(t, "gone.safetensors")),
            "index.json names gone.safetensors, which is no",
        ),
        (
            lambda f, t: rewrite(f, t, index=dict.fromkeys(t, "../x.safetensors")),
            "index.json names ../x.safetensors, which is no",
        ),
        (lambda f, t: rewrite(f, t, index=dict.fromkeys([*t, "more"], "0.safetensors")), "more is in no file"),
        (lambda f, t: rewrite(f, t, index=dict.fromkeys([*t][1:], "0.safetensors")), "is in 0.safetensors, and in no file by"),
        (lambda f, t: rewrite(f, t, dict([*t.items()][:1])), "is in 0.safetensors and in 1.safetensors"),
        (lambda f, t: rewrite(f, t, index={"a": 5}), "index.json is no index of weights"),
        (lambda f, t: os.truncate(f / "model.safetensors", 5000), "model.safetensors is no whole safetensors file"),
        (
            lambda f, t: save_file({**t, "model.norm.weight": torch.ones(1)}, f / "model.safetensors"),
            r"norm.weight is \[1\] in",
        ),
        (
            lambda f, t: save_file({**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1}, f / "model.safetensors"),
            "head of",
        ),
    ],
)
def test_weights_that_contradict_themselves(byte_model, tmp_path, change, words):
    """DDP, FSDP and vLLM would each read them in another way. All three ask tensor_files; FSDP also read_rows_of."""
    shutil.copytree(byte_model, tmp_path / "m")
    change(tmp_path / "m", load_file(tmp_path / "m" / "model.safetensors"))
    with pytest.raises(UserError, match=f"no causal LM loads from model .*{words}"):
        load_policy(str(tmp_path / "m"))


def test_only_named_weights_are_read(byte_model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(byte_model, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: torch.zeros_like(t) for n, t in tensors.items()}, folder / "zzz.safetensors")
    assert set(tensor_files(str(folder)).values()) == {str(folder / "model.safetensors")}
    with as_named(str(folder)) as seen:  # what vLLM gets
        assert "model.safetensors" in os.listdir(seen) and "zzz.safetensors" not in os.listdir(seen)
    halves = [dict([*tensors.items()][i::2]) for i in (0, 1)]
    rewrite(folder, *halves)
    assert {os.path.basename(f) for f in tensor_files(str(folder)).values()} == {"0.safetensors", "1.safetensors"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})  # transformers prefers it to the index, vLLM does not
    assert set(tensor_files(str(folder)).values()) == {str(folder / "model.safetensors")}
    with as_named(str(folder)) as seen:
        assert not [name for name in os.listdir(seen) if "index" in name or name[0].isdigit()]
    (folder / "model.safetensors").rename(folder / "named.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "named.safetensors"}))
    assert set(tensor_files(str(folder)).values()) == {str(folder / "named.safetensors")}
    load_policy(str(folder))
