# ReLIFT's final evaluation: math-verify, and the whole text where no thought was closed.
#
#     torchrun --nproc_per_node=8 eval.py config/eval/relift.py --model=DIR --data=data/valid.all.parquet --out_dir=out/six

template = "own"
system = "remove"
k = "1,aime=32,aime25=32,amc=32,math=8,olympiad_bench=8"  # the paper's; its files have one row of the last two
temperature = 0.6
max_tokens = 8192
grader = "math_verify"
grade_unclosed = True
answer_line = False
