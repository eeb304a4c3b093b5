"""The picture of loss over compute."""

import json
import math
import sys
from configurator import UserError

import pytest
from conftest import logged

from support.checkpoint import load_checkpoint
from support.data import load_meta
from tools import scaling


def test_a_curve_has_the_operations_and_the_bits_per_byte_of_each_evaluation(tiny_run, dataset):
    out_dir = tiny_run(max_iters=12, eval_interval=6)
    curve = scaling.read_curve(out_dir)
    # 2 layers: 12 * 16 * 16 weights each; a head of 18 * 16; attention of 16 tokens; 3 passes of
    # 2 operations; 2 * 4 sequences of 16 tokens in a step
    per_token = 6 * (2 * 12 * 16 * 16 + 18 * 16) + 12 * 2 * 16 * 16
    assert curve.flops == [6 * 128 * per_token, 12 * 128 * per_token]
    meta = load_meta(dataset)
    losses = [r["val_loss"] for r in logged(out_dir) if "val_loss" in r and r["step"]]
    expected = [
        loss * math.log2(math.e) * meta["val_tokens"] / meta["val_bytes"] for loss in losses
    ]
    assert curve.bits == pytest.approx(expected)
    assert (curve.name, curve.optimizer) == ("tiny", "adamw")
    assert (
        curve.parameters
        == sum(p.numel() for p in load_checkpoint(out_dir / "ckpt.pt")[0].parameters()) / 1e6
    )


def test_a_run_that_has_only_begun_is_named(tiny_run):
    out_dir = tiny_run(max_iters=0)
    with pytest.raises(UserError, match="no evaluation after step 0 yet; train longer"):
        scaling.read_curve(out_dir)


def test_bits_per_byte_are_not_computed_with_another_data_set(tiny_run, dataset):
    out_dir, meta = tiny_run(), json.loads((dataset / "meta.json").read_text(encoding="utf-8"))
    meta["sha256"]["train.bin"] = "0" * 64
    (dataset / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UserError, match="data/tiny was prepared again since this run"):
        scaling.read_curve(out_dir)


def test_a_picture_without_a_name_is_refused():
    with pytest.raises(UserError, match="picture='' is not a file"):
        scaling.ScalingConfig(picture="")


def test_every_run_is_a_line_and_is_printed(tiny_run, monkeypatch, capsys, tmp_path):
    runs = [tiny_run(out_dir=f"out/{name}", n_layer=n) for name, n in (("small", 1), ("large", 2))]
    curves = [scaling.read_curve(out_dir) for out_dir in runs]
    lines = scaling.draw_curves(curves).axes[0].get_lines()
    assert [line.get_ydata().tolist() for line in lines] == [curve.bits for curve in curves]
    monkeypatch.setattr(sys, "argv", ["scaling", *(f"--out_dir={out_dir}" for out_dir in runs)])
    capsys.readouterr()
    scaling.main(scaling.ScalingConfig(picture=str(tmp_path / "curves.png")))
    printed = capsys.readouterr().out
    assert "small: 0.0 million" in printed and f"{curves[1].bits[-1]:.4f} bits per byte" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_line_of_an_optimizer_joins_its_best_run_of_each_size(monkeypatch, tmp_path):
    ends = {  # optimizer, millions of parameters, operations and bits per byte at the end
        ("adamw", 1): (1e13, 2.4), ("adamw", 3): (3e13, 2.1), ("muon", 1): (1e13, 2.2)
    }  # fmt: skip
    curves = [scaling.Curve("run", n, o, [x / 2, x], [9, y]) for (o, n), (x, y) in ends.items()]
    curves.append(scaling.Curve("worse", 1, "muon", [5e12, 1e13], [1.0, 2.3]))
    lines = scaling.draw_optimizers(curves).axes[0].get_lines()
    points = [list(zip(*line.get_data(), strict=True)) for line in lines]
    adamw = [(1e13, 2.4), (3e13, 2.1)]
    assert points == [adamw, adamw, [(1e13, 2.2)], [(1e13, 2.2), (1e13, 2.3)]]
    monkeypatch.setattr(scaling, "read_curve", lambda _: curves[0])
    picture = tmp_path / "optimizers.png"
    scaling.main(scaling.ScalingConfig(compare_optimizers=True, picture=str(picture)))
    assert picture.read_bytes().startswith(b"\x89PNG")
