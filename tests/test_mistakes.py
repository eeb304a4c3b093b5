"""Wrong commands of train.py and sample.py: each ends in one line that names what is wrong."""

from pathlib import Path

import pytest

import sample
import train
from configurator import UserError, configure

OPTIONS = [  # refused before anything is read; exit code 2
    ("train.py --batch_size=0", "batch_size=0 must be at least 1"),
    ("train.py --log_interval=0", "log_interval=0 must be at least 1"),
    ("train.py --gradient_accumulation_steps=0", "gradient_accumulation_steps=0 must be at least"),
    ("train.py --max_iters=-1", "max_iters=-1 must be at least 0"),
    ("train.py --dropout=1", "dropout=1.0 must be at least 0"),
    ("train.py --learning_rate=0", "learning_rate=0.0 must be at least 1e-12"),
    ("train.py --beta2=1", "beta2=1.0 must be at least 0"),
    ("train.py --muon_momentum=1", "muon_momentum=1.0 must be at least 0"),
    ("train.py --seed=99999999999999999999", "seed=99999999999999999999 must be"),
    ("train.py --n_head=7", "n_embd=768 must be a multiple of n_head=7"),
    ("train.py --min_lr=1", "min_lr=1.0 is above learning_rate=0.0006; lower it, or set decay_lr"),
    ("train.py --sample_interval=3 --sample_start=", "sample_start is empty; give a prompt"),
    ("train.py --dtype=int8", "dtype is 'int8' but must be 'auto' or 'float32' or"),
    ("train.py --nlayer=3", "there is no option 'nlayer'; did you mean 'n_layer'?"),
    ("sample.py --num_samples=0", "num_samples=0 must be at least 1"),
    ("sample.py --temperature=-1", "temperature=-1.0 must be at least 0"),
    ("sample.py --top_k=0", "top_k=0 must be at least 1"),
    ("sample.py --top_p=0", "top_p=0.0 must be at least 1e-12"),
    ("sample.py --seed=-1", "seed=-1 must be at least 0"),
    ("sample.py --temperature=0 --num_samples=2", "temperature=0 writes one text; num_samples=2"),
]
RUNS = [  # refused when the files or the device are looked at; exit code 1
    ("train.py --dataset=nowhere", "shakespeare.py, or prepare_openweb.py); data has tiny"),
    ("train.py --init_from=resume --out_dir=out/none", "out/none/ckpt.pt: no such checkpoint"),
    ("train.py --sample_interval=6 --sample_start=ROMEO", "character 'R' at position 0 is not one"),
    ("train.py --pad_vocab_to=10", "pad_vocab_to=10 is below the 18 tokens of data/tiny; raise it"),
    ("train.py --block_size=5000", "val.bin: 718 tokens are too few for block_size=5000"),
    ("train.py --device=gpu", "device=gpu is not a device; use auto, cpu, cuda"),
    ("sample.py --start=", "start is empty"),
    ("sample.py --start=Zeus", "'Zeus': character 'Z' at position 0 is not one of the 18"),
    ("sample.py --start=FILE:latin.txt", "latin.txt: byte 0 (0xe9) is not utf-8"),
    ("sample.py --checkpoint=other.pt", "other.pt: no such checkpoint; train first, or name a run"),
]
PROGRAMS = {
    "train.py": (train.main, train.TrainConfig),
    "sample.py": (sample.main, sample.SampleConfig),
}


@pytest.mark.parametrize(("command", "words"), OPTIONS)
def test_an_option_that_can_not_be_is_named(command, words, capsys):
    program, *arguments = command.split()
    with pytest.raises(SystemExit) as exit_:
        configure(PROGRAMS[program][1], arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and words in error


@pytest.mark.parametrize(("command", "words"), RUNS)
def test_a_command_that_can_not_work_is_named_and_changes_nothing(tiny_run, command, words):
    Path("latin.txt").write_bytes(b"\xe9")
    program, *arguments = command.split()
    main, cls = PROGRAMS[program]
    if program == "train.py":
        arguments = [*(f"--{k}={v}" for k, v in tiny_run.options.items()), *arguments]
    else:
        arguments = [f"--out_dir={tiny_run(max_iters=0)}", *arguments]
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        main(configure(cls, arguments))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
