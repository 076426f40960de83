"""What `unmask pretrain` can be told. Not RL: `rl.config` is the other half."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from common.config import Section
from common.metrics import MetricsConfig
from models.engine import EngineConfig
from pretrain.stages import StageSection


class RunSection(Section):
    """name: of the run. folder: where stages, logs and metrics go. seed: of everything drawn.

    data_seed: of the embedded splits; apart, so that runs of several seeds learn from one data set.
    """

    name: str
    folder: Path
    seed: int = 0
    data_seed: int = 0


class TokenizerSection(Section):
    """A new byte-level BPE, trained on the text of all stages; unused when `start` is given."""

    vocab_size: int = Field(default=512, ge=260)


class PretrainConfig(Section):
    """The whole of a pretraining run.

    architecture: a transformers config with `model_type`, for a new model; or
    start: a checkpoint folder to continue from (then `architecture` is unused).
    threads: CPU threads of the engine; 0 leaves the choice to torch.
    """

    run: RunSection
    architecture: dict[str, Any] = {}
    start: Path | None = None
    tokenizer: TokenizerSection = TokenizerSection()
    engine: EngineConfig = EngineConfig()
    metrics: MetricsConfig = MetricsConfig()
    threads: int = Field(default=0, ge=0)
    stages: tuple[StageSection, ...] = Field(min_length=1)
    resume: Literal["auto", "never"] = "auto"

    @model_validator(mode="after")
    def _fits(self) -> "PretrainConfig":
        if self.start is None and "model_type" not in self.architecture:
            raise ValueError("architecture.model_type is missing (or give `start`, a checkpoint)")
        if self.start is None and self.engine.lora is not None:
            raise ValueError("engine.lora: adapters need a trained model: give `start`")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("stages must have different names")
        return self
