"""The scripts in a notebook: docs/colab.ipynb from its first to its last cell, and %run."""

import shutil

import nbclient
import nbformat
import pytest
from conftest import ROOT

TINY = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --max_iters=4 --device=cpu"
TINY += " --compile=False --batch_size=2 --gradient_accumulation_steps=1"
REPLACED = {  # what needs a network, a GPU or hours
    "!pip install -q -r requirements.txt": "",
    "!python prepare_shakespeare.py": "!python prepare_shakespeare.py --input=../text.txt",
    "config/phase1_quick.py": f"config/phase1_quick.py {TINY}",
    "--size=12GB": "--input=../text.txt --vocab_size=300",
    "config/phase3_gpt2.py": f"config/phase3_gpt2.py {TINY}",
}


def execute(notebook, folder) -> str:
    """Run a notebook in a folder and return all that it printed. Fails at the first error."""
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
def test_the_colab_notebook_runs_from_its_first_to_its_last_cell(tmp_path):
    notebook = nbformat.read(ROOT / "docs" / "colab.ipynb", as_version=4)
    for old, new in REPLACED.items():
        found = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
        assert found, old
        for cell in found:
            cell.source = cell.source.replace(old, new)
    notebook.cells.append(notebook.cells[1])  # who runs all cells again stays in the same folder
    ignored = shutil.ignore_patterns("data", "out", "hunt", ".*", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "gpt2", ignore=ignored)
    lines = "".join(f"{i} times {i % 97} is {i * (i % 97)}.\n" for i in range(6000))
    (tmp_path / "text.txt").write_text(f"ROMEO: The\n{lines}", encoding="utf-8")
    printed = execute(notebook, tmp_path)
    assert all(word not in printed for word in ("error: ", "Traceback", "Errno"))
    assert (tmp_path / "gpt2/out/phase1_quick/ckpt.pt").exists()
    assert (tmp_path / "gpt2/out/phase3/loss.png").exists()
    assert "4/4 [" in printed and "out/phase3 has loss.png and samples.md" in printed


@pytest.mark.slow
def test_scripts_run_inside_a_notebook(tiny_run, dataset):
    tiny_run()
    options = f"--dataset=tiny --sample_interval=2 --sample_start=1 {TINY}"
    script = ROOT / "train.py"
    cells = [
        f"%run {ROOT / 'sample.py'} --out_dir=out/tiny --start=1 --max_new_tokens=20",
        f"%run {script} {options} --out_dir=out/in_a_cell",
        f"%run {script} --help",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    printed = execute(notebook, dataset.parent.parent)
    assert "out/in_a_cell has loss.png" in printed and "4/4 [" in printed  # a progress bar
    assert "usage: python" in printed
