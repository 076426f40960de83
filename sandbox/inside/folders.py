"""The folder of a test where there is no tmpfs for it (landlock level): how full, and away with it.

Whatever a program built in there: names, permissions and depth are its choice.
"""

import contextlib
import os
import stat

_MAX_FILES = 4096  # as many as the tmpfs of the namespace level holds
_MAX_DEPTH = 100_000  # folders in folders; more than the limits on files let a test make


def too_full(top: str, max_bytes: int) -> bool:
    """Whether what lies below `top` takes more than `max_bytes`, or is too much to count."""
    used = count = 0
    folders = [top]
    for folder in folders:  # grows meanwhile
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    used += entry.stat(follow_symlinks=False).st_blocks * 512
                    count += 1
                    if used > max_bytes or count > _MAX_FILES:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:
            continue  # removed meanwhile
        except OSError:
            return True  # it hides what it has, by permissions or by the length of its path
    return False


def remove(top: str) -> None:
    """Delete `top` with all below it, if it exists, once nobody uses it any more."""
    with contextlib.suppress(FileNotFoundError):
        empty(top)
        os.rmdir(top)


def empty(top: str) -> None:
    """Delete all below `top`, once nobody writes there any more.

    Folders move up into `top` before their turn: so depth costs neither stack nor path length.
    Raises OSError if something stays: then nothing may run here again.
    """
    token = ""
    for depth in range(_MAX_DEPTH):
        names = os.listdir(top)
        if not names:
            return
        token = token or os.urandom(8).hex()  # a name that no program can have taken
        for number, name in enumerate(names):
            _remove(os.path.join(top, name), os.path.join(top, f"{token}.{depth}.{number}."))
    raise OSError(f"{top}: cannot be emptied")


def _remove(path: str, prefix: str) -> None:
    """Delete `path`; folders in it become `prefix`0, `prefix`1 and so on."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        os.unlink(path)
        return
    os.chmod(path, 0o700)
    with os.scandir(path) as entries:
        inner = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for number, (child, is_folder) in enumerate(inner):
        if is_folder:
            os.chmod(child, 0o700)  # moving a folder writes into it
            os.rename(child, f"{prefix}{number}")
        else:
            os.unlink(child)
    os.rmdir(path)
