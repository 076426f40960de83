"""What a training run needs, worked out before a machine is rented: bytes per role, samples/s.

Pure arithmetic over a configuration and the shape of a model (`rl.shape`): nothing is loaded and
nothing measured here. Tests compare it with measured memory. Sizes are worst cases: every prompt
as long as `data.prompt_limit`, every completion as long as `gen_length`.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Literal

from diffusion.layout import Sequence
from diffusion.likelihood import forward_tokens
from diffusion.views import count_views
from models.attention import TILE
from models.cache import needs_cache, slot_bytes
from models.decoding import LOGIT_NUMBERS
from models.engine import BUCKET_BYTES, EngineConfig
from models.head import CPU_BUDGET, LOGIT_BUDGET, MIN_SLICE
from models.windows import PREFILL_TOKENS
from rl.config import TrainConfig
from rl.shape import Shape
from workers.weights import KEEP_VERSIONS

MIB, GIB = 2**20, 2**30
# Elements of DeepSpeed's buckets (`models.deepspeed_engine`) and of ZeRO-3's gathered parameters.
BUCKET, LIVE = 200_000_000, 1_000_000_000
# Copies of a slice of logits alive at one time: in the head's backward, in the sampler.
HEAD_COPIES, SAMPLER_COPIES = 4, 6
# The share of a GPU that tensors may fill: the rest is CUDA's context, NCCL and fragmentation.
USABLE = 0.9

Where = Literal["device", "host"]


@dataclass(frozen=True)
class Part:
    """Bytes of one thing in one process. `device` is the GPU, or the host where there is none."""

    name: str
    bytes: int
    where: Where = "device"


@dataclass(frozen=True)
class Role:
    """One process of a role: there are `count` of them, each with `num_gpus`.

    `together` are kept all the time. Of `phases` only the largest exists at one time.
    """

    name: str
    count: int
    num_gpus: float
    together: tuple[Part, ...]
    phases: tuple[Part, ...] = ()

    @property
    def device_bytes(self) -> int:
        """Peak on the device."""
        return self._sum("device")

    @property
    def host_bytes(self) -> int:
        """Peak on the host, if the device is a GPU."""
        return self._sum("host")

    def _sum(self, where: Where) -> int:
        kept = sum(part.bytes for part in self.together if part.where == where)
        return kept + max((part.bytes for part in self.phases if part.where == where), default=0)


@dataclass(frozen=True)
class Bytes:
    """Per parameter: what DeepSpeed 0.19 keeps, and what a step adds for a moment.

    A pair is (whole on every rank, divided by the ranks).
    """

    parameters: tuple[int, int]
    gradients: tuple[int, int]
    optimizer: tuple[int, int]
    step: tuple[int, int]


# (precision, stage) -> bytes. Optimizer: Adam's two moments, and float32 masters (DeepSpeed makes
# them in fp32 too, except at stage 0). Gradients: summed in float32 except at stage 0. Step: the
# sum in one piece and Adam's square roots. All of it found by measuring (tests/rl/test_plan.py).
STATE = {
    ("fp32", 0): Bytes((4, 0), (4, 0), (8, 0), (1, 0)),
    ("fp32", 1): Bytes((4, 0), (4, 0), (0, 12), (0, 8)),
    ("fp32", 2): Bytes((4, 0), (0, 4), (0, 12), (0, 9)),
    ("fp32", 3): Bytes((0, 4), (0, 4), (0, 12), (0, 12)),
    ("bf16", 0): Bytes((2, 0), (2, 0), (12, 0), (5, 0)),
    ("bf16", 1): Bytes((2, 0), (6, 0), (0, 12), (0, 8)),
    ("bf16", 2): Bytes((2, 0), (0, 4), (0, 12), (0, 9)),
    ("bf16", 3): Bytes((0, 2), (0, 4), (0, 12), (0, 12)),
}
# Plain PyTorch: no masters; under `bf16` autocast keeps a 16-bit copy of every weight for backward.
PLAIN = Bytes((4, 0), (4, 0), (8, 0), (1, 0))


def number_bytes(precision: str) -> int:
    """Bytes of a number in the forward pass, in the store and in rollout workers."""
    return 2 if precision == "bf16" else 4


@dataclass(frozen=True)
class Sample:
    """The longest sample: how it goes through the learner.

    tokens: of all its views; rows of `length` tokens each; scored: answers read off.
    """

    tokens: int
    rows: int
    length: int
    scored: int


def longest_sample(config: TrainConfig, shape: Shape) -> Sample:
    """The sample of the longest prompt and the longest completion."""
    spec, estimator = shape.spec, config.algorithm.estimator
    prompt, completion = config.data.prompt_limit, config.rollout.decoding.gen_length
    order = tuple(range(completion))  # one token a step: the most views that `trace` can need
    sequence = Sequence((0,) * prompt, (0,) * completion, completion, order)
    tokens = forward_tokens(spec, sequence, estimator)
    views = count_views(sequence, estimator, spec.block_size, spec.block_origin)
    rows = views if spec.block_size is None else 1
    # A pair hides every token once: two views that answer together once for each.
    scored = completion * {"coupled": 1 + estimator.num_pairs, "trace": 1}.get(
        estimator.kind, views
    )
    return Sample(tokens, rows, tokens // rows, scored)


def layer_bytes(shape: Shape, size: int, rows: int, length: int, dense: bool) -> int:
    """What a stock layer keeps for its backward pass, of `rows` of `length` tokens.

    In numbers of `size` bytes per token: of each norm its input (always float32), the normalised
    state and the result; queries, expanded keys and values, attention's result; four of the MLP's
    inner width. A dense mask is kept as numbers, [rows, length, length], by every layer.

    Args:
        dense: attention by `sdpa`, which takes a dense mask and expands keys and values.
    """
    keys = 2 * (shape.queries if dense else shape.keys)
    token = 2 * (4 + 2 * size) * shape.width
    token += size * (2 * shape.queries + keys + 4 * shape.inner)
    return rows * length * token + (rows * length * length * size if dense else 0)


def activation_bytes(
    shape: Shape, config: EngineConfig, rows: int, length: int, dense: bool
) -> int:
    """The highest that a forward and a backward pass of `rows` of `length` tokens need.

    Checkpointing keeps one state per layer, and one layer while it is computed again. Adapters add
    next to nothing (their rank per token) and are not counted.
    """
    size, tokens = number_bytes(config.precision), rows * length
    layer = layer_bytes(shape, size, rows, length, dense)
    kept = shape.layers * layer
    if config.gradient_checkpointing:
        kept = shape.layers * tokens * size * shape.width + layer
    # While a layer is computed backward: gradients of the MLP's three and of the states.
    working = tokens * size * (3 * shape.inner + 4 * shape.width)
    ends = tokens * (2 * size + 4) * shape.width  # embedding, last norm
    return kept + working + ends + (rows * length * length if dense else 0)


def head_bytes(shape: Shape, size: int, scored: int, gpu: bool, frozen: bool = False) -> int:
    """The last layer of the learner: slices of logits, and unless frozen its weight's gradient."""
    numbers = max(LOGIT_BUDGET if gpu else CPU_BUDGET, scored * MIN_SLICE)
    numbers = min(numbers, scored * shape.vocabulary)
    return HEAD_COPIES * 4 * numbers + (0 if frozen else shape.vocabulary * shape.width * size)


def learner(config: TrainConfig, shape: Shape, gpu: bool) -> Role:
    """One rank."""
    engine, ranks = config.engine, config.cluster.learner.ranks
    size, plain = number_bytes(engine.precision), engine.kind == "torch"
    parameters, adapters = shape.parameters, shape.adapters(engine.lora)
    count, trained = parameters + adapters, adapters or parameters
    sample = longest_sample(config, shape)
    fits = max(1, config.algorithm.tokens_per_micro_batch // sample.tokens)
    dense = engine.attention == "sdpa" or not gpu
    length = sample.length if dense else -(-sample.length // TILE) * TILE
    together, stepping = state_bytes(engine, count, trained, ranks)
    if config.algorithm.beta > 0 and engine.lora is None:
        together.append(Part("reference", count * size, _place(engine.offload_reference)))
    buckets = 0 if plain else _bucket_bytes(engine, count, trained, ranks)
    if buckets:
        together.append(Part("buckets", buckets))
    logits = head_bytes(shape, size, fits * sample.scored, gpu, frozen=engine.lora is not None)
    activations = activation_bytes(shape, engine, fits * sample.rows, length, dense)
    cast = 2 * shape.layers * shape.layer_weights if plain and engine.precision == "bf16" else 0
    phases: tuple[Part, ...] = (
        Part("activations and logits", activations + logits + cast),
        stepping,
    )
    if config.algorithm.beta > 0 and engine.offload_reference and gpu:
        # It scores before the first pass with gradients: not beside one.
        phases += (Part("reference visiting", count * size + logits),)
    if engine.lora is not None:  # a matrix, its adapter's product and their sum, in float32
        largest = shape.width * max(shape.inner, shape.queries)
        phases += (Part("merging a matrix", 3 * 4 * largest),)
    # Checkpoints are read in float32 on the host, by every rank, before they move.
    host = [Part("reading the checkpoint", 4 * parameters, "host")]
    host.append(Part("publishing", 2 * BUCKET_BYTES, "host"))
    return Role("learner", ranks, config.cluster.learner.num_gpus, (*together,), (*phases, *host))


def state_bytes(
    engine: EngineConfig, count: int, trained: int, ranks: int
) -> tuple[list[Part], Part]:
    """What a rank keeps of `count` parameters, `trained` of them; what a step adds for a moment."""
    plain = engine.kind == "torch"
    state = PLAIN if plain else STATE[engine.precision, engine.zero_stage]

    def share(numbers: int, pair: tuple[int, int]) -> int:
        return numbers * pair[0] + numbers * pair[1] // ranks

    place = _place(engine.offload_optimizer)
    kept = [
        Part("parameters", share(count, state.parameters)),
        Part("gradients", share(trained, state.gradients)),
        Part("optimizer", share(trained, state.optimizer), place),
    ]
    return kept, Part("optimizer step", share(trained, state.step), place)


def _place(offloaded: bool) -> Where:
    return "host" if offloaded else "device"


def _bucket_bytes(engine: EngineConfig, count: int, trained: int, ranks: int) -> int:
    """Reduction and gathering buffers of ZeRO, and what stage 3 gathers at one time."""
    size, bucket = number_bytes(engine.precision), min(trained, BUCKET)
    if engine.zero_stage == 0 or ranks == 1:
        return 0
    live = min(count, LIVE) * size if engine.zero_stage == 3 else 0
    return 2 * bucket * size + live


def rollout(config: TrainConfig, shape: Shape, gpu: bool) -> Role:
    """One rollout worker at its fullest."""
    size, decoding = number_bytes(config.engine.precision), config.rollout.decoding
    pool, prompt = config.cluster.rollout, config.data.prompt_limit
    slots = rows_at_once(config, shape)
    places = decoding.span(shape.spec, prompt)[1]
    cached = needs_cache(shape.spec, decoding)
    kv = slots * slot_bytes(shape.config, places, size) if cached else 0
    block = decoding.block_size or shape.spec.block_size or decoding.gen_length
    if cached and decoding.cache == "exact":
        tokens = max(min(PREFILL_TOKENS, slots * prompt), slots * 2 * block)
    else:
        tokens = slots * places
    # Without gradients: residual, norm in float32, q, k, v and the MLP's two, of one layer.
    per_token = 4 * shape.width + size * (4 * shape.width + 4 * shape.queries + 3 * shape.inner)
    seen = slots * min(2 * block if cached else places, places) * places
    logits = SAMPLER_COPIES * 4 * min(LOGIT_NUMBERS, slots * block * shape.vocabulary)
    parts = (
        Part("parameters", shape.parameters * size),
        Part("keys and values", kv),
        Part("activations", tokens * per_token + seen * (1 + size)),
        Part("logits", logits),
    )
    host = (Part("reading the checkpoint", shape.parameters * size, "host"),)
    return Role("rollout", pool.max, pool.num_gpus, parts, host)


def rows_at_once(config: TrainConfig, shape: Shape) -> int:
    """Requests that one rollout worker decodes side by side; 0: not even one fits cache_mib."""
    decoding, rollouts = config.rollout.decoding, config.rollout
    share = -(-rollouts.prompts_per_step // config.cluster.rollout.max) * rollouts.group_size
    slots = min(decoding.max_rows, share)
    if needs_cache(shape.spec, decoding):
        places = decoding.span(shape.spec, config.data.prompt_limit)[1]
        each = slot_bytes(shape.config, places, number_bytes(config.engine.precision))
        slots = min(slots, decoding.cache_mib * MIB // each)
    return slots


def store_bytes(config: TrainConfig, shape: Shape) -> int:
    """Ray's object store: the versions that are kept, and the one that is being published."""
    precision = "bf16" if config.cluster.wire == "bf16" else config.engine.precision
    return (KEEP_VERSIONS + 1) * shape.parameters * number_bytes(precision)


def roles_of(config: TrainConfig, shape: Shape, gpus: int) -> tuple[Role, Role]:
    """Learner and rollout; reward workers have no tensors."""
    alone = config.cluster.kind == "local"  # one process takes a GPU if there is one

    def has(asked: float) -> bool:
        return gpus > 0 and (alone or asked > 0)

    return (
        learner(config, shape, has(config.cluster.learner.num_gpus)),
        rollout(config, shape, has(config.cluster.rollout.num_gpus)),
    )


def misfits(config: TrainConfig, shape: Shape, gpus: int, gpu_mem_gib: float) -> List[str]:
    """What does not fit, a line each. Without GPUs nothing is refused: hosts differ."""
    roles = roles_of(config, shape, gpus)
    found = []
    asked = sum(role.count * role.num_gpus for role in roles)
    if config.cluster.kind == "ray" and asked > gpus:
        found.append(f"cluster asks for {asked:g} GPUs, there are {gpus}")
    if rows_at_once(config, shape) < 1:
        found.append(
            f"rollout: one request does not fit rollout.decoding.cache_mib="
            f"{config.rollout.decoding.cache_mib}"
        )
    usable = gpu_mem_gib * GIB * USABLE
    if config.cluster.kind == "local":
        total = sum(role.device_bytes for role in roles)
        if gpus and total > usable:
            found.append(_over("learner and rollout in one process", total, usable))
        return found
    for role in roles:
        room = usable * min(1.0, role.num_gpus)
        if role.num_gpus > 0 and role.device_bytes > room:
            found.append(_over(role.name, role.device_bytes, room))
    return found


def _over(name: str, needed: float, room: float) -> str:
    return f"{name}: needs {needed / GIB:.1f} GiB of a GPU, {room / GIB:.1f} GiB are usable"
