"""From completions and masks to the tokens of a forward pass. Not the network, not the estimator.

A block-causal completion with V masks becomes one row `[prompt ; x_0 ; x_t^1 ; ... ; x_t^V]`: all
masks share one clean context, exactly the condition under which each block was decoded. Prompt
tokens that share the completion's first block (`first_place`) stand in every x_t as they are. A
bidirectional completion becomes V rows `[prompt ; x_t]`: there nothing can be shared.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.records import Completion
from diffusion.attention import BlockOrigin, Pattern, block_index, first_place


@dataclass(frozen=True)
class Sequence:
    """One completion to score: `supervised` leading tokens count, the rest (tail) is context.

    step_map: the denoising step that fixed each token of `completion_ids`, if it is known.
    undecided: masks behind the completion that a bidirectional model saw while it decoded (blocks
        of the canvas that were never reached); a block-causal model sees nothing behind.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    supervised: int
    step_map: tuple[int, ...] | None = None
    undecided: int = 0


def decoded_sequence(prompt_ids: tuple[int, ...], completion: Completion) -> Sequence:
    """Prompt, the whole decoded completion, and supervision through its end (first EOS) only.

    What stands behind the EOS was decoded in the same block and is context; supervising it would
    let pads dominate the loss (defect 9 of ALGORITHMS section 4).
    """
    return Sequence(
        prompt_ids=prompt_ids,
        completion_ids=completion.token_ids + completion.tail_ids,
        supervised=len(completion.token_ids),
        step_map=completion.step_map or None,
        undecided=completion.undecided,
    )


@dataclass(frozen=True)
class TokenRows:
    """Input of one forward pass and the tokens to score in it.

    input_ids, position_ids int64 [B, S]; pattern: who sees whom in them;
    select int64 [N]: flat places (row * S + column) whose hidden state predicts targets int64 [N].
    """

    input_ids: Tensor
    position_ids: Tensor
    pattern: Pattern
    select: Tensor
    targets: Tensor

    @property
    def attention_mask(self) -> Tensor:
        """The pattern as a dense mask: bool [B, 1, S, S] (True: may see)."""
        return self.pattern.dense()[:, None]

    def to(self, device: torch.device) -> "TokenRows":
        """The same rows on another device."""
        return TokenRows(*(getattr(self, f).to(device) for f in self.__dataclass_fields__))

    def padded(self, multiple: int) -> "TokenRows":
        """The same rows, padded on the right to a multiple of so many columns."""
        length = self.input_ids.shape[1]
        width = -length % multiple
        if not width:
            return self
        row = torch.div(self.select, length, rounding_mode="floor")
        return TokenRows(
            pad(self.input_ids, (0, width)),
            pad(self.position_ids, (0, width)),
            self.pattern.padded(width),
            self.select + row * width,
            self.targets,
        )


@dataclass(frozen=True)
class _Row:
    """One row before padding; int64 [S_row] each. `source[j]` predicts token `target[j]`."""

    ids: Tensor
    position: Tensor
    view: Tensor
    block: Tensor
    source: Tensor
    target: Tensor


def build_rows(
    sequences: List[Sequence],
    masks: List[Tensor],
    *,
    mask_token_id: int,
    block_size: int | None,
    logit_shift: bool,
    scored: List[Tensor] | None = None,
    block_origin: BlockOrigin = "prompt",
) -> TokenRows:
    """Rows that score, in every view, the supervised tokens that the view hides.

    Args:
        sequences: B completions.
        masks: per completion bool [V, len(completion_ids)]: what each view hides.
        block_size: None for bidirectional models.
        scored: per completion bool [V, len(completion_ids)]: what to score instead.

    Returns:
        `TokenRows` with `select` ordered by completion, then view, then position.

    Raises:
        ValueError: `logit_shift` and an empty prompt: nothing stands before the first token.
    """
    if logit_shift and not all(sequence.prompt_ids for sequence in sequences):
        raise ValueError("with logit_shift a completion needs at least one prompt token")
    rows: list[_Row] = []
    if scored is None:
        scored = [_supervised(s, mask) for s, mask in zip(sequences, masks, strict=True)]
    for sequence, mask, wanted in zip(sequences, masks, scored, strict=True):
        if block_size is None:
            rows += [
                _canvas_row(sequence, view, part, mask_token_id, logit_shift)
                for view, part in zip(mask, wanted, strict=True)
            ]
        else:
            first = first_place(len(sequence.prompt_ids), block_size, block_origin)
            rows.append(
                _block_row(sequence, mask, wanted, mask_token_id, block_size, first, logit_shift)
            )
    return _pad(rows)


def row_tokens(
    sequence: Sequence, views: int, block_size: int | None, block_origin: BlockOrigin = "prompt"
) -> int:
    """Tokens that the forward pass of one completion with `views` masks costs."""
    prompt, completion = len(sequence.prompt_ids), len(sequence.completion_ids)
    if block_size is None:
        return views * (prompt + completion + sequence.undecided)
    first = first_place(prompt, block_size, block_origin)
    noisy = prompt + completion - first
    return first + _clean_length(noisy, block_size) + views * noisy


def _clean_length(noisy: int, block_size: int) -> int:
    """Clean copies that some noisy block may see, of `noisy` tokens: all but the last block's."""
    return (max(noisy, 1) - 1) // block_size * block_size


def _canvas_row(
    sequence: Sequence, mask: Tensor, scored: Tensor, mask_token_id: int, shift: bool
) -> _Row:
    prompt = len(sequence.prompt_ids)
    completion = torch.tensor(sequence.completion_ids, dtype=torch.int64)
    noisy = completion.masked_fill(mask, mask_token_id)
    behind = torch.full((sequence.undecided,), mask_token_id)
    ids = torch.cat([torch.tensor(sequence.prompt_ids, dtype=torch.int64), noisy, behind])
    hidden = scored.nonzero()[:, 0]
    ones = torch.ones_like(ids)
    return _Row(
        ids=ids,
        position=torch.arange(len(ids)),
        view=ones,
        block=0 * ones,
        source=prompt + hidden - int(shift),
        target=completion[hidden],
    )


def _block_row(
    sequence: Sequence,
    masks: Tensor,
    scored: Tensor,
    mask_token_id: int,
    block_size: int,
    first: int,
    shift: bool,
) -> _Row:
    prompt, views = len(sequence.prompt_ids), masks.shape[0]
    text = torch.tensor(sequence.prompt_ids + sequence.completion_ids, dtype=torch.int64)
    given, width = prompt - first, len(text) - first
    clean = first + _clean_length(width, block_size)
    noisy = text[first:].repeat(views, 1)
    noisy[:, given:].masked_fill_(masks, mask_token_id)
    position = torch.cat([torch.arange(clean), torch.arange(first, len(text)).repeat(views)])
    view = torch.cat([torch.zeros(clean, dtype=torch.int64), _repeat(range(1, views + 1), width)])
    source, target = [], []
    for number, wanted in enumerate(scored):
        column = given + wanted.nonzero()[:, 0]
        place = clean + number * width + column
        if shift:
            # The first token of a block is predicted from the clean end of the block before it.
            opening = column % block_size == 0
            place = torch.where(opening, first + column - 1, place - 1)
        source.append(place)
        target.append(text[first + column])
    return _Row(
        torch.cat([text[:clean], noisy.reshape(-1)]),
        position,
        view,
        block_index(position, first, block_size),
        torch.cat(source),
        torch.cat(target),
    )


def _repeat(values: range, times: int) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64).repeat_interleave(times)


def _supervised(sequence: Sequence, mask: Tensor) -> Tensor:
    return mask & (torch.arange(mask.shape[1]) < sequence.supervised)


def _pad(rows: List[_Row]) -> TokenRows:
    """Pad on the right to the longest row. Pads see and are seen by nobody."""
    longest = max(len(row.ids) for row in rows)

    def stack(name: str) -> Tensor:
        out = torch.zeros(len(rows), longest, dtype=torch.int64)
        for number, row in enumerate(rows):
            values = getattr(row, name)
            out[number, : len(values)] = values
        return out

    lengths = torch.tensor([len(row.ids) for row in rows])
    valid = torch.arange(longest) < lengths[:, None]
    pattern = Pattern(stack("view"), stack("block"), None, valid)
    select = torch.cat([number * longest + row.source for number, row in enumerate(rows)])
    targets = torch.cat([row.target for row in rows])
    return TokenRows(stack("ids"), stack("position"), pattern, select, targets)
