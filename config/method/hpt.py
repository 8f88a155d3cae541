# HPT (arXiv 2509.04419): eight own samples; where none is right they leave and the trace is learnt by likelihood, elsewhere
# there is no trace. Numbers from its released train.sh, whose learning rate of 5e-6 is not an overlay's (--learning_rate=5e-6).
# Its Llama script has --teacher_gate=2, its 1.5B one --sft_coef=0.3. Different: our verifier; there the traces stand at the
# batch's end, so only a step's last update learns them, and each micro-batch with a trace adds its own mean NLL, times 1.
n_teacher = 1
teacher_gate = 0
baseline = "group"  # the mean of the eight: wherever own samples are trained, no trace is among them
clip_low = 0.0
clip_high = 0.0
skip_grad_norm = 80.0
sft_coef = 1.0
entropy_coef = min(entropy_coef, 0.003)
