"""Samples per second, estimated from FLOPs and bytes. Nothing here is a measurement.

Each pass takes as long as its arithmetic or its reading, whichever is longer, at a stated share of
the GPU's published peak. Left out: rewards (they overlap), the optimizer step, communication, the
pull of new weights, and that completions end early: the first make it too fast, the last too slow.
"""

from dataclasses import dataclass

from models.cache import needs_cache, slot_bytes
from rl.config import TrainConfig
from rl.plan import longest_sample, number_bytes, rows_at_once
from rl.shape import Shape

# Of a GPU's peak: what training and decoding at these sizes commonly reach, not what ours did.
LEARNER_SHARE, ROLLOUT_SHARE, READING_SHARE = 0.35, 0.3, 0.6


@dataclass(frozen=True)
class Gpu:
    """Published peaks: dense bfloat16 FLOPs and bytes of memory per second."""

    flops: float
    bytes_per_s: float


GPUS = {
    "a100": Gpu(312e12, 2.0e12),
    "h100": Gpu(989e12, 3.35e12),
    "h200": Gpu(989e12, 4.8e12),
    "b200": Gpu(2250e12, 8.0e12),
}


@dataclass(frozen=True)
class Speed:
    """Seconds of one training step by role, and what follows."""

    rollout_s: float
    update_s: float
    samples_per_s: float


def estimate_speed(config: TrainConfig, shape: Shape, gpu: Gpu) -> Speed:
    """Time of a step whose samples are all as long as can be.

    Synchronous roles take turns; with `algorithm.max_staleness` > 0 the slower one decides.
    """
    samples = config.rollout.group_size * config.rollout.prompts_per_step
    rollout_s = rollout_seconds(config, shape, gpu)
    update_s = update_flops(config, shape) * samples / config.cluster.learner.ranks
    update_s /= gpu.flops * LEARNER_SHARE
    overlap = config.algorithm.max_staleness > 0 and config.cluster.kind == "ray"
    step_s = max(rollout_s, update_s) if overlap else rollout_s + update_s
    return Speed(rollout_s, update_s, samples / step_s)


def update_flops(config: TrainConfig, shape: Shape) -> float:
    """FLOPs of the learner for one sample of one batch, all its optimizer steps.

    A backward pass costs two forward passes, but about one if only adapters have gradients of
    their weights; checkpointing one more. Later iterations are scored
    once before the first step; each iteration once by the reference.
    """
    sample, algorithm = longest_sample(config, shape), config.algorithm
    pairs = float(sample.rows * sample.length**2)
    if config.engine.attention != "sdpa" and shape.spec.attention != "bidirectional":
        pairs /= 2  # tiles that nobody sees are skipped
    one = shape.forward_flops(sample.tokens, pairs, sample.scored)
    steps = algorithm.num_iterations
    both_ways = 3 if config.engine.lora is None else 2
    passes = steps * (both_ways + config.engine.gradient_checkpointing) + steps - 1
    return one * (passes + (steps if algorithm.beta > 0 else 0))


def rollout_seconds(config: TrainConfig, shape: Shape, gpu: Gpu) -> float:
    """Seconds until the slowest rollout worker has finished its share of a batch."""
    decoding, workers = config.rollout.decoding, config.cluster.rollout.max
    slots = rows_at_once(config, shape)
    size = number_bytes(config.engine.precision)
    share = -(-config.rollout.prompts_per_step // workers) * config.rollout.group_size
    block, steps = decoding.resolve(shape.spec)
    first, end = decoding.span(shape.spec, config.data.prompt_limit)
    blocks = (end - first) // block
    passes = blocks * steps
    tokens = _tokens(config, shape, block, steps, end, blocks)
    flops = shape.forward_flops(tokens, tokens * end, passes * block)
    reading = shape.parameters * size
    if needs_cache(shape.spec, decoding):
        reading += slots * slot_bytes(shape.config, end, size)
    waves = share / slots
    arithmetic_s = share * flops / (gpu.flops * ROLLOUT_SHARE)
    reading_s = waves * passes * reading / (gpu.bytes_per_s * READING_SHARE)
    return max(arithmetic_s, reading_s)


def _tokens(
    config: TrainConfig, shape: Shape, block: int, steps: int, end: int, blocks: int
) -> float:
    """Tokens that go through the network for one completion.

    With an exact cache: the prompt and every finished block once, a block once a pass. Without: the
    whole canvas every pass. `dual` and `prefix` show the canvas once a block, then the block alone
    or all from it on.
    """
    cache = config.rollout.decoding.cache
    if shape.spec.attention != "bidirectional":
        return end + blocks * steps * block
    if cache == "exact":
        return blocks * steps * end
    later = block if cache == "dual" else block * (blocks + 1) / 2
    return blocks * (end + (steps - 1) * later)
