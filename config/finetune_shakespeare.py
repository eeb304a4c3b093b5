# OpenAI's GPT-2 Small, which already knows English, learns to write like Shakespeare.
#
#     python prepare_shakespeare.py --tokenizer=gpt2
#     python train.py config/finetune_shakespeare.py
#     python sample.py --out_dir=out/finetune_shakespeare --checkpoint=best.pt
#
# The first run downloads the weights, 0.5 GB. --init_from=gpt2-medium, gpt2-large and gpt2-xl are
# larger models.

init_from = "gpt2"
dataset = "shakespeare"
out_dir = "out/finetune_shakespeare"

# 32 * 256 = 8,192 tokens per step: 100 steps are two to three passes over the 0.3 million tokens
block_size = 256
batch_size = 8
gradient_accumulation_steps = 4
max_iters = 100

# Small steps of equal size: large ones would destroy what the weights know.
learning_rate = 3e-5
warmup_iters = 0
decay_lr = False
dropout = 0.1

# A large model soon memorizes a short text: best.pt has the weights with the lowest validation
# loss.
eval_interval = 10
eval_iters = 20
sample_interval = 50
sample_start = "ROMEO:"
log_interval = 1
