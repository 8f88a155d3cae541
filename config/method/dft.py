# DFT (arXiv 2508.05629): SFT whose token loss is weighted by the detached probability, -sg(p) log p. That has the gradient of
# -p, so it is the likelihood term without a logarithm. One mean over the batch's tokens, as in TRL; its own trainer averages
# the means of micro-batches of four traces. Batch, learning rate and schedule are the base's. mixed.py is this f times A.
include("config/method/sft.py")
sft_shaping = "none"
