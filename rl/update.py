"""One policy update: coupled-GRPO over the samples of one step. Not the loop, not the engine.

The same object runs on every learner rank. It holds no counters: masks follow from names
(the completion's own seed, problem, sample, iteration), so neither accumulation, nor the number of
ranks, nor a resume, nor the step at which a batch is used can change them.
"""

from collections.abc import Sequence as List
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from pydantic import Field
from torch import Tensor

from common.config import Section
from common.errors import UserError
from common.records import Group
from diffusion.likelihood import TokenScorer, estimate_logps, forward_tokens
from diffusion.views import EstimatorConfig
from models.denoiser import Denoiser
from models.engine import Engine
from models.spec import DiffusionSpec
from models.state_files import StateFiles
from rl.advantage import Baseline
from rl.batch import Batch, MicroBatch, StaleRule, batch_metrics, make_batch, micro_batches
from rl.loss import LossTerms, clipped_policy_loss, mean_metrics
from rl.offpolicy import BehaviourScoring, Correction, check_behaviour
from rl.reference import Reference


class AlgorithmConfig(Section):
    """Coupled-GRPO (ALGORITHMS section 4).

    num_iterations: optimizer steps per batch of rollouts (mu), each under its own masks.
    beta: weight of the k3 KL to the reference policy; 0 keeps no reference in memory.
    kl_tail: log-ratio beyond which the KL grows linearly (`rl.loss.k3_kl`); None is the plain k3.
    epsilon_low, epsilon_high: bounds of the clipped ratio.
    reference_refresh_steps: every K steps the reference becomes the policy; 0 is never.
    max_staleness: updates that may lie between a rollout's weights and its use; 0 is synchronous.
    importance_cap: largest weight of a token that older weights than the learner's have decoded
        (`rl.offpolicy`); for it, rollout workers score what they decode if max_staleness > 0. None
        leaves such tokens uncorrected and unscored.
    stale: what becomes of a rollout that is older than max_staleness: `drop`, or `recompute`: the
        learner waits while its group is rolled out again, same seeds, newest weights.
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
    importance_cap: float | None = Field(default=2.0, ge=1)
    stale: StaleRule = "drop"
    tokens_per_micro_batch: int = Field(default=8192, ge=1)

    @property
    def behaviour(self) -> BehaviourScoring | None:
        """How rollout workers score what they decode; None if nobody would look at it."""
        if self.max_staleness == 0 or self.importance_cap is None:
            return None
        return self.scoring

    @property
    def scoring(self) -> BehaviourScoring:
        """Under which masks policies are compared."""
        return BehaviourScoring(self.estimator, self.num_iterations)


class PolicyUpdater:
    """Turns scored groups into optimizer steps.

    Args:
        engine: wraps the policy; sums gradients over micro-batches and ranks.
        reference: frozen copy of a policy, on the engine's device or on the host, from where it
            visits the device to score; needed if `config.beta` > 0, but not by an engine that
            trains adapters: it scores without them.
        spec: how the policy denoises.
        config: the algorithm.
    """

    def __init__(
        self,
        engine: Engine,
        reference: Denoiser | None,
        spec: DiffusionSpec,
        config: AlgorithmConfig,
    ) -> None:
        if config.beta > 0 and reference is None and not engine.adapted:
            raise ValueError("beta > 0 needs a reference policy")
        self._engine = engine
        self._spec = spec
        self._config = config
        self._reference: Reference | None = None
        if config.beta > 0:
            budget = config.tokens_per_micro_batch
            self._reference = Reference(reference, engine, spec, config.scoring, budget)

    def prepare(self, groups: List[Group]) -> None:
        """Do what an update with these groups needs and what no update before it can change.

        Every rank is told of the same groups in the same order; an update does the rest itself.
        """
        if self._reference is not None:
            self._reference.prepare(self._batch(groups).samples)

    def update(self, groups: List[Group], step: int, version: int = 0) -> dict[str, float]:
        """`num_iterations` optimizer steps on one batch; the same metrics on every rank.

        A batch in which no group has any spread takes no optimizer step and reports
        `update/no_signal` 1.

        Args:
            groups: the whole global batch, on every rank.
            step: updates finished before this one.
            version: of the policy as it is now; samples of older ones are corrected for.

        Raises:
            UserError: such a sample was rolled out under other settings.
        """
        every = self._config.reference_refresh_steps
        if every and step and step % every == 0 and self._reference is not None:
            self._reference.refresh()
        batch = self._batch(groups)
        metrics = batch_metrics(batch)
        metrics["update/no_signal"] = float(not batch.samples)
        if not batch.samples:
            return metrics
        metrics |= self._optimise(batch, version)
        if self._reference is not None:
            self._reference.forget(oldest=version + 1 - self._config.max_staleness)
        return metrics

    def _batch(self, groups: List[Group]) -> Batch:
        return make_batch(groups, self._config.advantage, self._config.scale_by_std)

    def _optimise(self, batch: Batch, version: int) -> dict[str, float]:
        plan, correction = self._plan(batch), self._correction(batch, version)
        iterations = range(self._config.num_iterations)
        # Before the first optimizer step every iteration's masks are scored under the unchanged
        # policy. Iteration 0 needs no extra pass: its own forward is that policy.
        old = [self._frozen_logps(self._engine.score, plan, i) if i else [] for i in iterations]
        reference = self._reference.logps(plan, batch.samples) if self._reference else None
        sums: dict[str, float] = {}
        infos = []
        for i in iterations:
            for number, micro in enumerate(plan):
                logps = self._logps(self._engine.score, micro, i)
                frozen = None if reference is None else reference[i][number]
                before = None if i == 0 else old[i][number]
                terms = self._terms(micro, logps, before, frozen, batch.normaliser)
                if correction is not None:
                    weights = correction.weigh(micro.samples, terms.old, terms.supervised, i)
                    terms = replace(terms, importance=weights)
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
        return metrics | (correction.metrics(self._engine) if correction is not None else {})

    def _correction(self, batch: Batch, version: int) -> Correction | None:
        scoring, cap = self._config.behaviour, self._config.importance_cap
        if scoring is None or cap is None:
            return None
        check_behaviour(batch.samples, version, scoring.num_iterations)
        return Correction(cap, version)

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
        old: Tensor | None,
        reference: Tensor | None,
        normaliser: int,
    ) -> LossTerms:
        lengths = torch.tensor([sample.sequence.supervised for sample in micro.samples])
        supervised = torch.arange(logps.shape[1]) < lengths[:, None]
        advantages = torch.tensor([sample.advantage for sample in micro.samples])
        return LossTerms(
            old=logps.detach() if old is None else old,
            advantages=advantages.to(logps.device),
            supervised=(supervised & (micro.weight > 0)).to(logps.device),
            normaliser=float(normaliser),
            epsilon_low=self._config.epsilon_low,
            epsilon_high=self._config.epsilon_high,
            reference=reference,
            beta=self._config.beta,
            kl_tail=self._config.kl_tail,
        )

    def _logps(self, score: TokenScorer, micro: MicroBatch, iteration: int) -> Tensor:
        """Estimated log-probabilities [B, C] under the masks of (sample, iteration)."""
        return estimate_logps(
            score,
            self._spec,
            [sample.sequence for sample in micro.samples],
            [sample.mask_seed(iteration) for sample in micro.samples],
            self._config.estimator,
        )

    @torch.no_grad()
    def _frozen_logps(
        self, score: TokenScorer, plan: list[MicroBatch], iteration: int
    ) -> list[Tensor]:
        return [self._logps(score, micro, iteration) for micro in plan]

    def snapshot(self, folder: Path) -> StateFiles:
        """A copy of `policy/`, and of `reference/` if it moves: what this rank has to write.

        Collective, and quick: training may go on while the files are written.
        """
        files = StateFiles()
        self._engine.snapshot(folder / "policy", files)
        moves = self._config.reference_refresh_steps > 0
        if moves and self._reference is not None:
            self._reference.snapshot(folder, files)
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
        if self._config.reference_refresh_steps > 0 and self._reference is not None:
            self._reference.load(folder)
