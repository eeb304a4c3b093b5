# GPT-2 Small as OpenAI made it: 12 layers, context 1,024, its own 50,257 tokens, tied weights.
#
#     python prepare_openweb.py --size=all --tokenizer=gpt2 --dataset=openweb_gpt2
#     torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py --init_from=auto
#
# About half a million tokens per step, as GPT-3 has for this size (table 2.1 of
# https://arxiv.org/abs/2005.14165). 10,000 steps are half a pass over the 9 billion tokens of
# OpenWebText.

dataset = "openweb_gpt2"
out_dir = "out/gpt2_124m"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
pad_vocab_to = 50304  # 393 * 128: the head's products are faster; the added rows are no tokens

# 40 * 12 * 1,024 = 491,520 tokens per step
batch_size = 12
gradient_accumulation_steps = 40
max_iters = 10000

# Muon for the matrices of the blocks, AdamW for the rest: see phase3_gpt2.py. GPT-3's recipe has
# --optimizer=adamw --learning_rate=6e-4 --min_lr=6e-5 --lr_schedule=cosine --weight_decay=0.1.
optimizer = "muon"
muon_lr = 0.025
learning_rate = 4e-3
warmup_iters = 250
lr_schedule = "linear"
min_lr = 0.0
weight_decay = 0.05

eval_interval = 1000
eval_iters = 200
sample_interval = 1000
sample_start = "<|endoftext|>"
log_interval = 10
