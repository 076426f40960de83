"""Plain lines are few, name the stage and the time left; a terminal gets a bar that goes away."""

import io

from rich.console import Console

from common.progress import LineProgress, open_progress


def test_plain_lines_are_few_and_tell_what_is_left() -> None:
    lines: list[str] = []
    now = [0.0]
    progress = LineProgress(lines.append, every_s=10.0, clock=lambda: now[0])
    progress.stage("sft", total=100)
    for done in range(1, 101):
        now[0] = float(done)  # one second a step
        progress.update(done, loss=2.0 / done)
    assert lines[0] == "sft: started"
    assert lines[1] == "sft: 10/100  loss 0.2  1:30 left"
    assert lines[-1] == "sft: 100/100  loss 0.02  in 1:40"
    assert len(lines) == 11


def test_the_pace_after_a_resume_counts_new_steps_only() -> None:
    lines: list[str] = []
    now = [0.0]
    progress = LineProgress(lines.append, every_s=1.0, clock=lambda: now[0])
    progress.stage("rl", total=100, done=90)
    now[0] = 20.0
    progress.update(92, reward=0.5)
    assert lines[-1] == "rl: 92/100  reward 0.5  1:20 left"


def test_unknown_length_and_hours() -> None:
    lines: list[str] = []
    now = [0.0]
    progress = LineProgress(lines.append, every_s=1.0, clock=lambda: now[0])
    progress.stage("starting Ray", total=None)
    now[0] = 2.0
    progress.update(1)
    assert lines[-1] == "starting Ray: 1"
    progress.stage("rl", total=3)
    now[0] = 3602.0
    progress.update(1)
    assert lines[-1] == "rl: 1/3  2:00:00 left"


def test_no_terminal_means_plain_lines() -> None:
    stream = io.StringIO()
    with open_progress(Console(file=stream)) as progress:
        progress.stage("ar", total=2)
        progress.update(2, loss=1.0)
        progress.say("[not markup]")
    assert stream.getvalue() == "ar: started\nar: 2/2  loss 1  in 0:00\n[not markup]\n"


def test_a_terminal_gets_a_bar_with_stage_and_value() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with open_progress(console) as progress:
        progress.update(1)  # before any stage: nothing to show, nothing to crash
        progress.stage("block", total=4)
        progress.update(3, loss=0.5)
        progress.stage("sft", total=4)
        progress.say("block: reused")
    text = stream.getvalue()
    assert "sft" in text and "block: reused" in text
