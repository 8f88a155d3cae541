# Prefix-RFT (arXiv 2507.01679): beside seven own samples the policy continues a prefix of the trace. Its share is drawn between
# a bound that falls from 0.95 to 0.05 along a cosine, and 0.95. Of the prefix only the fifth of the tokens with the highest
# entropy carries the row's advantage, unshaped: log p has the weight of a ratio at 1. Numbers from its paper, as others quote
# them, and from run names in its code, which has no run's config: the clip is its default. Different: entropies are ranked
# within a prefix, not over a micro-batch; in a second update the prefix has neither ratio nor clip; no dual clip (3). Its code
# can also take each prefix's rows as a group. The control, whose prefix is only read: --train_teacher=False
# --teacher_top_entropy=1.0.
n_teacher = 1
shaping = "log"
gamma = 1.0
clip_low = 0.2
clip_high = 0.2
teacher_share = 0.95
teacher_share_end = 0.95
teacher_share_low = 0.05
teacher_share_schedule = "cosine"
teacher_top_entropy = 0.2
