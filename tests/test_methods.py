"""Each estimator's expected gradient, by enumeration: a tabular policy of three tokens and two steps, every sequence
weighted by its probability. And every overlay, run."""

import glob
import itertools
import json
import os
import random
import re

import build
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_data import a_row, write
from test_plan import QWEN_05B, QWEN_7B
from test_train import launch, run

from configurator import ROOT, UserError
from data import Packed, check_same_tokens, load_tokenizer
from loss import batch_loss, token_loss
from model import load_policy

V = 3
SEQUENCES = list(itertools.product(range(V), repeat=2))


def table(seed):
    """Logits of four states: the start, and after each first token."""
    return torch.randn(V + 1, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(y):
    return torch.tensor([0, 1 + y[0]])


def packed(y, advantage=0.0, **fields):
    """The sequence alone, as batch_loss sees it: two response tokens."""
    fill = lambda x: torch.full((2,), float(x), dtype=torch.float64)
    return Packed(torch.tensor([y]), None, None, torch.tensor([True, True]), torch.tensor([False, False]), fill(advantage),
                  fields.pop("sampler_logp", fill(float("nan"))), **fields)  # fmt: skip


def expected_gradient(theta, loss, behaviour=None):
    """sum over sequences of probability x gradient of loss(y, logp, entropy, logprobs of both states)."""
    theta = theta.clone().requires_grad_(True)
    total = 0
    for y in SEQUENCES:
        rows = theta.log_softmax(-1)[states(y)]
        logp = rows[torch.arange(2), list(y)]
        sampler = (theta if behaviour is None else behaviour).detach().log_softmax(-1)
        p = sampler[states(y)][torch.arange(2), list(y)].sum().exp()
        total = total + p * loss(y, logp, -(rows.exp() * rows).sum(-1), rows)
    return torch.autograd.grad(total, theta)[0]


def gradient_over_states(theta, f):
    """Gradient of the sum over states of their (fixed) visiting probability x f(log-probs there, state)."""
    theta = theta.clone().requires_grad_(True)
    logprobs = theta.log_softmax(-1)
    visits = torch.cat([torch.ones(1), logprobs[0].exp().detach()])
    total = sum(v * f(logprobs[s], s) for s, v in enumerate(visits))
    return torch.autograd.grad(total, theta)[0]


THETA, TEACHER = table(0), table(1)
T_LOGPROBS = TEACHER.log_softmax(-1)


def test_policy_term_is_the_policy_gradient():
    reward = {y: float(y[0] + 2 * y[1] == 4) for y in SEQUENCES}
    got = expected_gradient(
        THETA, lambda y, logp, h, _: batch_loss(logp, h, None, packed(y, reward[y]), (2, 0), loss_constant=1.0)
    )
    theta = THETA.clone().requires_grad_(True)
    logprobs = theta.log_softmax(-1)
    value = sum(r * (logprobs[0, y[0]] + logprobs[1 + y[0], y[1]]).exp() for y, r in reward.items())
    torch.testing.assert_close(got, -torch.autograd.grad(value, theta)[0])


def kl_term(y, logp, h, _):
    teacher_logp = T_LOGPROBS[states(y)][torch.arange(2), list(y)]
    return batch_loss(logp, h, None, packed(y, teacher_logp=teacher_logp), (2, 0), policy_coef=0.0, kl_coef=2.0)


def test_kl_term_is_reverse_kl():
    """The k2 estimate's gradient, over the policy's own samples, is that of KL(pi || pi_T) in each state."""
    want = gradient_over_states(THETA, lambda logprobs, s: (logprobs.exp() * (logprobs - T_LOGPROBS[s])).sum())
    torch.testing.assert_close(expected_gradient(THETA, kl_term), want)  # kl_coef 2 over 2 tokens


def test_kl_by_its_value_would_teach_nothing():
    """Why not k1, log p - log p_T: its gradient does not know the teacher, and is zero on average."""
    k1 = lambda y, logp, h, _: (logp - T_LOGPROBS[states(y)][torch.arange(2), list(y)]).sum()
    torch.testing.assert_close(expected_gradient(THETA, k1), torch.zeros(V + 1, V, dtype=torch.float64))


def test_kl_term_has_the_right_sign():
    """A step against its gradient brings the policy nearer to the teacher; the released KDRL goes away from it."""
    kl = lambda theta: (theta.softmax(-1) * (theta.log_softmax(-1) - T_LOGPROBS)).sum(-1)
    after = THETA - 0.1 * expected_gradient(THETA, kl_term)
    assert (kl(after) < kl(THETA)).all()


def ce_term(y, logp, h, rows):
    top1 = T_LOGPROBS[states(y)].argmax(-1)
    return batch_loss(logp, h, rows[torch.arange(2), top1], packed(y, top1=top1), (2, 0), policy_coef=0.0, ce_coef=2.0)


def test_ce_term_is_cross_entropy_along_own_samples():
    want = gradient_over_states(THETA, lambda logprobs, s: -logprobs[T_LOGPROBS[s].argmax()])
    got = expected_gradient(THETA, ce_term)
    torch.testing.assert_close(got, want)
    after = (THETA - 0.1 * got).log_softmax(-1)
    first = T_LOGPROBS.argmax(-1)
    assert (after.gather(-1, first[:, None]) > THETA.log_softmax(-1).gather(-1, first[:, None])).all()


def test_tokens_without_a_first_choice_count_for_nothing():
    y = (1, 2)
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    loss = lambda top1: batch_loss(logp, -logp, logp, packed(y, top1=torch.tensor(top1)), (2, 0), policy_coef=0.0, ce_coef=1.0)
    assert loss([-1, -1]) == 0 and loss([0, -1]) == 0.5 and loss([0, 0]) == 1.5


def test_a_probability_is_no_advantage():
    """The released tipo_adv adds pi(y*) to the advantage: a baseline, with no expected effect. 1[y = y*] has one."""
    first = T_LOGPROBS.argmax(-1)

    def with_advantage(advantage):
        return lambda y, logp, h, rows: token_loss(
            logp, logp.detach(), advantage(y, rows), torch.zeros(2, dtype=torch.bool)
        ).sum()

    as_released = with_advantage(lambda y, rows: rows.detach().exp()[torch.arange(2), first[states(y)]])
    torch.testing.assert_close(expected_gradient(THETA, as_released), torch.zeros(V + 1, V, dtype=torch.float64))
    indicator = with_advantage(lambda y, rows: (torch.tensor(y) == first[states(y)]).double())
    want = gradient_over_states(THETA, lambda logprobs, s: -logprobs[first[s]].exp())
    torch.testing.assert_close(expected_gradient(THETA, indicator), want)


def test_entropy_and_sft_terms():
    got = expected_gradient(
        THETA, lambda y, logp, h, _: batch_loss(logp, h, None, packed(y), (2, 0), policy_coef=0.0, entropy_coef=2.0)
    )
    torch.testing.assert_close(got, gradient_over_states(THETA, lambda logprobs, s: (logprobs.exp() * logprobs).sum()))
    logp, teacher = torch.tensor([-1.0, -2.0], dtype=torch.float64), packed((0, 1), advantage=1.0)
    teacher.is_teacher = torch.tensor([True, True])
    assert batch_loss(logp, -logp, None, teacher, (2, 2), sft_coef=0.5) == 0.75  # and nothing is left of the policy term


def test_truncated_importance_sampling():
    """Samples of another policy, one step each: weighed by pi_old / pi_sampler the gradient is the on-policy one, until
    the cap cuts the weights."""
    sampler = table(2)
    reward = lambda y: float(y[0] == 1)

    def loss(cap):
        def one(y, logp, h, rows):
            sampler_logp = sampler.log_softmax(-1)[states(y)][torch.arange(2), list(y)]
            batch = packed(y, reward(y), sampler_logp=sampler_logp)
            batch.loss_mask = torch.tensor([True, False])
            return batch_loss(logp, h, None, batch, (1, 0), loss_constant=1.0, tis_cap=cap)

        return one

    on_policy = expected_gradient(THETA, loss(0.0))
    torch.testing.assert_close(expected_gradient(THETA, loss(1e9), sampler), on_policy)
    assert not torch.allclose(expected_gradient(THETA, loss(0.0), sampler), on_policy)
    w = (THETA.log_softmax(-1) - sampler.log_softmax(-1))[0, 1].exp()
    torch.testing.assert_close(expected_gradient(THETA, loss(w.item() / 2), sampler), on_policy / 2)


def test_replayed_tokens_weigh_by_their_ratio():
    """ExGRPO: f(w), w = pi / pi_then: at w = 1 a gradient of gamma / (1 + gamma)^2 = 0.0826, a twelfth of a fresh token's."""
    w = torch.tensor([1.0, 0.1, 2.0], dtype=torch.float64)
    then = torch.tensor([-2.0, -1.0, -3.0], dtype=torch.float64)
    logp = (then + w.log()).requires_grad_(True)
    yes = torch.ones(3, dtype=torch.bool)
    token_loss(logp, then, torch.ones(3, dtype=torch.float64), yes, behaviour_logp=then).sum().backward()
    torch.testing.assert_close(-logp.grad, 0.1 * w / (w + 0.1) ** 2)
    assert -logp.grad[0] == pytest.approx(0.0826, abs=1e-4) and -logp.grad[1] == pytest.approx(0.25)


# ---------------------------------------------------------------- the overlays, run

OVERLAYS = sorted(os.path.basename(p)[:-3] for p in glob.glob(os.path.join(ROOT, "config", "method", "*.py")))
WITH_TEACHER = ("rkl", "kdrl", "tgpo")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A teacher model: the toy's base with flatter choices."""
    policy, folder = load_policy("toy/base"), str(tmp_path_factory.mktemp("teacher") / "model")
    with torch.no_grad():
        policy.hf.lm_head.weight.mul_(0.5)
    policy.hf.save_pretrained(folder)
    load_tokenizer("toy/base").save_pretrained(folder)
    return folder


def glossary():
    """The names in README's table of metrics."""
    text = open(os.path.join(ROOT, "README.md")).read().partition("## Metrics\n")[2].partition("\n## ")[0]
    names = {
        name for line in text.splitlines() if line.startswith("| `") for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
    return (names - {"_after"}) | {f"{name}_after" for name in names if name.startswith("memory/")}


def test_the_glossary_names_nothing_else():
    code = "".join(open(os.path.join(ROOT, name)).read() for name in ("train.py", "metrics.py"))
    phases = {f"{kind}/{p}{end}" for p in ("sync", "rollout", "reward", "update") for kind, end in PHASE_METRICS}
    for name in glossary() - phases:
        assert f'"{name}"' in code or name in ("eval/greedy", "eval/avg@k"), name
    assert all(f'begin("{p.split("/")[1]}")' in code for p in phases if p.startswith("time/"))


PHASE_METRICS = (("time", ""), ("memory", ""), ("memory", "_after"))


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_runs(script, tmp_path, name, other_model):
    argv = [f"config/method/{name}.py", "--max_steps=2", *([f"--teacher_model={other_model}"] if name in WITH_TEACHER else [])]
    rows = run(script, tmp_path, name, *argv)
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert {key for row in rows for key in row} <= glossary()
    if name in WITH_TEACHER:
        assert rows[1]["teacher_model/kl"] > 0.01
    if name == "tgpo":
        assert 0 < rows[1]["teacher_model/agrees"] < 1
    if name == "relift":
        assert rows[1]["relift/sft_loss"] > 0 and rows[1]["relift/waiting"] < 16  # the base fails every question
    if name == "exgrpo":
        assert rows[2]["replay/questions"] == 0  # and so nothing starts
    if name == "luffy_partial":
        samples = [json.loads(line) for line in open(tmp_path / name / "rollouts" / "step_2.jsonl")]
        assert not any(s["teacher_tokens"] for s in samples)  # the share has fallen to zero


def test_partial_traces_are_continued(script, tmp_path):
    run(script, tmp_path, "x", "--max_steps=1", "--teacher_share=0.5", "--teacher_share_end=0.5")
    rows = [json.loads(line) for line in open(tmp_path / "x" / "rollouts" / "step_1.jsonl")]
    cut = [r for r in rows if r["teacher_tokens"]]
    assert len(cut) == 16
    for r in cut:
        assert 0 < r["teacher_tokens"] < len(r["response_ids"]) == r["teacher_tokens"] + len(r["sampler_logps"])
        assert r["finish_reason"] in ("stop", "length") and len(r["response_ids"]) <= 40


@pytest.mark.parametrize(
    "argv,words",
    [
        (["config/method/kdrl.py"], "want a teacher model"),
        (["config/method/kdrl.py", "--teacher_model=nowhere"], "there is no model folder"),
        (["--baseline=own", "--n_rollouts=1"], "baseline='own' wants own samples"),
        (["--replay_share=0.5"], "set n_teacher=0"),
        (["--teacher_share=1.5"], "between 0 and 1"),
        (["--lr_schedule=linear"], "choose constant or cosine"),
        (["config/method/sft.py", "--teacher_share=0.5"], "teacher_share below 1 wants the policy to go on"),
        (["config/method/relift.py", "--sft_buffer=5000"], "has only 512 problems with a trace"),
        (["config/method/exgrpo.py", "--sft_buffer=16"], "are two methods"),
        (["--teacher_model=toy/base"], "of no use without kl_coef or ce_coef"),
    ],
)
def test_method_knobs_are_checked(script, tmp_path, argv, words):
    with pytest.raises(UserError, match=words):
        run(script, tmp_path, "bad", *argv)
    assert not (tmp_path / "bad").exists()


def test_teacher_tokenizers_must_agree(tokenizer, byte_model):
    check_same_tokens(tokenizer, load_tokenizer("toy/base"))
    with pytest.raises(UserError, match=r"differs in \d+ of 21 tokens: 0 is '<pad>' to the policy"):
        check_same_tokens(tokenizer, load_tokenizer(byte_model))
    other = load_tokenizer("toy/base")
    other.eos_token = "<think>"
    with pytest.raises(UserError, match=r"ends in '<eos>' \(1\), the teacher model in '<think>'"):
        check_same_tokens(tokenizer, other)


def test_the_learning_rates_schedule(script):
    module = script("train", ["--lr_schedule=cosine", "--warmup_steps=4", "--max_steps=20"])
    factors = [module.schedule(step) for step in range(1, 21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[11] == pytest.approx(0.5) and factors[19] == pytest.approx(0)
    constant = script("train", ["--warmup_steps=0"])
    assert {constant.schedule(step) for step in range(1, 61)} == {1.0}


def test_what_dapo_leaves_out(script):
    from data import Rollout

    groups = [(0, "stop", 0.0), (0, "stop", 0.0), (1, "stop", 1.0), (1, "length", 0.0)]
    rows = [Rollout(q, [i], 0, [], how, reward=r) for i, (q, how, r) in enumerate(groups)]
    kept = lambda *argv: [r.response_ids[0] for r in script("train", list(argv)).worth_training(rows)]
    assert kept() == [0, 1, 2, 3]
    assert kept("--skip_equal_groups=True") == [2, 3]
    assert kept("--skip_equal_groups=True", "--skip_truncated=True") == [2]


@pytest.fixture(scope="module")
def easy_data(tmp_path_factory):
    """Sums of two numbers, which the base knows, so that hot samples are right now and then."""
    rng, rows = random.Random(0), []
    for i in range(64):
        numbers = build.sample_numbers(rng, 2)
        trace = build.response(build.running_totals(numbers), build.add(*numbers))
        rows.append({"data_source": "two", "prompt": [{"role": "user", "content": build.question(numbers)}],
                     "target": [{"role": "assistant", "content": "<think>\n" + trace}], "ability": "math",
                     "reward_model": {"ground_truth": f"{build.add(*numbers):02d}", "style": "rule"},
                     "extra_info": {"index": i, "split": "train"}})  # fmt: skip
    path = str(tmp_path_factory.mktemp("easy") / "two.parquet")
    pq.write_table(pa.Table.from_pylist(rows, build.SCHEMA), path)
    return path


def test_replay_starts_and_fills_half_the_batch(script, tmp_path, easy_data):
    rows = run(script, tmp_path, "x", "config/method/exgrpo.py", f"--data={easy_data}", "--temperature=1.6", "--max_steps=4",
               "--save_interval=4")  # fmt: skip
    assert "reward/replayed" not in rows[1] and rows[1]["replay/questions"] == 0 and rows[1]["reward/own"] > 0.35
    assert rows[2]["replay/questions"] > 4 and "reward/replayed" not in rows[2]  # active now: it stores, and replays next
    assert rows[3]["reward/replayed"] == 1.0  # graded again, and right again
    dumped = [json.loads(line) for line in open(tmp_path / "x" / "rollouts" / "step_3.jsonl")]
    replayed = [r for r in dumped if r["finish_reason"] == "replay"]
    assert len(dumped) == 128 and len({r["problem"] for r in dumped}) == 16 and 4 < len(replayed) <= 8
    earlier = {
        tuple(r["response_ids"]): r
        for n in (1, 2)
        for r in map(json.loads, open(tmp_path / "x" / "rollouts" / f"step_{n}.jsonl"))
    }
    for r in replayed:  # ids and log-probs are those of its own sampling
        assert earlier[tuple(r["response_ids"])]["sampler_logps"] == pytest.approx(r["sampler_logps"], abs=1e-6)
    assert (
        load_file(tmp_path / "x" / "ckpt_4" / "state" / "memory.safetensors")["question"].numel() >= rows[4]["replay/questions"]
    )
    load_policy(str(tmp_path / "x" / "ckpt_4"))  # which the replay's state does not disturb


def test_relift_interleaves(script, tmp_path):
    """Every question of the toy is failed, bar luck: one SFT step for each 16 that wait, with its own optimizer."""
    rows = run(script, tmp_path, "x", "config/method/relift.py", "--max_steps=4")
    fired = ["relift/sft_loss" in r for r in rows[1:]]
    waiting = 0
    for r, f in zip(rows[1:], fired, strict=True):
        waiting += round(16 * r["groups/none_solved"]) - 16 * f
        assert r["relift/waiting"] == waiting and (waiting < 16)
    assert sum(fired) >= 3
    losses = [r["relift/sft_loss"] for r in rows[1:] if "relift/sft_loss" in r]
    assert losses[-1] < losses[0]
    assert load_file(tmp_path / "x" / "ckpt_4" / "state" / "memory.safetensors")["queue"].numel() == waiting


def spied(script, tmp_path, *argv):
    """Run train.py's main and note what each update was called with, and each stamp that the engine took."""
    out = tmp_path / "x"
    module = script("train", ["--sampler=torch", f"--out_dir={out}", "--eval_data=", "--reward_workers=1", *argv])
    calls, stamps, update, sampler = [], [], module.update, module.TorchSampler

    def spy(policy, optimizer, micro_batches, max_norm, terms, safe_point):
        calls.append((id(optimizer), optimizer.param_groups[0]["lr"], max_norm, dict(terms), micro_batches))
        return update(policy, optimizer, micro_batches, max_norm, terms, safe_point)

    class Spy(sampler):
        def load(self, hf, stamp):
            stamps.append(stamp)
            super().load(hf, stamp)

    module.update, module.TorchSampler = spy, Spy
    return module, calls, stamps


def test_relifts_step_is_its_own(script, tmp_path):
    """ReLIFT's SFT step: another AdamW, its own rate, clip and terms; and the engine hears of it."""
    argv = [
        "config/method/relift.py",
        "--max_steps=3",
        "--sft_learning_rate=0.0005",
        "--sft_grad_clip=0.9",
        "--canary_interval=0",
    ]
    module, calls, stamps = spied(script, tmp_path, *argv)
    module.main()
    rl, sft = [c for c in calls if c[3]["policy_coef"]], [c for c in calls if not c[3]["policy_coef"]]
    assert len(rl) == 3 and len(sft) >= 2
    assert {c[0] for c in rl}.isdisjoint(c[0] for c in sft)
    assert all(c[1:3] == (0.0005, 0.9) for c in sft) and all(c[2] == 0.7 for c in rl)
    assert all(c[3] == {"policy_coef": 0.0, "sft_coef": 1.0, "entropy_coef": 1e-4} for c in sft)
    assert all(b.is_teacher[b.loss_mask].all() for c in sft for b in c[4])
    assert stamps[-1] >= 3  # two RL updates and at least one SFT step before the last rollout


def test_tgpos_weight_falls_to_zero(script, tmp_path, other_model):
    argv = ["config/method/tgpo.py", f"--teacher_model={other_model}", "--ce_coef=0.5", "--ce_steps=2", "--max_steps=3"]
    module, calls, _ = spied(script, tmp_path, *argv)
    module.main()
    assert [c[3]["ce_coef"] for c in calls] == [0.5, 0.25, 0.0]
    assert [c[4][0].top1 is None for c in calls] == [False, False, True]  # and then nobody asks the teacher


def test_choices_that_are_no_tokens_count_as_none(script):
    module = script("train", [])

    class Teacher:
        def judge(self, batch):
            return torch.zeros(3), torch.tensor([2, 20, 21])

    batch = packed((0, 1))
    module.ask(Teacher(), [batch], True, 21)
    assert batch.top1.tolist() == [2, 20, -1]
    module.ask(Teacher(), [other := packed((0, 1))], False, 21)
    assert other.top1 is None


def test_mean_entropies(script, policy, problems):
    """The mean, not the sum, over each response, in the order asked, however the pairs are cut."""
    from data import Rollout, pack

    pairs = [(p.prompt_ids, Rollout(p.id, p.teacher[0][: 5 + 4 * i], 0, [], "stop")) for i, p in enumerate(problems[:5])]
    want = []
    for pair in pairs:
        with torch.no_grad():
            _, entropy = policy(pack([pair]))
        want.append(entropy.sum().item() / len(pair[1].response_ids))
    assert script("train", ["--micro_tokens=110"]).mean_entropies(policy, pairs) == pytest.approx(want, abs=1e-5)


def test_replays_are_the_surest_and_never_retired(script, tmp_path, easy_data):
    """Of a question's stored successes the one with the lowest entropy goes into the group; whole batches of different
    questions; replays do not count as successes; retired questions are not served while others are left."""
    module, *_ = spied(script, tmp_path, "config/method/exgrpo.py", f"--data={easy_data}", "--temperature=2.0", "--max_steps=6",
                       "--prompts_per_step=8")  # fmt: skip
    asked, pools, successes = [], [], module.Successes
    module.mean_entropies = lambda policy, pairs: asked.append(pairs) or [(i * 7) % 5 + i / 100 for i in range(len(pairs))]

    class Spy(successes):
        def observe(self, groups):
            assert all(r.finish_reason != "replay" for rows in groups.values() for r in rows)
            pools.append((set(self.retired), set(groups)))
            super().observe(groups)

    module.Successes = Spy
    module.main()
    assert len(asked) >= 3 and any(len(pairs) > 4 for pairs in asked)
    steps = [[json.loads(line) for line in open(tmp_path / "x" / "rollouts" / f"step_{n}.jsonl")] for n in range(1, 7)]
    assert all(len(rows) == 64 and len({r["problem"] for r in rows}) == 8 for rows in steps)
    with_replays = [rows for rows in steps if any(r["finish_reason"] == "replay" for r in rows)]
    for pairs, rows in zip(asked, with_replays, strict=True):
        entropy = [(i * 7) % 5 + i / 100 for i in range(len(pairs))]
        for r in (r for r in rows if r["finish_reason"] == "replay"):
            mine = [i for i, (_, s) in enumerate(pairs) if s.problem == r["problem"]]
            assert pairs[min(mine, key=entropy.__getitem__)][1].response_ids == r["response_ids"]
    assert all(not retired & served for retired, served in pools)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_method_plans_at_7b(script, tmp_path, name, capsys):
    """Each overlay over luffy_7b says what it takes, from config.json files alone, a teacher model's included."""
    for folder, model in (("student", QWEN_7B), ("teacher", QWEN_05B)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(model.to_dict()))
    argv = ["config/luffy_7b.py", f"config/method/{name}.py", "--dry_run=True", f"--model={tmp_path / 'student'}"]
    script("train", argv).main()
    plain = capsys.readouterr().out
    assert "fits in 80 GiB: yes" in plain
    assert ("the teacher model is not counted" in plain) == (name in WITH_TEACHER)
    if name in WITH_TEACHER:
        script("train", [*argv, f"--teacher_model={tmp_path / 'teacher'}"]).main()
        assert "teacher model's weights" in capsys.readouterr().out


def test_several_traces_in_a_group(script, tmp_path):
    """n_teacher = 2: six own samples, both traces of a problem that has two, and the only one of a problem that has one."""
    one = {"content": "<think>\n49>36</think>\\boxed{36}", "role": "assistant"}
    rows = [a_row(target=[one, {**one, "content": "<think>\n36</think>\\boxed{36}"}]), a_row(target=[one])]
    data = write(tmp_path / "two.parquet", [{**r, "reward_model": {"ground_truth": "36", "style": "rule"}} for r in rows])
    run(script, tmp_path, "x", f"--data={data}", "--prompts_per_step=2", "--n_teacher=2", "--max_steps=1")
    dumped = [json.loads(line) for line in open(tmp_path / "x" / "rollouts" / "step_1.jsonl")]
    by_problem = {p: [r["teacher_tokens"] > 0 for r in dumped if r["problem"] == p] for p in (0, 1)}
    assert by_problem == {0: [False] * 6 + [True] * 2, 1: [False] * 7 + [True]}
    group = [r for r in dumped if r["problem"] == 0]
    mean = sum(r["reward"] for r in group) / 8
    assert all(r["advantage"] == pytest.approx(r["reward"] - mean) for r in group)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,more",
    [
        ("relift", []),
        ("exgrpo", ["--data={easy}", "--temperature=1.6"]),
        ("tgpo", ["--teacher_model={other}", "--teacher_offload=True", "--ce_coef=0.5"]),
        ("kdrl", ["--teacher_model={other}", "--kl_coef=0.1"]),
    ],
)
def test_methods_on_two_sharded_ranks(tmp_path, name, more, easy_data, other_model):
    """Buffers, pools and teacher models are the same on one process and on two FSDP2 ranks: so are four steps."""
    argv = [f"config/method/{name}.py", "--max_steps=4", "--sampler=torch", "--eval_data=",
            *(m.format(easy=easy_data, other=other_model) for m in more)]  # fmt: skip
    one = launch(tmp_path, "one", 1, *argv)
    two = launch(tmp_path, "two", 2, *argv, "--shard=fsdp")
    kinds = ("loss", "grad_norm", "reward", "replay", "relift", "teacher_model", "entropy")
    for a, b in zip(one[1:], two[1:], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key.split("/")[0] in kinds:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), (a["step"], key)
