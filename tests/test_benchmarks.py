import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """As when they are run as programs: their own folder is where they import from."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("detect", "machine", "training_step"):
        sys.modules.pop(name, None)


def rows_of(text):
    """The lines of the Markdown table under its header, as lists of cells."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return lines[2:]


def test_the_cost_of_a_map_is_one_table(tmp_path, pipeline, capsys):
    import detect

    pipeline.register_to_config(settings={"num_inference_steps": 10, "guidance_scale": 2.0})
    pipeline.save_pretrained(tmp_path)
    detect.main(["--model", str(tmp_path), "--device", "cpu", "--original_steps", "20", "--batch_size", "2"])
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert [row[0].strip() for row in rows] == [
        "original procedure",
        "default",
        "default",
        "default, bfloat16",
        "default, channels_last",
    ]
    # of 20 steps 10 lie below level 500: 10 forwards there, 2 x 10 back; of 10 steps 5
    assert [(row[1], row[2]) for row in rows] == [("1", "30"), ("1", "15"), ("2", "15"), ("2", "15"), ("2", "15")]
    assert rows[0][4] == "1.000" and float(rows[3][5]) > float(rows[4][5])
    assert "threads" in text and "torch" in text


def test_the_cost_of_a_training_step_is_one_table(capsys):
    import training_step

    toy = ["unet.block_out_channels=[8, 8, 8]", "unet.attention_head_dim=8", "train.batch_size=2"]
    training_step.main(["--recipes", "phantom_cfg_32", "--steps", "3", *toy])
    rows = rows_of(capsys.readouterr().out)
    assert [row[1] for row in rows] == ["in memory", "from files"]
    waiting = [float(row[-1].rstrip("% ")) for row in rows]
    assert 0 <= waiting[0] < waiting[1] < 100
