"""Emptying the folder a test wrote to, whatever the test made of it. Not which folder that is."""

import os
import stat

_MAX_DEPTH = 100_000  # folders in folders; more than the limits on files let a test make


def empty(folder: str) -> None:
    """Remove everything in `folder`. Nobody else may be writing there any more.

    Deep trees, unreadable folders and links are no obstacle: a nested folder is moved up before
    it is emptied, so no path grows longer and nothing recurses.

    Raises OSError if something stays: then nothing may run here again.
    """
    token = ""
    for depth in range(_MAX_DEPTH):
        names = os.listdir(folder)
        if not names:
            return
        token = token or os.urandom(8).hex()  # a name that the test cannot have taken
        for number, name in enumerate(names):
            _remove(os.path.join(folder, name), os.path.join(folder, f"{token}.{depth}.{number}."))
    raise OSError(f"{folder}: cannot be emptied")


def _remove(path: str, prefix: str) -> None:
    """Remove `path`; folders in it become `prefix`0, `prefix`1 and so on."""
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
