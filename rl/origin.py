"""Where a checkpoint came from: model, data, settings; and whether a run that resumes it fits.

Not the training state. Another model is an error, before any work starts. Other settings or other
problems are allowed and said aloud: what goes on is no longer quite the run that was saved.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.records import Problem
from models.identity import architecture, save_outline, weights_mark
from models.outline import Outline

ORIGIN_FILE, DESCRIPTION = "origin.json", "model"
# Settings that say how long, how often and how loud, not what is learned.
UNIMPORTANT = ("run.resume", "train.", "metrics.", "cluster.")
# What a batch that was scored before a restart depends on; `algorithm` for its log-probabilities.
OF_BATCHES = (
    *("rollout.", "reward.", "data.", "algorithm.estimator."),
    *("algorithm.num_iterations", "algorithm.importance_cap"),
)
SHOWN = 4


@dataclass(frozen=True)
class Origin:
    """What every checkpoint of a run says of the run.

    config: the resolved configuration, as plain values. model: the sizes and meaning of the policy
    (`models.identity`). weights: mark of the weights that the run started from, which are also its
    reference. problems: CRC-32 over the training problems in their order; the data cursor is the
    step, which together with data.seed names every batch. folder: where the model lies.
    """

    config: Mapping[str, Any]
    model: Mapping[str, Any]
    weights: int
    problems: int
    folder: Path
    outline: Outline | None = None  # the running run's; what is read back has none

    @staticmethod
    def of(config: Mapping[str, Any], outline: Outline, problems: Sequence[Problem]) -> "Origin":
        """Of a run that trains the model of `outline` on `problems`."""
        folder = outline.folder
        return Origin(
            config,
            architecture(outline),
            weights_mark(folder),
            _fingerprint(problems),
            folder,
            outline,
        )

    def write(self, out: Path) -> None:
        """Write `origin.json`, and config and tokenizer of the model under `model/`."""
        record = vars(replace(self, outline=None)) | {"folder": str(self.folder)}
        del record["outline"]
        (out / ORIGIN_FILE).write_text(json.dumps(record, indent=1) + "\n")
        if self.outline is not None:
            save_outline(self.outline, out / DESCRIPTION)

    def check(self, checkpoint: Path) -> list[str]:
        """Compare with the run that wrote `checkpoint`: remarks for people, or an error.

        Raises:
            UserError: it was another model's.
        """
        saved = read_origin(checkpoint)
        for name in dict.fromkeys([*self.model, *saved.model]):
            ours, theirs = self.model.get(name), saved.model.get(name)
            if ours != theirs:
                raise UserError(
                    f"{checkpoint}: checkpoint of another model ({name}={theirs}, but model.path="
                    f"{self.folder} has {name}={ours}); set model.path back (it was "
                    f"{saved.folder}), or choose another run.folder"
                )
        if self.weights != saved.weights:
            raise UserError(
                f"{checkpoint}: its run started from other weights than model.path={self.folder} "
                f"holds now (it was {saved.folder}); set model.path back, or choose another "
                "run.folder"
            )
        return self._remarks(saved)

    def takes_up(self, checkpoint: Path) -> bool:
        """Whether batches that were scored when `checkpoint` was written are still of this run."""
        saved = read_origin(checkpoint)
        changed = any(key.startswith(OF_BATCHES) for key in self._changes(saved))
        return not changed and self.problems == saved.problems

    def _changes(self, saved: "Origin") -> dict[str, str]:
        old, new = dict(_flat(saved.config)), dict(_flat(json.loads(json.dumps(self.config))))
        return {
            key: f"{old.get(key)} -> {new.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not key.startswith(UNIMPORTANT)
        }

    def _remarks(self, saved: "Origin") -> list[str]:
        remarks = []
        changed = [f"{key} {change}" for key, change in self._changes(saved).items()]
        if changed:
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            remarks.append(
                f"settings changed since the checkpoint: {', '.join(changed[:SHOWN])}{more}"
            )
        if self.problems != saved.problems:
            remarks.append("the training problems changed since the checkpoint (data.train)")
        return remarks


def read_origin(checkpoint: Path) -> Origin:
    """`origin.json` of a checkpoint. Raises UserError: missing or damaged."""
    path = checkpoint / ORIGIN_FILE
    try:
        values = json.loads(path.read_text())
        return Origin(**(values | {"folder": Path(values["folder"])}))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; this folder holds no complete checkpoint") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); resume from an earlier step") from error


def _fingerprint(problems: Sequence[Problem]) -> int:
    mark = 0
    for problem in problems:
        text = (
            f"{problem.problem_id}\x1f{problem.prompt}\x1f{problem.tests}{problem.stdin_tests}\x1e"
        )
        mark = zlib.crc32(text.encode(errors="surrogatepass"), mark)
    return mark


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        yield prefix, values
        return
    for key, value in values.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else key)
