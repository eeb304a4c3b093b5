# Phase 1 in half a minute: a first look, as good as the run for CPUs in nanoGPT's README.
#
#     python prepare_shakespeare.py
#     python train.py config/phase1_quick.py
#
# The model of phase 1 with half the context: a step costs less, and at first such a small model
# learns mostly from the last few characters.

dataset = "shakespeare_char"
out_dir = "out/phase1_quick"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 64

# 16 * 64 = 1,024 tokens per step, 0.4 epochs in all. Compiling would take longer than these steps.
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 420
compile = False

# Many small steps at high rates, which fall to zero at the end
optimizer = "muon"
muon_lr = 0.04
learning_rate = 8e-3
warmup_iters = 20
lr_schedule = "linear"
min_lr = 0.0

eval_interval = max_iters
sample_interval = max_iters
sample_start = "ROMEO:"
sample_tokens = 120
log_interval = 42
