"""One policy update: coupled-GRPO over the samples of one step. Not the loop, not the engine.

The same object runs on every learner rank. It holds no counters: masks follow from names
(run seed, step, problem, sample, iteration), so neither accumulation, nor the number of ranks, nor
a resume can change them.
"""

from collections.abc import Sequence as List
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from common.config import Section
from common.errors import UserError
from common.records import Group
from diffusion.layout import TokenRows
from diffusion.likelihood import TokenScorer, estimate_logps, forward_tokens
from diffusion.views import EstimatorConfig
from models.denoiser import Denoiser
from models.engine import Engine
from models.spec import DiffusionSpec
from models.state_files import StateFiles
from rl.advantage import Baseline
from rl.batch import Batch, MicroBatch, batch_metrics, make_batch, micro_batches
from rl.loss import LossTerms, clipped_policy_loss, mean_metrics

REFERENCE_FILE = "reference/model.pt"


class AlgorithmConfig(Section):
    """Coupled-GRPO (ALGORITHMS section 4).

    num_iterations: optimizer steps per batch of rollouts (mu), each under its own masks.
    beta: weight of the k3 KL to the reference policy; 0 keeps no reference in memory.
    kl_tail: log-ratio beyond which the KL grows linearly (`rl.loss.k3_kl`); None is the plain k3.
    epsilon_low, epsilon_high: bounds of the clipped ratio.
    reference_refresh_steps: every K steps the reference becomes the policy; 0 is never.
    max_staleness: updates that may lie between a rollout's weights and its use; 0 is synchronous.
        Above 0 the log-probabilities of the behaviour policy are not yet corrected for.
    tokens_per_micro_batch: forward tokens (all views of all rows) of one pass.
    """

    estimator: EstimatorConfig = EstimatorConfig()
    num_iterations: int = Field(default=2, ge=1)
    beta: float = Field(default=0.01, ge=0)
    kl_tail: float | None = Field(default=None, gt=0)
    epsilon_low: float = Field(default=0.2, gt=0, lt=1)
    epsilon_high: float = Field(default=0.2, gt=0)
    advantage: Baseline = "mean"
    scale_by_std: bool = False
    reference_refresh_steps: int = Field(default=0, ge=0)
    max_staleness: int = Field(default=0, ge=0)
    tokens_per_micro_batch: int = Field(default=8192, ge=1)


class PolicyUpdater:
    """Turns scored groups into optimizer steps.

    Args:
        engine: wraps the policy; sums gradients over micro-batches and ranks.
        reference: frozen copy of a policy on the engine's device; needed if `config.beta` > 0.
        spec: how the policy denoises.
        config: the algorithm.
        run_seed: first name of every mask seed.
    """

    def __init__(
        self,
        engine: Engine,
        reference: Denoiser | None,
        spec: DiffusionSpec,
        config: AlgorithmConfig,
        run_seed: int,
    ) -> None:
        if config.beta > 0 and reference is None:
            raise ValueError("beta > 0 needs a reference policy")
        self._engine = engine
        self._reference = reference.eval().requires_grad_(False) if reference is not None else None
        self._spec = spec
        self._config = config
        self._run_seed = run_seed

    def update(self, groups: List[Group], step: int) -> dict[str, float]:
        """`num_iterations` optimizer steps on one batch; the same metrics on every rank.

        A batch in which no group has any spread takes no optimizer step and reports
        `update/no_signal` 1.

        Args:
            groups: the whole global batch, on every rank.
            step: updates finished before this one.
        """
        every = self._config.reference_refresh_steps
        if every and step and step % every == 0:
            self.refresh_reference()
        batch = make_batch(groups, self._config.advantage, self._config.scale_by_std)
        metrics = batch_metrics(batch)
        metrics["update/no_signal"] = float(not batch.samples)
        if not batch.samples:
            return metrics
        return metrics | self._optimise(batch, step)

    def _optimise(self, batch: Batch, step: int) -> dict[str, float]:
        plan = self._plan(batch)
        iterations = range(self._config.num_iterations)
        # Before the first optimizer step every iteration's masks are scored under the unchanged
        # policy. Iteration 0 needs no extra pass: its own forward is that policy.
        old = [
            self._frozen_logps(self._engine.score, plan, step, i) if i else None for i in iterations
        ]
        reference = [self._reference_logps(plan, step, i) for i in iterations]
        sums: dict[str, float] = {}
        infos = []
        for i in iterations:
            for number, micro in enumerate(plan):
                logps = self._logps(self._engine.score, micro, step, i)
                terms = self._terms(micro, logps, old[i], reference[i], number, batch.normaliser)
                loss, part = clipped_policy_loss(logps, terms)
                self._engine.backward(loss, last=number == len(plan) - 1)
                sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
            infos.append(self._engine.step())
        metrics = mean_metrics(self._engine.sum_over_ranks(sums))
        if self._config.beta == 0:
            del metrics["policy/kl"]  # nothing to compare with: not a zero
        metrics["policy/grad_norm"] = sum(info.grad_norm for info in infos) / len(infos)
        metrics["policy/lr"] = infos[-1].lr
        metrics["update/optimizer_steps"] = float(sum(not info.skipped for info in infos))
        return metrics

    def _plan(self, batch: Batch) -> list[MicroBatch]:
        costs = [
            forward_tokens(self._spec, sample.sequence, self._config.estimator)
            for sample in batch.samples
        ]
        budget = self._config.tokens_per_micro_batch
        engine = self._engine
        return micro_batches(batch.samples, costs, budget, engine.rank, engine.world_size)

    def _terms(
        self,
        micro: MicroBatch,
        logps: Tensor,
        old: list[Tensor] | None,
        reference: list[Tensor] | None,
        number: int,
        normaliser: int,
    ) -> LossTerms:
        lengths = torch.tensor([sample.sequence.supervised for sample in micro.samples])
        supervised = torch.arange(logps.shape[1]) < lengths[:, None]
        advantages = torch.tensor([sample.advantage for sample in micro.samples])
        return LossTerms(
            old=logps.detach() if old is None else old[number],
            advantages=advantages.to(logps.device),
            supervised=(supervised & (micro.weight > 0)).to(logps.device),
            normaliser=float(normaliser),
            epsilon_low=self._config.epsilon_low,
            epsilon_high=self._config.epsilon_high,
            reference=None if reference is None else reference[number],
            beta=self._config.beta,
            kl_tail=self._config.kl_tail,
        )

    def _logps(self, score: TokenScorer, micro: MicroBatch, step: int, iteration: int) -> Tensor:
        """Estimated log-probabilities [B, C] under the masks of (step, sample, iteration)."""
        return estimate_logps(
            score,
            self._spec,
            [sample.sequence for sample in micro.samples],
            [sample.mask_seed(self._run_seed, step, iteration) for sample in micro.samples],
            self._config.estimator,
        )

    @torch.no_grad()
    def _frozen_logps(
        self, score: TokenScorer, plan: list[MicroBatch], step: int, iteration: int
    ) -> list[Tensor]:
        return [self._logps(score, micro, step, iteration) for micro in plan]

    def _reference_logps(
        self, plan: list[MicroBatch], step: int, iteration: int
    ) -> list[Tensor] | None:
        reference, device = self._reference, self._engine.device
        if reference is None or self._config.beta == 0:
            return None

        def score(rows: TokenRows) -> Tensor:
            return reference(rows.to(device))

        return self._frozen_logps(score, plan, step, iteration)

    def refresh_reference(self) -> None:
        """The reference becomes the current policy. Collective: every rank enters."""
        if self._reference is None:
            return
        for bucket in self._engine.state_buckets():
            shared = _broadcast_bucket(bucket, self._engine)
            outcome = self._reference.model.load_state_dict(shared, strict=False)
            if outcome.unexpected_keys:
                raise ValueError(f"the policy has weights its reference lacks: {outcome}")

    def snapshot(self, folder: Path) -> StateFiles:
        """A copy of `policy/`, and of `reference/` if it moves: what this rank has to write.

        Collective, and quick: training may go on while the files are written.
        """
        files = StateFiles()
        self._engine.snapshot(folder / "policy", files)
        moves = self._config.reference_refresh_steps > 0
        if moves and self._reference is not None and self._engine.rank == 0:
            files.add(folder / REFERENCE_FILE, self._reference.model.state_dict())
        return files

    def load(self, folder: Path) -> None:
        """Restore what `snapshot` took; the number of ranks may have changed.

        Raises:
            UserError: damaged files, or no reference although this configuration refreshes one.
        """
        try:
            self._engine.load(folder / "policy")
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{folder}: cannot be loaded ({reason}); set run.resume to an earlier "
                "rl/global_step_N of the run"
            ) from error
        if self._config.reference_refresh_steps == 0 or self._reference is None:
            return
        path = folder / REFERENCE_FILE
        if not path.is_file():
            raise UserError(
                f"{path}: missing; the run was saved with algorithm.reference_refresh_steps=0 or "
                "beta=0: resume it with the same settings"
            )
        state = torch.load(path, map_location=self._engine.device, weights_only=True)
        self._reference.model.load_state_dict(state)


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
