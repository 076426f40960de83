"""What a run writes is for its owner only, and whole; which variables are secret."""

import errno
import os
from pathlib import Path

import pytest

from common import files
from common.errors import InfrastructureError
from common.files import append_line, private_folder
from common.secret_names import is_secret


def test_new_folders_are_private_and_old_ones_stay(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    old.chmod(0o755)
    before = os.umask(0)
    try:
        private_folder(old / "runs" / "demo")
        private_folder(old / "runs" / "demo")
        private_folder(old)
    finally:
        os.umask(before)
    modes = [p.stat().st_mode & 0o777 for p in (old, old / "runs", old / "runs" / "demo")]
    assert modes == [0o755, 0o700, 0o700]


@pytest.mark.parametrize("how", ["short", "refused"])
def test_a_line_is_appended_whole_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path, write, times = tmp_path / "lines", os.write, []

    def full(descriptor: int, data: bytes) -> int:
        times.append(path.read_text())
        if len(times) > 2:
            return write(descriptor, data)
        if how == "refused":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:3])

    append_line(path, "first")
    monkeypatch.setattr("common.files.os.write", full)
    monkeypatch.setattr(files, "POLL_S", 0.01)
    append_line(path, "second", durable=True)
    assert times == ["first\n"] * 3  # nothing of the half line stays
    assert path.read_text() == "first\nsecond\n"


def test_other_refusals_and_a_disk_that_stays_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "FULL_DISK_S", 0.05)
    monkeypatch.setattr(files, "POLL_S", 0.01)
    monkeypatch.setattr("common.files.os.write", lambda descriptor, data: 0)
    with pytest.raises(InfrastructureError, match="lines: the disk has been full for 0.05 s"):
        append_line(tmp_path / "lines", "x")
    with pytest.raises(IsADirectoryError):
        append_line(tmp_path, "x")


SECRET = """
HF_TOKEN HUGGING_FACE_HUB_TOKEN GITHUB_TOKEN GH_TOKEN WANDB_API_KEY WANDB_BASE_URL AWS_PROFILE
AWS_SECRET_ACCESS_KEY OPENAI_API_KEY ANTHROPIC_API_KEY OPENAI_APIKEY db_password MYSQL_PWD NETRC
PGPASSWORD SSH_AUTH_SOCK DOCKER_AUTH_CONFIG GOOGLE_APPLICATION_CREDENTIALS KUBECONFIG SENTRY_DSN
AZURE_CLIENT_SECRET AZURE_STORAGE_KEY AZURE_STORAGE_CONNECTION_STRING SLACK_WEBHOOK_URL
GPG_PASSPHRASE AUTHORIZATION SSH_KEY_FILE
"""
PLAIN = """
PATH HOME PWD OLDPWD OMP_NUM_THREADS TOKENIZERS_PARALLELISM GIT_AUTHOR_NAME DOCKER_HOST KEYBOARD
CUDA_VISIBLE_DEVICES PYTHONPATH HF_HOME KUBERNETES_SERVICE_HOST XDG_RUNTIME_DIR RAY_AUTH_MODE
RAY_AUTH_TOKEN_PATH
"""


@pytest.mark.parametrize("name", SECRET.split())
def test_secret_names(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", PLAIN.split())
def test_plain_names(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("value", "secret"),
    [
        ("http://me:word@proxy:3128", True),
        ("postgres://token@db/x", True),
        ("http://proxy:3128", False),
        ("https://host/a@b", False),
    ],
)
def test_a_login_in_an_address_is_secret_under_any_name(value: str, secret: bool) -> None:
    assert is_secret("https_proxy", value) is secret
