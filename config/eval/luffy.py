# LUFFY's final evaluation, as its README runs it. ExGRPO's is the same.
#
#     torchrun --nproc_per_node=8 eval.py config/eval/luffy.py --model=DIR --data=data/valid.all.parquet --out_dir=out/six
#
# Six benchmarks: avg@32 on AIME24, AIME25 and AMC, one sample on the others, and the unweighted mean of the six.
# Out of distribution: ARC-c, GPQA-diamond and MMLU-Pro by the same lines (its README); letters must be boxed.

template = "own"  # eurus-2-7b-prime-zero: prime; simple-rl-zero: qwen
system = "remove"  # so the template's default system prompt counts; prepare.py writes the training's there
k = "1,aime=32,aime25=32,amc=32"
temperature = 0.6
max_tokens = 8192
grader = "oat"
grade_unclosed = True  # a box inside a thought that was cut off counts
answer_line = False  # GPQA's own "ANSWER: C" is wrong
