"""The runner: lanes, reuse, failures, and how far a script is."""

from __future__ import annotations

import json
import re
import threading
import time

import pytest

from tinyllava_switchkd.launch.stages import run_name
from tinyllava_switchkd.quickstart import runner as runner_module
from tinyllava_switchkd.quickstart.plan import Plan, Stage, Workspace, fingerprint
from tinyllava_switchkd.quickstart.runner import (
    Runner,
    StageError,
    is_made,
    read_stamp,
    stage_mark,
    training_seconds,
    write_stamp,
)

SCRIPT = """\
echo "begun with $MAX_STEPS steps, $COLOUR" >&2
printf '  50%%|##| 2/4 [00:01<00:01]\\r' >&2
mkdir -p "$1"
echo once >> "$1/../calls"
if [ "$COLOUR" = broken ]; then echo "the reason"; exit 3; fi
echo '{"log_history": [{"step": 1, "loss": 1.0}, {"step": 4, "train_runtime": 1.25}]}' > "$1/trainer_state.json"
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.sh").write_text(SCRIPT)
    monkeypatch.setattr("tinyllava_switchkd.quickstart.plan.SCRIPTS", tmp_path / "scripts")
    return tmp_path


def stage_of(root, name="run", colour="red", steps=4, needs=()) -> Stage:
    output = root / "out" / name
    return Stage(name, "train.sh", (str(output),), {"COLOUR": colour}, output, tuple(needs), steps)


def calls(root) -> int:
    file = root / "out" / "calls"
    return len(file.read_text().splitlines()) if file.exists() else 0


def quiet(root) -> Runner:
    return Runner(root / "logs", quiet=True)


def test_a_finished_stage_is_not_run_again(script):
    with quiet(script) as runner:
        assert runner.stage(stage_of(script)) == 1.25
        assert runner.stage(stage_of(script)) == 1.25
    assert calls(script) == 1
    assert read_stamp(script / "out" / "run")["steps"] == 4
    assert "begun with 4 steps, red" in (script / "logs" / "run.log").read_text()


def test_other_settings_or_other_input_run_it_again(script):
    data = script / "data.json"
    data.write_text("[]")
    write_stamp(data, "first")
    with quiet(script) as runner:
        runner.stage(stage_of(script, needs=[data]))
        runner.stage(stage_of(script, needs=[data], colour="blue"))
        runner.stage(stage_of(script, needs=[data], colour="blue", steps=8))
        assert calls(script) == 3
        write_stamp(data, "second")
        runner.stage(stage_of(script, needs=[data], colour="blue", steps=8))
    assert calls(script) == 4


def test_a_half_finished_stage_starts_anew(script):
    output = script / "out" / "run"
    output.mkdir(parents=True)
    (output / "left-over").write_text("")
    with quiet(script) as runner:
        runner.stage(stage_of(script))
    assert not (output / "left-over").exists() and calls(script) == 1


def test_missing_input_and_failing_script_are_told(script):
    with quiet(script) as runner:
        with pytest.raises(StageError, match=r"run needs .*nothing\.json, which is not there"):
            runner.stage(stage_of(script, needs=[script / "nothing.json"]))
        with pytest.raises(StageError, match=r"(?s)run failed \(exit code 3\).*run\.log:\n.*the reason"):
            runner.stage(stage_of(script, colour="broken"))
    assert read_stamp(script / "out" / "run") is None


def test_lanes_run_at_once_and_a_failure_stops_all(tmp_path):
    both = threading.Barrier(2, timeout=20)
    done = []

    def meet(runner):
        both.wait()
        done.append("met")

    with Runner(tmp_path, lanes=2, quiet=True) as runner:
        runner.run([[meet, lambda _: done.append("next")], [meet]])
    assert sorted(done) == ["met", "met", "next"]

    def fail(runner):
        raise StageError("no")

    def wait(runner):
        both.wait()
        time.sleep(0.2)

    def fail_then(runner):
        both.wait()
        fail(runner)

    with Runner(tmp_path, lanes=2, quiet=True) as runner, pytest.raises(StageError, match="no"):
        runner.run([[fail_then], [wait, lambda _: done.append("never")]])
    assert "never" not in done


def test_stopping_ends_a_running_script(script):
    (script / "scripts" / "train.sh").write_text('echo $$ > "$1.pid"\nsleep 60\n')
    (script / "out").mkdir()
    with quiet(script) as runner:

        def lane_job():
            with pytest.raises(runner_module.Interrupted):
                runner.stage(stage_of(script))

        lane = threading.Thread(target=lane_job)
        lane.start()
        for _ in range(100):
            if (script / "out" / "run.pid").exists():
                break
            time.sleep(0.05)
        started = time.monotonic()
        runner._stop.set()
        lane.join(20)
        assert not lane.is_alive() and time.monotonic() - started < 15


def test_progress_is_the_runs_own_bar(tmp_path):
    log = tmp_path / "log"
    log.write_text("Loading weights: 100%| 67/67 [00:00<00:00]\n")
    assert runner_module._progress(log, 800) == (0.0, "starting")
    log.write_text("Loading: 67/67 [00:00\r  1%| 8/800 [00:01<\r 25%| 200/800 [00:05<00:10, 40it/s]\r")
    assert runner_module._progress(log, 800) == (0.25, "200/800")


def test_seconds_are_the_trainers(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"train_runtime": 7.5}]}))
    assert training_seconds(tmp_path) == 7.5
    with pytest.raises(StageError, match="no finished training run"):
        training_seconds(tmp_path / "nowhere")


def test_stamps(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file.json"
    folder.mkdir()
    file.write_text("{}")
    for path in (folder, file):
        assert not is_made(path, "mark")
        write_stamp(path, "mark", seconds=2.0)
        assert is_made(path, "mark") and not is_made(path, "other") and read_stamp(path)["seconds"] == 2.0
    file.unlink()
    assert not is_made(file, "mark")
    assert fingerprint(Plan()) == fingerprint(Plan()) != fingerprint(Plan(student_steps=1))


def test_plan_is_made_of_the_projects_own_scripts(tmp_path):
    """The three students of a seed differ in nothing but the script, the teacher and the number of steps."""
    space = Workspace(tmp_path, Plan())
    sft, switch, equal = space.student_sft(1), space.student_switch(1), space.equal_time(1, 20.0, 50.0)
    for stage in (space.tower_stage(), space.llm_stage("student"), *space.teacher_stages(), sft, switch, equal):
        assert (runner_module.Path(stage.command[1])).is_file(), stage.script
    assert switch.arguments[:-1] == sft.arguments and switch.arguments[-1] == str(space.teacher)
    assert switch.environment == sft.environment
    assert equal.steps == 2.5 * sft.steps
    changed = {name for name in equal.environment if equal.environment[name] != sft.environment.get(name)}
    assert changed == {"MAX_STEPS", "PRETRAINED_PATH"}
    assert equal.environment["PRETRAINED_PATH"] == str(space.student_pt(1).output)
    assert len({stage.output for stage in (sft, switch, equal)}) == 3
    assert all(space.student_pt(1).output in stage.needs for stage in (sft, switch, equal))


def test_outputs_are_where_the_scripts_write(tmp_path):
    """The names are derived twice, here and by the launcher."""
    space = Workspace(tmp_path, Plan())
    for stage, kind in ((space.student_pt(3), "pretrain"), (space.student_sft(3), "finetune")):
        llm, tower, version = stage.arguments[2], stage.arguments[3], stage.arguments[-3]
        assert f"{stage.environment['OUTPUT_ROOT']}/{run_name(llm, tower, version, kind)}" == str(stage.output)


def test_mark_names_everything_that_matters(script):
    first = stage_mark(stage_of(script))
    assert first == stage_mark(stage_of(script))
    assert len({first, stage_mark(stage_of(script, colour="blue")), stage_mark(stage_of(script, steps=5))}) == 3
    assert re.fullmatch(r"[0-9a-f]{16}", first)
