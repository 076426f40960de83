"""Stages in order: files, reuse, reproducibility, and refusals that leave nothing behind."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import pretrain.train
from common.errors import UserError
from models.checkpoint import import_checkpoint, load_checkpoint
from models.decoding import Decoder, DecodingConfig, Request
from models.public import ImportOptions
from models.tokenizer import encode_prompt
from pretrain.config import PretrainConfig
from pretrain.data import RowStream
from pretrain.sources import load_examples
from pretrain.stages import run_stage
from pretrain.train import Pretraining, main, stage_folder

ROOT = Path(__file__).resolve().parents[2]
MakeValues = Callable[..., dict[str, Any]]
NAMES = ["ar", "block", "sft"]


def config_of(values: dict[str, Any]) -> PretrainConfig:
    return PretrainConfig.model_validate_json(json.dumps(values))


def change(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A deep copy with `a.0.b` replaced."""
    out = json.loads(json.dumps(values))
    *path, last = key.split(".")
    at = out
    for part in path:
        at = at[int(part)] if part.isdigit() else at[part]
    at[last] = value
    return out


def weights(folder: Path) -> torch.Tensor:
    model = load_checkpoint(folder).denoiser
    return torch.cat([value.detach().flatten() for value in model.parameters()])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a finished run of all three stages lies; made by the first test that needs it."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(finished: Path, make_values: MakeValues, memory: Any) -> Path:
    if not finished.exists():
        Pretraining(config_of(make_values(finished))).run(memory, memory)
    return finished


# What a run leaves


def test_stages_in_order(tmp_path: Path, make_values: MakeValues, memory: Any) -> None:
    folders = Pretraining(config_of(make_values(tmp_path))).run(memory, memory)
    assert folders == [stage_folder(tmp_path, name) for name in NAMES]
    assert [(at, step) for at, step, _ in memory.records] == [(n, s) for n in NAMES for s in (1, 2)]
    assert {
        "pretrain/loss",
        "pretrain/grad_norm",
        "pretrain/u_max",
        "pretrain/fallback_rate",
    } < set(memory.records[0][2])
    assert memory.records[0][2]["perf/tokens_per_s"] > 0
    specs = [load_checkpoint(folder).spec for folder in folders]
    assert [spec.attention for spec in specs] == ["causal", "block_causal", "block_causal"]
    assert not list((tmp_path / "stages").glob(".*"))  # no partial folder


def test_a_stage_loads_in_stock_transformers(run: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    for name in NAMES:
        folder = stage_folder(run, name)
        stock = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        ours = load_checkpoint(folder).denoiser.model.eval()
        with torch.no_grad():
            assert torch.equal(stock(ids).logits, ours(ids).logits)
        assert not list(folder.glob("*.py"))


def test_every_stage_moves_on_from_the_one_before(run: Path) -> None:
    ar, block, sft = (weights(stage_folder(run, name)) for name in NAMES)
    for before, after in ((ar, block), (block, sft)):
        moved = (after - before).abs()
        assert 0 < float(moved.max()) < 0.02  # two steps of Adam at 3e-3, not a new model


def test_a_stage_tokenizes_as_it_was_trained(run: Path) -> None:
    """The trained vocabulary reads the splits the same way after loading."""
    tokenizers = [load_checkpoint(stage_folder(run, name)).tokenizer for name in NAMES]
    for example in load_examples("embedded:sft", 10, seed=0):
        ids = [encode_prompt(t, example.prompt) + tuple(t.encode(example.text)) for t in tokenizers]
        assert ids[0] == ids[1] == ids[2]
        assert example.text in tokenizers[0].decode(ids[0])


def test_a_stage_decodes(run: Path) -> None:
    checkpoint = load_checkpoint(stage_folder(run, "sft"))
    prompt = encode_prompt(checkpoint.tokenizer, "# sum")
    decoder = Decoder(checkpoint.denoiser, checkpoint.tokenizer)
    (found,) = decoder.decode([Request(prompt, 0)], DecodingConfig(gen_length=8))
    assert len(found.token_ids) <= 8


def test_same_seed_same_weights(
    run: Path, tmp_path: Path, make_values: MakeValues, memory: Any
) -> None:
    folders = Pretraining(config_of(make_values(tmp_path))).run(memory, memory)
    for folder, name in zip(folders, NAMES, strict=True):
        assert torch.equal(weights(folder), weights(stage_folder(run, name)))


def test_loss_falls(tmp_path: Path, make_values: MakeValues, memory: Any) -> None:
    values = make_values(tmp_path)
    values["stages"] = [change(values, "stages.0.steps", 25)["stages"][0]]
    Pretraining(config_of(values)).run(memory, memory)
    losses = memory.series("ar")
    assert losses[0] > 5.0 and losses[-1] < 0.8 * losses[0]


# Reuse


def test_finished_stages_are_reused(run: Path, make_values: MakeValues, memory: Any) -> None:
    folders = Pretraining(config_of(make_values(run))).run(memory, memory)
    assert memory.records == []
    assert [text for text in memory.said if "reused" in text] == memory.said
    assert len(memory.said) == 3 and folders == [stage_folder(run, name) for name in NAMES]


@pytest.mark.parametrize(
    ("key", "value", "again"),
    [
        ("stages.0.steps", 1, ["ar", "block", "sft"]),  # later stages start from it
        ("stages.1.warmup.steps", 2, ["block", "sft"]),
        ("stages.2.optim.lr", 1e-3, ["sft"]),
        ("run.seed", 1, ["ar", "block", "sft"]),
        ("architecture.hidden_size", 16, ["ar", "block", "sft"]),
        ("stages.2.count", 30, ["ar", "block", "sft"]),  # the tokenizer is trained on all text
        ("run.name", "renamed", []),
        ("threads", 1, []),
        ("resume", "never", ["ar", "block", "sft"]),
    ],
)
def test_what_is_made_again(
    run: Path,
    tmp_path: Path,
    make_values: MakeValues,
    memory: Any,
    key: str,
    value: Any,
    again: list[str],
) -> None:
    shutil.copytree(run, tmp_path / "run")
    Pretraining(config_of(change(make_values(tmp_path / "run"), key, value))).run(memory, memory)
    assert list(dict.fromkeys(at for at, _, _ in memory.records)) == again


def test_an_interrupted_stage_is_not_finished(
    tmp_path: Path, make_values: MakeValues, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(make_values(tmp_path))
    log = memory.log

    def interrupt(values: dict[str, float], *, step: int, stage: str) -> None:
        log(values, step=step, stage=stage)
        if stage == "block" and step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(memory, "log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Pretraining(config).run(memory, memory)
    assert stage_folder(tmp_path, "ar").is_dir() and not stage_folder(tmp_path, "block").exists()
    monkeypatch.undo()
    memory.records.clear()
    Pretraining(config).run(memory, memory)
    assert list(dict.fromkeys(at for at, _, _ in memory.records)) == ["block", "sft"]


def test_a_changed_data_file_is_learned_again(
    tmp_path: Path, make_values: MakeValues, memory: Any
) -> None:
    path = tmp_path / "code.jsonl"
    values = change(make_values(tmp_path / "run"), "stages.0.data", str(path))
    values["stages"] = values["stages"][:1]
    for text in ("x = 1", "x = 2"):
        path.write_text(json.dumps({"text": text}) + "\n")
        memory.records.clear()
        Pretraining(config_of(values)).run(memory, memory)
        assert len(memory.records) == 2


def test_start_from_a_checkpoint(
    run: Path, tmp_path: Path, make_values: MakeValues, memory: Any
) -> None:
    values = make_values(tmp_path, start=str(stage_folder(run, "block")), architecture={})
    values["stages"] = values["stages"][2:]
    (folder,) = Pretraining(config_of(values)).run(memory, memory)
    before = load_checkpoint(stage_folder(run, "block"))
    after = load_checkpoint(folder)
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    moved = (weights(folder) - weights(stage_folder(run, "block"))).abs()
    assert 0 < float(moved.max()) < 0.02


def test_start_from_a_tokenizer_without_a_mask_token(
    run: Path, tmp_path: Path, make_values: MakeValues, memory: Any
) -> None:
    """Public tokenizers often have none; diffusion.json says which id it is."""
    start = Path(shutil.copytree(stage_folder(run, "block"), tmp_path / "start"))
    settings = json.loads((start / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (start / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_checkpoint(start).tokenizer.mask_token_id is None
    values = make_values(tmp_path / "run", start=str(start), architecture={})
    values["stages"] = values["stages"][2:]
    (folder,) = Pretraining(config_of(values)).run(memory, memory)
    found = load_checkpoint(folder)
    assert found.spec.mask_token_id == found.tokenizer.mask_token_id == 2


@pytest.mark.peft
def test_adapters_of_every_stage(
    run: Path, tmp_path: Path, make_values: MakeValues, memory: Any
) -> None:
    """Each stage merges its own and the next one starts from the sum: stock folders both."""
    start = stage_folder(run, "ar")
    values = make_values(tmp_path / "run", start=str(start), architecture={})
    values["stages"] = values["stages"][1:]
    values["engine"] = values.get("engine", {}) | {"lora": {"rank": 4, "targets": ["q_proj"]}}
    folders = [start, *Pretraining(config_of(values)).run(memory, memory)]
    states = [dict(load_checkpoint(folder).denoiser.model.named_parameters()) for folder in folders]
    for old, new in pairwise(states):
        assert list(new) == list(old)
        moved = {name.split(".")[-2] for name in new if not torch.equal(new[name], old[name])}
        assert moved == {"q_proj"}


def test_adaptation_of_a_plain_ar_model(
    run: Path, tmp_path: Path, make_values: MakeValues, memory: Any
) -> None:
    """A folder as anybody's AR model: no diffusion.json, no mask token, a full embedding."""
    plain = Path(shutil.copytree(stage_folder(run, "ar"), tmp_path / "plain"))
    (plain / "diffusion.json").unlink()
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    tokens = (plain / "tokenizer.json").read_text()
    (plain / "tokenizer.json").write_text(tokens.replace("<|mask|>", "<|other|>"))
    plan = import_checkpoint(plain, tmp_path / "start", ImportOptions())
    rows = load_checkpoint(stage_folder(run, "ar")).denoiser.model.config.vocab_size
    assert plan.grown and plan.spec.mask_token_id == rows
    values = make_values(tmp_path / "run", start=str(tmp_path / "start"), architecture={})
    values["stages"] = values["stages"][1:]
    folders = Pretraining(config_of(values)).run(memory, memory)
    found = load_checkpoint(folders[-1])
    assert found.spec.attention == "block_causal"
    assert found.spec.mask_token_id == found.tokenizer.mask_token_id == rows


def test_other_objectives(tmp_path: Path, make_values: MakeValues, memory: Any) -> None:
    """Causal diffusion, then bidirectional: the curricula of DiffuCoder."""
    values = make_values(tmp_path)
    values["stages"][1] |= {"objective": "causal_diffusion", "logit_shift": True}
    values["stages"][2] |= {"objective": "bidirectional", "logit_shift": True}
    folders = Pretraining(config_of(values)).run(memory, memory)
    specs = [load_checkpoint(folder).spec for folder in folders]
    assert [spec.attention for spec in specs] == ["causal", "causal", "bidirectional"]
    assert all(spec.logit_shift for spec in specs)
    values["stages"][2]["canvas"] = 8
    with pytest.raises(UserError, match=r"stages\.sft \(embedded:sft\): example 0 .* canvas is 8"):
        Pretraining(config_of(values))


@pytest.mark.parametrize("origin", ["prompt", "sequence"])
def test_the_origin_of_blocks(
    tmp_path: Path,
    make_values: MakeValues,
    memory: Any,
    monkeypatch: pytest.MonkeyPatch,
    origin: str,
) -> None:
    """A stage's rows are cut as its checkpoint says that they are decoded."""
    streams: list[RowStream] = []

    def remember(stage: Any, engine: Any, stream: RowStream, *rest: Any) -> Any:
        streams.append(stream)
        return run_stage(stage, engine, stream, *rest)

    monkeypatch.setattr(pretrain.train, "run_stage", remember)
    values = make_values(tmp_path)
    values["stages"] = [values["stages"][2] | {"block_origin": origin, "row_length": 512}]
    (folder,) = Pretraining(config_of(values)).run(memory, memory)
    assert load_checkpoint(folder).spec.block_origin == origin
    (rows,) = streams[0].batches(1)
    same = rows.document[:, 1:] == rows.document[:, :-1]
    inside = same & rows.valid[:, 1:]
    opens = (rows.block[:, 1:] != rows.block[:, :-1]) & inside
    on_grid = rows.position[:, 1:][opens] % 4 == 0
    assert bool(on_grid.all()) == (origin == "sequence")
    lengths = rows.position[:, :-1][~same & rows.valid[:, 1:]] + 1  # of all but a row's last
    assert len(lengths) > 4
    assert bool((lengths % 4 == 0).all()) == (origin == "sequence")


# The command


def command(folder: Path, values: dict[str, Any], *arguments: str) -> Result:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, ["--config", str(path), *arguments])


def test_command_runs_and_reuses(run: Path, tmp_path: Path, make_values: MakeValues) -> None:
    result = command(tmp_path, make_values(run))
    assert result.exit_code == 0
    assert result.stdout.count("finished before, reused") == 3


def test_dry_run_prints_and_writes_nothing(tmp_path: Path, make_values: MakeValues) -> None:
    result = command(tmp_path, make_values(tmp_path / "run"), "--dry-run", "run.seed=5")
    assert result.exit_code == 0
    assert yaml.safe_load(result.stdout)["run"]["seed"] == 5
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.sed=1", "run.sed: unknown key"),
        ("stages.1.data=embedded:test", "only embedded:pretrain and embedded:sft"),
        ("stages.1.data=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("stages.2.row_length=16", "stages.sft (embedded:sft): example"),
        ("start=nowhere", "nowhere: no config.json"),
        ("stages", "write it as key=value"),
        ("architecture.hiden_size=8", "architecture.hiden_size: qwen2 has no such key"),
        ("architecture.model_type=qwon", "qwon"),
        ("engine.attention=flash_attention_2", "stages.ar: engine.attention=flash_attention_2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, make_values: MakeValues, override: str, message: str
) -> None:
    result = command(tmp_path, make_values(tmp_path / "run"), override)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("unmask:")]
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    ['{"stage": "block"', "[]", '{"seconds": 1.0}', '{"fingerprint": "a", "seconds": "long"}'],
)
def test_a_damaged_stage_record_names_the_file(
    run: Path, tmp_path: Path, make_values: MakeValues, text: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "stages" / "block" / "stage.json").write_text(text)
    result = command(tmp_path, make_values(copy))
    assert result.exit_code == 2
    assert "stage.json: damaged" in result.stderr and "remove" in result.stderr


def test_missing_config_file(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--config", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2 and "no such config file" in result.stderr


def test_ranks_must_share_the_micro_batches(
    tmp_path: Path, make_values: MakeValues, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"stages\.ar: 2 micro-batches a step .* 4 ranks"):
        Pretraining(config_of(make_values(tmp_path))).run(memory, memory)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_ranks_make_the_same_model(
    tmp_path: Path,
    make_values: MakeValues,
    memory: Any,
    run_two_ranks: Callable[..., list[str]],
) -> None:
    """Two processes on DeepSpeed, stage after stage, against the plain engine on one."""
    alone = Pretraining(config_of(make_values(tmp_path / "one"))).run(memory, memory)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(make_values(tmp_path / "two", engine={"kind": "deepspeed"})))
    run_two_ranks("-m", "pretrain.train", "--config", path)
    for one in alone:
        two = stage_folder(tmp_path / "two", one.name)
        torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=3e-4)
