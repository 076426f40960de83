"""What a checkpoint and the asked decoding cannot have in common: one line, before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rl.commands
import rl.evaluate
import rl.train
from models.spec import DiffusionSpec
from rl.cli import app

CONFIG = str(Path(__file__).parents[2] / "configs" / "rl" / "tiny_cpu.yaml")
COMMANDS = ("train", "evaluate", "generate")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    """Two layers, keys and values, 2 heads of 8 numbers of 4 bytes: 256 bytes a token."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "good")


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights, no workers, no sandbox."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("work was started")

    for module, name in [
        (rl.train, "make_cluster"),
        (rl.evaluate, "load_checkpoint"),
        (rl.evaluate, "Rewarder"),
        (rl.commands, "load_checkpoint"),
    ]:
        monkeypatch.setattr(module, name, refuse)


def run(
    command: str, model: Path, tmp_path: Path, *decoding: str, precision: str = "fp32"
) -> tuple[int, str]:
    """(exit code, stderr); `decoding` are keys of rollout.decoding, for generate its options."""
    keys = [f"rollout.decoding.{word}" for word in decoding]
    small = ["data.train_count=16", "data.test_count=4", f"engine.precision={precision}", *keys]
    words = {
        "train": ["--config", CONFIG, f"model.path={model}", f"run.folder={tmp_path}/run", *small],
        "evaluate": [str(model), "--config", CONFIG, *small],
        "generate": [
            str(model), "add one",
            *(f"--{word.replace('_', '-')}" for word in decoding),
        ],
    }  # fmt: skip
    found = CliRunner().invoke(app, [command, *words[command]])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stderr


def assert_refused(found: tuple[int, str], tmp_path: Path, *parts: str) -> None:
    code, err = found
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and err.startswith("unmask: ")
    assert all(part in err for part in parts), err
    assert not (tmp_path / "run").exists()


def change(path: Path, **values: object) -> None:
    """Set keys of a JSON file; None removes one."""
    merged = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))


def unknown_type(folder: Path) -> None:
    change(folder / "config.json", model_type="qwon")


def unknown_family(folder: Path) -> None:
    unknown_type(folder)
    (folder / "diffusion.json").unlink()


def no_mask(folder: Path) -> None:
    change(folder / "diffusion.json", mask_token_id=None)


def public_without_mask(folder: Path) -> None:
    change(folder / "config.json", model_type="Dream")
    change(folder / "tokenizer_config.json", mask_token=None)
    (folder / "diffusion.json").unlink()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (unknown_type, ("config.json: ", "model type `qwon`", "`unmask import`")),
        (unknown_family, ("config.json: model_type 'qwon' is none of Dream, sdar",)),
        (no_mask, ("diffusion.json: missing", "'mask_token_id'")),
        (public_without_mask, ("no mask token", "--mask-token TEXT")),
    ],
)
def test_a_checkpoint_that_cannot_denoise(
    good: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], None],
    parts: tuple[str, ...],
) -> None:
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    damage(bad)
    assert_refused(run(command, bad, tmp_path), tmp_path, str(bad), *parts)


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("block_size=8", ("rollout.decoding.block_size 8", "trained with 4")),
        ("gen_length=62", ("rollout.decoding.gen_length 62", "multiple of block_size 4")),
        ("steps_per_block=5", ("rollout.decoding.steps_per_block 5 exceeds block_size 4",)),
        ("cache=dual", ("rollout.decoding.cache dual is for bidirectional",)),
    ],
)
def test_sizes_that_contradict_the_checkpoint(
    good: Path, tmp_path: Path, command: str, word: str, parts: tuple[str, ...]
) -> None:
    assert_refused(run(command, good, tmp_path, word), tmp_path, *parts)


@pytest.mark.parametrize("command", COMMANDS)
def test_too_little_memory_for_one_request(good: Path, tmp_path: Path, command: str) -> None:
    """4096 tokens of 256 bytes fill one MiB; prompts and the spare place come on top."""
    assert_refused(
        run(command, good, tmp_path, "gen_length=4096", "cache_mib=1"),
        tmp_path,
        "decoding.cache_mib 1: one request of 4",
        "bytes of key/value cache; set it to 2 or more",
    )


def test_half_precision_rollouts_need_half_the_memory(good: Path, tmp_path: Path) -> None:
    words = ["gen_length=4096", "cache_mib=1"]
    assert run("train", good, tmp_path, *words)[0] == 2
    with pytest.raises(AssertionError, match="work was started"):
        run("train", good, tmp_path, *words, precision="bf16")


def test_generate_says_that_it_rounds_up(good: Path) -> None:
    found = CliRunner().invoke(app, ["generate", str(good), "add one", "--gen-length", "62"])
    assert found.stderr == "--gen-length 62 rounded up to 64: blocks of 4\n"
    assert str(found.exception) == "work was started"  # with 64


def test_training_needs_what_stands_behind_the_end(good: Path, tmp_path: Path) -> None:
    canvas = Path(shutil.copytree(good, tmp_path / "canvas"))
    DiffusionSpec(
        mask_token_id=2, logit_shift=False, attention="bidirectional", block_size=None
    ).save(canvas)
    said = "rollout.decoding.early_exit true keeps nothing"
    assert_refused(run("train", canvas, tmp_path, "early_exit=true"), tmp_path, said)
    with pytest.raises(AssertionError, match="work was started"):  # nothing is trained on here
        run("evaluate", canvas, tmp_path, "early_exit=true")
