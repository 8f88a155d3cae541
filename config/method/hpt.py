# HPT (arXiv 2509.04419): eight own samples; where none is right they leave and the trace is learnt by likelihood, elsewhere
# there is no trace. Numbers from its released train.sh, whose learning rate of 5e-6 is not an overlay's (--learning_rate=5e-6).
# Its Llama script has --teacher_gate=2, its 1.5B one 0.3 of the likelihood. Different: our verifier.
# The script adds the mean NLL once for each micro-batch with a trace. Of a rank's K = 2 to 5 micro-batches, with 1 to 4 traces,
# that is 0.7 to 2.5, and its entropy's 0.001 acts as 0.003. On a base that has not raised the entropy's, neither is raised.
n_teacher = 1
teacher_gate = 0
baseline = "group"  # the mean of the eight: wherever own samples are trained, no trace is among them
clip_low = 0.0
clip_high = 0.0
skip_grad_norm = 80.0
_raised = entropy_coef > 0.001
sft_coef = 2.0 if _raised else 1.0
entropy_coef = min(entropy_coef, 0.003)
