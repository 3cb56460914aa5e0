"""Checkpoint + Recipe (+ Target) → Plan.  Pure: no byte is read.

The rules run in order, each on the names that the one before it made.  With a target, policies
then settle what the target does not know (unexpected), wants in another shape (mismatched) or
does not get (missing); what no policy settles is a problem.  All problems are collected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

from ckptsurgeon import recognition, versions, wrappers
from ckptsurgeon.applying import Applying, options_of
from ckptsurgeon.checkpoint import Checkpoint, Target, buffer_words
from ckptsurgeon.collecting import uncollected
from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import MOST_SHOWN, Problem, UsageError
from ckptsurgeon.ops import Initial, reshaped
from ckptsurgeon.ops.making import filled
from ckptsurgeon.plans import STRICT, Mismatched, Missing, Plan, Policies, Step, Unexpected
from ckptsurgeon.provenance import Derivation
from ckptsurgeon.rules import Recipe, parse, render
from ckptsurgeon.schemes import Scheme
from ckptsurgeon.sources import Apply, Kernel
from ckptsurgeon.tensor import TensorRef, TensorSpec, only_ones_differ

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Overlap(Kernel):
    """The part that two tensors of one rank share comes from the first, the rest from the second."""

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        loaded, initial = inputs
        region = tuple(slice(0, min(a, b)) for a, b in zip(loaded.shape, initial.shape, strict=True))
        out = initial.to(loaded.dtype).clone()
        out[region] = loaded[region]
        return out

    def rows(self, inputs: tuple[TensorRef, ...], begin: int, end: int) -> tuple[TensorRef, ...] | None:
        loaded, initial = inputs
        count = loaded.shape[0]
        parts = loaded.rows(min(begin, count), min(end, count)), initial.rows(begin, end)
        return None if parts[0] is None or parts[1] is None else (parts[0], parts[1])


def apply_rules(source: Checkpoint, recipe: Recipe, target: Target | None, allow_unused: bool = False) -> Plan:
    """The rules alone: the target is only what `when=target` looks at."""
    made = _replayable(lambda work: work.rules(recipe), source, target, allow_unused, 0)
    return _derived(made, recipe, {"allow_unused": True} if allow_unused else {})


def _replayable(
    work_on: Callable[[_Work], object], source: Checkpoint, target: Target | None, allow_unused: bool, seed: int
) -> Plan:
    """A plan whose steps know their edges by planning once more, which gives the same."""

    def made(again: Callable[[], tuple[Step, ...]] | None) -> Plan:
        work = _Work(source, target, allow_unused, seed, again)
        with uncollected():
            work_on(work)
            return work.finish()

    return made(cache(lambda: made(None).steps))


def plan(
    source: Checkpoint,
    recipe: Recipe,
    target: Target | None = None,
    policies: Policies = STRICT,
    *,
    dtype: DType | None = None,
    seed: int = 0,
    init: Scheme | str | Mapping[str, str] | None = None,
    allow_unused: bool = False,
) -> Plan:
    """Plan a surgery; every problem is in `.problems`.

    `dtype` casts the floating tensors of the result; `seed` starts the initialisation of missing
    tensors, and `init` is its scheme; `allow_unused` tolerates rules that match nothing.  UsageError when policies are
    given without a target.
    """
    if target is None and policies.any:
        raise UsageError("--fit, --unexpected, --mismatched and --missing compare with a target: name one with --to")
    if dtype is not None and (dtype.kind != "float" or dtype.bits < 8):
        raise UsageError(f"--dtype takes a floating dtype that torch computes, not {dtype}")
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise UsageError(f"a seed is a whole number from 0 to 2**64 - 1, not {seed!r}")
    scheme = None if init is None else _scheme(init, policies, target)
    made = _replayable(lambda work: work.all(recipe, policies, dtype, scheme), source, target, allow_unused, seed)
    decided: dict[str, Any] = {
        "dtype": None if dtype is None else dtype.name,
        "unexpected": policies.unexpected,
        "mismatched": policies.mismatched,
        "missing": policies.missing,
        "fit": policies.fit,
        "unwrap": policies.unwrap and not policies.fit,
        "allow_unused": allow_unused,
    }
    options = {name: value for name, value in decided.items() if value}
    draws = any("seed" in options_of(rule) and "seed" not in rule.args for rule in recipe.rules)
    options |= {"seed": seed} if made.initialised or made.overlapped or draws else {}
    options |= {"init": str(scheme)} if scheme is not None and (made.initialised or made.overlapped) else {}

    def on(other: Checkpoint) -> Plan:
        return plan(other, recipe, target, policies, dtype=dtype, seed=seed, init=scheme, allow_unused=allow_unused)

    return replace(_derived(made, recipe, options), on=on)


def _scheme(init: Scheme | str | Mapping[str, str], policies: Policies, target: Target | None) -> Scheme:
    """What was asked for; UsageError where no policy initialises anything."""
    _, mismatched, missing = policies.settled()
    if target is None or (missing != "init" and mismatched != "overlap"):
        raise UsageError(
            "--init says how keys begin that the checkpoint does not bring: it goes with --missing init,"
            " --fit or --mismatched overlap"
        )
    return Scheme.of(init).written().check(target)


def _derived(made: Plan, recipe: Recipe, options: dict[str, Any]) -> Plan:
    """The plan, whose result says what it was made of."""
    source, target = made.source, made.target
    place = (source.origin.format, source.origin.selected) if source.origin else ("", ".")
    lines = tuple(rule.text for rule in recipe.rules)
    derived = Derivation(source.tensors, *place, lines, options, None if target is None else target.entries)
    return replace(made, result=made.result.replace(derived=derived))


class _Work(Applying):
    """A plan that is being made: the rules, then what settles the differences to a target."""

    def __init__(
        self,
        source: Checkpoint,
        target: Target | None,
        allow_unused: bool,
        seed: int,
        again: Callable[[], tuple[Step, ...]] | None,
    ) -> None:
        super().__init__(source, target, allow_unused, seed, again)
        self.missing: dict[str, str] = {}
        self.mismatched: dict[str, str] = {}
        self.kept: list[str] = []
        self.warnings: list[str] = []
        self.overlapped: dict[str, int] = {}
        self.initialised: list[str] = []
        self.stopped = False
        self.scheme: Scheme | None = None

    def rules(self, recipe: Recipe) -> bool:
        """Every rule in order; False where the recipe is not for this checkpoint, and no more is done."""
        applied = recognition.recorded(recipe, self.source)
        if applied is None and not any(rule.operation.guards for rule in recipe.rules):
            applied = recognition.yielded(recipe, self.source)  # it expects nothing that would tell
        if applied is None:
            for rule in recipe.rules:
                before = len(self.problems)
                self.apply(rule)
                if self.endless:
                    self.stopped = True
                    break
                if rule.operation.guards and len(self.problems) > before:
                    applied = recognition.yielded(recipe, self.source)
                    self.stopped = True
                    break
        if applied is None and not self.steps and {problem.kind for problem in self.problems} == {"unused"}:
            applied = recognition.named(recipe, {problem.rule for problem in self.problems}, self.source)
        if applied is not None:
            self.problems = [Problem(applied, kind="applied")]
        return applied is None and not self.stopped

    def all(self, recipe: Recipe, policies: Policies, dtype: DType | None, scheme: Scheme | None) -> None:
        """The rules, then what settles the differences to the target, then the dtype."""
        self.scheme = scheme
        if not self.rules(recipe):
            return
        if self.target is not None:
            if policies.fit or policies.unwrap:
                self.unwrap(self.target)
            self.settle(self.target, policies, self.seed)
        if dtype is not None and self.refs:
            cast = parse(render("cast", {"pattern": ".|^$", "dtype": dtype.name}))
            self.apply(cast, by="policy", name=f"--dtype {dtype.name}")

    # -- the target --------------------------------------------------------------------------

    def unwrap(self, target: Target) -> None:
        found = wrappers.find(
            {key: ref.shape for key, ref in self.refs.items()},
            {key: entry.spec.shape for key, entry in target.entries.items()},
        )
        for rule in found.rules:
            self.apply(rule, by="fit")
        if found.alternatives:
            ways = ", ".join(found.alternatives)
            text = f"the names fit {target.label} in several ways, equally well: {ways}; give one of them as a rule"
            self.problems.append(Problem(text, kind="ambiguous"))

    def _warn(self, target: Target) -> None:
        fresh = set(self.initialised)
        if target.entries and not any(key in self.refs and key not in fresh for key in target.entries):
            self.warnings.append(f"no tensor of {target.label} comes from the checkpoint")
        for group in target.ties:
            kept = [key for key in group if key in self.refs]
            if len({self.refs[key].source for key in kept}) > 1:
                names = ", ".join(map(repr, kept))
                self.warnings.append(f"{target.label} shares one parameter among {names}, which are not tied here")
        if target.others:
            names = ", ".join(map(repr, target.others[:5]))
            self.warnings.append(f"{target.label} also wants {names}: no tensors, and not in a checkpoint of tensors")

    def settle(self, target: Target, policies: Policies, seed: int) -> None:
        unexpected, mismatched, missing = policies.settled()
        self._unexpected(target, unexpected)
        self._mismatched(target, mismatched, policies.fit and policies.mismatched is None, missing, seed)
        self._missing(target, missing, seed)
        self._order(target)
        self._warn(target)

    def _unexpected(self, target: Target, policy: Unexpected) -> None:
        extra = [key for key in self.refs if key not in target.entries]
        if policy == "keep":
            self.kept = extra
        elif policy == "drop":
            for key in extra:
                del self.refs[key]
                self.drop(key, f"not a key of {target.label}")
            self._policy("--unexpected drop", [((key,), ()) for key in extra])
        else:
            for key in extra:
                near = _nearest(key, target) if len(extra) <= MOST_SHOWN else []
                hint = f" (nearest: {near[0]!r})" if near else ""
                text = f"{key!r} is no key of {target.label}{hint}; rename or drop it, or use --unexpected drop|keep"
                self.problems.append(Problem(text, key=key, kind="unexpected"))

    def _mismatched(self, target: Target, policy: Mismatched, fit: bool, missing: Missing, seed: int) -> None:
        done: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {}
        for key, ref in list(self.refs.items()):
            entry = target.entries.get(key)
            if entry is None or entry.spec.shape == ref.shape:
                continue
            shapes = f"{list(ref.shape)} in the checkpoint, {list(entry.spec.shape)} in {target.label}"
            fixed = ref.quantizer is not None or ref.absent is not None or entry.spec.dtype.kind == "quantized"
            if policy == "reshape" and only_ones_differ(ref.shape, entry.spec.shape) and not fixed:
                self.refs[key] = reshaped(ref, entry.spec.shape)
                self.mismatched[key] = f"reshaped: {shapes}"
                done.setdefault("--mismatched reshape", []).append(((key,), (key,)))
            elif policy == "overlap" and len(ref.shape) == len(entry.spec.shape) and not fixed:
                self._overlap(target, key, ref, entry.spec, seed, shapes)
                done.setdefault("--mismatched overlap", []).append(((key,), (key,)))
            elif policy == "drop" or fit:
                del self.refs[key]
                self.mismatched[key] = f"other shape: {shapes}"
                self.drop(key, self.mismatched[key])
                done.setdefault("--mismatched drop", []).append(((key,), ()))
            else:
                self.problems.append(Problem(f"{key!r}: {shapes}{_way_out(policy)}", key=key, kind="shape"))
        for name, edges in done.items():
            self._policy(name, edges)

    def _overlap(self, target: Target, key: str, ref: TensorRef, want: TensorSpec, seed: int, shapes: str) -> None:
        first = next((group[0] for group in target.ties if key in group), key)
        initial = replace(self._begun(target, first, seed), spec=want)
        made = TensorSpec(ref.dtype, want.shape)
        self.refs[key] = TensorRef(made, Apply(Overlap(), (ref, initial)))
        shared = prod(min(a, b) for a, b in zip(ref.shape, want.shape, strict=True))
        self.overlapped[key] = shared
        percent = 100 * shared / want.numel if want.numel else 0
        self.mismatched[key] = (
            f"{shared} of {want.numel} elements copied ({percent:.1f} %), the rest initialised: {shapes}"
        )

    def _missing(self, target: Target, policy: Missing, seed: int) -> None:
        absent = [key for key in target.entries if key not in self.refs]
        lost = {problem.key for problem in self.problems if problem.kind in ("shape", "collision")}
        for key in absent:
            entry = target.entries[key]
            why = self.mismatched.get(key, "not in the checkpoint")
            shared = [name for group in target.ties if key in group for name in group if name in self.refs]
            buffer = buffer_words(key, entry.role, entry.module)
            if shared:
                why += f"; the target shares it with {shared[0]!r}, which is there"
            if policy == "init" and entry.spec.dtype.kind == "quantized" and target.is_model:
                text = f"{key!r} of {target.label} is quantised ({entry.spec.dtype}), and cannot be initialised here"
                self.problems.append(Problem(f"{text}; use --missing skip", key=key, kind="missing"))
            elif policy == "init":
                own = None if target.is_model or target.tensors is None else target.tensors.get(key)
                self.refs[key] = own or self._begun(target, key, seed)
                self.initialised.append(key)
                made = self._made_by(target, key)
                self.missing[key] = f"{made} ({buffer})" if buffer else made
            elif policy == "skip":
                self.missing[key] = f"left out ({buffer})" if buffer else "left out"
            elif key not in lost:
                reason = f"{why}; {buffer}" if buffer else why
                text = f"{key!r} {list(entry.spec.shape)} of {target.label} is missing ({reason})"
                self.problems.append(Problem(f"{text}; use --missing init|skip", key=key, kind="missing"))
        if self.initialised:
            self._policy("--missing init", [((), (key,)) for key in self.initialised])
            self._retie(target)

    def _begun(self, target: Target, key: str, seed: int) -> TensorRef:
        """What a key begins with: by the scheme, or as the target does."""
        entry = target.entries[key]
        initial = None if self.scheme is None else self.scheme.choice(key, entry)
        if isinstance(initial, Initial):
            return filled(entry.spec, initial, key, seed)
        return TensorRef(entry.spec, target.initial_source(key, seed))

    def _made_by(self, target: Target, key: str) -> str:
        initial = None if self.scheme is None else self.scheme.choice(key, target.entries[key])
        if initial is not None:
            return f"initialised by {initial}"
        return f"initialised as {target.label} does" if target.is_model else f"taken from {target.label}"

    def _retie(self, target: Target) -> None:
        """A name that shares its parameter with a loaded one gets the loaded tensor, not a fresh one."""
        fresh = set(self.initialised)
        for group in target.ties:
            loaded = [key for key in group if key in self.refs and key not in fresh]
            first = (loaded or [key for key in group if key in self.refs] or [""])[0]
            for key in group:
                if key in fresh and key != first:
                    self.refs[key] = self.refs[first]
                    self.missing[key] = f"tied to {first!r}, as in {target.label}"
                    if loaded:
                        self.initialised.remove(key)

    def _order(self, target: Target) -> None:
        known = {key: self.refs[key] for key in target.entries if key in self.refs}
        self.refs = {**known, **{key: ref for key, ref in self.refs.items() if key not in known}}

    def _policy(self, name: str, edges: list[tuple[tuple[str, ...], tuple[str, ...]]]) -> None:
        if edges:
            self.steps.append(Step(name, self._edges(edges), "policy"))

    # -- the end -----------------------------------------------------------------------------

    def _parted(self) -> list[str]:
        """Warnings about tensors that were tied in the source and are not any more."""
        groups = self.source.tied()
        if not groups or not self.steps:
            return []
        of: dict[str, list[str]] = {}
        for name in self.refs:
            for key in self.origins(name):
                of.setdefault(key, []).append(name)
        said = []
        for group in groups:
            there = [key for key in group if key in of]
            ties = {tuple([self.refs[name].tie for name in of[key]]) for key in there}
            if len(ties) > 1:
                names = " and ".join(repr(key) for key in there[:3])
                said.append(f"{names} were tied, and are not any more: change both, or tie them again with `tie`")
        return said

    def finish(self) -> Plan:
        pairs = ((origins[0], key) for key in self.refs if (origins := self.origins(key)))
        renamed = versions.renamed(self.source.versions, self.source, pairs)
        result = self.source.replace(tensors=self.refs, versions=renamed, provenance=self.source.provenance)
        return Plan(
            self.source,
            self.target,
            result,
            tuple(self.steps),
            self.dropped,
            self.missing,
            self.mismatched,
            tuple(self.kept),
            tuple(self.initialised),
            self.overlapped,
            tuple(self.problems),
            (*self.source.remarks, *self.warnings, *self._parted()),
        )


def _nearest(key: str, target: Target) -> list[str]:
    """The most alike of some keys of the target with the same end."""
    from difflib import get_close_matches

    end = key.rpartition(".")[2]
    alike = [name for name in target.entries if name.rpartition(".")[2] == end]
    return get_close_matches(key, alike[:300], 1, 0.8)


def _way_out(policy: Mismatched) -> str:
    if policy == "reshape":
        return "; more than dimensions of size 1 differ: use a rule, or --mismatched drop|overlap"
    if policy == "overlap":
        return "; the numbers of dimensions differ: use a rule, or --mismatched drop"
    return "; use a rule, or --mismatched drop|reshape|overlap"
