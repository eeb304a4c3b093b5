"""Write a trained model as a folder for Hugging Face's transformers, or as a small checkpoint.

    python -m tools.export --out_dir=out/phase3_gpt2 --to=exported
    python -m tools.export --out_dir=out/phase3_gpt2 --to=small --weights_only

AutoModelForCausalLM and AutoTokenizer load the first folder, and so do vLLM, llama.cpp's converter
and lm-evaluation-harness. The second has a checkpoint for sample.py without the optimizer's state,
which is more than half of a checkpoint.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from configurator import UserError, configure, one_line, run
from model import GPT
from support import files, hub
from support.checkpoint import save_checkpoint
from support.tokenizer import BYTE_TO_CHAR, END_OF_TEXT, BPETokenizer, Tokenizer


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model as a folder for transformers, or its weights alone for sample.py."""

    out_dir: str = "out/phase1_char"  # folder of the run
    checkpoint: str = "ckpt.pt"  # ckpt.pt: the last state; best.pt: the lowest loss
    to: str = ""  # the folder to write: new or empty
    weights_only: bool = False  # write a checkpoint without the optimizer's state

    def __post_init__(self) -> None:
        if not self.to:
            raise UserError("to is empty; name the folder to write, as in --to=exported")


def main(config: ExportConfig) -> None:
    folder, path = Path(config.to), Path(config.out_dir) / config.checkpoint
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"to={folder}: exists and is not an empty folder; name a new folder")
    model, tokenizer, checkpoint = hub.load_model(str(path))
    print(f"{path}: writing {model.num_params():,} parameters to {folder} ...")
    if config.weights_only:
        save_checkpoint(folder / "ckpt.pt", replace(checkpoint, optimizers=None, scaler=None))
    else:
        write_folder(folder, model, tokenizer)
    written = sorted(folder.iterdir())
    megabytes = sum(file.stat().st_size for file in written) / 1e6
    print(f"{folder}: {', '.join(file.name for file in written)}")
    print(f"{megabytes:,.1f} MB; {path} has {path.stat().st_size / 1e6:,.1f} MB")


def write_folder(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write what load_model and transformers read, completely or not at all.

    Missing biases are written as zeros; rows of padding and a tied head are not written.
    """
    hf, c, end = hub.import_transformers(), model.config, getattr(tokenizer, "end_of_text", None)
    fields = {theirs: getattr(c, ours) for theirs, ours in hub.NAMES.items()}
    fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
    fields |= {"n_ctx": c.block_size, "bos_token_id": end, "eos_token_id": end}  # for llama.cpp
    fields["activation_function"] = "gelu" if c.gelu == "exact" else "gelu_new"
    weights = hub.transpose(model.state_dict())
    weights |= {name: weights[name][: c.vocab_size] for name in (hub.HEAD, hub.EMBEDDING)}
    config, their_tokenizer = hf.GPT2Config(**fields), export_tokenizer(hf, tokenizer)
    their_tokenizer.model_max_length = c.block_size
    theirs = hf.GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=weights)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            new = Path(temporary) / "new"  # with the usual permissions
            theirs.save_pretrained(new)
            their_tokenizer.save_pretrained(new)
            if folder.exists():
                folder.rmdir()  # empty
            files.replace(new, folder)
    except Exception as error:  # safetensors and tokenizers have their own kinds for a full disk
        raise UserError(f"{folder}: can not be written ({one_line(error)[:150]})") from error


def export_tokenizer(hf, ours: Tokenizer):
    """Return a tokenizer of transformers that gives the same ids as ours."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    if isinstance(ours, BPETokenizer):
        tokens = [token.decode("latin-1").translate(BYTE_TO_CHAR) for token in ours.tokens]
        vocab = dict(zip(tokens, ours.ids, strict=True)) | ours.special
        # Every way to join two tokens to a third one, in the order of the third, as in tiktoken.
        pairs = ((t[:i], t[i:]) for t in tokens for i in range(1, len(t)))
        merges = [pair for pair in pairs if vocab.keys() >= {*pair}]
        end = END_OF_TEXT if END_OF_TEXT in ours.special else None
        theirs = hf.GPT2Tokenizer(vocab, merges, unk_token=end, bos_token=end, eos_token=end)
        theirs.add_tokens(list(ours.special), special_tokens=True)
        return theirs
    # An unk_token outside the vocabulary makes an unknown character an error, as it is here.
    backend = Backend(models.WordLevel(ours.ids, unk_token=""))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend)


if __name__ == "__main__":
    run(main, configure(ExportConfig))
