"""Every preset is what it claims to be: the released scripts' values beside ours.

A row is (flag of the released script, its value, our knob, our value, why they differ). A pair as the released value is a
range: the release's own number depends on lengths. K is how many micro-batches a rank has in an optimizer step; the released
losses are summed over them. It is ceil(mean tokens of a sequence / 512), because a rank has 64 sequences and a micro-batch
32,768 tokens. Scripts were read at LUFFY 01f4ae0 (with ExGRPO), TGPO 0a32d6f, ReLIFT eb95454, OpenRLHF 0.8.1, HPT ae332f5,
AMPO 46cf136, DFT 0622902, Trinity-RFT 0414330.
"""

import ast
import glob
import math
import os
import re

import pytest
from helpers import read_config, resolve

from configurator import ROOT

IDLE = "its learning rate is 0 in the first rollout batch; ours begins at once"
LEAK = "the release chooses a checkpoint on the test questions"

LUFFY = [  # what LUFFY's four scripts share, and ReLIFT's and ExGRPO's with them
    ("data.train_batch_size", 128, "prompts_per_step", 128),
    ("train_batch_size / ppo_mini_batch_size", 2, "update_batches", 2),
    ("rollout.n", 8, "n_rollouts", 8),
    ("data.max_prompt_length", 1024, "max_prompt_tokens", 1024),
    ("data.max_response_length", 8192, "max_tokens", 8192),
    ("rollout.max_prefix_len", 8192, "max_teacher_tokens", 8192),
    ("actor.optim.lr", 1e-6, "learning_rate", 1e-6),
    ("optim.lr_scheduler", "constant", "lr_schedule", "constant"),
    ("optim.lr_warmup_steps_ratio", 0, "warmup_steps", 0, IDLE),
    ("AdamW beta1", 0.9, "beta1", 0.9),
    ("AdamW beta2", 0.999, "beta2", 0.999),
    ("AdamW weight_decay", 0.01, "weight_decay", 0.01),
    ("rollout.temperature", 1.0, "temperature", 1.0),
    ("rollout.val_temperature", 0.6, "eval_temperature", 0.6),
    ("rollout.n_val", 1, "eval_k", 1),
    ("actor.use_kl_loss", 0.0, "kl_coef", 0.0),
    ("algorithm.grpo_use_std", False, "use_std", False),
    ("8192 x 8 GPUs (loss_remove_token_mean=True)", 65536.0, "loss_constant", 65536.0),
    ("data.reward_impl_version=3: a thought must close", True, "require_think", True),
    ("data.seed", 47, "seed", 47, "the same number, another generator"),
    ("trainer.test_freq", 10, "eval_interval", 10),
    ("trainer.save_freq", 50, "save_interval", 10, "the steps that a crash may cost"),
    ("data.val_files", "valid.parquet", "eval_data", "", LEAK),
    ("questions held out", 0, "holdout", 256, LEAK),
]  # fmt: skip
NO_STOP = ("trainer.total_epochs=30", 10710, "max_steps", 500, "stopped by hand; the paper says 500")
TRACE = ("rollout.n_prefix=1, prefix_ratio=1.0", 1, "n_teacher", 1)
NO_TRACE = ("rollout.min_prefix_ratio=max_prefix_ratio=0.0", 0, "n_teacher", 0)
SHAPED = [("actor.off_policy_reshape=p_div_p_0.1", "luffy", "shaping", "luffy"), ("the 0.1 in it", 0.1, "gamma", 0.1)]
NO_CLIP = [("actor.loss_remove_clip=True", 0.0, "clip_low", 0.0), ("actor.loss_remove_clip=True", 0.0, "clip_high", 0.0)]
CLIP = [("actor.clip_ratio", 0.2, "clip_low", 0.2), ("actor.clip_ratio", 0.2, "clip_high", 0.2)]
CLIPPED_NORM = ("actor.grad_clip", 1.0, "grad_clip", 1.0)


def entropy(low, high, ours):
    why = "K varies: its middle"
    return ("actor.entropy_coeff=0.001, x K", (0.001 * low, 0.001 * high), "entropy_coef", ours, why)


SFT = [  # OpenRLHF's train_sft, LUFFY's README
    ("--train_batch_size", 64, "prompts_per_step", 64),
    ("--learning_rate", 5e-5, "learning_rate", 5e-5),
    ("--lr_scheduler=cosine_with_min_lr", "cosine", "lr_schedule", "cosine"),
    ("min_lr / learning_rate", 0.1, "lr_floor", 0.1),
    ("--lr_warmup_ratio=0.1: ceil(214.2)", 215, "warmup_steps", 215),
    ("--max_epochs=3: 3 x (45.7k // 64)", 2142, "max_steps", 2142),
    ("--max_norm", 1.0, "grad_clip", 1.0),
    ("rows of a prompt", 1, "n_rollouts", 1),
    ("traces of a prompt", 1, "n_teacher", 1),
    ("weight of the NLL", 1.0, "sft_coef", 1.0),
    ("entropy bonus", 0.0, "entropy_coef", 0.0),
    ("optimizer steps per batch", 1, "update_batches", 1),
    ("--max_len, of prompt and trace", 16384, "max_teacher_tokens", 8192, "no trace of the set is longer"),
    ("questions held out", 0, "holdout", 256, "to choose a checkpoint by; --holdout=0 for exact epochs"),
]
TGPO = [row for row in LUFFY if row[2] not in ("loss_constant", "eval_interval", "kl_coef")] + [
    ("trainer.test_freq", 50, "eval_interval", 10, "own choice; its exp_scripts have 20"),
    ("--steps", 300, "max_steps", 300),
    ("loss_remove_token_mean=False: a token mean", 0.0, "loss_constant", 0.0),
    ("actor.entropy_coeff=0.001, of a token mean like the policy term's", 0.001, "entropy_coef", 0.001),
    ("actor.grad_clip=1.0, of a sum over K = 4 to 11 such means", (1 / 11, 1 / 4), "grad_clip", 0.15, "1 / K"),
    ("data.train_files", "openr1.a3b_correct_35k.parquet", "data", "data/openr1.a3b.parquet", "by prepare.py reanswer"),
]

HPT = [
    *[row for row in LUFFY if row[2] not in ("learning_rate", "n_rollouts", "eval_k")],
    ("actor.optim.lr", 5e-6, "learning_rate", 5e-6),
    ("rollout.n_verify", 8, "n_rollouts", 8),
    ("rollout.n_prefix=1, prefix_ratio=1.0", 1, "n_teacher", 1),
    ("trainer.switch_gate: this many right, or fewer", 0, "teacher_gate", 0),
    ("algorithm.adv_estimator=grpo, over the eight", "group", "baseline", "group"),
    *NO_CLIP,
    CLIPPED_NORM,
    ("actor.max_grad_norm", 80.0, "skip_grad_norm", 80.0),
    entropy(2, 5, 0.003),
    (
        "actor.sft_loss_coef=1.0, x the micro-batches with a trace",
        (0.4, 1.4),
        "sft_coef",
        1.0,
        "min(K, a rank's traces), in one of two updates",
    ),
    ("actor.offline_loss_type", "sft", "sft_shaping", "log", "log is the NLL"),
    ("trainer.total_training_steps", 500, "max_steps", 500),
]
AMPO = [
    *[row for row in LUFFY if row[2] not in ("weight_decay", "loss_constant", "learning_rate")],
    ("actor.optim.lr", 1e-6, "learning_rate", 1e-6),
    ("actor.optim.weight_decay", 0.1, "weight_decay", 0.1),
    ("data.num_off_policy_targets", 2, "n_teacher", 2),
    ("rollout.injection_strategy=adaptive: none is right", 0, "teacher_gate", 0),
    *SHAPED,
    *CLIP,
    ("8192 x 4 GPUs", 32768.0, "loss_constant", 65536.0, "with the entropy's 0.001 x K halved: the same ratio"),
    ("actor.entropy_coeff=0.001, x K / 2", (0.003, 0.0075), "entropy_coef", 0.005, "K is 6 to 15 at 18,432 tokens"),
    ("actor.grad_clip=1.0, of 2 / K of our gradient", (3.0, 7.5), "grad_clip", 5.0, "the same K"),
    ("trainer.total_training_steps", 510, "max_steps", 510),
]
CHORD = [  # Trinity-RFT's examples/mix_chord: its comments have the numbers of both; the learning rate is in a file not read
    ("repeat_times, and a trace", 9, "n_rollouts", 9),
    ("train_batch_size_expert=64 / 32 prompts", 2, "n_teacher", 1, "ours are the prompts' own, and most have one"),
    ("advantage_fn=grpo: of the samples", "own", "baseline", "own"),
    ("advantage_fn=grpo: / std", True, "use_std", True),
    ("clip_range", 0.2, "clip_low", 0.2),
    ("clip_range", 0.2, "clip_high", 0.2),
    ("token means", 0.0, "loss_constant", 0.0),
    ("kl_coef", 0.0, "kl_coef", 0.0),
    ("entropy_coef", 0.0, "entropy_coef", 0.0),
    ("train_batch_size_usual=256 / 8", 32, "prompts_per_step", 32),
    ("ppo_mini_batch_size=320: one update", 1, "update_batches", 1),
    ("mu_warmup_steps", 0, "sft_warmup_steps", 0),
    ("(1 - mu) * grpo + mu * sft", True, "sft_mix", True),
    ("temperature", 1.0, "temperature", 1.0),
    ("ms-swift's example: learning_rate", 1e-6, "learning_rate", 1e-6),
]

PRESETS = {  # {the released script: (our configs, the rows)}
    "LUFFY exp_scripts/train.sh": ("config/luffy_7b.py", [
        *LUFFY, TRACE, *SHAPED, *NO_CLIP, CLIPPED_NORM, entropy(4, 7, 0.005), NO_STOP,
        ("data.train_files", "data/openr1.parquet", "data", "data/openr1.parquet"),
        ("use_sft_multitask_loss=False", 0.0, "sft_coef", 0.0),
    ]),
    "LUFFY exp_scripts/train_on_policy.sh": ("config/grpo_7b.py", [
        *LUFFY, NO_TRACE, *CLIP, CLIPPED_NORM, entropy(2, 5, 0.003), NO_STOP,
    ]),
    "LUFFY exp_scripts/train_on_policy.sh, as an overlay": ("config/luffy_7b.py config/method/grpo.py", [
        *LUFFY, NO_TRACE, *CLIP, CLIPPED_NORM, entropy(2, 5, 0.003), NO_STOP,
    ]),
    "LUFFY exp_scripts/train_on_policy.sh, loss_remove_clip=True": ("config/luffy_7b.py config/method/grpo_noclip.py", [
        *LUFFY, NO_TRACE, *NO_CLIP, CLIPPED_NORM, entropy(2, 5, 0.003), NO_STOP,
    ]),
    "LUFFY exp_scripts/train.sh, no_reshape": ("config/luffy_7b.py config/method/mixed.py", [
        *LUFFY, TRACE, ("actor.off_policy_reshape=no_reshape", "none", "shaping", "none"), *NO_CLIP, CLIPPED_NORM,
        entropy(4, 7, 0.005), NO_STOP,
    ]),
    "LUFFY exp_scripts/train.sh, no_reshape, loss_remove_clip=False": ("config/luffy_7b.py config/method/mixed_clip.py", [
        *LUFFY, TRACE, ("actor.off_policy_reshape=no_reshape", "none", "shaping", "none"), *CLIP, CLIPPED_NORM,
        entropy(4, 7, 0.005), NO_STOP,
    ]),
    "LUFFY exp_scripts/train_rl_sft_loss.sh": ("config/luffy_7b.py config/method/rl_sft_loss.py", [
        *LUFFY, TRACE, *NO_CLIP, CLIPPED_NORM, entropy(3, 11, 0.006), NO_STOP,
        ("algorithm.adv_estimator=grpo_split", "own", "baseline", "own"),
        ("sft_loss_coef=1.0, x the micro-batches with a trace", (2.8, 5.7), "sft_coef", 4.5, "K (1 - (7/8)^(64/K)) at K = 6"),
    ]),
    "LUFFY exp_scripts/train_sft_rl.sh": ("config/grpo_7b.py config/method/sft_then_rl.py", [
        *LUFFY, NO_TRACE, *CLIP, CLIPPED_NORM, entropy(8, 10, 0.008), NO_STOP,
        ("data.train_files", "data/openr1.complement.parquet", "data", "data/openr1.complement.parquet"),
    ]),
    "LUFFY README, OpenRLHF's train_sft": ("config/sft_7b.py config/method/sft_released.py", [
        *SFT,
        ("--micro_train_batch_size=1: a mean of 64 means", True, "sft_per_sequence", True),
        ("--adam_betas", 0.9, "beta1", 0.9),
        ("--adam_betas", 0.95, "beta2", 0.95),
        ("--l2", 0.0, "weight_decay", 0.0),
        ("--seed", 42, "seed", 0, "another generator, so any number"),
    ]),
    "arXiv 2604.23747, SFT": ("config/sft_7b.py", [
        *SFT,
        ("one mean over the batch's tokens", False, "sft_per_sequence", False),
        ("AdamW betas", 0.9, "beta1", 0.9),
        ("AdamW betas", 0.999, "beta2", 0.999),
        ("AdamW weight decay", 0.01, "weight_decay", 0.01),
    ]),
    "arXiv 2604.23747, SFT then RL": ("config/grpo_7b.py config/method/sft_then_rl_corrected.py", [
        *[row for row in LUFFY if row[2] in ("prompts_per_step", "update_batches", "n_rollouts", "max_tokens", "learning_rate",
                                             "temperature", "use_std", "kl_coef", "lr_schedule")],
        ("steps", 500, "max_steps", 500),
        ("traces in a group", 0, "n_teacher", 0),
        ("token-level loss", 0.0, "loss_constant", 0.0),
        ("entropy bonus", 0.0, "entropy_coef", 0.0),
        ("clip", 0.2, "clip_low", 0.2),
        ("clip", 0.28, "clip_high", 0.28),
        ("the prompts of SFT", "data/openr1.parquet", "data", "data/openr1.parquet"),
    ]),
    "ReLIFT examples/math-7b/train.sh": ("config/relift_7b.py", [
        *LUFFY, *NO_CLIP, entropy(2, 8, 0.005),
        ("no trace in a group", 0, "n_teacher", 0),
        ("trainer.total_epochs=3: 1,071, of which one is not taken", 1070, "max_steps", 1070),
        ("actor.grad_clip", 0.7, "grad_clip", 0.7),
        ("sft.sft_data_size", 128, "sft_buffer", 128),
        ("optim.sft.lr", 1e-6, "sft_learning_rate", 1e-6),
        ("sft.sft_grad_clip=1.0, of a gradient / (128 / 4) where a rank has 16 / 4", 8.0, "sft_grad_clip", 8.0),
        ("sft.entropy_coeff", 1e-3, "sft_entropy_coef", 1e-4, "the paper finds 1e-4 best"),
    ]),
    "ReLIFT examples/math-7b/train_rl.sh": ("config/grpo_7b.py --max_steps=1070", [
        *LUFFY, *CLIP, CLIPPED_NORM, entropy(2, 5, 0.003), ("no trace in a group", 0, "n_teacher", 0),
        ("sft.sft_data_size=-1", 0, "sft_buffer", 0),
        ("trainer.total_epochs=3: 1,071, of which one is not taken", 1070, "max_steps", 1070),
    ]),
    "ExGRPO exp_scripts/run_exgrpo.sh": ("config/exgrpo_7b.py", [
        *LUFFY, *SHAPED, CLIPPED_NORM, entropy(2, 5, 0.003),
        ("data.train_files, its traces unused", 0, "n_teacher", 0),
        ("trainer.total_training_steps=701, of which one is not taken", 700, "max_steps", 700),
        ("actor.skip_grad_bound", 500.0, "skip_grad_norm", 500.0),
        ("its run goes on after any number of skipped updates", 0, "max_skipped", 3, "such a run learns nothing"),
        ("trainer.experience_ratio", 0.5, "replay_share", 0.5),
        ("trainer.experience_start_sratio", 0.35, "replay_start", 0.35),
        ("no limit of stored answers", 0, "replay_limit", 8, "memory; the newest are kept"),
        ("clip until replay starts, then none", (0.0, 0.2), "clip_low", 0.0, "one loss from start to end"),
        ("clip until replay starts, then none", (0.0, 0.2), "clip_high", 0.0, "one loss from start to end"),
    ]),
    "TGPO train.sh --algo luffy": ("config/tgpo_7b.py", [*TGPO, TRACE, *SHAPED, *NO_CLIP]),
    "TGPO train.sh --algo tipo_reg": ("config/tgpo_7b.py config/method/tgpo.py", [
        *[row for row in TGPO if row[2] != "use_std"], *CLIP, NO_TRACE,
        ("algorithm.grpo_use_std", True, "use_std", True),
        ("teacher_coef", 0.002, "ce_coef", 0.002),
        ("teacher_coef / teacher_decay (1e-5)", 200, "ce_steps", 200),
    ]),
    "TGPO train.sh --algo tipo_adv": ("config/tgpo_7b.py config/method/tgpo_adv.py", [
        *[row for row in TGPO if row[2] != "use_std"], *CLIP, NO_TRACE,
        ("algorithm.grpo_use_std", True, "use_std", True),
        ("teacher_coef", 0.02, "top1_bonus", 0.02, "pi_old(y*) there has no expected gradient; ours is 1[y = y*] - pi(y*)"),
        ("teacher_coef / teacher_decay (1e-4)", 200, "ce_steps", 200),
    ]),
    "TGPO train.sh --algo kdrl": ("config/tgpo_7b.py config/method/kdrl.py", [
        *[row for row in TGPO if row[2] != "use_std"], *CLIP, NO_TRACE,
        ("algorithm.grpo_use_std", False, "use_std", True, "as in its exp_scripts; --use_std=False is tasks.sh"),
        ("teacher_coef", 0.002, "kl_coef", 0.002, "k2 with the right sign; the release's k1 has no expected gradient"),
    ]),
    "TGPO train.sh --algo rkl": ("config/tgpo_7b.py config/method/rkl.py", [
        *TGPO, NO_TRACE,
        ("no reward", 0.0, "policy_coef", 0.0),
        ("advantage log p_T - log p_old", 1.0, "kl_coef", 1.0, "k2: the same expected gradient where nothing is clipped"),
    ]),
    "TGPO exp_scripts_qwen2d5_math_7b/train_grpo": ("config/tgpo_7b.py config/method/grpo_std.py", [
        *[row for row in TGPO if row[2] != "use_std"], *CLIP, NO_TRACE,
        ("algorithm.grpo_use_std", True, "use_std", True),
    ]),
    "TGPO train.sh --algo grpo": (
        "config/grpo_7b.py --data=data/openr1.a3b.parquet --max_steps=300 --entropy_coef=0.007", [
        *[row for row in LUFFY if row[2] != "eval_interval"], NO_TRACE, *CLIP, CLIPPED_NORM, entropy(4, 11, 0.007),
        ("--steps", 300, "max_steps", 300),
    ]),
    "HPT train.sh": ("config/luffy_7b.py config/method/hpt.py --learning_rate=5e-6", HPT),
    "AMPO exp_scripts/train_ampo.sh": (
        "config/luffy_7b_instruct.py config/method/ampo.py --max_steps=510 --grad_clip=5.0", AMPO),
    "DFT, its README and sft_trainer.yaml": ("config/sft_7b.py config/method/dft.py", [
        ("loss * p.detach()", "none", "sft_shaping", "none", "the same gradient"),
        ("sum over tokens / their number", False, "sft_per_sequence", False),
        ("optim.lr", 5e-5, "learning_rate", 5e-5),
        ("optim.clip_grad", 1.0, "grad_clip", 1.0),
        ("optim.lr_scheduler", "cosine", "lr_schedule", "cosine"),
        ("optim.weight_decay", 0.01, "weight_decay", 0.01),
        ("optim.betas", 0.9, "beta1", 0.9),
        ("optim.betas", 0.95, "beta2", 0.999, "sft_7b.py's, to compare with it"),
        ("data.train_batch_size", 256, "prompts_per_step", 64, "the same"),
        ("trainer.total_epochs=1 of 100k", 390, "max_steps", 2142, "the same; three epochs of other data"),
        ("rows of a prompt", 1, "n_rollouts", 1),
        ("entropy bonus", 0.0, "entropy_coef", 0.0),
    ]),
    "CHORD-mu, Trinity-RFT": (
        "config/luffy_7b_instruct.py config/method/chord_mu.py --prompts_per_step=32 --update_batches=1", [
        *CHORD,
        ("enable_phi_function", False, "sft_shaping", "log", "log is the NLL"),
        ("mu_peak", 0.9, "sft_coef", 0.9),
        ("mu_decay_steps", 200, "sft_decay_steps", 200),
        ("mu_valley", 0.05, "sft_coef_end", 0.05),
    ]),
    "CHORD-phi, Trinity-RFT": (
        "config/luffy_7b_instruct.py config/method/chord_phi.py --prompts_per_step=32 --update_batches=1", [
        *CHORD,
        ("enable_phi_function", True, "sft_shaping", "phi", "p (1 - p), detached: the same gradient"),
        ("mu_peak", 0.1, "sft_coef", 0.1),
        ("mu_decay_steps", 0, "sft_decay_steps", 0),
    ]),
    "arXiv 2507.01679, Prefix-RFT, as others quote it": ("config/luffy_7b.py config/method/prefix_rft.py", [
        ("num_empty_7, and one prefix", 8, "n_rollouts", 8),
        ("num_empty_7, and one prefix", 1, "n_teacher", 1),
        ("l's upper bound", 0.95, "teacher_share", 0.95),
        ("l's upper bound at the end", 0.95, "teacher_share_end", 0.95),
        ("l's lower bound at the end", 0.05, "teacher_share_low", 0.05),
        ("cosine scheduler", "cosine", "teacher_share_schedule", "cosine"),
        ("clip_0.8: the lowest 80 % of entropies", 0.2, "teacher_top_entropy", 0.2),
        ("prefix token: -A rho at rho = 1", "log", "shaping", "log", "the same gradient, with gamma = 1"),
        ("its weight", 1.0, "gamma", 1.0),
        ("verl's clip_ratio", 0.2, "clip_low", 0.2, "its run's value is not published"),
        ("verl's clip_ratio", 0.2, "clip_high", 0.2, "its run's value is not published"),
    ]),
    "LUFFY's paper, 1.5B": ("config/luffy_1p5b.py", [
        *LUFFY, TRACE, *SHAPED, *NO_CLIP, CLIPPED_NORM, entropy(4, 7, 0.005), NO_STOP,
    ]),
    "LUFFY's paper, 7B-Instruct": ("config/luffy_7b_instruct.py", [
        *LUFFY, TRACE, *SHAPED, *NO_CLIP, CLIPPED_NORM, entropy(4, 7, 0.005), NO_STOP,
    ]),
    "LUFFY's paper, Llama-3.1-8B": ("config/luffy_llama8b.py", [
        *[row for row in LUFFY if row[2] != "require_think"], TRACE, *SHAPED, *NO_CLIP, CLIPPED_NORM,
        entropy(4, 7, 0.005), NO_STOP,
        ("no think tokens in the prompt", False, "require_think", False),
        ("traces: not known", "?", "data", "data/openr1.easy.parquet", "a guess, as its header says: no tags at all"),
    ]),
}  # fmt: skip
OURS = {  # no released script stands behind these
    "config/luffy_1gpu.py": "our own numbers", "config/luffy_qwen3_1p7b.py": "no paper's",
    "config/method/luffy.py": "luffy_7b.py's switches", "config/method/luffy_partial.py": "our own schedule",
    "config/method/relift.py": "relift_7b.py includes it", "config/method/exgrpo.py": "exgrpo_7b.py includes it",
    "config/method/sft.py": "the toy's SFT; sft_7b.py has the numbers", "config/method/sft_verified.py": "the same",
    "config/method/grpo_token_mean.py": "an ablation of ours", "config/method/dapo.py": "another paper's switches",
    "config/method/cispo.py": "another paper's switch, whose bound it does not name; 5 is ScaleRL's",
}  # fmt: skip


def configs(stack):
    """The config files that a stack runs, those that they include with them."""
    named = [os.path.join(ROOT, path) for path in stack.split() if not path.startswith("--")]
    return {os.path.relpath(p, ROOT) for path in named for p in (path, *read_config(path)[1])}


@pytest.mark.parametrize("script", PRESETS)
def test_a_preset_has_its_scripts_numbers(script):
    stack, rows = PRESETS[script]
    knobs = resolve("train.py", *stack.split(), "--teacher_model=a/b")
    for flag, released, knob, ours, *why in rows:
        assert knobs[knob] == ours, (flag, knob, knobs[knob])
        if isinstance(released, tuple):
            assert released[0] <= ours <= released[1], (flag, released, ours)
        assert ours == released or why, f"{flag}: a number that differs needs a reason"
    assert len({knob for _, _, knob, *_ in rows}) == len(rows), "a knob has two rows"


def test_every_config_is_in_the_table():
    found = {os.path.relpath(p, ROOT) for folder in ("config", "config/method") for p in glob.glob(f"{ROOT}/{folder}/*.py")}
    tabled = set().union(*(configs(stack) for stack, _ in PRESETS.values()))
    assert found == tabled | set(OURS)
    assert not {path for path in OURS if any(path in stack for stack, _ in PRESETS.values())}


def test_the_page_has_each_stack():
    """docs/presets.md tells users to stack them as they are stacked here."""
    page = open(os.path.join(ROOT, "docs", "presets.md")).read()
    assert not [stack for stack, _ in PRESETS.values() if f"`{stack}`" not in page]
    typed = re.findall(r"`(config/[^`]+)`", page)
    for stack in typed:
        resolve("train.py", *stack.replace("FOLDER", "a/b").split())
    assert len(typed) >= len(PRESETS)


def test_an_overlay_leaves_the_toys_run_as_it_is():
    """How long it is, how large a batch, which rates and data: an overlay alone changes nothing of it. And coefficients that
    are raised for a released run's many micro-batches are not raised here."""
    toy, run = resolve("train.py"), set()
    names = "max_steps prompts_per_step update_batches learning_rate lr_schedule warmup_steps seed entropy_coef eval_interval"
    for path in glob.glob(os.path.join(ROOT, "config", "method", "*.py")):
        knobs = resolve("train.py", path)
        run |= {(os.path.basename(path), name) for name in names.split() if knobs[name] != toy[name]}
        assert knobs["sft_coef"] <= 1.0 and knobs["sft_grad_clip"] == 1.0, path
        assert knobs["data"] in (toy["data"], "toy/train.complement.parquet"), path
    assert not run


def test_the_overlay_and_the_config_of_the_on_policy_baseline_agree():
    one, two = resolve("train.py", "config/grpo_7b.py"), resolve("train.py", "config/luffy_7b.py", "config/method/grpo.py")
    assert {name for name in one if one[name] != two[name]} == {"out_dir"}


def test_both_coefficients_of_rl_with_sft_loss_are_raised_or_neither():
    overlay = "config/method/rl_sft_loss.py"
    pair = lambda *argv: [resolve("train.py", *argv, overlay)[name] for name in ("entropy_coef", "sft_coef")]
    assert pair("config/luffy_7b.py") == [0.006, 4.5]
    assert pair("config/luffy_7b.py", "--entropy_coef=0.001") == [0.001, 1.0] and pair() == [0.0, 1.0]
    k = 6
    assert k * (1 - (7 / 8) ** (64 / k)) == pytest.approx(4.5, abs=0.1)


def test_hpts_traces_are_learnt_in_one_of_two_updates():
    """Where g of 128 questions fail, a rank has (1024 - 7 g) / 8 rows, the g / 8 traces last, and updates of 64 rows. Its
    micro-batches of 32,768 tokens are cut by length, so long traces part: the likelihood is added for each that has one.
    Lengths are estimates, as in docs/presets.md."""
    found = []
    for failing, length in ((16, 800), (24, 1500), (32, 800), (32, 1500), (48, 2200), (64, 1500)):
        rows, traces = (1024 - 7 * failing) // 8, failing // 8
        assert math.ceil(rows / 64) == 2 and rows - 64 >= traces  # all traces are in the second update
        tokens = (rows - 64 - traces) * (250 + length) + traces * (250 + 4000)
        found.append(min(math.ceil(tokens / 32768), traces) / 2)  # the mean over the two updates
    assert 0.4 < min(found) <= 1.0 <= max(found) < 1.6
    assert math.ceil((1024 - 7 * 73) / 8 / 64) == 2 and (1024 - 7 * 74) / 8 < 64
    pair = lambda *argv: [resolve("train.py", *argv, "config/method/hpt.py")[n] for n in ("entropy_coef", "sft_coef")]
    assert pair("config/luffy_7b.py") == [0.003, 1.0]
    assert pair("config/luffy_7b.py", "--entropy_coef=0.001") == [0.001, 1.0] and pair() == [0.0, 1.0]


@pytest.mark.parametrize("base", ["config/luffy_7b.py", "config/tgpo_7b.py"])
@pytest.mark.parametrize("method", ["rkl", "kdrl", "tgpo", "tgpo_adv", "grpo_std", "grpo_token_mean"])
def test_a_token_mean_has_a_coefficient_of_one_micro_batch(base, method):
    assert resolve("train.py", base, f"config/method/{method}.py")["entropy_coef"] == 0.001


def test_the_line_that_imitates_the_fault_of_released_sft():
    """Of a rank's eight gradients the first and the last survive, still divided by eight. Clipped at 1, that is a quarter of
    our mean over the 16 survivors clipped at 4."""
    header = open(os.path.join(ROOT, "config", "method", "sft_released.py")).read()
    n, clip = map(ast.literal_eval, re.search(r"--prompts_per_step=(\d+) --grad_clip=([\d.]+)", header).groups())
    assert n == 8 * 2
    for scale in (0.01, 0.3):  # below and above the clip
        gradients = [[scale * (rank + 3 * i) for i in range(8)] for rank in range(8)]  # one number each
        theirs = sum((rank[0] + rank[-1]) / 8 for rank in gradients) / 8
        ours = sum(g for rank in gradients for g in (rank[0], rank[-1])) / n
        assert min(ours, clip) / 4 == pytest.approx(min(theirs, 1.0))
