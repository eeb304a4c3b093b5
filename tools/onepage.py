"""Write the playground and a model as one HTML file, which computes in the browser.

The file holds the page, the weights, the tokenizer, the log and engine.js, which is GPT-2 in plain
JavaScript. Its Content-Security-Policy forbids every request, and allows only the scripts inside,
by their checksums. It holds no path of this machine.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

from configurator import UserError
from model import GPT
from support.files import atomic_write
from support.tokenizer import Tokenizer

HERE = Path(__file__).parent
LARGEST_MODEL = 60_000_000  # parameters; a telephone has to hold four bytes for each


def write_page(path: Path, model: GPT, tokenizer: Tokenizer, facts: dict, dtype: str) -> None:
    """Write the HTML file, with the weights in `dtype`. `facts` are plain values for engine.js."""
    size = model.num_params() * (2 if dtype == "float16" else 4) * 4 / 3  # base64: 3 bytes in 4
    if path.suffix != ".html":
        raise UserError(f"to={path}: name the file to write, as in --to=romeo.html")
    if model.num_params() > LARGEST_MODEL:
        raise UserError(
            f"to={path}: {model.num_params():,} parameters would make a file of {size / 1e6:,.0f} "
            f"MB; a page takes at most {LARGEST_MODEL:,}: serve this model, without --to"
        )
    print(f"{path}: writing {model.num_params():,} parameters, about {size / 1e6:,.1f} MB ...")
    weights = {name: w.detach().cpu().numpy() for name, w in model.named_parameters()}
    shapes = {name: w.shape for name, w in weights.items()}
    page = facts | {"name": path.stem, "dtype": dtype, "shapes": shapes}
    data = json.dumps(page | {"tokenizer": tokenizer.to_dict()})
    kind = "<f2" if dtype == "float16" else "<f4"
    numbers = b"".join(w.astype(kind).tobytes() for w in weights.values())
    blocks = {"model": data.replace("<", "\\u003c"), "weights": base64.b64encode(numbers).decode()}
    html = inline((HERE / "playground.html").read_text(encoding="utf-8"))
    for name, text in blocks.items():  # a browser does not run them, and no text in them ends them
        block = f'<!-- data --><script type="text/plain" id="{name}">{text}</script>'
        html = html.replace("<!-- data -->", block)
    with atomic_write(path) as file:
        file.write(html.encode())
    print(f"{path}: {path.stat().st_size / 1e6:,.2f} MB; open it in a browser, or send it")


def inline(html: str) -> str:
    """Return the page with its style sheet and scripts inside, and a policy that allows them."""
    html = re.sub(r'<link rel="stylesheet" href="(.+?)">', r'<style src="\1"></style>', html)
    html = re.sub(r' src="(.+?)">', lambda m: ">" + (HERE / m[1]).read_text(encoding="utf-8"), html)
    policy = "default-src 'none'; img-src data:; worker-src blob:"
    for element in ("style", "script"):
        policy += f"; {element}-src"
        for text in re.findall(rf"<{element}\b[^>]*>(.*?)</{element}>", html, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest())
            policy += f" 'sha256-{digest.decode()}'"
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return html.replace("<head>", f"<head>\n    {meta}", 1)
