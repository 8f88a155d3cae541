# DFT (arXiv 2508.05629): SFT whose token loss is weighted by the detached probability, -sg(p) log p. That has the gradient of
# -p, so it is the likelihood term without a logarithm. With mixed.py beside it: what does the advantage add to the same shape?
include("config/method/sft.py")
sft_shaping = "none"
