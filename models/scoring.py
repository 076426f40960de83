"""The behaviour policy's own log-probabilities of what it has just decoded. Not an estimator.

Only the weights that produced a completion can say how likely it was to them (ALGORITHMS section 4,
off-policy), so the decoder scores before it lets go of them. The masks follow from names: a learner
that asks for the same names hides the same tokens.
"""

from collections.abc import Sequence as List
from dataclasses import replace

import torch

from common.records import Completion
from diffusion.layout import TokenRows, decoded_sequence
from diffusion.likelihood import EstimatorConfig, estimate_logps, forward_tokens
from models.denoiser import Denoiser
from models.request import Request

# Forward tokens of one pass: bounds the memory of scoring. Small ones stay in a CPU's cache.
SCORE_TOKENS = 8192
CPU_SCORE_TOKENS = 2048


@torch.no_grad()
def with_behaviour_logps(
    denoiser: Denoiser,
    requests: List[Request],
    completions: List[Completion],
    estimator: EstimatorConfig,
) -> list[Completion]:
    """Completions with `behaviour_logps` for every one of their requests' `mask_seeds`."""
    jobs = [
        (number, seed, decoded_sequence(request.prompt_ids, completion))
        for number, (request, completion) in enumerate(zip(requests, completions, strict=True))
        for seed in request.mask_seeds
    ]
    # Like costs side by side: fewer padded places. Equal ones keep the order of their seeds.
    jobs.sort(key=lambda job: forward_tokens(denoiser.spec, job[2], estimator))
    found: dict[int, list[tuple[float, ...]]] = {}
    device = next(denoiser.parameters()).device
    budget = CPU_SCORE_TOKENS if device.type == "cpu" else SCORE_TOKENS

    def score(rows: TokenRows) -> torch.Tensor:
        return denoiser(rows.to(device))

    while jobs:
        count = 0
        for _, _, sequence in jobs:  # rows are padded to the largest of their pass: the last one
            largest = forward_tokens(denoiser.spec, sequence, estimator)
            if count and largest * (count + 1) > budget:
                break
            count += 1
        numbers, seeds, sequences = zip(*jobs[:count], strict=True)
        logps = estimate_logps(score, denoiser.spec, list(sequences), list(seeds), estimator)
        for number, sequence, row in zip(numbers, sequences, logps.tolist(), strict=True):
            found.setdefault(number, []).append(tuple(row[: sequence.supervised]))
        jobs = jobs[count:]
    return [
        replace(completion, behaviour_logps=tuple(found.get(number, ())))
        for number, completion in enumerate(completions)
    ]
