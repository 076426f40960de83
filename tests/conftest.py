"""What all tests share: one process for all Ray tests and one for all Docker tests, and skips that
say what they need.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

# No limit per example: a machine that is busy is not a test that fails.
hypothesis.settings.register_profile("unmask", deadline=None)
hypothesis.settings.load_profile("unmask")


def _missing(marker: str) -> str | None:
    """Why this machine cannot run tests with `marker`, or None if it can."""
    if marker == "gpu":
        import torch  # only if some test asks: it takes seconds

        return None if torch.cuda.is_available() else "needs a CUDA GPU"
    if marker == "docker":
        return _missing_for_docker()
    extra = {"vllm": "vllm", "peft": "lora"}.get(marker)
    if extra is not None and importlib.util.find_spec(marker) is None:
        return f"needs the {extra} extra"
    return None


def _missing_for_docker() -> str | None:
    if os.geteuid() != 0:
        return "needs root, to start a Docker engine"
    tools = [t for t in ("dockerd", "containerd", "debootstrap") if shutil.which(t) is None]
    if tools:
        return f"needs {', '.join(tools)} (Debian: apt install docker.io debootstrap)"
    return None if importlib.util.find_spec("docker") else "needs the docker extra"


@pytest.hookimpl(tryfirst=True)  # before xdist turns the groups into parts of the names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for group in ("ray", "docker"):
            if item.get_closest_marker(group):
                item.add_marker(pytest.mark.xdist_group(group))
        for marker in ("gpu", "docker", "vllm", "peft"):
            reason = _missing(marker) if item.get_closest_marker(marker) else None
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def run_two_ranks() -> Callable[..., list[str]]:
    """`run_two_ranks(__file__, folder)`: Python with these arguments, twice, as torchrun would.

    Both find each other by what is in their environment, and end well; what each said on stdout.
    """

    def run(*arguments: object) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=environment | {"RANK": str(rank)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            outputs = [rank.communicate(timeout=250)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [0, 0]
        return outputs

    return run


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """`write_checkpoint(folder, logit_shift=..., **architecture)`: 2 layers of width 32."""
    # Only if some test asks: torch takes seconds.
    from models.checkpoint import new_model, save_checkpoint
    from models.spec import DiffusionSpec
    from models.tokenizer import train_tokenizer

    def write(
        folder: Path,
        *,
        logit_shift: bool = False,
        attention: Any = "block_causal",
        block_size: int | None = 4,
        words: Sequence[str] = ("def f(x):\n    return x + 1\n",) * 3,
        vocab_size: int = 262,
        seed: int = 0,
        **changes: Any,
    ) -> Path:
        tokenizer = train_tokenizer(words, vocab_size=vocab_size)
        architecture = {
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "eos_token_id": tokenizer.eos_token_id,
        }
        spec = DiffusionSpec(
            mask_token_id=int(tokenizer.mask_token_id),
            logit_shift=logit_shift,
            attention=attention,
            block_size=block_size,
        )
        save_checkpoint(folder, new_model(architecture | changes, seed=seed), tokenizer, spec)
        return folder

    return write
