"""The rollout worker: problems in, whole groups of completions out. Not the decoder itself.

A plain class; `workers.cluster` wraps it in an actor. It pulls the newest weights when it is built
and before it serves, so one that joins late or restarts cannot answer with an old policy.
"""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from common.errors import InfrastructureError
from common.records import Completion, Group, Problem, Rollout
from common.seeding import derive_seed
from models.checkpoint import load_checkpoint
from models.decoding import Decoder, DecodingConfig, Request
from models.engine import EngineConfig
from models.tokenizer import encode_prompt
from rl.offpolicy import BehaviourScoring
from workers.weights import INITIAL_VERSION, WeightStore
from workers.wire import load_into

# Of weights that were half written when a fetch broke off: older than any, so never served.
TORN = -1
log = logging.getLogger(__name__)


def rollout_dtype(config: EngineConfig) -> torch.dtype:
    """Decode with the very numbers that the learner's forward pass uses."""
    return config.dtype


class RolloutWorker:
    """Decodes with the newest published policy.

    Args:
        checkpoint_folder: architecture, tokenizer and the weights of version 0.
        decoding: how to decode unless a call says otherwise.
        weights: the store to pull from.
        threads: of torch in this process; None leaves them alone.
        dtype: of the weights here.
        behaviour: how to score what is decoded for training; None does not.
    """

    def __init__(
        self,
        checkpoint_folder: Path,
        decoding: DecodingConfig,
        weights: WeightStore,
        threads: int | None = None,
        dtype: torch.dtype = torch.float32,
        behaviour: BehaviourScoring | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        checkpoint = load_checkpoint(checkpoint_folder, dtype=dtype, device=device)
        self._decoder = Decoder(checkpoint.denoiser, checkpoint.tokenizer)
        self._decoding = decoding
        self._behaviour = behaviour
        self._weights = weights
        self._version = INITIAL_VERSION
        self._turn = threading.Lock()
        weights.enrol()
        try:
            self._pull()
        except InfrastructureError as error:
            # Their publisher has just died and its successor will publish again. `generate` pulls
            # once more, and refuses while it cannot; an actor that died here would stay dead.
            log.warning("starting without the newest weights: %s", error)

    @property
    def policy_version(self) -> int:
        """Of the weights it holds."""
        return self._version

    def generate(
        self,
        problems: Sequence[Problem],
        seed: int,
        group_size: int,
        decoding: DecodingConfig | None = None,
        at_least: int = INITIAL_VERSION,
    ) -> list[Group]:
        """`group_size` completions of every problem, in the order of `problems`.

        Each request's seed is a function of (seed, problem id, sample index): who else is in the
        batch, or on which worker, does not matter. A call with a decoding of its own is for
        evaluation: nothing of it is scored under masks.

        Raises:
            InfrastructureError: the store has no version as new as `at_least`, or fetching failed.
            LearnerLost: what should be fetched is gone for good.
        """
        prompts = [encode_prompt(self._decoder.tokenizer, problem.prompt) for problem in problems]
        seeds = [
            [derive_seed(seed, problem.problem_id, index) for index in range(group_size)]
            for problem in problems
        ]
        behaviour = self._behaviour if decoding is None else None
        requests = [
            Request(prompt, one, mask_seeds=_mask_seeds(behaviour, one, problem.problem_id, index))
            for problem, prompt, row in zip(problems, prompts, seeds, strict=True)
            for index, one in enumerate(row)
        ]
        version, decoded = self._decode(requests, decoding, behaviour, at_least)
        done = iter(decoded)
        groups = []
        for problem, prompt, row in zip(problems, prompts, seeds, strict=True):
            name = problem.problem_id
            rollouts = (
                Rollout(name, index, prompt, next(done), version, one)
                for index, one in enumerate(row)
            )
            groups.append(Group(problem, tuple(rollouts)))
        return groups

    def _decode(
        self,
        requests: Sequence[Request],
        decoding: DecodingConfig | None,
        behaviour: BehaviourScoring | None,
        at_least: int,
    ) -> tuple[int, Sequence[Completion]]:
        """Completions and the version of the weights that decoded all of them."""
        estimator = behaviour.estimator if behaviour is not None else None
        with self._turn:  # no other thread may pull between the stamp and the last token
            self._pull()
            if self._version < at_least:
                raise InfrastructureError(
                    f"weights: version {at_least} was promised, the store's newest is "
                    f"{self._version}"
                )
            decoding = decoding or self._decoding
            return self._version, self._decoder.decode(requests, decoding, estimator=estimator)

    def receive(self, version: int) -> None:
        """Fetch `version`, which is just being published. `generate` makes up for a failure."""
        with self._turn:
            if version > self._version:
                self._load(version)

    def _pull(self) -> None:
        if self._weights.newest() > self._version:
            self._load(None)

    def _load(self, version: int | None) -> None:
        found, buckets = self._weights.fetch(version)
        with self._decoder.updating():
            self._version = TORN
            load_into(self._decoder.denoiser.model, buckets)
            self._version = found


def _mask_seeds(
    behaviour: BehaviourScoring | None, seed: int, problem_id: str, sample_index: int
) -> tuple[int, ...]:
    return () if behaviour is None else behaviour.mask_seeds(seed, problem_id, sample_index)
