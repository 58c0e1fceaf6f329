"""metrics.svg: the log of a run as curves over its steps."""
import json
import math
import random
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

import train
from data import runs
from data.stats import curves, figure
from tests.conftest import ROOT

RANDOM = f"random:{ROOT}/data/tiny/init/config.json"


def drawn(svg):
    """SVG text -> its texts, and the points [(x, y)] of each curve.  Nothing leaves the canvas."""
    root, space = ElementTree.fromstring(svg), "{http://www.w3.org/2000/svg}"
    assert root.get("width") == "800"
    texts, lines, height = [], [], float(root.get("height"))
    for text in root.iter(space + "text"):
        x, y = float(text.get("x")), float(text.get("y"))
        width = 8 * len(text.text)       # at 14 px
        left = x - width if text.get("class") == "end" else x
        assert left >= 0 and left + width <= 800 and 12 <= y <= height, text.text
        texts.append(text.text)
    for path in root.iter(space + "path"):
        numbers = re.fullmatch(r"M([-\d. L]+)h.1", path.get("d"))
        if numbers:
            lines.append([tuple(map(float, point.split())) for point in numbers[1].split("L")])
            assert all(180 <= x <= 620.1 and 60 <= y <= height for x, y in lines[-1])
    return texts, lines


def test_a_curve_goes_from_the_first_step_to_the_last_between_lowest_and_highest():
    rows = [{"step": step, "kl": kl, "tok/s": 7.0, "seconds": 9} for step, kl in ((1, 4.0), (6, 1.0), (11, 2.5))]
    texts, (line,) = drawn(curves(rows, "tune: adapter"))
    assert line == [(180, 60), (400, 156), (620, 108)]
    assert texts == ["tune: adapter", "kl", "4", "1", "1", "step 11", "last 2.5"]


def test_panels_stand_below_each_other_with_one_axis_of_steps():
    rows = [{"step": i, "fvu": 1 / i, "l0": 4, "dead": i / 9} for i in range(1, 10)]
    texts, lines = drawn(curves(rows, "sae"))
    assert [texts[i] for i in (1, 7, 13)] == ["fvu", "l0", "dead"]
    xs = [[x for x, _ in line] for line in lines]
    assert xs[0] == xs[1] == xs[2] and max(y for _, y in lines[0]) < min(y for _, y in lines[1])
    assert len({y for _, y in lines[1]}) == 1        # of equal numbers a straight line


def test_layers_share_a_panel_in_their_order_and_their_own_colours():
    rows = [{"step": i} | {f"fvu.{layer}": layer / i for layer in (12, 4, 100)} for i in (1, 2)]
    svg = curves(rows, "sae")
    texts, lines = drawn(svg)
    assert texts[-3:] == ["layer 4: 2", "layer 12: 6", "layer 100: 50"] and texts.count("fvu") == 1
    assert len(lines) == 3 and len(set(re.findall(r"stroke: (hsl[^)]*\))", svg))) == 3
    assert "prefers-color-scheme: dark" in svg


def test_a_hundred_thousand_steps_stay_small_and_keep_their_peaks():
    rng = random.Random(0)
    rows = [{"step": i + 1, "kl": rng.random(), "norm": rng.random(), "lr": i, "ce": 1.0} for i in range(100_000)]
    rows[70_123]["kl"], rows[30_000]["kl"] = 99.0, -99.0
    svg = curves(rows, "tune")
    assert len(svg.encode()) < 60_000
    _, lines = drawn(svg)
    assert (60.0 in [y for _, y in lines[0]]) and (156.0 in [y for _, y in lines[0]])
    many = [{"step": i} | {f"{name}.{layer}": rng.random() for name in ("fvu", "l0", "dead") for layer in range(36)}
            for i in range(1, 1000)]
    svg = curves(many, "sae")
    assert len(svg.encode()) < 60_000 and len(drawn(svg)[1]) == 3 * 36


@pytest.mark.parametrize("bad", [math.nan, math.inf, "<script>", None, [1], {"a": 1}, True, 10**400, "9"])
def test_only_numbers_are_drawn(bad):
    rows = [{"step": 1, "kl": 1.0, "x": bad}, {"step": bad, "kl": 5.0}, {"kl": 7.0}, {"step": 3, "kl": 2.0}]
    texts, lines = drawn(curves(rows, "<b>&"))
    assert len(lines) == 1 and texts[:4] == ["<b>&", "kl", "2", "1"]


def test_names_are_text_and_short():
    svg = curves([{"step": 1, "<script>alert(1)</script>": 1.0, "a" * 10_000: 2.0, "\x1b[2J": 3.0}], "t" * 20)
    texts, lines = drawn(svg)
    assert len(lines) == 3 and "<script>aler" in texts[1] and "\x1b" not in svg and "<script" not in svg


def test_a_log_of_nothing_or_of_one_step_is_drawn():
    assert drawn(curves([], "empty")) == (["empty"], [])
    assert drawn(curves([{"step": 5, "kl": 1e-300}], "one"))[1] == [[(180, 156)]]
    drawn(curves([{"step": 1, "kl": -9e299}, {"step": 2, "kl": 9e299}], "far"))
    drawn(figure([("base", 0.5, 0.4, 0.6), ("other", 0.2, 0.1, 0.3)], "arms"))      # the same canvas


@pytest.mark.parametrize("stage, flags, names", [
    ("sae", ["--latents", 64, "--k", 4, "--source", RANDOM], ["fvu", "l0", "dead"]),
    ("sae", ["--latents", 64, "--k", 4, "--source", RANDOM, "--layer", "0,3"], ["fvu", "l0", "dead", "layer 3: 4"]),
    ("sft", ["--target", RANDOM], ["ce", "norm", "lr"])])
def test_every_run_ends_with_its_curves(stage, flags, names, data, tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", "--stage", stage, "--data", data, "--steps", "3", "--log-every", "1",
         "--seq-len", "64", "--batch", "2", "--device", "cpu", "--out", tmp_path / "o", *map(str, flags)],
        cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts, lines = drawn((tmp_path / "o" / "metrics.svg").read_text())
    assert set(names) <= set(texts) and "tok/s" not in texts and f"train.py --stage {stage}" in texts
    assert {len(line) for line in lines} == {3}


def test_a_resumed_run_draws_all_of_its_steps(data, tmp_path):
    flags = ["--stage", "sft", "--target", RANDOM, "--data", str(data), "--seq-len", "64", "--batch", "2", "--steps",
             "5", "--log-every", "1", "--save-every", "2", "--device", "cpu", "--out", str(tmp_path)]
    end_step = runs.Run.end_step

    def stop(self, step, *rest):
        end_step(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "end_step", stop)
        train.main(flags)
    assert not (tmp_path / "metrics.svg").exists()
    train.main([*flags, "--resume"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (tmp_path / "metrics.svg").read_text() == curves(rows, "train.py --stage sft")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
