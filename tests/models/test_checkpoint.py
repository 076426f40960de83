"""Checkpoint folders: stock transformers reads them; damaged ones end in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common.errors import UserError
from models.checkpoint import load_checkpoint, new_model, save_checkpoint
from models.denoiser import Denoiser
from models.spec import DiffusionSpec

ROOT = Path(__file__).resolve().parents[2]
SPEC = DiffusionSpec(mask_token_id=2, logit_shift=False, attention="block_causal", block_size=4)
IDS = torch.tensor([[5, 6, 7, 8]])
TINY = {
    "model_type": "qwen2",
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "sft"
    save_checkpoint(folder, new_model(TINY, 0), word_tokenizer, SPEC)
    return folder


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_stock_transformers_reads_it(
    word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tied: bool, model_type: str
) -> None:
    model = new_model({**TINY, "model_type": model_type, "tie_word_embeddings": tied}, 3).eval()
    save_checkpoint(tmp_path / "c", model, word_tokenizer, SPEC)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "c", local_files_only=True).eval()
    ours = load_checkpoint(tmp_path / "c")
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(stock(IDS).logits, expected)
        assert torch.equal(ours.denoiser.model.eval()(IDS).logits, expected)
    assert ours.spec == SPEC
    assert not list((tmp_path / "c").glob("*.py"))  # no remote code


def test_given_state_replaces_the_weights(
    word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """What an engine hands out: HF names, tied weights once."""
    architecture = {**TINY, "tie_word_embeddings": True}
    model, other = new_model(architecture, 0), new_model(architecture, 1)
    state = {name: value.detach() for name, value in other.named_parameters()}
    assert "lm_head.weight" not in state
    save_checkpoint(tmp_path, model, word_tokenizer, SPEC, state)
    found = load_checkpoint(tmp_path).denoiser.model
    for name, value in found.named_parameters():
        assert torch.equal(value, state[name]), name
    assert found.lm_head.weight is found.model.embed_tokens.weight


@pytest.mark.slow
@pytest.mark.peft
def test_saving_says_nothing(good: Path, tmp_path: Path) -> None:
    """peft brings accelerate, with which transformers imports DeepSpeed to save a model."""
    script = (
        "import sys; from pathlib import Path\n"
        "from models.checkpoint import load_checkpoint, save_checkpoint\n"
        "found = load_checkpoint(Path(sys.argv[1]))\n"
        "model = found.denoiser.model\n"
        "save_checkpoint(Path(sys.argv[2]), model, found.tokenizer, found.spec)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(good), str(tmp_path / "again")],
        env=environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_dtype_is_chosen_at_loading(good: Path) -> None:
    model = load_checkpoint(good, dtype=torch.bfloat16).denoiser.model
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert {v.dtype for v in load_checkpoint(good).denoiser.parameters()} == {torch.float32}


def test_parameter_names_carry_one_prefix(good: Path) -> None:
    checkpoint = load_checkpoint(good)
    stock = {f"model.{name}" for name, _ in checkpoint.denoiser.model.named_parameters()}
    assert {name for name, _ in checkpoint.denoiser.named_parameters()} == stock


def test_new_model_is_a_function_of_its_seed() -> None:
    def weights(model: nn.Module) -> torch.Tensor:
        return torch.cat([value.flatten() for value in model.parameters()])

    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = weights(new_model(TINY, 1))
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's randomness moved
    torch.manual_seed(6)
    assert torch.equal(weights(new_model(TINY, 1)), one)
    assert not torch.equal(weights(new_model(TINY, 2)), one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 16}, r"architecture\.hiden_size: qwen2 has no such key"),
        ({"hidden_size": "16"}, "architecture: .*hidden_size"),
        ({"model_type": "qwon"}, "architecture: .*qwon"),
    ],
)
def test_impossible_architecture(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        new_model({**TINY, **change}, 0)
    assert "\n" not in str(raised.value)


def edit_json(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def drop_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


BREAK = {
    "no folder": (shutil.rmtree, r"no config\.json"),
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "no spec": (lambda f: (f / "diffusion.json").unlink(), r"diffusion\.json: missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot load the weights"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"cut"),
        "cannot load the weights",
    ),
    "other sizes": (lambda f: edit_json(f / "config.json", hidden_size=16), "cannot load"),
    "unknown type": (lambda f: edit_json(f / "config.json", model_type="qwon"), "cannot load"),
    # transformers fills the gap with random numbers and a warning.
    "lacking weights": (drop_tensor, r"lack model\.layers\.0\.mlp\.up_proj\.weight"),
    "more layers": (
        lambda f: edit_json(
            f / "config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2
        ),
        "weights lack",
    ),
    "contradiction": (lambda f: edit_json(f / "config.json", num_hidden_layers=2), "cannot load"),
    "adapters": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        r"has an adapter_config\.json; merge",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer there"),
    "other mask": (
        lambda f: edit_json(f / "diffusion.json", mask_token_id=3),
        "the tokenizer says 2; the folder mixes two checkpoints",
    ),
}


@pytest.mark.parametrize("case", BREAK)
def test_a_bad_folder_ends_in_one_line(copy: Path, case: str) -> None:
    damage, message = BREAK[case]
    damage(copy)
    with pytest.raises(UserError, match=message) as raised:
        load_checkpoint(copy)
    assert str(copy) in str(raised.value) and "\n" not in str(raised.value)


def test_a_tokenizer_too_large_for_the_model(
    word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, new_model({**TINY, "vocab_size": 20}, 0), word_tokenizer, SPEC)
    with pytest.raises(UserError, match="tokenizer has 24 tokens but the model embeds 20"):
        load_checkpoint(tmp_path)


def test_checkpoint_knows_its_folder(good: Path) -> None:
    checkpoint = load_checkpoint(good)
    assert checkpoint.folder == good and isinstance(checkpoint.denoiser, Denoiser)
    assert checkpoint.tokenizer.eos_token_id == 1
