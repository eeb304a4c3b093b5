# Phase 1: a GPT-2 with 0.4 million parameters learns to write Shakespeare, character by character.
#
#     python prepare_shakespeare.py
#     python train.py config/phase1_char.py
#
# README.md says what these 20 epochs cost and reach. All other options have TrainConfig's defaults.

dataset = "shakespeare_char"
out_dir = "out/phase1_char"

# GPT-2 in every respect but its size
n_layer = 2
n_head = 4
n_embd = 128
block_size = 128

# 32 * 128 = 4,096 tokens per step, 245 steps per epoch
batch_size = 32
gradient_accumulation_steps = 1
max_iters = 20 * 245

# With so few tokens Muon learns more from each than AdamW. A small model tolerates high rates.
optimizer = "muon"
muon_lr = 0.03
learning_rate = 4e-3
warmup_iters = 50
lr_schedule = "linear"
min_lr = 0.0

# Evaluate and write a sample after each epoch. The first samples come after 0, 25, 50 and 100
# steps.
eval_interval = 245
sample_interval = 245
sample_start = "ROMEO:"
sample_tokens = 150
log_interval = 49
