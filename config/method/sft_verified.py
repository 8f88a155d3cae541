# SFT on only those traces that the verifier accepts.
include("config/method/sft.py")
verified_only = True
