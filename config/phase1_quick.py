# Phase 1 in less than half a minute: a first look, as good as the run for CPUs in nanoGPT's README.
#
#     python prepare_shakespeare.py
#     python train.py config/phase1_quick.py
#
# Half the width and half the context of phase 1: in so little time a small model, which reads more
# text, learns more than a large one.

dataset = "shakespeare_char"
out_dir = "out/phase1_quick"

n_layer = 2
n_head = 4
n_embd = 64
block_size = 64

# 32 * 64 = 2,048 tokens per step, 0.65 epochs in all. Compiling would take longer than these steps.
batch_size = 32
gradient_accumulation_steps = 1
max_iters = 320
compile = False

# High rates, which fall to zero at the end. In such a short run a Muon momentum of 0.9 is better
# than the usual 0.95: in trials the loss was 0.03 to 0.05 lower.
optimizer = "muon"
muon_lr = 0.08
muon_momentum = 0.9
learning_rate = 2e-2
warmup_iters = 10
lr_schedule = "linear"
min_lr = 0.0

# Evaluate on 32 * 16 = 512 of the 1,743 sequences of val.bin, spread over the file: enough for a
# first look. All of them: python -m tools.evaluate --out_dir=out/phase1_quick
eval_interval = max_iters // 4
eval_iters = 32
sample_interval = max_iters
sample_start = "ROMEO:"
sample_tokens = 120
log_interval = 32
