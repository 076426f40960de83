"""The lean output layer against the plain form, in values, gradients and memory."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import models.head
from diffusion.layout import Sequence, TokenRows, build_rows
from models.checkpoint import new_model
from models.denoiser import Denoiser
from models.engine import EngineConfig, OptimConfig, make_engine
from models.head import TargetHead
from models.spec import DiffusionSpec

SPEC = DiffusionSpec(mask_token_id=2, logit_shift=False, attention="bidirectional", block_size=None)


def plain(layer: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = nn.functional.linear(hidden, layer.weight, layer.bias)
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def layer_of(bias: bool, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 37, bias=bias, dtype=dtype)


def gradients(values: Tensor, layer: nn.Linear, hidden: Tensor) -> list[Tensor]:
    # A different gradient for every token, so that a mix-up of tokens shows.
    weight = torch.arange(1.0, len(values) + 1, dtype=values.dtype)
    return list(torch.autograd.grad((values * weight).sum(), [hidden, *layer.parameters()]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 5, 36, 37, 100])
def test_equals_the_plain_form(monkeypatch: pytest.MonkeyPatch, bias: bool, width: int) -> None:
    monkeypatch.setattr(models.head, "MIN_SLICE", 1)
    monkeypatch.setattr(models.head, "CPU_BUDGET", 9 * width)
    layer = layer_of(bias)
    head = TargetHead.over(layer)
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 36, 5, 5, 4, 35, 17, 1, 30])
    ours, theirs = head(hidden, targets), plain(layer, hidden, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(
        gradients(ours, layer, hidden), gradients(theirs, layer, hidden), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_numerical_gradient() -> None:
    head = TargetHead.over(layer_of(bias=True))
    hidden = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 36, 1])
    assert torch.autograd.gradcheck(lambda h, *_: head(h, targets), (hidden, *head.parameters()))


def test_without_targets_it_is_the_layer_it_was() -> None:
    layer = layer_of(bias=True)
    head = TargetHead.over(layer)
    assert head.weight is layer.weight and head.bias is layer.bias
    assert TargetHead.over(head) is head
    hidden = torch.randn(2, 4, 6, dtype=torch.float64)
    assert torch.equal(head(hidden), layer(hidden))


def test_bf16_is_float32_arithmetic_on_rounded_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.head, "CPU_BUDGET", 1)
    monkeypatch.setattr(models.head, "MIN_SLICE", 8)
    layer = layer_of(bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(9, 6).bfloat16().requires_grad_()
    targets = torch.arange(9)
    ours = TargetHead.over(layer)(hidden, targets)
    logits = nn.functional.linear(hidden, layer.weight).float()
    theirs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        gradients(ours, layer, hidden), gradients(theirs, layer, hidden), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)


def test_autocast_rounds_as_a_linear_layer_does() -> None:
    layer = layer_of(bias=True, dtype=torch.float32)
    hidden, targets = torch.randn(9, 6), torch.arange(9)
    with torch.autocast("cpu", torch.bfloat16):
        ours = TargetHead.over(layer)(hidden, targets)
        theirs = layer(hidden).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs.detach())
    assert not torch.allclose(theirs, plain(layer, hidden, targets), atol=1e-5)


def test_no_tensor_of_positions_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: the largest tensor that any operation makes, forward and backward."""
    monkeypatch.setattr(models.head, "CPU_BUDGET", 50 * 64)
    monkeypatch.setattr(models.head, "MIN_SLICE", 1)
    positions, vocabulary, width = 50, 4096, 4
    layer = nn.Linear(width, vocabulary, bias=False)
    hidden = torch.randn(positions, width, requires_grad=True)
    largest = Largest()
    with largest:
        logps = TargetHead.over(layer)(hidden, torch.arange(positions))
        logps.sum().backward()
    assert largest.elements == vocabulary * width  # the weight's gradient; its logits have 204800


class Largest(TorchDispatchMode):
    """Elements of the largest new tensor."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, list | tuple) else [out]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def model(tied: bool) -> nn.Module:
    architecture = {
        "model_type": "qwen2",
        "vocab_size": 24,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    return new_model(architecture, 0)


def rows_of_one() -> TokenRows:
    mask = torch.ones(1, 6, dtype=torch.bool)
    return build_rows(
        [Sequence((4, 5), (6, 7, 8, 9, 10, 6), 6)],
        [mask],
        mask_token_id=2,
        block_size=None,
        logit_shift=False,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_gradients_of_the_model_stay_whose_they_are(tied: bool) -> None:
    stock = model(tied)
    denoiser = Denoiser(copy.deepcopy(stock), SPEC)
    assert denoiser.model.state_dict().keys() == stock.state_dict().keys()
    rows = rows_of_one()
    logits = stock(rows.input_ids, attention_mask=rows.attention_mask).logits.flatten(0, 1)
    theirs = logits[rows.select].log_softmax(-1).gather(-1, rows.targets[:, None])[:, 0]
    ours = denoiser(rows)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, mine), other in zip(
        denoiser.model.named_parameters(), stock.parameters(), strict=True
    ):
        assert mine.grad is not None and other.grad is not None, name
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert (denoiser.model.lm_head.weight is denoiser.model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_deepspeed_gathers_the_head_when_it_is_used(
    monkeypatch: pytest.MonkeyPatch, tied: bool, stage: int
) -> None:
    monkeypatch.setattr(models.head, "CPU_BUDGET", 1)
    monkeypatch.setattr(models.head, "MIN_SLICE", 7)
    optim = OptimConfig(lr=1e-2, schedule="constant", grad_clip=0.0, weight_decay=0.0)
    states = []
    for config in (EngineConfig(kind="torch"), EngineConfig(kind="deepspeed", zero_stage=stage)):
        engine = make_engine(Denoiser(model(tied), SPEC), config, optim)
        rows = rows_of_one()
        for _ in range(2):
            loss = engine.score(rows).mean() * engine.score(rows).mean()  # two uses in one graph
            engine.backward(loss, last=True)
            engine.step()
        states.append({k: v for bucket in engine.state_buckets() for k, v in bucket.items()})
    torch.testing.assert_close(states[1], states[0], rtol=2e-3, atol=2e-4)
