"""A section that names a class and its parameters: ``{"type": "Adam", "params": {"lr": 0.001}}``.

Owns the choice of a parameters' model by type, and the check of parameters against a signature for a class
that has no model here. Which names there are is the subclass's business.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from pydantic import ConfigDict, Field, SerializeAsAny, ValidationInfo, field_validator

from engine.config.section import (
    MISTAKE,
    REFUSAL,
    Betas,
    Integer,
    NonNegative,
    Section,
    adapter_of,
    check,
    failure,
    finished,
    unknown_key,
    wrong,
)
from engine.config.words import nearest, shown

__all__ = ["AUTO_PARAMS", "Classes", "Component", "FreeParams", "Models"]

AUTO_PARAMS = ("lr", "betas", "eps", "weight_decay")  # what Hugging Face's integration fills in for any optimizer

Models = dict[str, type[Section]]  # named here: in a class with a field `type`, that word means the field
Classes = dict[str, type]


class Component(Section):
    """The name of a class and the parameters it is called with."""

    kind: ClassVar[str]  # "optimizer", as the section is called
    models: ClassVar[Models]  # the types whose parameters have a model
    any_case: ClassVar[tuple[str, ...]] = ()  # the types that DeepSpeed knows in upper and lower case
    not_built: ClassVar[dict[str, str]]  # names, in lower case, that are not to be taken: why, what to use instead

    type: str
    params: SerializeAsAny[Section] = Field(default=None, validate_default=True)

    def arguments(self) -> dict[str, Any]:
        """The parameters that were given, ready as keyword arguments; those left out are not in it."""
        given, extra = self.params.model_fields_set, self.params.model_extra or {}
        return {name: getattr(self.params, name) for name in type(self.params).model_fields if name in given} | extra

    def takes(self, parameter: str) -> bool:
        """Whether the class has a parameter of this name."""
        if self.type in self.models:
            return parameter in type(self.params).model_fields
        parameters = inspect.signature(self.classes()[self.type]).parameters
        return parameter in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())

    @classmethod
    def classes(cls) -> Classes:
        """Every name that can be used, models or not, with its class."""
        raise NotImplementedError

    @classmethod
    def misplaced(cls, key: str) -> str | None:
        if any(key in model.model_fields for model in cls.models.values()):
            return f"move it into {cls.kind}.params"
        return None

    @field_validator("type")
    @classmethod
    def _known(cls, name: str) -> str:
        name = next((spelt for spelt in cls.any_case if spelt.lower() == name.lower()), name)
        if name in cls.models:
            return name
        known, reason = cls.classes(), cls.not_built.get(name.lower())
        if reason and (name not in known or known[name].__module__.startswith("torch.")):  # not a registered one
            raise wrong(REFUSAL, f"{shown(name)} is not built; {reason}")
        if name not in known:
            usable = {**known, **cls.models}
            guess = nearest(name, usable)
            names = sorted(name for name in usable if name.lower() not in cls.not_built)
            hint = f'did you mean "{guess}"?' if guess else f"known: {', '.join(names)}"
            raise wrong(MISTAKE, f"unknown {cls.kind} {shown(name)}; {hint}")
        return name

    @field_validator("params", mode="wrap")
    @classmethod
    def _of_its_type(cls, params: Any, _: Any, info: ValidationInfo) -> Section:
        name = info.data.get("type")
        if name is None:  # the type has its own mistake; what it would take is not known
            return Section()
        params = {} if params is None else params
        if name in cls.models:
            return cls.models[name].model_validate(params, context=info.context)
        return _by_signature(cls.classes()[name], FreeParams.model_validate(params))


class FreeParams(Section):
    """Parameters of a class that has no model here."""

    model_config = ConfigDict(extra="allow")


_BY_NAME: dict[str, Any] = {"lr": NonNegative, "weight_decay": NonNegative, "momentum": NonNegative, "betas": Betas}


def _by_signature(cls: type, params: FreeParams) -> FreeParams:
    """The parameters, once they fit the class's signature as far as that tells.

    Its first parameter (``params``, ``optimizer``) is the engine's to give.
    """
    _, *parameters = inspect.signature(cls).parameters.values()
    known = {each.name: each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    given = (params.model_extra or {}).items()
    values, mistakes = {key: value for key, value in given if value != "auto" or key not in AUTO_PARAMS}, []
    for name, value in values.items():
        message: str | None = None
        if name in known:
            values[name], message = check(adapter_of(_annotation(known[name])), value)
        elif not takes_any:
            message = unknown_key(name, known)
        if message:
            mistakes.append(finished(MISTAKE, (name,), message))
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in values:
            mistakes.append(finished(MISTAKE, (name,), f"missing; {cls.__name__} needs it"))
    if mistakes:
        raise failure(mistakes)
    return FreeParams.model_validate(values)


def _annotation(parameter: inspect.Parameter) -> Any:
    """The JSON that a parameter takes: by its name, its annotation, its default; anything if these do not tell."""
    if parameter.name in _BY_NAME:
        return _BY_NAME[parameter.name]
    declared, default = parameter.annotation, parameter.default
    if declared in (int, "int"):
        return Integer
    if declared in (bool, "bool") or isinstance(default, bool):
        return bool
    if declared in (float, "float") or isinstance(default, (int, float)):
        return float | list[float]
    return str if isinstance(default, str) else Any
