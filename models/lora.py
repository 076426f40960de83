"""Low-rank adapters (LoRA, arXiv 2106.09685) in a stock model, by peft. Not an engine.

The stock weights are frozen and only adapters are trained: W' = W + (alpha / rank) * B @ A. Outside
an engine nobody sees adapters: what is published and exported are merged weights under their stock
names, and the model with its adapters off is the policy that training started from.

peft is the optional extra `lora`: it is imported where adapters are made, and nowhere else.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.seeding import derive_seed

# The matrices of a layer of Qwen2, Qwen3 and Llama. Not the embeddings: those may be tied.
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# How peft names its parts.
BASE, FACTOR_A, FACTOR_B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of `rank` on the matrices named in `targets`, scaled by alpha / rank."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = MATRICES

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError("lora.rank must be at least 1 and lora.alpha above 0")
        if not self.targets or len({*self.targets}) < len(self.targets):
            raise ValueError("lora.targets must name at least one matrix, each once")
        if unknown := [name for name in self.targets if name not in MATRICES]:
            raise ValueError(f"lora.targets: no {unknown[0]}; choose among {', '.join(MATRICES)}")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for saved adapters to be these, as JSON gives it back."""
        return {"rank": self.rank, "alpha": float(self.alpha), "targets": sorted(self.targets)}


def check_lora(config: LoraConfig | None) -> None:
    """UserError if adapters are asked for and peft is not there; imports nothing."""
    if config is not None and importlib.util.find_spec("peft") is None:
        raise UserError(
            "engine.lora: peft is not installed; run `pip install peft` (pinned in "
            "requirements/cpu.txt) or set engine.lora=null"
        )


class Adapters:
    """The adapters that were put into a module; without a configuration there are none.

    Names are those of `module.named_parameters()`, peft's parts included.
    """

    def __init__(self, module: nn.Module, config: LoraConfig | None) -> None:
        """Put them into `module.model`, and freeze everything else.

        Raises:
            UserError: peft is not installed, or the model has none of the targets.
        """
        self._layers: dict[str, Any] = {}
        if config is None:
            return
        check_lora(config)
        _inject(module.model, config)  # type: ignore[arg-type]
        self._scale = config.scale
        for name, layer in module.named_modules():
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
                self._layers[f"{name}{BASE}weight"] = layer
                _draw(layer.lora_A["default"].weight, name)

    def __bool__(self) -> bool:
        return bool(self._layers)

    def factors(self, name: str) -> tuple[nn.Parameter, ...]:
        """B [out, rank] and A [rank, in] of the adapter on stock parameter `name`, if any."""
        layer = self._layers.get(name)
        if layer is None:
            return ()
        return layer.lora_B["default"].weight, layer.lora_A["default"].weight

    def merged(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Stock parameter `name` with its adapter in it: `value` itself if it has none.

        Args:
            dtype: of the numbers that the forward pass uses; None: as they are kept.
        """
        found = self.factors(name)
        if not found:
            return value
        b, a = found
        return merge(value.detach(), b, a, self._scale, dtype)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The stock model while the block runs. For passes without gradients."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)


def stock_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that the stock model has too, by their present names, tied ones once."""
    for name, value in module.named_parameters():
        if not name.endswith((FACTOR_A, FACTOR_B)):
            yield name, value


def merge(
    base: Tensor, b: Tensor, a: Tensor, scale: float, dtype: torch.dtype | None = None
) -> Tensor:
    """base + scale * b @ a, of numbers rounded to `dtype`: summed in float32, rounded once."""
    dtype = dtype or base.dtype
    exact = (part.detach().to(dtype).float() for part in (base, b, a))
    return torch.addmm(*exact, alpha=scale).to(dtype)


def merged_state(state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """A saved state with peft's names as one of the stock model."""
    found = {}
    for name, value in state.items():
        if name.endswith((FACTOR_A, FACTOR_B)):
            continue
        stem, _, leaf = name.rpartition(BASE)
        if stem and leaf == "weight":
            b, a = state[stem + FACTOR_B], state[stem + FACTOR_A]
            value = merge(value, b, a, config.scale)
        found[stock_name(name)] = value
    return found


def stock_name(name: str) -> str:
    """A parameter's name in the stock model."""
    return name.replace(BASE, ".")


def _inject(model: nn.Module, config: LoraConfig) -> None:
    import peft

    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets)
    )
    with torch.random.fork_rng(devices=[]):  # its own random start is drawn anew, by name
        try:
            peft.inject_adapter_in_model(settings, model)
        except ValueError as error:  # a model without such matrices
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"engine.lora.targets: {reason}; name matrices it has") from error


def _draw(factor: nn.Parameter, name: str) -> None:
    """LoRA's start: A uniform, B zero. A's numbers follow from the layer's name alone."""
    generator = torch.Generator().manual_seed(derive_seed(0, "lora", name))
    drawn = torch.empty(factor.shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        factor.copy_(drawn)
