"""The decoder: requests in, completions out. One public call for rollout, evaluation, `generate`.

Not the maths of a step (`diffusion.sampling`, `diffusion.unmasking`) and not what the network is
shown (`models.windows`). Rows are independent: each has its own settings, block and step, and a
finished row's slot is given to the next request at once.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import InfrastructureError, UserError
from common.records import Completion
from diffusion.likelihood import EstimatorConfig
from diffusion.sampling import draw, target_distribution
from diffusion.unmasking import choose, mixed_confidence, ranking
from models.cache import SlotCache, affordable_slots, needs_cache
from models.denoiser import Denoiser
from models.request import DecodingConfig, Request
from models.scoring import with_behaviour_logps
from models.slots import Slots
from models.stops import stop_ids
from models.windows import BlockWindow, CachedCanvasWindow, CanvasWindow, Window

# Logits alive at one time (float32): bounds the memory of the last layer, 64 MiB a copy.
LOGIT_NUMBERS = 2**24


@dataclass(frozen=True)
class Snapshot:
    """One request after a pass: `ids` of its canvas up to gen_length (mask token: undecided).

    The first `final` of them are in finished blocks: they will not change any more. The first
    `text` of them stand before any stop token.
    """

    request: int
    ids: tuple[int, ...]
    final: int
    text: int


Watch = Callable[[Snapshot], None]


class Decoder:
    """Decodes requests with one model. Threads take turns."""

    def __init__(self, denoiser: Denoiser, tokenizer: PreTrainedTokenizerFast) -> None:
        self.denoiser = denoiser
        self.tokenizer = tokenizer
        self.stops = stop_ids(denoiser.model, tokenizer)
        self._lock = threading.Lock()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Change the weights in here: waits until no request is under work, and holds the next.

        Nothing that was computed from the old weights outlives a call of `decode`.
        """
        with self._lock:
            yield

    @torch.no_grad()
    def decode(
        self,
        requests: Sequence[Request],
        config: DecodingConfig,
        on_progress: Callable[[int], None] | None = None,
        watch: Watch | None = None,
        estimator: EstimatorConfig | None = None,
    ) -> list[Completion]:
        """Completions in the order of `requests`.

        Args:
            config: for requests without settings of their own; its max_rows and cache_mib bound
                the call.
            on_progress: told how many completions have just been finished.
            watch: shown every row after every pass.
            estimator: of the log-probabilities that requests ask for with `mask_seeds`.

        Raises:
            UserError: sizes that do not fit the checkpoint, an empty prompt, or too little memory.
            InfrastructureError: somebody changed the weights meanwhile, not in `updating`.
        """
        if any(not request.prompt_ids for request in requests):
            raise UserError("empty prompt: a completion needs at least one prompt token")
        if estimator is None and any(request.mask_seeds for request in requests):
            raise ValueError("requests with mask_seeds need an estimator")
        if any(r.mask_seeds and (r.decoding or config).early_exit for r in requests):
            raise ValueError("early_exit keeps no tail, the context that mask_seeds are scored in")
        config.resolve(self.denoiser.spec)
        parts: dict[tuple[int, str], list[int]] = {}
        for number, request in enumerate(requests):
            own = request.decoding or config
            key = (own.resolve(self.denoiser.spec)[0], own.cache)
            parts.setdefault(key, []).append(number)
        done: dict[int, Completion] = {}
        with self._lock:
            self.denoiser.eval()
            before = self._weights_version()
            for numbers in parts.values():
                _Run(self, requests, numbers, config, done, on_progress, watch).finish()
            completions = [done[number] for number in range(len(requests))]
            if estimator is not None:
                completions = with_behaviour_logps(self.denoiser, requests, completions, estimator)
            if self._weights_version() != before:
                raise InfrastructureError(
                    "weights changed while requests were decoded; change them in Decoder.updating()"
                )
        return completions

    def _weights_version(self) -> int:
        """Grows whenever a weight is written to."""
        return sum(parameter._version for parameter in self.denoiser.parameters())


class _Run:
    """Requests of one block size and one kind of cache, until all are done.

    Args:
        numbers: which of `requests`.
        config: the call's.
        done: where completions go, by request number.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[Request],
        numbers: list[int],
        config: DecodingConfig,
        done: dict[int, Completion],
        on_progress: Callable[[int], None] | None,
        watch: Watch | None,
    ) -> None:
        self.decoder, self.denoiser = decoder, decoder.denoiser
        self.requests, self.done = requests, done
        self.on_progress, self.watch = on_progress, watch
        spec, device = self.denoiser.spec, next(self.denoiser.parameters()).device
        self.stops = torch.tensor(decoder.stops, device=device)
        self.own = {n: requests[n].decoding or config for n in numbers}
        self.steps = {n: own.resolve(spec)[1] for n, own in self.own.items()}
        # Like lengths side by side: fewer padded places.
        self.queue = deque(sorted(numbers, key=lambda n: (len(requests[n].prompt_ids), n)))
        prompts = {n: len(requests[n].prompt_ids) for n in numbers}
        self.spans = {n: self.own[n].span(spec, prompts[n]) for n in numbers}
        places = max(end for _, end in self.spans.values())
        noise = (0, 0)
        if any(own.needs_noise for own in self.own.values()):
            noise = max(self.spans[n][1] - prompts[n] for n in numbers), max(self.steps.values())
        first = self.own[numbers[0]]
        slots = min(config.max_rows, len(numbers))
        model_config: Any = self.denoiser.model.config
        if needs_cache(spec, first):
            itemsize = next(self.denoiser.parameters()).element_size()
            slots = affordable_slots(model_config, places, slots, config.cache_mib, itemsize)
        self.slots = Slots.make(
            slots, places, noise, first.resolve(spec)[0], spec.mask_token_id, device
        )
        self.vocabulary = int(model_config.vocab_size)
        self.window = self._window(first, SlotCache(slots, places))

    def _window(self, config: DecodingConfig, cache: SlotCache) -> Window:
        if self.denoiser.spec.attention != "bidirectional":
            return BlockWindow(self.denoiser, self.slots, cache)
        if config.cache == "exact":
            return CanvasWindow(self.denoiser, self.slots)
        return CachedCanvasWindow(self.denoiser, self.slots, cache, config.cache == "dual")

    def finish(self) -> None:
        """Decode everything."""
        self.slots.active = len(self.slots.ids)
        self._refill(list(range(self.slots.active)))
        while self.slots.active:
            self._pass()

    def _pass(self) -> None:
        """One step of every active row: some places of each block under work are decided."""
        slots, active = self.slots, self.slots.active
        block = slots.block()
        masked = slots.masked(block)
        for_draw, for_order = slots.uniforms(block)
        token, sure = self._candidates(
            self.window.hidden()[masked],
            masked.nonzero()[:, 0],
            for_draw[masked],
            for_order[masked],
        )
        tokens = torch.zeros_like(block).masked_scatter(masked, token)
        score = torch.zeros_like(for_order).masked_scatter(masked, sure)
        rank = ranking(score, slots.order[:active], slots.order_temperature[:active], for_order)
        left = slots.steps[:active] - slots.step[:active]
        fixed = choose(score, masked, left, slots.threshold[:active], rank)
        slots.fix(block, fixed, tokens, score)
        self._advance(block, ~(masked & ~fixed).any(-1))

    def _candidates(
        self, hidden: Tensor, row: Tensor, for_draw: Tensor, for_order: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A token and its confidence for each masked place, [N] each, from hidden [N, D]."""
        slots = self.slots
        size = max(1, LOGIT_NUMBERS // self.vocabulary)
        tokens, scores = [], []
        for states, rows, uniform, order_uniform in zip(
            *(part.split(size) for part in (hidden, row, for_draw, for_order)), strict=True
        ):
            heat = slots.temperature[rows]
            probs = target_distribution(
                self.denoiser.logits(states),
                heat,
                slots.top_p[rows],
                slots.top_k[rows],
                slots.mask_token_id,
            )
            token = draw(probs, uniform, heat)
            tokens.append(token)
            scores.append(mixed_confidence(probs, token, slots.order[rows], order_uniform))
        return torch.cat(tokens), torch.cat(scores)

    def _advance(self, block: Tensor, finished: Tensor) -> None:
        """Rows whose block is decided go on to the next one, or are done."""
        slots, active = self.slots, self.slots.active
        ids = slots.ids[:active].gather(1, block)
        if self.watch:
            self._show(finished)
        # A prompt may hold stop tokens too: its turns end with them.
        eos = torch.isin(ids, self.stops) & (block >= slots.prompt[:active, None])
        last = slots.start[:active] + slots.block_size == slots.end[:active]
        over = finished & (eos.any(-1) | last)
        if any(own.early_exit for own in self.own.values()):
            settled = ((ids == slots.mask_token_id).cumsum(-1) == 0) & eos
            early = [self.own[n].early_exit for n in slots.number[:active].tolist()]
            over = over | (settled.any(-1) & torch.tensor(early, device=over.device))
        onward = (finished & ~over).nonzero()[:, 0]
        slots.next_block(onward)
        retired = over.nonzero()[:, 0].tolist()
        if not retired:
            return
        for slot in retired:
            self.done[int(slots.number[slot])] = self._completion(slot)
        if self.on_progress:
            self.on_progress(len(retired))
        self._refill(retired)

    def _refill(self, free: list[int]) -> None:
        """Give free slots to waiting requests; without any, close the gaps."""
        admitted = []
        while free and self.queue:
            slot, number = free.pop(0), self.queue.popleft()
            own, steps = self.own[number], self.steps[number]
            self.slots.admit(slot, number, self.requests[number], own, steps, self.spans[number])
            admitted.append(slot)
        if free:
            self._close_gaps(free)
        if admitted:
            self.window.admit(admitted)

    def _close_gaps(self, free: list[int]) -> None:
        """Active slots stay the first ones, so that a pass reads the cache without a copy."""
        active = self.slots.active - len(free)
        target = [slot for slot in free if slot < active]
        source = [slot for slot in range(active, self.slots.active) if slot not in free]
        if target:
            device = self.slots.ids.device
            pair = torch.tensor(source, device=device), torch.tensor(target, device=device)
            self.slots.move(*pair)
            self.window.move(*pair)
        self.slots.active = active

    def _before_stop(self, ids: Sequence[int]) -> int:
        """How many of `ids` stand before the first stop token."""
        return next((n for n, token in enumerate(ids) if token in self.decoder.stops), len(ids))

    def _show(self, finished: Tensor) -> None:
        assert self.watch is not None
        slots = self.slots
        for slot, whole in enumerate(finished.tolist()):
            number, prompt = int(slots.number[slot]), int(slots.prompt[slot])
            length = self.own[number].gen_length
            final = int(slots.start[slot]) - prompt + (slots.block_size if whole else 0)
            ids = tuple(slots.ids[slot, prompt : prompt + length].tolist())
            self.watch(Snapshot(number, ids, min(max(final, 0), length), self._before_stop(ids)))

    def _completion(self, slot: int) -> Completion:
        slots = self.slots
        part = slice(int(slots.prompt[slot]), int(slots.start[slot]) + slots.block_size)
        ids = slots.ids[slot, part].tolist()
        most = self.own[int(slots.number[slot])].gen_length
        before = self._before_stop(ids[:most])
        ended = before < min(most, len(ids))
        length = before + int(ended)
        # Left early, the places behind the EOS are undecided: they are no part of the result.
        stop = length if slots.mask_token_id in ids else len(ids)
        # Numbered without gaps, also where a pass decided such places only.
        steps = slots.step_map[slot, part][:stop].unique(return_inverse=True)[1]
        sees_behind = self.denoiser.spec.attention == "bidirectional"
        return Completion(
            token_ids=tuple(ids[:length]),
            tail_ids=tuple(ids[length:stop]),
            text=str(self.decoder.tokenizer.decode(ids[:before], skip_special_tokens=True)),
            finish_reason="eos" if ended else "length",
            step_map=tuple(steps.tolist()),
            confidences=tuple(slots.sure[slot, part][:stop].tolist()),
            undecided=int(slots.end[slot]) - part.start - stop if sees_behind else 0,
        )
