"""The folder of a test where there is no tmpfs for it (landlock level): how full, and away with it.

Whatever a program built in there: names, permissions and depth are its choice.
"""

import contextlib
import os

_MAX_FILES = 4096  # as many as the tmpfs of the namespace level holds


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
    """Delete `top` with all below it, once nobody uses it any more.

    Folders move up beside `top` before their turn: so depth costs neither stack nor path length.
    """
    folders = [top]
    with contextlib.suppress(FileNotFoundError):  # `top` itself
        for folder in folders:  # grows meanwhile
            with os.scandir(folder) as listing:
                entries = list(listing)
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)
                    folders.append(f"{top}.{len(folders)}")
                    os.rename(entry.path, folders[-1])
                else:
                    os.unlink(entry.path)
            os.rmdir(folder)
