"""Curves of runs: reading logs, smoothing, and drawing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tinyllava_switchkd.visualize.curves import (
    draw_inside,
    draw_losses,
    main,
    read_history,
    series,
    smooth,
)


def history(steps: int, distilled: bool) -> list[dict[str, float]]:
    """A log as the trainer writes it; the summary at its end has no loss."""
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 2.0 / step, "ce": 1.0 / step, "learning_rate": 1e-3}
        if distilled:
            row |= {"align": 0.5 / step, "visual_switch": 0.5 / step, "knee_teacher": 9.0, "knee_student": 7.0 + step}
            row |= {"topk_overlap": 0.8}
        rows.append(row)
    return [*rows, {"step": steps, "train_runtime": 3.5}]


def state(folder, rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": len(rows), "log_history": rows}))


def test_history_of_finished_and_running_runs(tmp_path):
    state(tmp_path / "done", history(5, False))
    state(tmp_path / "going" / "checkpoint-3", history(3, False))
    assert len(read_history(tmp_path / "done")) == 6
    assert read_history(tmp_path / "done" / "trainer_state.json") == read_history(tmp_path / "done")
    assert len(read_history(tmp_path / "going")) == 4


def test_held_out_losses_and_gradient_shares_are_drawn(tmp_path):
    """Two terms with norms 3 and 1 have 75 and 25 %; held-out losses change the picture of the losses."""
    plain = history(4, True)
    rows = [*plain, {"step": 2, "eval_ce": 0.9, "eval_align": 0.1}, {"step": 4, "eval_ce": 0.7, "eval_align": 0.2}]
    with_eval, without = (
        draw_losses({"run": one}, tmp_path / name) for one, name in ((rows, "a.png"), (plain, "b.png"))
    )
    assert with_eval.read_bytes() != without.read_bytes()
    for row in rows[:4]:
        row |= {
            f"gradient/{place}/{term}": norm
            for place in ("eyes", "head")
            for term, norm in (("ce", 3.0), ("align", 1.0))
        }
    pictures = []
    for scale in (1.0, 10.0):  # shares, not norms
        scaled = [{k: v * scale if k.startswith("gradient/") else v for k, v in row.items()} for row in rows]
        pictures.append(draw_inside(scaled, tmp_path / f"{scale}.png").read_bytes())
    assert pictures[0] == pictures[1]
    with pytest.raises(ValueError, match="--log_gradient_shares"):
        draw_inside(plain[:0], tmp_path / "none.png")
    state(tmp_path / "run", rows)
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "inside_run.png").is_file()


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="output folder of a training run"):
        read_history(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="no log_history"):
        read_history(tmp_path)


def test_series_skips_missing_values():
    steps, values = series(history(4, True), "knee_student")
    assert steps.tolist() == [1, 2, 3, 4] and values.tolist() == [8, 9, 10, 11]
    assert len(series(history(4, False), "align")[0]) == 0


def test_smoothing_is_a_centred_mean_and_keeps_the_ends():
    values = np.array([0.0, 3.0, 0.0, 3.0, 9.0])
    assert smooth(values, 3).tolist() == [0.0, 1.0, 2.0, 4.0, 9.0]
    assert smooth(values, 1).tolist() == values.tolist()
    line = np.arange(100.0)
    assert np.allclose(smooth(line), line)  # a straight line does not change


def test_pictures(tmp_path):
    runs = {"SFT": history(40, False), "Switch-KD": history(40, True)}
    with Image.open(draw_losses(runs, tmp_path / "a" / "losses.png")) as losses:
        assert losses.width > 2 * losses.height  # three panels: cross-entropy, align, visual switch
    with Image.open(draw_losses({"SFT": runs["SFT"]}, tmp_path / "one.png")) as one:
        assert one.width < losses.width / 2
    with Image.open(draw_inside(runs["Switch-KD"], tmp_path / "knees.png", vocabulary=53, title="t")) as knees:
        assert knees.width > knees.height


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no knee and no gradient"):
        draw_inside(history(3, False), "never.png")
    with pytest.raises(ValueError, match="None of the runs"):
        draw_losses({"empty": []}, "never.png")
    with pytest.raises(ValueError, match="one to 7 runs, not 8"):
        draw_losses({str(number): history(3, False) for number in range(8)}, "never.png")


def test_command(tmp_path, capsys):
    state(tmp_path / "sft", history(10, False))
    state(tmp_path / "switch", history(10, True))
    assert main([str(tmp_path / "sft"), str(tmp_path / "switch"), "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"losses.png", "inside_switch.png"}
    for name in ("a", "b"):
        state(tmp_path / name / "student", history(10, True))
    assert main([*(str(tmp_path / name / "student") for name in ("a", "b")), "--output", str(tmp_path / "two")]) == 0
    names = {"losses.png", "inside_a_student.png", "inside_b_student.png"}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
