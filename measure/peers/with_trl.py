"""
TRL's side of `python bench.py peers`: GRPOTrainer, which waits before each step until it is its turn. It runs in TRL's own
environment, and imports only turns.py and parity.py from this repository.

    PYTHON_OF_TRL measure/peers/with_trl.py SPEC
"""

import json
import os
import sys
import time

from turns import in_use, settle, synchronize, tell, wait  # isort: skip, it redirects stdout before the libraries print

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from parity import grade
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

spec, seen = json.loads(sys.argv[1]), {}
NEVER = -1  # the token that ends a completion, so none does: both sides decode the same number of tokens


class Clock:
    """Adds the seconds inside it to seen[name]."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        synchronize()
        self.start = time.perf_counter()

    def __exit__(self, *error):
        synchronize()
        seen[self.name] = seen.get(self.name, 0) + time.perf_counter() - self.start


class Timed(GRPOTrainer):
    """GRPOTrainer that measures decoding, reward, and all that comes before the update."""

    def _prepare_inputs(self, batch):
        """Called for each micro-batch. The step's first call decodes and grades for all of them."""
        with Clock("before_update"):
            inputs = super()._prepare_inputs(batch)
        if "in_use" not in seen:
            _, seen["peak"] = in_use()
            settle()
            seen["in_use"], _ = in_use()
        seen["tokens"] = seen.get("tokens", 0) + inputs["completion_mask"].sum().item()
        return inputs

    def _generate_single_turn(self, *a, **k):
        with Clock("decode"):
            return super()._generate_single_turn(*a, **k)

    def _calculate_rewards(self, *a, **k):
        with Clock("reward"):
            return super()._calculate_rewards(*a, **k)


class Turns(TrainerCallback):
    def on_step_begin(self, *a, **k):
        wait()
        in_use()  # the peak starts here
        synchronize()
        seen.clear()
        seen["start"] = time.perf_counter()

    def on_step_end(self, *a, **k):
        synchronize()
        seen["end"] = time.perf_counter()

    def on_log(self, *a, **k):  # logging is part of the step, and its last part
        seconds, (_, peak) = time.perf_counter() - seen["start"], in_use()
        assert seen["tokens"] == spec["prompts"] * spec["group"] * spec["completion"], seen
        tell({"seconds": seconds, "decode": seen["decode"], "reward": seen["reward"],
              "update": seen["end"] - seen["start"] - seen["before_update"],
              "update_bytes": peak - seen["in_use"], "peak_bytes": max(peak, seen["peak"])})  # fmt: skip


def main():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    rows = [
        {"prompt": r["prompt"], "answer": r["reward_model"]["ground_truth"]} for r in pq.read_table(spec["parquet"]).to_pylist()
    ]
    n, batch = spec["completion"], spec["prompts"] * spec["group"]
    if spec["trl_sampler"] == "vllm" and spec["device"] == "cpu":
        # With oneDNN, on CPUs that have AVX-512, vLLM keeps packed weights alone, and TRL cannot load others.
        import vllm._custom_ops

        vllm._custom_ops._supports_onednn = False
    if spec["trl_sampler"] == "vllm":
        sampling = dict(use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=spec["gpu_memory"],
                        vllm_max_model_length=64 + n, vllm_importance_sampling_correction=False,
                        generation_kwargs={"ignore_eos": True})  # fmt: skip
    else:
        sampling = dict(generation_kwargs={"eos_token_id": NEVER})
    config = GRPOConfig(
        output_dir=os.path.join(spec["folder"], "trl"), per_device_train_batch_size=spec["micro_rows"],
        gradient_accumulation_steps=batch // spec["micro_rows"], num_generations=spec["group"], max_completion_length=n,
        beta=0.0, epsilon=0.2, loss_type="dr_grpo", scale_rewards="none", temperature=1.0, top_p=1.0, top_k=0,
        learning_rate=1e-6, lr_scheduler_type="constant", max_grad_norm=1.0, adam_beta1=0.9, adam_beta2=0.99,
        weight_decay=0.0, logging_steps=1, save_strategy="no", report_to="none", seed=0, dataloader_num_workers=0,
        disable_tqdm=True, optim="adamw_torch_fused", max_steps=10**6, use_cpu=spec["device"] == "cpu",
        bf16=spec["dtype"] == "bfloat16", gradient_checkpointing=spec["recompute"], use_liger_kernel=spec["liger"], **sampling,
    )  # fmt: skip
    reward = lambda completions, answer, **k: [grade(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]
    reward.__name__ = "reward"
    trainer = Timed(model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows),
                    processing_class=tokenizer, callbacks=[Turns()])  # fmt: skip
    trainer.eos_token_ids = [NEVER]
    trainer.train()


if __name__ == "__main__":
    main()
