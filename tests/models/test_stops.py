"""Stop tokens: all that a checkpoint lists end a completion, and they travel with its weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common.errors import UserError
from common.records import Completion
from models.checkpoint import load_checkpoint, save_checkpoint
from models.decoding import Decoder, Snapshot
from models.denoiser import Denoiser
from models.request import DecodingConfig, Request
from models.stops import stop_ids

MakeDenoiser = Callable[..., Denoiser]
EOS, MASK, LENGTH = 1, 2, 16


@pytest.fixture
def with_stops(
    make_denoiser: MakeDenoiser,
    word_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Decoder]:
    """A decoder whose model lists `listed` (None, a number or a list) as its `eos_token_id`."""

    def make(listed: int | list[int] | None, *args: Any) -> Decoder:
        denoiser = make_denoiser(*args)
        monkeypatch.setattr(denoiser.model.generation_config, "eos_token_id", listed)
        return Decoder(denoiser, word_tokenizer)

    return make


@pytest.mark.parametrize(
    ("listed", "expected"),
    [(None, (1,)), (1, (1,)), (7, (1, 7)), ([9, 1, 7, 9], (1, 9, 7))],
)
def test_the_tokenizers_eos_and_all_that_are_listed(
    with_stops: Callable[..., Decoder], listed: Any, expected: tuple[int, ...]
) -> None:
    decoder = with_stops(listed)
    assert decoder.stops == stop_ids(decoder.denoiser.model, decoder.tokenizer) == expected


def block_end(place: int, size: int) -> int:
    return (place // size + 1) * size


@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
def test_any_of_them_ends_a_completion(
    with_stops: Callable[..., Decoder], prompts: list[tuple[int, ...]], attention: str
) -> None:
    """The same tokens as without the further stops, up to the end of the first one's block."""
    config = DecodingConfig(gen_length=LENGTH, block_size=4)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    free = with_stops(None, attention).decode(requests, config)
    further = [7, 12, 20]
    decoder = with_stops(further, attention)
    shown: list[Snapshot] = []
    found = decoder.decode(requests, config, watch=shown.append)
    ended_by = set()
    for number, (ours, whole) in enumerate(zip(found, free, strict=True)):
        tokens = whole.token_ids + whole.tail_ids
        stops = [place for place, token in enumerate(tokens) if token in (EOS, *further)]
        if not stops:
            assert replace(ours, confidences=()) == replace(whole, confidences=())
            continue
        first = stops[0]
        assert ours.token_ids == tokens[: first + 1]
        assert ours.tail_ids == tokens[first + 1 : block_end(first, 4)]
        assert ours.finish_reason == "eos"
        text = decoder.tokenizer.decode(tokens[:first], skip_special_tokens=True)
        assert ours.text == text
        last = [snapshot for snapshot in shown if snapshot.request == number][-1]
        assert last.text == first
        ended_by.add(ours.token_ids[-1])
    assert len(ended_by - {EOS}) > 1


def test_early_exit_knows_them(
    with_stops: Callable[..., Decoder], prompts: list[tuple[int, ...]]
) -> None:
    """A canvas in one block: done as soon as all up to the first stop token is decided."""
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    decoder = with_stops([7, 12, 20], "bidirectional")

    def texts(early: bool) -> list[Completion]:
        return decoder.decode(requests, DecodingConfig(gen_length=LENGTH, early_exit=early))

    pairs = list(zip(texts(early=True), texts(early=False), strict=True))
    assert all(short.token_ids == long.token_ids for short, long in pairs)
    assert any(len(short.step_map) < len(long.step_map) for short, long in pairs)


def save(folder: Path, decoder: Decoder) -> None:
    save_checkpoint(folder, decoder.denoiser.model, decoder.tokenizer, decoder.denoiser.spec)


def test_they_are_saved_and_loaded(with_stops: Callable[..., Decoder], tmp_path: Path) -> None:
    save(tmp_path / "a", with_stops([1, 9, 7]))
    assert json.loads((tmp_path / "a/generation_config.json").read_text())["eos_token_id"] == [
        1, 9, 7,
    ]  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "a", local_files_only=True)
    assert stock.generation_config.eos_token_id == [1, 9, 7]
    loaded = load_checkpoint(tmp_path / "a")
    again = Decoder(loaded.denoiser, loaded.tokenizer)
    assert again.stops == (1, 9, 7)
    save(tmp_path / "b", again)
    loaded = load_checkpoint(tmp_path / "b", dtype=torch.bfloat16)
    assert stop_ids(loaded.denoiser.model, loaded.tokenizer) == (1, 9, 7)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([1, MASK], "eos_token_id 2 in generation_config.json, .* is the mask token; take it out"),
        ([1, 24], "eos_token_id 24 in generation_config.json, .* is no token of 24; take it out"),
        (-1, "eos_token_id -1 .* is no token of 24"),
    ],
)
def test_tokens_that_cannot_stop_anything(
    with_stops: Callable[..., Decoder], tmp_path: Path, listed: Any, message: str
) -> None:
    save(tmp_path, with_stops(1))
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": listed}))
    with pytest.raises(UserError, match=message) as raised:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
