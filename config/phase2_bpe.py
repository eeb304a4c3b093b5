# Phase 2: a GPT-2 of 23 million parameters on 250 MB of text, with byte pair encoding.
#
#     python prepare_openweb.py --size=250MB
#     python train.py config/phase2_bpe.py

dataset = "openweb"
out_dir = "out/phase2_bpe"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 512

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 14000

optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3
warmup_iters = 100
lr_schedule = "linear"
min_lr = 0.0

eval_interval = 1000
sample_interval = 1000
sample_start = "The"
log_interval = 10
