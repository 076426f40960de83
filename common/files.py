"""Folders that belong to one user. Not what is written into them."""

from pathlib import Path


def private_folder(path: Path) -> None:
    """Make `path` and its missing parents, for their owner only; what exists stays as it is.

    What a run writes (texts of models, resolved settings, logs) is nobody else's business on a
    shared machine. `chmod` opens one folder to others.
    """
    for folder in [*reversed(path.parents), path]:
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
