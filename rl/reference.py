"""The frozen policy that the KL compares with, and what it has said of completions. Not the loss.

Its log-probabilities do not depend on what is learned, so they can be worked out as soon as a group
is scored, while others are still being decoded (`prepare`). They are then worked out group by
group: a sample's numbers must not depend on who happened to arrive with it, or when.
"""

import itertools
from collections.abc import Sequence as List
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from diffusion.layout import TokenRows
from diffusion.likelihood import estimate_logps, forward_tokens
from models.denoiser import Denoiser
from models.engine import Engine
from models.offload import visiting
from models.spec import DiffusionSpec
from models.state_files import StateFiles
from rl.batch import MicroBatch, Sample, micro_batches
from rl.offpolicy import BehaviourScoring

REFERENCE_FILE = "reference/model.pt"
# A seed names run, step, problem and index; the version tells a sample that was rolled out again.
Key = tuple[int, str, int, int]


class Reference:
    """A frozen policy of every rank's own.

    Args:
        denoiser: on the engine's device, or on the host, from where it visits the device to score.
            None: the engine trains adapters, and scores without them.
        engine: of the policy: its device, and the other ranks.
        spec: how both denoise.
        scoring: under which masks.
        budget: tokens of one pass.
    """

    def __init__(
        self,
        denoiser: Denoiser | None,
        engine: Engine,
        spec: DiffusionSpec,
        scoring: BehaviourScoring,
        budget: int,
    ) -> None:
        self._denoiser = denoiser.eval().requires_grad_(False) if denoiser is not None else None
        self._engine = engine
        self._spec = spec
        self._scoring = scoring
        self._budget = budget
        self._asked: set[Key] = set()  # by any rank: every rank is told of the same groups
        self._known: dict[Key, list[Tensor]] = {}  # the share of this rank, an entry an iteration
        self._loads = [0] * engine.world_size

    def prepare(self, samples: List[Sample]) -> None:
        """Score now what `logps` will be asked for. Every rank is told the same, in one order."""
        self._score(samples)

    def logps(self, plan: List[MicroBatch], samples: List[Sample]) -> list[list[Tensor]]:
        """Log-probabilities by iteration and micro-batch: float32 [B, C], 0 behind the end.

        Collective: every rank enters.

        Args:
            plan: of this rank.
            samples: of all ranks.
        """
        self._score(samples)
        mine = {key: self._known[key] for s in samples if (key := _key(s)) in self._known}
        known = {key: rows for share in self._engine.gather(mine) for key, rows in share.items()}
        device = self._engine.device
        return [
            [_padded([known[_key(s)][i] for s in micro.samples]).to(device) for micro in plan]
            for i in range(self._scoring.num_iterations)
        ]

    def forget(self, oldest: int) -> None:
        """Samples of weights older than version `oldest` will not be asked for any more."""
        self._asked = {key for key in self._asked if key[-1] >= oldest}
        self._known = {key: rows for key, rows in self._known.items() if key[-1] >= oldest}

    @torch.no_grad()
    def _score(self, samples: List[Sample]) -> None:
        new = [sample for sample in samples if _key(sample) not in self._asked]
        self._asked |= {_key(sample) for sample in new}
        alone = self._denoiser is not None or self._engine.world_size == 1
        plan = self._share_of_groups(new) if alone else self._share(new)
        with self._at_hand() if plan else nullcontext():
            for micro in plan:
                self._score_one(micro)

    def _share_of_groups(self, samples: List[Sample]) -> list[MicroBatch]:
        """Whole groups, each for the rank that has been given the fewest tokens so far."""
        plan = []
        for _, group in itertools.groupby(samples, key=lambda sample: sample.problem_id):
            members = list(group)
            costs = self._costs(members)
            owner = self._loads.index(min(self._loads))
            self._loads[owner] += sum(costs)
            if owner == self._engine.rank:
                plan += micro_batches(members, costs, self._budget)
        return plan

    def _share(self, samples: List[Sample]) -> list[MicroBatch]:
        """As many passes as every other rank: adapters may be in pieces on all of them."""
        engine, costs = self._engine, self._costs(samples)
        return micro_batches(samples, costs, self._budget, engine.rank, engine.world_size)

    def _costs(self, samples: List[Sample]) -> list[int]:
        estimator = self._scoring.estimator
        return [forward_tokens(self._spec, sample.sequence, estimator) for sample in samples]

    def _score_one(self, micro: MicroBatch) -> None:
        sequences = [sample.sequence for sample in micro.samples]
        for i in range(self._scoring.num_iterations):
            seeds = [sample.mask_seed(i) for sample in micro.samples]
            estimator = self._scoring.estimator
            logps = estimate_logps(self._forward, self._spec, sequences, seeds, estimator).cpu()
            if micro.weight > 0:
                for sample, row in zip(micro.samples, logps, strict=True):
                    rows = self._known.setdefault(_key(sample), [])
                    rows.append(row[: sample.sequence.supervised].clone())

    def _forward(self, rows: TokenRows) -> Tensor:
        if self._denoiser is None:
            return self._engine.score_base(rows)
        scores: Tensor = self._denoiser(rows.to(self._engine.device))
        return scores

    def _at_hand(self) -> AbstractContextManager[object]:
        if self._denoiser is None:
            return nullcontext()
        return visiting(self._denoiser, self._engine.device)  # one that is there stays as it is

    def _model(self) -> nn.Module:
        if self._denoiser is None:
            raise ValueError("the reference of adapters is the model without them: it never moves")
        return self._denoiser.model

    def refresh(self) -> None:
        """Become the current policy. Collective: every rank enters."""
        model = self._model()
        for bucket in self._engine.state_buckets():
            shared = _broadcast_bucket(bucket, self._engine)
            outcome = model.load_state_dict(shared, strict=False)
            if outcome.unexpected_keys:
                raise ValueError(f"the policy has weights its reference lacks: {outcome}")
        self._asked, self._known = set(), {}

    def snapshot(self, folder: Path, files: StateFiles) -> None:
        """A copy of the weights, to be written by rank 0."""
        if self._engine.rank == 0:
            files.add(folder / REFERENCE_FILE, self._model().state_dict())

    def load(self, folder: Path) -> None:
        """Restore what `snapshot` took.

        Raises:
            UserError: it took none.
        """
        path = folder / REFERENCE_FILE
        if not path.is_file():
            raise UserError(
                f"{path}: missing; the run was saved with algorithm.reference_refresh_steps=0 or "
                "beta=0: resume it with the same settings"
            )
        state = torch.load(path, map_location=self._engine.device, weights_only=True)
        self._model().load_state_dict(state)
        self._asked, self._known = set(), {}


def _key(sample: Sample) -> Key:
    return sample.seed, sample.problem_id, sample.sample_index, sample.policy_version


def _padded(rows: List[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _broadcast_bucket(bucket: dict[str, Tensor], engine: Engine) -> dict[str, Tensor]:
    """Rank 0's bucket on every rank; the engine hands full tensors to rank 0 only."""
    if engine.world_size == 1:
        return bucket
    head: list[list[tuple[str, torch.Size, torch.dtype]]] = [
        [(name, value.shape, value.dtype) for name, value in bucket.items()]
    ]
    dist.broadcast_object_list(head, src=0, device=engine.device)
    shared: dict[str, Tensor] = {}
    for name, shape, dtype in head[0]:
        mine = bucket[name] if engine.rank == 0 else torch.empty(shape, dtype=dtype)
        value = mine.to(engine.device).contiguous()
        dist.broadcast(value, src=0)
        shared[name] = value
    return shared
