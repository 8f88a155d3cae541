# ReLIFT's final evaluation: LUFFY's, but graded by math-verify, and with more samples on two benchmarks.
#
#     torchrun --nproc_per_node=8 eval.py config/eval/relift.py --model=DIR --data=data/valid.all.parquet --out_dir=out/six

include("config/eval/luffy.py")

k = "1,aime=32,aime25=32,amc=32,math=8,olympiad_bench=8"  # the paper's; its files have one row of the last two
grader = "math_verify"
