# On-policy distillation: reverse KL to a teacher model on the policy's own samples, no reward. Needs
# --teacher_model=FOLDER with the policy's tokenizer. TGPO's baseline "rkl", which makes an advantage of it, with the
# clip; also Thinking Machines ("On-Policy Distillation", October 2025), with the same coefficient of 1.0. The entropy's
# is TGPO's.
n_teacher = 0
policy_coef = 0.0
entropy_coef = min(entropy_coef, 0.001)
kl_coef = 1.0
