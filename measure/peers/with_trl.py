"""
TRL's side of `python bench.py peers`: GRPOTrainer, which waits before each step until it is its turn. It runs in TRL's own
environment, and imports only turns.py and parity.py from this repository.

    PYTHON_OF_TRL measure/peers/with_trl.py SPEC
"""

import json
import os
import sys
import time

from turns import resident, settle, tell, wait  # isort: skip, it redirects stdout before the libraries print

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from parity import grade
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

spec, times = json.loads(sys.argv[1]), {}
NEVER = -1  # the token that ends a completion, so none does: both sides decode the same number of tokens


class Timed(GRPOTrainer):
    """GRPOTrainer that measures decoding, reward, and all that comes before the update."""

    def _prepare_inputs(self, batch):
        start = time.perf_counter()
        inputs = super()._prepare_inputs(batch)
        times["before_update"] = time.perf_counter() - start
        _, times["peak"] = resident()
        settle()
        times["resident"], _ = resident()
        assert inputs["completion_mask"].sum() == spec["prompts"] * spec["group"] * spec["completion"]
        return inputs

    def _generate_single_turn(self, *a, **k):
        start = time.perf_counter()
        result = super()._generate_single_turn(*a, **k)
        times["decode"] = time.perf_counter() - start
        return result

    def _calculate_rewards(self, *a, **k):
        start = time.perf_counter()
        result = super()._calculate_rewards(*a, **k)
        times["reward"] = time.perf_counter() - start
        return result


class Turns(TrainerCallback):
    def on_step_begin(self, *a, **k):
        wait()
        resident()  # the high-water mark starts here
        times["start"] = time.perf_counter()

    def on_step_end(self, *a, **k):
        times["end"] = time.perf_counter()

    def on_log(self, *a, **k):  # logging is part of the step, and its last part
        seconds, (_, peak) = time.perf_counter() - times["start"], resident()
        tell({"seconds": seconds, "decode": times["decode"], "reward": times["reward"],
              "update": times["end"] - times["start"] - times["before_update"],
              "update_bytes": peak - times["resident"], "peak_bytes": max(peak, times["peak"])})  # fmt: skip


def main():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    rows = [
        {"prompt": r["prompt"], "answer": r["reward_model"]["ground_truth"]} for r in pq.read_table(spec["parquet"]).to_pylist()
    ]
    n, batch = spec["completion"], spec["prompts"] * spec["group"]
    config = GRPOConfig(
        output_dir=os.path.join(spec["folder"], "trl"), per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        num_generations=spec["group"], max_completion_length=n, generation_kwargs={"eos_token_id": NEVER}, beta=0.0,
        epsilon=0.2, loss_type="dr_grpo", scale_rewards="none", temperature=1.0, top_p=1.0, top_k=0, learning_rate=1e-6,
        lr_scheduler_type="constant", max_grad_norm=1.0, adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.0, bf16=False,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, seed=0,
        dataloader_num_workers=0, disable_tqdm=True, optim="adamw_torch_fused", max_steps=10**6,
    )  # fmt: skip
    reward = lambda completions, answer, **k: [grade(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]
    reward.__name__ = "reward"
    trainer = Timed(model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows),
                    processing_class=tokenizer, callbacks=[Turns()])  # fmt: skip
    trainer.eos_token_ids = [NEVER]
    trainer.train()


if __name__ == "__main__":
    main()
