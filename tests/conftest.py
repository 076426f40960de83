"""What all tests share: one process for all Ray tests, and skips that say what they need."""

import importlib.util
import shutil

import pytest


def _missing(marker: str) -> str | None:
    """Why this machine cannot run tests with `marker`, or None if it can."""
    if marker == "gpu":
        import torch  # only if some test asks: it takes seconds

        return None if torch.cuda.is_available() else "needs a CUDA GPU"
    if marker == "docker" and shutil.which("docker") is None:
        return "needs docker"
    if marker == "vllm" and importlib.util.find_spec("vllm") is None:
        return "needs the vllm extra"
    return None


@pytest.hookimpl(tryfirst=True)  # before xdist turns the groups into parts of the names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))
        for marker in ("gpu", "docker", "vllm"):
            reason = _missing(marker) if item.get_closest_marker(marker) else None
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
