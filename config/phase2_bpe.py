# Phase 2: a GPT-2 with 23 million parameters learns to write prose from 250 MB of text.
#
#     python prepare_openweb.py --size=250MB
#     python train.py config/phase2_bpe.py
#
# 14,000 steps are one pass over the 57 million tokens; README.md says what a tenth of them costs
# and reaches. For a larger model change n_layer, n_head and n_embd; for more text, --size and
# max_iters.

dataset = "openweb"
out_dir = "out/phase2_bpe"

# 64 channels per head, as in GPT-2 Small
n_layer = 6
n_head = 6
n_embd = 384
block_size = 512

# 8 * 512 = 4,096 tokens per step. On a GPU: --batch_size=64, with max_iters and warmup_iters / 8.
batch_size = 8
gradient_accumulation_steps = 1
max_iters = 14000

# In trials of 110 steps Muon was far ahead of AdamW; half or twice these rates changed little.
optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3
warmup_iters = 100
lr_schedule = "linear"
min_lr = 0.0

# All of val.bin would take as long as 50 steps; a part, spread over the file, is enough here.
eval_interval = 200
eval_iters = 12
sample_interval = 200
sample_start = "The"
sample_tokens = 150
log_interval = 20
