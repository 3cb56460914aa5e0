"""Models named so that no shell needs quotes: `torchvision:resnet18,num_classes=10`.

    spec    = source ":" factory { "," name "=" value }
    source  = "torchvision" | "timm" | "transformers" | package { "." module } | file ".py"

Values are Python literals, else text.  Commas split outside of brackets and quotes only.  A spec
names code that the user asks to run; none is ever made from the contents of a checkpoint.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptsurgeon.checkpoint import Target
from ckptsurgeon.errors import TargetError
from ckptsurgeon.targets import cache, module

if TYPE_CHECKING:
    import torch

_SOURCE = re.compile(r"[A-Za-z_][\w.]*|.*\.py", re.DOTALL)


@dataclass(frozen=True)
class Spec:
    """A parsed spec: where the model comes from, what it is called there, its arguments."""

    text: str
    source: str
    factory: str
    args: dict[str, Any] = field(default_factory=dict)


def looks_like(text: str) -> bool:
    """Whether `text` has the form of a spec."""
    source, colon, rest = text.partition(":")
    return bool(colon and rest and _SOURCE.fullmatch(source))


def parse(text: str) -> Spec:
    """The spec that `text` says; TargetError when it says none.

    >>> parse("torchvision:resnet18,num_classes=10,norm='a,b'").args
    {'num_classes': 10, 'norm': 'a,b'}
    """
    source, _, rest = text.partition(":")
    if not looks_like(text):
        raise TargetError(
            f"{text}: no such file, and no model spec; write torchvision:NAME, timm:NAME, "
            "transformers:FOLDER, package.module:factory or file.py:factory"
        )
    factory, *pairs = _split(rest)
    args: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip().isidentifier():
            raise TargetError(f"{text}: {pair!r} is no argument; write name=value")
        if name.strip() in args:
            raise TargetError(f"{text}: the argument {name.strip()} stands twice")
        args[name.strip()] = _literal(value.strip())
    return Spec(text, source, factory.strip(), args)


def _split(text: str) -> list[str]:
    parts, depth, quote, start = [], 0, "", 0
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth <= 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def target(text: str, use_cache: bool = True) -> Target:
    """The target that a spec names: from the cache, else built on the meta device where that works, else
    on the CPU.

    Raises TargetError when the package is not installed, the model unknown, or its code fails.
    """
    spec = parse(text)
    return cache.through(spec, lambda: _target(spec), use_cache)


def built(text: str) -> torch.nn.Module:
    """The module that a spec names, on the meta device where that works, else on the CPU. TargetError as `target`."""
    spec = parse(text)
    made: torch.nn.Module = _build_light(spec, _factory(spec))
    return made


def real(text: str, seed: int) -> torch.nn.Module:
    """The module that a spec names, with values from `seed`. TargetError as `target`."""
    spec = parse(text)
    return _build_seeded(spec, _factory(spec), seed)


def _target(spec: Spec) -> Target:
    factory = _factory(spec)

    def real(seed: int) -> torch.nn.Module:
        return _build_seeded(spec, factory, seed)

    return module.target(_build_light(spec, factory), spec.text, real)


def _factory(spec: Spec) -> Callable[[], Any]:
    """A call without arguments that makes the model."""
    find = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}.get(spec.source)
    with quiet():
        _seed(0)  # what a module makes when it is imported is the same every time
        try:
            return _code(spec) if find is None else find(spec)
        except TargetError:
            raise
        except (Exception, SystemExit) as error:
            raise TargetError(f"{spec.text}: {_words(error)}") from error


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What a model's code prints goes to stderr, its warnings nowhere, and what it draws at random
    leaves the caller's random state as it was."""
    import random

    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _import(name: str, spec: Spec) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        extra = f"pip install 'ckptsurgeon[{name}]'"
        raise TargetError(f"{spec.text}: {name} is not installed; {extra} installs it") from None


def _unknown(spec: Spec, names: list[str], of: str) -> TargetError:
    return TargetError(f"{spec.text}: {of} has no model {spec.factory!r}{_nearest(spec.factory, names)}")


def _nearest(name: str, names: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, names, 3)
    return f"; the nearest are {', '.join(near)}" if near else ""


def _torchvision(spec: Spec) -> Callable[[], Any]:
    models = _import("torchvision", spec).models
    names = models.list_models()
    if spec.factory not in names:
        raise _unknown(spec, names, "torchvision")
    builder = models.get_model_builder(spec.factory)
    offline = {"weights_backbone": None} if "weights_backbone" in _parameters(builder) else {}
    return lambda: builder(**{"weights": None, **offline, **spec.args})


def _parameters(function: Callable[..., Any]) -> set[str]:
    import inspect

    return set(inspect.signature(function).parameters)


def _timm(spec: Spec) -> Callable[[], Any]:
    timm = _import("timm", spec)
    if not timm.is_model(spec.factory):
        raise _unknown(spec, timm.list_models(), "timm")
    return lambda: timm.create_model(spec.factory, **{"pretrained": False, **spec.args})


def _transformers(spec: Spec) -> Callable[[], Any]:
    """A config folder (or file), else a model type with the arguments of its config."""
    transformers = _import("transformers", spec)
    args = dict(spec.args)
    wanted = args.pop("cls", None)
    if os.path.exists(spec.factory):
        args = {"local_files_only": True, "trust_remote_code": False, **args}
        config = transformers.AutoConfig.from_pretrained(spec.factory, **args)
    else:
        types = sorted(transformers.CONFIG_MAPPING.keys())
        if spec.factory not in types:
            raise _unknown(spec, types, "transformers (and the file system)")
        config = transformers.AutoConfig.for_model(spec.factory, **args)
    name = wanted or (getattr(config, "architectures", None) or ["AutoModel"])[0]
    cls = getattr(transformers, str(name), None)
    if not isinstance(cls, type) or not (issubclass(cls, transformers.PreTrainedModel) or hasattr(cls, "from_config")):
        # the name may come from a config file, which must not choose among functions
        raise TargetError(f"{spec.text}: transformers has no class of models {name}; name one with cls=")
    return lambda: cls.from_config(config) if hasattr(cls, "from_config") else cls(config)


def _code(spec: Spec) -> Callable[[], Any]:
    """`package.module:factory` (the current folder last on the path) or `file.py:factory`."""
    is_file = spec.source.endswith(".py")
    folder = os.path.dirname(os.path.abspath(spec.source)) if is_file else os.getcwd()
    with _on_path(folder):
        try:
            thing: Any = _file_module(spec) if is_file else importlib.import_module(spec.source)
        except ModuleNotFoundError as error:
            raise TargetError(f"{spec.text}: no module {error.name!r} is installed or in {folder}") from None
    for name in spec.factory.split("."):
        if not hasattr(thing, name):
            near = _nearest(name, [n for n in dir(thing) if not n.startswith("_")])
            raise TargetError(f"{spec.text}: {spec.source} has no {spec.factory!r}{near}")
        thing = getattr(thing, name)
    import torch

    if isinstance(thing, torch.nn.Module):
        return lambda: thing
    if not callable(thing):
        raise TargetError(f"{spec.text}: {spec.factory!r} is a {type(thing).__name__}, no factory of a model")

    def make() -> Any:
        with _on_path(folder):
            return thing(**spec.args)

    return make


@contextlib.contextmanager
def _on_path(folder: str) -> Iterator[None]:
    """`folder` is importable, after everything that is installed."""
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _file_module(spec: Spec) -> Any:
    path = os.path.abspath(spec.source)
    if not os.path.isfile(path):
        raise TargetError(f"{spec.text}: no such file: {spec.source}")
    name = "ckptsurgeon_target_" + re.sub(r"\W", "_", path)
    described = importlib.util.spec_from_file_location(name, path)
    if described is None or described.loader is None:
        raise TargetError(f"{spec.text}: {spec.source} cannot be imported")
    found = importlib.util.module_from_spec(described)
    sys.modules[name] = found
    described.loader.exec_module(found)
    return found


def _build_light(spec: Spec, factory: Callable[[], Any]) -> Any:
    """The model on the meta device; quietly on the CPU where its code cannot do that."""
    import torch

    with quiet():
        try:
            with torch.device("meta"):
                return _module(spec, factory())
        except TargetError:
            raise
        except (Exception, SystemExit):
            return _build(spec, factory)


def _build(spec: Spec, factory: Callable[[], Any]) -> Any:
    try:
        return _module(spec, factory())
    except TargetError:
        raise
    except (Exception, SystemExit) as error:
        raise TargetError(f"{spec.text}: the model cannot be built: {_words(error)}") from error


def _module(spec: Spec, made: Any) -> Any:
    import torch

    if not isinstance(made, torch.nn.Module):
        raise TargetError(f"{spec.text}: makes a {type(made).__name__}, no nn.Module")
    return made


def _seed(seed: int) -> None:
    import random

    import numpy as np
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def _build_seeded(spec: Spec, factory: Callable[[], Any], seed: int) -> torch.nn.Module:
    """The model with real values on the CPU, from `seed`."""
    with quiet():
        _seed(seed)
        made: torch.nn.Module = _build(spec, factory)
        return made
