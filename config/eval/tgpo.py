# TGPO's evaluation: LUFFY's with the data's system prompt kept.
#
#     torchrun --nproc_per_node=8 eval.py config/eval/tgpo.py --model=DIR --data=data/valid.all.parquet --out_dir=out/six
#
# Its scripts also call an answer right if either grader does, which lifts every number: not done here.

template = "own"
system = "keep"
k = "1,aime=32,aime25=32,amc=32"
temperature = 0.6
max_tokens = 8192
grader = "oat"
grade_unclosed = True
answer_line = False
