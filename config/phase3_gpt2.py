# Phase 3: GPT-2 Small, 134,601,216 parameters, on 2.8 billion tokens of web text.
#
#     python prepare_openweb.py --size=12GB --dataset=openweb12
#     python train.py config/phase3_gpt2.py --preflight
#     python train.py config/phase3_gpt2.py --init_from=auto
#     torchrun --standalone --nproc_per_node=8 train.py config/phase3_gpt2.py --init_from=auto
#
# It is larger than OpenAI's 124 million because the head is a matrix of its own. 42,000 steps are
# one pass over the data. The learning rate falls over the whole run, so choose --max_iters at the
# start: with 168,000 steps, four passes, the model still learns.

dataset = "openweb12"
out_dir = "out/phase3_gpt2"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 512
bias = True
tie_weights = False

# 8 * 16 * 512 = 65,536 tokens per step, shared by up to 8 processes. One GPU with 80 GB computes
# the same update faster with --batch_size=64 --gradient_accumulation_steps=2.
batch_size = 16
gradient_accumulation_steps = 8
max_iters = 42000

learning_rate = 6e-4
warmup_iters = 1000
min_lr = 6e-5
weight_decay = 0.1

eval_interval = 1000
eval_iters = 100
sample_interval = 1000
sample_start = "<|endoftext|>"
log_interval = 10
