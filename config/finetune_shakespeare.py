# OpenAI's GPT-2 Small, which knows English, learns to speak as Shakespeare's persons do.
#
#     python prepare_shakespeare.py --tokenizer=gpt2
#     python train.py config/finetune_shakespeare.py
#     python sample.py --out_dir=out/finetune_shakespeare --checkpoint=best.pt
#
# The first run fetches the weights, 0.5 GB. --init_from=gpt2-medium, gpt2-large or gpt2-xl takes a larger one.

init_from = "gpt2"
dataset = "shakespeare"
out_dir = "out/finetune_shakespeare"

# 32 * 256 = 8,192 tokens a step; a hundred steps see the 0.3 million tokens of the plays between two and three times
block_size = 256
batch_size = 8
gradient_accumulation_steps = 4
max_iters = 100

# Small steps, all alike: the weights are good already, and large ones would undo what they know.
learning_rate = 3e-5
warmup_iters = 0
decay_lr = False
dropout = 0.1

# So large a model soon has so short a text by heart: the weights with the lowest validation loss are in best.pt.
eval_interval = 10
eval_iters = 20
sample_interval = 50
sample_start = "ROMEO:"
log_interval = 1
