"""The estimator study: each estimator's mean is what it aims at, and coupling pays where it should.

The numbers of `benchmarks/estimators.py` on fewer draws; exact values by enumeration of all masks.
"""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.estimators import CASES, Study, make_study
from diffusion.views import EstimatorConfig

DRAWS = 500


@pytest.fixture(scope="module", params=["bidirectional", "block_causal"])
def study(request: pytest.FixtureRequest) -> Study:
    return make_study(request.param, seed=1)


def spread(study: Study, config: EstimatorConfig) -> float:
    return float(study.draws(config, DRAWS).sum(1).std())


def error_to_elbo(study: Study, config: EstimatorConfig) -> float:
    away = study.draws(config, DRAWS).sum(1) - study.exact_elbo()
    return float(away.square().mean().sqrt())


# Uncoupled normalised divides by a random count: no closed form.
KNOWN = [(n, c) for n, c in CASES if (c.kind, c.mode) != ("uncoupled", "normalised")]


@pytest.mark.parametrize("config", [c for _, c in KNOWN], ids=[name for name, _ in KNOWN])
def test_the_mean_is_what_the_estimator_aims_at(study: Study, config: EstimatorConfig) -> None:
    target = study.exact_target(config)
    values = study.draws(config, DRAWS).sum(1)
    error = float(values.std()) / math.sqrt(DRAWS)
    assert float(values.mean()) == pytest.approx(target, abs=4.5 * error + 1e-4)


def test_coupling_halves_the_spread_of_ratio_weighted_masks(study: Study) -> None:
    """Same expectation (parity, 1 pair against 2 masks), same passes."""
    coupled = EstimatorConfig(mode="parity")
    uncoupled = EstimatorConfig(kind="uncoupled", num_masks=2, mode="parity")
    assert study.exact_target(coupled) == pytest.approx(study.exact_target(uncoupled))
    assert study.passes(coupled) == study.passes(uncoupled) == 3
    assert spread(study, coupled) < 0.75 * spread(study, uncoupled)


def test_normalised_coupled_is_nearer_the_elbo_than_uncoupled(study: Study) -> None:
    """Not by its spread: a token no mask hides falls back on the full mask, which never varies."""
    coupled, uncoupled = EstimatorConfig(), EstimatorConfig(kind="uncoupled", num_masks=2)
    assert error_to_elbo(study, coupled) < error_to_elbo(study, uncoupled)


def test_elbo_pays_for_being_unbiased_with_spread(study: Study) -> None:
    samples = EstimatorConfig(kind="elbo", num_samples=3)
    assert spread(study, samples) > 2 * spread(study, EstimatorConfig())


def test_exact_elbo_by_sampled_orders() -> None:
    """The closed form against 400 traces in random orders."""
    study = make_study("bidirectional", seed=2)
    values = []
    for number in range(400):
        gen = torch.Generator().manual_seed(number)
        order = tuple(torch.randperm(10, generator=gen).tolist())
        ordered = Study(replace(study.sequence, step_map=order), None, study.table)
        values.append(ordered.exact_target(EstimatorConfig(kind="trace")))
    found = torch.tensor(values)
    error = float(found.std()) / math.sqrt(len(values))
    assert float(found.mean()) == pytest.approx(study.exact_elbo(), abs=4.5 * error)
