"""Who may talk to Ray, and what a worker may know: token, addresses, secret variables.

Also where Ray is imported, once its settings are made. Not the joining and starting itself
(`workers.placement`), not the sandbox. What this protects and what not: docs/SECURITY.md.
"""

import atexit
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError
from common.secret_names import is_secret

# Read by Ray when it is imported: say nothing to its makers, hide GPUs from actors without one.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
import ray  # noqa: E402
import ray._private.ray_constants as ray_constants  # noqa: E402
from ray._raylet import Config  # type: ignore[attr-defined]  # noqa: E402

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
KNOCK_TIMEOUT_S = 20.0
HERE_TIMEOUT_S = 1.0
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
# Answers what a cluster says to whoever comes with (or without) a token: in a process of its own,
# which can be ended, and whose remarks on stderr nobody has to read.
_KNOCK = """
import sys
from ray._raylet import AuthenticationTokenLoader, GcsClient
from ray.exceptions import AuthenticationError
try:
    token = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    if sys.argv[2] == "token" and not token:
        print("none")
    else:
        GcsClient(address=sys.argv[1]).internal_kv_get(b"unmask", None, timeout=5)
        print("welcome")
except AuthenticationError:
    print("refused")
"""


def forget_secrets() -> None:
    """Remove what is secret, Ray's token too, from this process's environment. Ray has read it."""
    for name, value in list(os.environ.items()):
        if name == TOKEN or is_secret(name, value):
            del os.environ[name]


# Starting


def keep_token() -> None:
    """See that Ray finds a token which nobody else can read, before it starts a cluster here.

    Without one Ray (2.60) writes ~/.ray/auth_token itself, with the rights that the umask leaves:
    as a rule everybody may read it. RAY_AUTH_MODE=disabled and a token given by variable stand.
    """
    if os.environ.get(MODE, "token").lower() != "token" or {TOKEN, TOKEN_PATH} & os.environ.keys():
        return
    try:
        _write_once(Path.home() / ".ray" / "auth_token")
    except (OSError, RuntimeError):
        # No home that can be written to: for this process and its children only.
        folder = Path(tempfile.mkdtemp(prefix="unmask-token-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _write_once(folder / "auth_token")
        os.environ[TOKEN_PATH] = str(folder / "auth_token")


def _write_once(path: Path) -> None:
    """A new token at `path` unless one is there; readable by its owner only in both cases."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.is_file() and path.stat().st_size == 0:
        path.unlink()
    descriptor, partial = tempfile.mkstemp(dir=path.parent)  # made with mode 0600
    try:
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        # Not a rename: of two that start at once, both must use the first one's.
        with suppress(FileExistsError):
            os.link(partial, path)
    finally:
        os.unlink(partial)
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)


@contextmanager
def loopback() -> Iterator[None]:
    """While it lasts, Ray takes this node's address to be 127.0.0.1, and binds all ports there.

    Private (pinned by a test). `_node_ip_address="127.0.0.1"` is turned into the address of a
    network by Ray, and then every port is open to that.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


# Joining


@contextmanager
def admission(address: str, source: str) -> Iterator[None]:
    """Around `ray.init(address)`: with a token if the cluster wants one, and only then.

    Ray by itself uses a token for an explicit address only if RAY_AUTH_MODE=token is set, and
    takes a minute to say so. A cluster that was started here listens on 127.0.0.1 only.

    Args:
        address: host:port; others (auto) are left to Ray.
        source: where the address was given, for the error's text.

    Raises:
        UserError: no token, the wrong one, or nobody there who speaks Ray's language.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        yield
        return
    _authenticate(address, source)
    if host in LOOPBACK and not _listens(ray.util.get_node_ip_address(), int(port)):
        with loopback():
            yield
    else:
        yield


def _authenticate(address: str, source: str) -> None:
    mode = os.environ.get(MODE, "").lower()
    answer = _knock(address, mode or "disabled")
    if not mode and answer == "refused":
        mode = "token"
        answer = _knock(address, mode)
        if answer == "welcome":
            os.environ[MODE] = mode
            Config.initialize("")  # Ray has read the variable already
    if answer == "welcome":
        return
    if answer == "none" or (answer == "refused" and mode != "token"):
        problem = (
            f"asks for a token and {MODE}={mode} forbids one; unset it"
            if answer == "refused"
            else f"asks for a token and none was found; {_where_tokens_go()}"
        )
    elif answer == "refused":
        problem = f"refuses the token of {_token_source()}; {_where_tokens_go()}"
    else:
        problem = f"nobody there speaks Ray {ray.__version__} ({answer}); check host and port"
    raise UserError(f"{source}={address}: {problem}")


def _knock(address: str, mode: str) -> str:
    """`welcome`, `refused`, `none` (no token to show), or a remark on what went wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _KNOCK, address, mode],
            env={**os.environ, MODE: mode, "RAY_BACKEND_LOG_LEVEL": "fatal"},
            capture_output=True,
            text=True,
            timeout=KNOCK_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {KNOCK_TIMEOUT_S:g} s"
    lines = done.stdout.split() or done.stderr.strip().splitlines()
    return lines[-1][:200] if lines else f"exit status {done.returncode}"


def _token_source() -> str:
    names = [name for name in (TOKEN, TOKEN_PATH) if name in os.environ]
    return names[0] if names else "~/.ray/auth_token"


def _where_tokens_go() -> str:
    return (
        "put what `ray get-auth-token` prints on its head into ~/.ray/auth_token (chmod 600), or "
        f"name a file with {TOKEN_PATH}"
    )


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), HERE_TIMEOUT_S).close()
    except OSError:
        return False
    return True
