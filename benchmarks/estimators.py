"""Bias and spread of the likelihood estimators on completions of ten tokens, where all is known.

`python benchmarks/estimators.py [--json] [--draws 4000] [--completions 4]`

All 2^10 masks of a completion are shown to a small random model once; every draw of every
estimator then is a look-up, weighed by `diffusion.views` as in training. What each estimator aims
at is summed exactly from the same table. Not a timing: passes are counted. Values are of whole
completions, in nats.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from diffusion.layout import Sequence, build_rows  # noqa: E402
from diffusion.masking import generator  # noqa: E402
from diffusion.views import EstimatorConfig, make_views  # noqa: E402
from models.checkpoint import new_model  # noqa: E402
from models.denoiser import Denoiser  # noqa: E402
from models.spec import DiffusionSpec  # noqa: E402

LENGTH, VOCABULARY, MASK, BLOCK = 10, 24, 2, 4
POWERS = 2 ** torch.arange(LENGTH)
# (case, configuration), by passes of a bidirectional model: equal passes are compared.
CASES: tuple[tuple[str, EstimatorConfig], ...] = (
    ("full_mask", EstimatorConfig(kind="full_mask")),
    ("coupled 1 pair", EstimatorConfig(num_pairs=1)),
    ("uncoupled 2 masks", EstimatorConfig(kind="uncoupled", num_masks=2)),
    ("elbo 3 samples", EstimatorConfig(kind="elbo", num_samples=3)),
    ("coupled 2 pairs", EstimatorConfig(num_pairs=2)),
    ("uncoupled 4 masks", EstimatorConfig(kind="uncoupled", num_masks=4)),
    ("elbo 5 samples", EstimatorConfig(kind="elbo", num_samples=5)),
    ("coupled 1 pair, parity", EstimatorConfig(num_pairs=1, mode="parity")),
    ("uncoupled 2 masks, parity", EstimatorConfig(kind="uncoupled", num_masks=2, mode="parity")),
    ("trace", EstimatorConfig(kind="trace")),
)


@dataclass(frozen=True)
class Study:
    """One completion: `table[code, i]` is log p of token i under mask `code` (bit j hides j)."""

    sequence: Sequence
    block_size: int | None
    table: Tensor

    def draws(self, config: EstimatorConfig, count: int) -> Tensor:
        """`count` estimates, each token by token: float64 [count, LENGTH]."""
        return torch.stack([self._draw(config, seed) for seed in range(count)])

    def _draw(self, config: EstimatorConfig, seed: int) -> Tensor:
        views = make_views(self.sequence, config, self.block_size, seed)
        code = (views.hidden * POWERS).sum(1)
        return (views.weight.double() * views.scored * self.table[code]).sum(0)

    def passes(self, config: EstimatorConfig) -> int:
        """Views of one estimate."""
        return len(make_views(self.sequence, config, self.block_size, 0).hidden)

    def exact_elbo(self) -> float:
        """Mean over all orders: token i, n - k tokens known before it, k hidden with it."""
        n = LENGTH

        def share(k: int) -> float:
            return math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n)

        return float(self._over_masks(share).sum())

    def exact_target(self, config: EstimatorConfig) -> float:
        """What the estimator's mean is, without a draw; nan for uncoupled normalised (see RESULTS).

        A coupled or uncoupled mask hides a given set of k tokens with probability
        E[t^k (1-t)^(n-k)], and a pair asks twice. Parity divides by the hiding ratio.
        """
        if config.kind == "elbo":
            return self.exact_elbo()
        if config.kind in ("full_mask", "trace"):
            return float(self._draw(config, 0).sum())
        pairs = config.num_pairs if config.kind == "coupled" else config.num_masks / 2
        parity = config.mode == "parity"
        if config.kind == "uncoupled" and not parity:
            return math.nan

        def share(k: int) -> float:
            return 2 * _mean_power(k - int(parity), LENGTH - k, config)

        full = self.table[-1]
        return float((full + pairs * self._over_masks(share)).sum() / (1 + pairs))

    def _over_masks(self, share: Callable[[int], float]) -> Tensor:
        """Sum over masks that hide i of share(tokens hidden) * log p(i), [LENGTH]."""
        hidden = (torch.arange(2**LENGTH)[:, None] & POWERS) > 0
        weight = [0.0] + [share(k) for k in range(1, LENGTH + 1)]
        per_mask = torch.tensor(weight, dtype=torch.float64)[hidden.sum(1)]
        return (per_mask[:, None] * self.table).sum(0)


def _mean_power(hidden: int, shown: int, config: EstimatorConfig) -> float:
    """E[t^hidden (1-t)^shown] over the range of t: midpoints, error below 1e-7."""
    low, high = config.mask_ratio_min, config.mask_ratio_max
    t = low + (high - low) * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    return float((t**hidden * (1 - t) ** shown).mean())


def make_study(attention: str, seed: int) -> Study:
    """A random two-layer model and a completion drawn at random, with a random order."""
    architecture = {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,  # large: what is hidden then really matters
    }
    block = BLOCK if attention == "block_causal" else None
    spec = DiffusionSpec(
        mask_token_id=MASK,
        logit_shift=False,
        attention=attention,  # type: ignore[arg-type]
        block_size=block,
    )
    denoiser = Denoiser(new_model(architecture, seed).eval(), spec)
    gen = generator(seed)
    tokens = torch.randint(3, VOCABULARY, (4 + LENGTH,), generator=gen).tolist()
    steps = torch.rand(LENGTH, generator=gen)
    # Blocks in order, tokens of a block at random.
    steps += 0.0 if block is None else torch.arange(LENGTH) // block
    order = tuple(steps.argsort().argsort().tolist())
    sequence = Sequence(tuple(tokens[:4]), tuple(tokens[4:]), LENGTH, step_map=order)
    masks = (torch.arange(2**LENGTH)[:, None] & POWERS) > 0
    rows = build_rows(
        [sequence] * len(masks),
        list(masks[:, None]),
        mask_token_id=MASK,
        block_size=block,
        logit_shift=False,
    )
    with torch.no_grad():
        values = denoiser(rows).double()
    table = torch.zeros(masks.shape, dtype=torch.float64).masked_scatter(masks, values)
    return Study(sequence, block, table)


def compare(study: Study, draws: int) -> list[dict[str, object]]:
    """One row per estimator."""
    elbo, trace = study.exact_elbo(), study.exact_target(EstimatorConfig(kind="trace"))
    rows: list[dict[str, object]] = []
    for name, config in CASES:
        values = study.draws(config, draws)
        whole = values.sum(1)
        rows.append(
            {
                "estimator": name,
                "passes": study.passes(config),
                "target": study.exact_target(config),
                "mean": float(whole.mean()),
                "std": float(whole.std()),
                "token_std": float(values.std(0).mean()),
                "error_of_mean": float(whole.std()) / math.sqrt(draws),
                "bias_to_elbo": float(whole.mean()) - elbo,
                "rmse_to_elbo": float((whole - elbo).square().mean().sqrt()),
                "rmse_to_trace": float((whole - trace).square().mean().sqrt()),
            }
        )
    return rows


def averaged(attention: str, completions: int, draws: int) -> list[dict[str, object]]:
    """`compare` over several completions: means of absolute biases, root means of squares."""
    tables = [compare(make_study(attention, seed), draws) for seed in range(completions)]
    rows: list[dict[str, object]] = []
    for parts in zip(*tables, strict=True):
        row: dict[str, object] = {"attention": attention, **parts[0]}
        for key in ("std", "token_std", "rmse_to_elbo", "rmse_to_trace"):
            row[key] = math.sqrt(sum(float(p[key]) ** 2 for p in parts) / len(parts))
        for key in ("target", "mean", "bias_to_elbo"):
            row[key] = sum(float(p[key]) for p in parts) / len(parts)
        rows.append(row)
    return rows


def main() -> None:
    """Print the tables, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--completions", type=int, default=4)
    options = parser.parse_args()
    kinds = ("bidirectional", "block_causal")
    rows = [r for kind in kinds for r in averaged(kind, options.completions, options.draws)]
    if options.json:
        print(json.dumps({"name": "estimators", "draws": options.draws, "rows": rows}))
        return
    keys = ("target", "mean", "std", "token_std", "bias_to_elbo", "rmse_to_elbo", "rmse_to_trace")
    print(f"{'attention':14}{'estimator':27}{'passes':>6}" + "".join(f"{k:>14}" for k in keys))
    for r in rows:
        numbers = "".join(f"{float(r[k]):14.3f}" for k in keys)  # type: ignore[arg-type]
        print(f"{r['attention']!s:14}{r['estimator']!s:27}{r['passes']!s:>6}{numbers}")


if __name__ == "__main__":
    main()
