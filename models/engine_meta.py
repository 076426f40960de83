"""`engine.json` beside an engine's state: whose it is. Not the state (the engines write that)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError

META_FILE = "engine.json"
# What must be equal to go on; the number of ranks need not.
IDENTITY = ("kind", "zero_stage", "precision", "lora")


def read_meta(folder: Path, ours: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`engine.json` of an engine's folder; with `ours`, if that engine was like it.

    Raises:
        UserError: nothing there, or another kind, ZeRO stage, precision or other adapters.
    """
    path = folder / META_FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: missing; this folder holds no engine checkpoint") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: damaged ({error}); resume from an earlier checkpoint") from error
    ours = found if ours is None else ours
    for key in IDENTITY:
        if found.get(key) != ours.get(key):
            raise UserError(
                f"{path}: was saved with {key}={found.get(key)}, this run has {key}="
                f"{ours.get(key)}; set it back, or start from the exported HF folder"
            )
    return found
