# LUFFY on Qwen2.5-Math-1.5B with luffy_7b.py's numbers: the paper uses them for every size. No script of this run is
# released; the entropy's coefficient is that of the 7B's lengths. Not run by us yet.
#
#     torchrun --nproc_per_node=8 train.py config/luffy_1p5b.py
#
# The authors' figures at this size:
#     AIME24 AIME25  AMC  MATH-500 Minerva Olympiad average
#      16.0   13.1  47.1    80.2    30.5    41.0     38.0     SFT 31.9, on-policy 30.0, the base 16.0
# The model's card is older (another verifier): 15.2 12.7 46.8 79.4 26.5 42.4, and over these six 37.2, SFT 35.9,
# on-policy 31.2 (its own averages, 42.1, 40.3 and 36.1, leave AIME25 out). Both SFTs were hurt: config/sft_7b.py.

include("config/luffy_7b.py")

model = "models/Qwen2.5-Math-1.5B-16k-think"  # made by prepare.py model: the prompt ends in "<think>\n"
out_dir = "out/luffy_1p5b"
