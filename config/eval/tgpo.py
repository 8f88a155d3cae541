# TGPO's evaluation: LUFFY's, but the data's system prompt is kept.
#
#     torchrun --nproc_per_node=8 eval.py config/eval/tgpo.py --model=DIR --data=data/valid.all.parquet --out_dir=out/six
#
# Its scripts also accept an answer if either of two graders does. That can only raise a number, and is not done here.

include("config/eval/luffy.py")

system = "keep"
