"""What a plan does, and what was written: `ckpt remap`, `ckpt convert`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ckptsurgeon import formats
from ckptsurgeon.plans import Followed, Plan, Step
from ckptsurgeon.report._text import percent, plural, shown, size
from ckptsurgeon.report.grouping import group
from ckptsurgeon.surgery import Written

if TYPE_CHECKING:
    from ckptsurgeon.inplace import Changes

SCHEMA = "ckptsurgeon.remap/1"
_FEW = 3
_BY = {"rule": "", "fit": " (found by --fit)", "policy": ""}


def text(plan: Plan, written: Written | None, keep_extras: bool, changes: Changes | None = None) -> str:
    """The steps, everything that was dropped, changed or initialised, and the result."""
    lines = [line for step in plan.steps for line in _step(step)]
    lines += _passed(plan)
    lines += _section("changed to fit", _changed(plan), plan)
    lines += _section("dropped", plan.dropped, plan)
    lines += _section("not in the checkpoint", plan.missing, plan)
    if plan.kept:
        lines += _section("kept, though no key of the target", dict.fromkeys(plan.kept, ""), plan)
    lines += [line for one in plan.followed for line in _followed(one)]
    end = _in_place(changes, written) if changes is not None and plan.ok else _end(plan, written, keep_extras)
    return "\n".join([*lines, *_target(plan), *end])


def _changed(plan: Plan) -> dict[str, str]:
    """Tensors of another shape that were made to fit."""
    fresh = set(plan.initialised)
    return {key: why for key, why in plan.mismatched.items() if key in plan.result.tensors and key not in fresh}


def _step(step: Step) -> list[str]:
    if not step.edges:
        return [f"{shown(step.rule)}{_BY[step.by]}: nothing to change"]
    count = plural(len(step.edges), "tensor")
    inputs, outputs = step.edges.first or ((), ())
    example = ""
    if step.rule.endswith("when=target"):
        one_by_one = [f"  {shown(old)} → {shown(new)}" for (old,), (new,) in step.edges]
        return [f"{shown(step.rule)}{_BY[step.by]}: {count}", *one_by_one]
    if inputs and outputs and inputs != outputs:
        example = f", as {shown(inputs[0])} → {shown(outputs[0])}"
    return [f"{shown(step.rule)}{_BY[step.by]}: {count}{example}{' # ' + step.note if step.note else ''}"]


def _passed(plan: Plan) -> list[str]:
    """How many keys the rules left as they are, and which, as long as they are few."""
    if not plan.steps or not (passed := plan.passed):
        return []
    names = ", ".join(map(shown, passed[:_FEW])) + (" …" if len(passed) > _FEW else "")
    return [f"left as they are: {plural(len(passed), 'tensor')} ({names})"]


def _followed(one: Followed) -> list[str]:
    """What became of an optimizer's state, or of an average."""
    name = shown(one.label)
    if one.left:
        return [f"{name}: {'kept as it was' if one.kept else 'left out'}: {shown(one.left)}"]
    what = "the state of" if one.kind == "optimizer" else ""
    lines = [" ".join(f"{name} follows: {what} {plural(len(one.exact), 'parameter' if what else 'tensor')}".split())]
    lines += [f"  begins anew: {shown(key)}: {shown(why)}" for key, why in one.reset.items()]
    lines += [f"  new, without a state: {shown(', '.join(one.fresh))}"] if one.fresh and what else []
    return lines + [f"  {shown(note)}" for note in one.notes]


def _section(title: str, keys: Mapping[str, str], plan: Plan) -> list[str]:
    if not keys:
        return []
    lines = [f"{title}: {plural(len(keys), 'key')}"]
    for merged in group(keys.items()):
        reason = f": {shown(str(merged.label))}" if merged.label else ""
        lines.append(f"  {shown(merged.name)}{reason}")
    return lines


def _target(plan: Plan) -> list[str]:
    """How much of the target comes from the checkpoint, and dtypes that are not the target's."""
    if plan.target is None:
        return []
    loaded, entries = plan.loaded(), plan.target.entries
    share = sum(loaded.values()) / plan.target.numel if plan.target.numel else 1.0
    lines = [
        f"from the checkpoint: {len(loaded)} of {plural(len(entries), 'tensor')} of {shown(plan.target.label)}, "
        f"{percent(share)} of the elements"
    ]
    other = [key for key in loaded if plan.result[key].dtype != entries[key].spec.dtype]
    if other:
        pairs = sorted({f"{plan.result[key].dtype} for {entries[key].spec.dtype}" for key in other})
        lines.append(f"dtype: {plural(len(other), 'tensor')} not of the target's dtype ({', '.join(pairs)})")
    return lines


def _end(plan: Plan, written: Written | None, keep_extras: bool) -> list[str]:
    result = plan.result
    if not plan.ok:
        return [f"nothing would be written: {plural(len(plan.problems), 'problem')}"]
    what = f"{plural(len(result), 'tensor')}, {plural(result.numel, 'element')}, {size(result.nbytes)}"
    lines = [f"would write {what}"]
    if written is not None:
        count = len(written.files) - 1
        shards = f", {plural(count, 'shard')} and {'its' if count == 1 else 'their'} index" if written.files else ""
        lines = [f"wrote {shown(written.path)} ({written.format}{shards}): {what}"]
    if written is not None and written.digest is not None:
        lines.append(f"contents: {written.digest}")
    if written is not None and written.removed:
        lines.append(f"removed, of an earlier output: {shown(', '.join(written.removed))}")
    if plan.source.extras and not keep_extras:
        lines.append(f"not kept: {shown(formats.summary(plan.source.extras))} (--keep-extras keeps what it can)")
    metadata = {key: value for key, value in plan.source.metadata.items() if key != "format"}
    if metadata and written is not None and not written.format.endswith("safetensors"):
        lines.append(f"not kept: the metadata {shown(', '.join(metadata))} ({written.format} holds none)")
    return lines + [f"not kept: {shown(name)}" for name in (written.lost if written is not None else ())]


def _in_place(changes: Changes, written: Written | None) -> list[str]:
    """Which headers are rewritten, and what goes."""
    name, headers = shown(changes.path), len(changes.files)
    if not changes.any:
        return [f"nothing to change: {name} is left as it is"]
    what = f"the header of {name}" if changes.index is None else f"{plural(headers, 'header')} of the shards of {name}"
    if changes.rewrites_index:
        what = f"{what} and the index" if headers else f"the index {name}"
    done = "rewrote" if written is not None else "would rewrite"
    lines = [f"{done} {what} in place: {size(changes.rewritten)} of {size(changes.nbytes)}; no tensor moves"]
    if changes.emptied:
        lines.append(f"shards without tensors, removed: {shown(', '.join(one.name for one in changes.emptied))}")
    lines += ["no room in the header for its provenance, which is left out"] if changes.crowded else []
    return [*lines, f"freed: {size(changes.freed)}"] if changes.freed else lines


def _edges(plan: Plan) -> list[dict[str, Any]]:
    """Every key of the result with what it is made of, and by which rules: none where it passed through."""
    return [{"out": key, "in": list(made.inputs), "rules": list(made.rules)} for key, made in plan.lineage().items()]


def data(plan: Plan, written: Written | None, changes: Changes | None = None) -> dict[str, Any]:
    """The JSON object of `ckpt remap --json` and `ckpt convert --json`."""
    origin = plan.source.origin
    return {
        "schema": SCHEMA,
        "source": origin.path if origin else None,
        "select": origin.selected if origin else None,
        "target": plan.target.label if plan.target else None,
        "target_is_cached": plan.target is not None and plan.target.cached,
        "ok": plan.ok,
        "steps": [
            {"rule": step.rule, "by": step.by, "note": step.note, "edges": [[list(i), list(o)] for i, o in step.edges]}
            for step in plan.steps
        ],
        "passed": list(plan.passed),
        "dropped": dict(plan.dropped),
        "missing": dict(plan.missing),
        "mismatched": dict(plan.mismatched),
        "warnings": list(plan.warnings),
        "kept": list(plan.kept),
        "initialised": list(plan.initialised),
        "problems": [
            {"kind": p.kind, "text": p.text, "rule": p.rule, "span": list(p.span) if p.span else None, "key": p.key}
            for p in plan.problems
        ],
        "edges": _edges(plan),
        "result": [{"key": key, "dtype": ref.dtype.name, "shape": list(ref.shape)} for key, ref in plan.result.items()],
        "followed": [
            {
                "place": one.place,
                "kind": one.kind,
                "exact": list(one.exact),
                "reset": dict(one.reset),
                "fresh": list(one.fresh),
                "notes": list(one.notes),
                "left": one.left or None,
                "kept": one.kept,
            }
            for one in plan.followed
        ],
        "in_place": None
        if changes is None or not plan.ok
        else {
            "files": list(changes.names),
            "removed": [one.name for one in changes.emptied],
            "rewritten": changes.rewritten,
            "freed": changes.freed,
            "crowded": changes.crowded,
        },
        "written": None
        if written is None
        else {
            "file": written.path,
            "format": written.format,
            "nbytes": written.nbytes,
            "files": list(written.files) or [written.path],
            "removed": list(written.removed),
            "digest": written.digest,
            "lost_extras": list(written.lost),
            "warnings": list(written.warnings),
        },
    }
