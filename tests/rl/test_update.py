"""One policy update on a real two-layer model: equivalences, masks, and the known defects."""

import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rl.reference
import rl.update
from common.errors import UserError
from common.records import Completion, Group, Problem, Rollout, Score
from common.seeding import derive_seed
from diffusion.layout import TokenRows
from diffusion.likelihood import estimate_logps
from diffusion.masking import coupled_masks
from diffusion.views import EstimatorConfig
from models.checkpoint import new_model
from models.denoiser import Denoiser
from models.engine import EngineConfig, OptimConfig, StepInfo, TorchEngine
from models.request import Request
from models.scoring import with_behaviour_logps
from models.spec import DiffusionSpec
from rl.batch import make_batch, sequence_of
from rl.offpolicy import BehaviourScoring
from rl.update import AlgorithmConfig, PolicyUpdater

VOCAB, MASK, EOS = 24, 2, 1
BLOCK = DiffusionSpec(mask_token_id=MASK, logit_shift=False, attention="block_causal", block_size=4)
CANVAS = DiffusionSpec(
    mask_token_id=MASK, logit_shift=True, attention="bidirectional", block_size=None
)
ARCHITECTURE = {
    "model_type": "qwen2",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
OPTIM = OptimConfig(lr=1e-2, grad_clip=0.0, weight_decay=0.0, schedule="constant", total_steps=100)
TORCH = EngineConfig(kind="torch")


def denoiser(spec: DiffusionSpec = BLOCK, seed: int = 0) -> Denoiser:
    return Denoiser(new_model(ARCHITECTURE, seed), spec)


class Spy(TorchEngine):
    """The real engine, which also counts passes and keeps the gradients of every step."""

    def __init__(self, module: Denoiser, optim: OptimConfig = OPTIM) -> None:
        super().__init__(module, TORCH, optim)
        self.module = module
        self.passes: list[str] = []
        self.gradients: list[dict[str, Tensor]] = []

    def score(self, rows: TokenRows) -> Tensor:
        self.passes.append("train" if torch.is_grad_enabled() else "frozen")
        return super().score(rows)

    def step(self) -> StepInfo:
        self.passes.append("step")
        self.gradients.append(
            {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}
        )
        return super().step()


class Gang(Spy):
    """One of several ranks in threads: sums gradients and metrics at a barrier, as DDP would."""

    def __init__(self, module: Denoiser, rank: int, shared: "list[Any]", barrier: Any) -> None:
        super().__init__(module)
        self.rank, self.world_size = rank, len(shared)
        self._shared, self._barrier = shared, barrier

    def _gather(self, mine: Any) -> list[Any]:
        self._shared[self.rank] = mine
        self._barrier.wait(30)
        everyone = list(self._shared)
        self._barrier.wait(30)
        return everyone

    def step(self) -> StepInfo:
        mine = [p.grad for p in self.module.parameters()]
        everyone = self._gather(mine)
        for number, parameter in enumerate(self.module.parameters()):
            parameter.grad = torch.stack([grads[number] for grads in everyone]).sum(0)
        return super().step()

    def sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        everyone = self._gather(dict(values))
        return {name: sum(one[name] for one in everyone) for name in values}

    def gather(self, mine: Any) -> list[Any]:
        return self._gather(mine)


def make_groups(count: int = 4, size: int = 2, seed: int = 0, step: int = 0) -> list[Group]:
    """Groups of random completions of different lengths; the first of each group is the best.

    `step` only names them, as the loop and the rollout worker do.
    """
    batch_seed = derive_seed(3, "rollout", step)
    gen = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (length,), generator=gen).tolist())

    groups = []
    for number in range(count):
        prompt = tokens(2 + number)
        rollouts = []
        for index in range(size):
            length = 3 + (number + 3 * index) % 7
            tail = (-length) % 4
            completion = Completion(
                (*tokens(length - 1), EOS),
                tokens(tail),
                "",
                "eos",
                tuple(range(length + tail)),
                (1.0,) * (length + tail),
            )
            score = Score(float(index == 0) + 0.1 * number * index)
            own = derive_seed(batch_seed, f"p{number}", index)
            rollouts.append(Rollout(f"p{number}", index, prompt, completion, 0, own, score))
        groups.append(Group(Problem(f"p{number}", "do"), tuple(rollouts)))
    return groups


def behaved(
    groups: list[Group], worker: Denoiser, version: int, iterations: int = 2
) -> list[Group]:
    """The groups as a rollout worker with these weights hands them in."""
    scoring = BehaviourScoring(EstimatorConfig(), iterations)

    def scored(rollout: Rollout) -> Rollout:
        seeds = scoring.mask_seeds(rollout.seed, rollout.problem_id, rollout.sample_index)
        request = Request(rollout.prompt_ids, rollout.seed, mask_seeds=seeds)
        [completion] = with_behaviour_logps(
            worker, [request], [rollout.completion], scoring.estimator
        )
        return replace(rollout, completion=completion, policy_version=version)

    return [replace(g, rollouts=tuple(map(scored, g.rollouts))) for g in groups]


def updater(engine: TorchEngine, spec: DiffusionSpec = BLOCK, **changes: Any) -> PolicyUpdater:
    config = AlgorithmConfig(**({"num_iterations": 1, "beta": 0.0} | changes))
    reference = denoiser(spec) if config.beta > 0 else None
    return PolicyUpdater(engine, reference, spec, config)


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every call of the estimator by the updater: who scored, which samples, which seeds."""
    calls: list[dict[str, Any]] = []

    def spying(score: Any, spec: Any, sequences: Any, seeds: list[int], config: Any) -> Tensor:
        out = estimate_logps(score, spec, sequences, seeds, config)
        calls.append(
            {
                "grad": torch.is_grad_enabled(),
                "own": isinstance(getattr(score, "__self__", None), TorchEngine),
                "sequences": tuple(sequences),
                "seeds": tuple(seeds),
                "logps": out.detach().clone(),
            }
        )
        return out

    for module in (rl.update, rl.reference):
        monkeypatch.setattr(module, "estimate_logps", spying)
    return calls


def assert_same_gradients(one: Spy, other: Spy) -> None:
    assert len(one.gradients) == len(other.gradients) > 0
    for ours, theirs in zip(one.gradients, other.gradients, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            scale = float(ours[name].abs().max()) + 1e-6
            assert torch.allclose(ours[name], theirs[name], atol=2e-4 * scale, rtol=1e-3), name


@pytest.mark.parametrize("spec", [BLOCK, CANVAS], ids=["block", "canvas"])
def test_old_equals_new_gives_ratio_exactly_one(spec: DiffusionSpec) -> None:
    engine = Spy(denoiser(spec))
    metrics = updater(engine, spec).update(make_groups(), step=0)
    assert metrics["policy/ratio"] == 1.0
    assert metrics["policy/clip_ratio"] == 0.0
    assert "policy/kl" not in metrics
    assert metrics["update/optimizer_steps"] == 1.0
    assert metrics["policy/lr"] == 1e-2
    assert metrics["policy/grad_norm"] > 0


def test_one_iteration_needs_no_extra_pass() -> None:
    engine = Spy(denoiser())
    updater(engine, tokens_per_micro_batch=10**6).update(make_groups(), step=0)
    assert engine.passes == ["train", "step"]


def test_later_iterations_are_scored_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, calls = Spy(denoiser()), record_calls(monkeypatch)
    metrics = updater(engine, num_iterations=3, tokens_per_micro_batch=10**6).update(
        make_groups(), step=0
    )
    assert engine.passes == ["frozen", "frozen", "train", "step", "train", "step", "train", "step"]
    assert metrics["policy/ratio"] != 1.0
    old, _, _, current, _ = calls
    assert old["seeds"] == current["seeds"]  # iteration 1, before and after the step
    assert not torch.equal(old["logps"], current["logps"])
    before = estimate_logps(
        denoiser(), BLOCK, list(old["sequences"]), list(old["seeds"]), EstimatorConfig()
    )
    assert torch.equal(old["logps"], before)


@pytest.mark.parametrize("budget", [1, 10**6], ids=["accumulated", "whole"])
def test_every_iteration_has_its_own_masks(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """Defect 1: an index that advances per micro-batch shows a sample the same mask twice."""
    calls = record_calls(monkeypatch)
    updater(Spy(denoiser()), num_iterations=2, tokens_per_micro_batch=budget).update(
        make_groups(), step=5
    )
    seen: dict[Any, list[int]] = {}
    for call in calls:
        if call["grad"]:
            for sequence, seed in zip(call["sequences"], call["seeds"], strict=True):
                seen.setdefault(sequence, []).append(seed)
    assert len(seen) == 8
    for sequence, seeds in seen.items():
        first, second = (
            coupled_masks(len(sequence.completion_ids), (0.2, 0.8), 1, seed) for seed in seeds
        )
        assert not torch.equal(first[1], second[1])


def test_masks_do_not_depend_on_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[dict[Any, int]] = []
    for budget in (1, 40, 10**6):
        calls = record_calls(monkeypatch)
        updater(Spy(denoiser()), tokens_per_micro_batch=budget).update(make_groups(), step=2)
        named.append(
            {s: seed for c in calls for s, seed in zip(c["sequences"], c["seeds"], strict=True)}
        )
    assert named[0] == named[1] == named[2]


def test_masks_change_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect 2: a fixed seed per call gives one t (0.5837) and one mask for ever."""
    calls = record_calls(monkeypatch)
    one = updater(Spy(denoiser()), tokens_per_micro_batch=10**6)
    for step in range(40):
        one.update(make_groups(count=1, step=step), step)
    seeds = [call["seeds"][0] for call in calls]
    assert len(set(seeds)) == 40
    assert max(seeds) > 2**40  # no 12-bit seeds
    ratios = [float(coupled_masks(8, (0.2, 0.8), 1, seed)[1][0]) for seed in seeds]
    assert len(set(ratios)) == 40
    assert min(ratios) < 0.35
    assert max(ratios) > 0.65


def test_every_sample_of_a_batch_has_its_own_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect 3: one t and one mask shared by the whole batch."""
    calls = record_calls(monkeypatch)
    updater(Spy(denoiser()), tokens_per_micro_batch=10**6).update(make_groups(8), step=0)
    assert len(calls) == 1
    ratios = {float(coupled_masks(8, (0.2, 0.8), 1, seed)[1][0]) for seed in calls[0]["seeds"]}
    assert len(ratios) == 16


def test_current_old_and_reference_share_the_masks_of_an_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = record_calls(monkeypatch)
    updater(Spy(denoiser()), num_iterations=2, beta=0.1, tokens_per_micro_batch=10**6).update(
        make_groups(), step=0
    )
    # The reference is asked group by group, and of each group about both iterations.
    assert [call["own"] for call in calls] == [True, *[False] * 8, True, True]
    old, *reference, current0, current1 = [call["seeds"] for call in calls]
    ref0, ref1 = sum(reference[0::2], ()), sum(reference[1::2], ())
    assert sorted(ref0) == sorted(current0)
    assert sorted(ref1) == sorted(current1)
    assert old == current1
    assert not set(ref0) & set(ref1)


def test_beta_with_one_iteration() -> None:
    """Defect 7: beta > 0 with mu = 1. Against the same policy the KL is rounding."""
    engine = Spy(denoiser())
    one = updater(engine, beta=0.5)
    assert one.update(make_groups(), step=0)["policy/kl"] == pytest.approx(0.0, abs=1e-10)
    assert one.update(make_groups(), step=1)["policy/kl"] > 0.0


def test_beta_without_reference_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="reference"):
        PolicyUpdater(Spy(denoiser()), None, BLOCK, AlgorithmConfig(beta=0.1))


@pytest.mark.parametrize("spec", [BLOCK, CANVAS], ids=["block", "canvas"])
def test_accumulating_one_by_one_equals_one_pass(spec: DiffusionSpec) -> None:
    """1 x 8 = 8 x 1, with prompts and completions of different lengths (defect 4: pads unseen)."""
    engines = []
    for budget in (1, 10**6):
        engine = Spy(denoiser(spec))
        updater(engine, spec, num_iterations=2, tokens_per_micro_batch=budget).update(
            make_groups(), step=0
        )
        engines.append(engine)
    assert engines[0].passes.count("train") == 16
    assert engines[1].passes.count("train") == 2
    # Only the first step: AdamW turns the rounding of a tiny gradient into a whole step.
    engines[0].gradients = engines[0].gradients[:1]
    engines[1].gradients = engines[1].gradients[:1]
    assert_same_gradients(*engines)


@pytest.mark.parametrize("count", [4, 1], ids=["even", "one rank short"])
@pytest.mark.parametrize("staleness", [0, 1], ids=["synchronous", "corrected"])
def test_two_ranks_equal_one(count: int, staleness: int) -> None:
    groups = make_groups(count, size=3)
    if staleness:
        groups = behaved(groups, denoiser(seed=7), version=0, iterations=1)
    alone = Spy(denoiser())
    config: dict[str, Any] = {
        "beta": 0.1,
        "tokens_per_micro_batch": 60,
        "max_staleness": staleness,
    }
    expected = updater(alone, **config).update(groups, 0, version=1)
    assert expected.get("async/older_share", 0.0) == staleness
    shared: list[Any] = [None, None]
    barrier = threading.Barrier(2)
    gang = [Gang(denoiser(), rank, shared, barrier) for rank in range(2)]
    updaters = [updater(one, **config) for one in gang]  # here: initialisation is not thread-safe
    results: list[dict[str, float]] = [{}, {}]

    def work(rank: int) -> None:
        results[rank] = updaters[rank].update(groups, 0, version=1)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert gang[0].passes == gang[1].passes
    assert_same_gradients(alone, gang[0])
    assert_same_gradients(alone, gang[1])
    assert results[0] == results[1]
    assert results[0] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_batch_without_signal_takes_no_step() -> None:
    flat = [
        replace(g, rollouts=tuple(replace(r, score=Score(0.5)) for r in g.rollouts))
        for g in make_groups()
    ]
    engine = Spy(denoiser())
    before = {n: p.clone() for n, p in engine.module.named_parameters()}
    metrics = updater(engine).update(flat, step=0)
    assert metrics["update/no_signal"] == 1.0
    assert metrics["frac_reward_zero_std"] == 1.0
    assert engine.passes == []
    assert all(torch.equal(p, before[n]) for n, p in engine.module.named_parameters())


def test_updates_make_the_better_completion_likelier() -> None:
    engine = Spy(denoiser(), replace(OPTIM, lr=3e-3))
    one = updater(engine, num_iterations=2, beta=0.0)
    groups = make_groups(count=2)

    def logp(index: int) -> float:
        sequences = [sequence_of(group.rollouts[index]) for group in groups]
        with torch.no_grad():
            out = estimate_logps(engine.score, BLOCK, sequences, [1, 2], EstimatorConfig())
        return float(out.sum())

    before = logp(0) - logp(1)
    for step in range(5):
        one.update(groups, step)
    assert logp(0) - logp(1) > before + 1.0


def test_loss_counts_supervised_tokens_only() -> None:
    """Defect 9 in the update: the tail is context; its tokens are not in the normaliser."""
    groups = make_groups()
    metrics = updater(Spy(denoiser())).update(groups, step=0)
    supervised = sum(len(r.completion.token_ids) for g in groups for r in g.rollouts)
    assert metrics["batch/tokens"] == supervised


def test_reference_is_refreshed_every_k_steps() -> None:
    one = updater(Spy(denoiser()), beta=0.1, reference_refresh_steps=2)
    groups = make_groups()
    kl = [one.update(groups, step)["policy/kl"] for step in range(4)]
    assert kl[0] == pytest.approx(0.0, abs=1e-10)
    assert kl[1] > 0.0
    # Step 2 begins with the policy of now as its reference.
    assert kl[2] == pytest.approx(0.0, abs=1e-10)
    assert kl[3] > 0.0


@pytest.mark.parametrize("refresh", [0, 2])
def test_optimizer_state_survives_a_resume(tmp_path: Path, refresh: int) -> None:
    """Defect 8: optimizer state lost at a restart. 4 straight = 2 + save, load + 2, bit by bit."""
    config: dict[str, Any] = {
        "beta": 0.1,
        "num_iterations": 2,
        "reference_refresh_steps": refresh,
    }
    groups = make_groups()

    def run(one: PolicyUpdater, steps: range) -> dict[str, float]:
        return [one.update(groups, step) for step in steps][-1]

    straight = Spy(denoiser())
    expected = run(updater(straight, **config), range(4))
    first = updater(Spy(denoiser()), **config)
    run(first, range(2))
    first.snapshot(tmp_path).write()
    second = Spy(denoiser(seed=99))
    resumed = updater(second, **config)
    resumed.load(tmp_path)
    assert run(resumed, range(2, 4)) == expected
    theirs = dict(second.module.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in straight.module.named_parameters())
    assert (tmp_path / "reference").exists() == (refresh > 0)


def test_a_checkpoint_without_the_refreshed_reference_is_refused(tmp_path: Path) -> None:
    updater(Spy(denoiser()), beta=0.1).snapshot(tmp_path).write()
    with pytest.raises(UserError, match="reference_refresh_steps"):
        updater(Spy(denoiser()), beta=0.1, reference_refresh_steps=3).load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"estimator": EstimatorConfig(mode="parity")},
        {"estimator": EstimatorConfig(num_pairs=0)},
        {"estimator": EstimatorConfig(num_pairs=2)},
        {"advantage": "leave_one_out", "scale_by_std": True},
    ],
    ids=["parity", "d1", "two pairs", "loo/std"],
)
def test_every_setting_runs(change: dict[str, Any]) -> None:
    metrics = updater(Spy(denoiser()), num_iterations=2, **change).update(make_groups(), step=0)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("spec", [BLOCK, CANVAS], ids=["block", "canvas"])
def test_the_correction_of_equal_weights_changes_nothing(spec: DiffusionSpec) -> None:
    """Bit for bit where versions are equal; to rounding where only the weights are."""

    def run(groups: list[Group], **config: Any) -> tuple[Spy, dict[str, float]]:
        engine = Spy(denoiser(spec))
        one = updater(engine, spec, num_iterations=2, beta=0.1, **config)
        return engine, one.update(groups, 0, version=4)

    def gradients(engine: Spy) -> list[Tensor]:
        return [value for step in engine.gradients for value in step.values()]

    new = behaved(make_groups(), denoiser(spec), version=4)
    synchronous, expected = run(new, max_staleness=0)
    same_version, metrics = run(new, max_staleness=1)
    pairs = zip(gradients(synchronous), gradients(same_version), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["async/older_share"] == 0.0
    old = behaved(make_groups(), denoiser(spec), version=3)
    same_weights, metrics = run(old, max_staleness=1)
    synchronous.gradients, same_weights.gradients = (
        synchronous.gradients[:1],  # AdamW turns the rounding of a tiny gradient into a step
        same_weights.gradients[:1],
    )
    assert_same_gradients(same_weights, synchronous)
    assert metrics["async/older_share"] == 1.0
    assert metrics["async/importance_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["async/importance_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["async/importance_truncated"] == 0.0


def test_every_iteration_is_weighed_under_its_own_masks() -> None:
    """The proximal policy is the learner at the start, for iterations after a step as well."""
    groups = behaved(make_groups(), denoiser(seed=7), version=3)
    config: dict[str, Any] = {"max_staleness": 1, "importance_cap": 1.2, "num_iterations": 2}
    metrics = updater(Spy(denoiser()), **config).update(groups, 0, version=4)
    weights = []
    for group in groups:
        for rollout in group.rollouts:
            sequence = sequence_of(rollout)
            sample = make_batch([group], "mean", False).samples[rollout.sample_index]
            for i, behaviour in enumerate(rollout.completion.behaviour_logps):
                with torch.no_grad():
                    [start] = estimate_logps(
                        denoiser(), BLOCK, [sequence], [sample.mask_seed(i)], EstimatorConfig()
                    )
                weights += (start - torch.tensor(behaviour)).exp().tolist()
    assert max(weights) > 1.2
    assert metrics["async/importance_max"] == pytest.approx(max(weights), rel=1e-3)
    assert metrics["async/importance_mean"] == pytest.approx(
        sum(min(weight, 1.2) for weight in weights) / len(weights), rel=1e-4
    )
    assert metrics["async/importance_truncated"] == pytest.approx(
        sum(weight > 1.2 for weight in weights) / len(weights)
    )


def test_no_cap_means_no_correction() -> None:
    groups = [
        replace(g, rollouts=tuple(replace(r, policy_version=3) for r in g.rollouts))
        for g in make_groups()
    ]
    config = AlgorithmConfig(max_staleness=1, importance_cap=None)
    assert config.behaviour is None
    metrics = updater(Spy(denoiser()), max_staleness=1, importance_cap=None).update(groups, 0, 4)
    assert not any(name.startswith("async/") for name in metrics)
    with pytest.raises(UserError, match=r"under 0 masks, but algorithm\.num_iterations=1"):
        updater(Spy(denoiser()), max_staleness=1).update(groups, 0, version=4)


def test_nothing_is_scored_at_staleness_0() -> None:
    assert AlgorithmConfig().behaviour is None
    estimator = EstimatorConfig(num_pairs=3)
    asynchronous = AlgorithmConfig(max_staleness=2, num_iterations=3, estimator=estimator)
    assert asynchronous.behaviour == BehaviourScoring(estimator, 3)


class Asked(Denoiser):
    """A reference that counts its passes."""

    passes = 0

    def forward(self, rows: TokenRows) -> Tensor:
        self.passes += 1
        return super().forward(rows)


def asked(seed: int = 5) -> Asked:
    """Of other weights than the policy, so that the KL is something."""
    return Asked(new_model(ARCHITECTURE, seed), BLOCK)


COMPARED = AlgorithmConfig(beta=0.1, num_iterations=2)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1], [2, 2, 0, 1, 3]], ids=str)
def test_groups_that_stream_in_change_nothing(order: list[int]) -> None:
    """In any order, some or all, twice: to the bit what the update works out alone."""
    groups = make_groups()
    alone, streamed = Spy(denoiser()), Spy(denoiser())
    expected = PolicyUpdater(alone, asked(), BLOCK, COMPARED).update(groups, 0)
    reference = asked()
    one = PolicyUpdater(streamed, reference, BLOCK, COMPARED)
    for number in order:
        one.prepare([groups[number]])
    assert reference.passes == 2 * len(set(order))
    assert one.update(groups, 0) == expected
    assert reference.passes == 2 * len(groups)  # nothing was asked twice
    for ours, theirs in zip(streamed.gradients, alone.gradients, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_groups_without_signal_are_not_prepared() -> None:
    reference = asked()
    one = PolicyUpdater(Spy(denoiser()), reference, BLOCK, COMPARED)
    flat = [replace(r, score=Score(1.0)) for r in make_groups()[0].rollouts]
    one.prepare([replace(make_groups()[0], rollouts=tuple(flat))])
    assert reference.passes == 0


def test_a_sample_that_was_rolled_out_again_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same seed, same name, newer weights, other tokens."""
    config = AlgorithmConfig(beta=0.1, max_staleness=1, importance_cap=None)
    old, new = make_groups(seed=0), make_groups(seed=1)
    new = [
        replace(g, rollouts=tuple(replace(r, policy_version=1) for r in g.rollouts)) for g in new
    ]
    assert [r.seed for g in old for r in g.rollouts] == [r.seed for g in new for r in g.rollouts]
    expected = PolicyUpdater(Spy(denoiser()), asked(), BLOCK, config).update(new, 0, version=1)
    one = PolicyUpdater(Spy(denoiser()), asked(), BLOCK, config)
    one.prepare(old)
    assert one.update(new, 0, version=1) == expected


@pytest.mark.parametrize(("bound", "left"), [(0, 8), (1, 0)])
def test_what_can_still_be_used_is_kept(bound: int, left: int) -> None:
    """Passes over the batch of the same weights, prepared before the update of the batch before."""
    reference = asked()
    config = AlgorithmConfig(beta=0.1, num_iterations=2, max_staleness=bound, importance_cap=None)
    one = PolicyUpdater(Spy(denoiser()), reference, BLOCK, config)
    later = make_groups(step=1)
    one.prepare(later)
    one.update(make_groups(step=0), 0, version=0)
    before = reference.passes
    one.update(later, 1, version=1)
    assert reference.passes - before == left


def test_a_refreshed_reference_forgets_what_it_said() -> None:
    one = updater(Spy(denoiser()), beta=0.1, reference_refresh_steps=2)
    groups = make_groups()
    for step in range(2):
        one.update(groups, step)
    one.prepare(groups)  # by the reference of before
    assert one.update(groups, 2)["policy/kl"] == pytest.approx(0.0, abs=1e-10)


def test_ranks_share_the_reference_scoring() -> None:
    """Each group is scored by one rank, as it streams in; whoever trains a sample knows it."""
    groups = make_groups()
    expected = PolicyUpdater(Spy(denoiser()), asked(), BLOCK, COMPARED).update(groups, 0)
    shared: list[Any] = [None, None]
    barrier = threading.Barrier(2)
    gang = [Gang(denoiser(), rank, shared, barrier) for rank in range(2)]
    references = [asked(), asked()]
    found: list[Any] = [None, None]

    def work(rank: int) -> None:
        one = PolicyUpdater(gang[rank], references[rank], BLOCK, COMPARED)
        for group in groups[:3]:
            one.prepare([group])
        found[rank] = one.update(groups, 0)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert [reference.passes for reference in references] == [4, 4]  # two groups, twice
