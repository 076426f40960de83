"""YAML + dotted overrides -> frozen, validated sections. Not a registry: rooms declare their own.

Sections near the maths are frozen stdlib dataclasses (so that `diffusion` and `models` import
without pydantic); pydantic validates them all the same through `__pydantic_config__`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from common.errors import UserError
from common.secret_names import is_secret

T = TypeVar("T")


class Section(BaseModel):
    """Base of configuration sections: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _variable(name: str, *default: str | None) -> str | None:
    """`${oc.env:NAME}`, but no secrets: the resolved settings are written down and logged."""
    value: str | None = oc.env(name, *default)
    if is_secret(name, value or ""):
        raise ValueError(
            f"${{oc.env:{name}}} would write a secret into config.yaml; leave it in the environment"
        )
    return value


OmegaConf.register_resolver("oc.env", _variable, replace=True)


def load_config(schema: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read `path`, apply `a.b=c` overrides, validate against `schema`.

    Raises:
        UserError: missing file, YAML that does not parse, an override that is no `key=value`,
            an unknown key, a wrong type or an impossible combination; names key and file.
    """
    values = _merged(path, overrides)
    try:
        # JSON mode is strict about types, yet takes a YAML list for a tuple.
        return TypeAdapter(schema).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(_first_problem(error, path)) from error


def dump_config(config: Any) -> str:
    """The resolved configuration as YAML, in the order of its schema."""
    values = TypeAdapter(type(config)).dump_python(config, mode="json")
    return yaml.safe_dump(values, sort_keys=False)


def read_value(text: str) -> Any:
    """What stands behind `key=` on a command line, as YAML would read it.

    OmegaConf's reading: plain YAML takes 1e-4 for text.
    """
    return OmegaConf.from_dotlist([f"value={text}"])["value"]


def _merged(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such config file; `configs/` holds those that ship with Unmask"
        )
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(
                f"override {override!r}: write it as key=value, for example train.steps=10"
            )
    try:
        merged = OmegaConf.load(path)
        for override in overrides:
            key, _, text = override.partition("=")
            # Not a merge of dot lists: that cannot reach into a list (stages.0.steps=10).
            OmegaConf.update(merged, key, read_value(text), force_add=True)
        values: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, IndexError, ValueError) as error:
        first = " ".join(str(error).splitlines()[0].split())
        raise UserError(f"{path}: {first}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: the file must hold a mapping of keys, not a {type(values).__name__}"
        )
    return values


def _first_problem(error: ValidationError, path: Path) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"]) or "(top level)"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        text = "unknown key; remove it or correct its spelling"
    elif first["type"] == "missing":
        text = "missing; add it"
    else:
        text = f"{first['msg']} (got {first.get('input')!r})"
    more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
    return f"{path}: {key}: {text}{more}"
