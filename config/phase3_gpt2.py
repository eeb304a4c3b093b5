# Phase 3: GPT-2 Small, 134,601,216 parameters, on 1.4 billion tokens of web text.
#
#     python prepare_openweb.py --size=12GB --dataset=openweb12
#     python -m tools.preflight config/phase3_gpt2.py
#     python train.py config/phase3_gpt2.py --init_from=auto
#     torchrun --standalone --nproc_per_node=8 train.py config/phase3_gpt2.py --init_from=auto
#
# With 32,000 tokens instead of 50,257 the embedding is smaller than OpenAI's. But the head is a
# matrix of its own, so the model is larger than 124 million. 21,000 steps are half a pass over the
# data. The learning rate falls over the whole run, so choose --max_iters at the start: with 42,000
# steps, a whole pass, the model learns more.

dataset = "openweb12"
out_dir = "out/phase3_gpt2"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 512
bias = True
tie_weights = False

# 8 * 16 * 512 = 65,536 tokens per step, shared by up to 8 processes. --batch_size=64
# --gradient_accumulation_steps=2 is the same update with 26 GB, in 0.6 of the time on an H200.
batch_size = 16
gradient_accumulation_steps = 8
max_iters = 21000

# Muon for the matrices of the blocks, AdamW for embeddings, head and vectors. modded-nanogpt's
# public record, with a model of this width and depth, has Muon at 3,250 steps where Adam needs
# 5,625 for the same loss (records/track_3_optimization/README.md at f411b3d, results 36 and 2).
# The rates are close to those of that record and of phase 2; they were not tuned for this model.
optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3
warmup_iters = 250
lr_schedule = "linear"
min_lr = 0.0
weight_decay = 0.1

eval_interval = 1000
eval_iters = 100
sample_interval = 1000
sample_start = "<|endoftext|>"
log_interval = 10
