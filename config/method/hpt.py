# HPT (arXiv 2509.04419): eight own samples; where none is right they leave and the trace is learnt by likelihood, elsewhere
# there is no trace. Numbers from its train.sh, whose learning rate is not an overlay's: --learning_rate=5e-6. Its Llama script
# has --teacher_gate=2, its 1.5B one 0.3 of the likelihood. Different: our verifier. Its traces stand at the batch's end: of two
# updates the second learns them all (where 74 or more of 128 questions fail there is only one); here each learns its own. It
# adds the mean NLL once per micro-batch with a trace: by our estimate 0.4 to 1.4 on average over its updates, so 1.0 here.
# The entropy's 0.001 is added for each of K = 2 to 5 micro-batches, and acts as 0.003.
n_teacher = 1
teacher_gate = 0
baseline = "group"  # the mean of the eight: wherever own samples are trained, no trace is among them
clip_low = 0.0
clip_high = 0.0
skip_grad_norm = 80.0
sft_coef = 1.0
entropy_coef = min(entropy_coef, 0.003)
