"""How often an aligner is right, asks or is wrong, beside the ways that people match checkpoints today.

    python tests/bench/aligning.py [--scrambles N] [--first SEED] [--pairs FOLDER] [--scale] [--only WAY] [--show]

Each way gets the same pairs in the same run.  Solved: every tensor of the target is, bit for bit, what it should be; of
`--pairs` the two models give the same outputs.  Asked: the way says that something is missing or that it cannot tell.
Wrong: it says nothing, and a tensor is another one.  A way of the peers that leaves parameters without a value counts
as asking, since all of them print that.

`--pairs` takes a folder with a module `pairs`: REG (names), get(name) (with `convert`, `wrap`, `dropped`),
build_source(name), build_target(name), source_state(name, model) and compare(name, source, target), the relative
difference of outputs.  `--scale` makes checkpoints that are nothing but a header, and counts the processor seconds and
the memory of one process each.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from torch import Tensor, nn

State = dict[str, "Tensor"]
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Task:
    """A file, the model it is for, and what is right: a verdict and why, of what a way would load."""

    name: str
    decidable: str
    path: Path
    source: State
    model: nn.Module
    verdict: Callable[[State], tuple[str, str]]


Way = Callable[[Task], "State | None"]
"""What a way would load into the model; None where it asks."""


def ours(task: Task) -> State | None:
    import ckptsurgeon as cs

    try:
        found = cs.align(task.path, task.model)
    except cs.CkptError:
        return None
    return {key: ref.read() for key, ref in found.plan().result.items()} if found.certain else None


def longest_suffix(task: Task) -> State | None:
    """As detectron2: of the tensors of its shape each takes the one whose name ends as its own does for longest.

    detectron2 wants the file's name to be the end of the model's; here any words at the end count.
    """
    found: list[tuple[int, int, int, str, str]] = []
    for n, (key, want) in enumerate(task.model.state_dict().items()):
        for m, (other, tensor) in enumerate(task.source.items()):
            if tensor.shape == want.shape and (same := _alike(key.split("."), other.split("."))):
                found.append((-same, n, m, key, other))
    made, taken = dict[str, Any](), set[str]()
    for *_, key, other in sorted(found):
        if key not in made and other not in taken:
            made[key] = task.source[other]
            taken.add(other)
    return made


def _alike(left: list[str], right: list[str]) -> int:
    """How many words at the end are the same."""
    count = 0
    for a, b in zip(reversed(left), reversed(right), strict=False):
        if a != b:
            break
        count += 1
    return count


def in_order(task: Task) -> State | None:
    """As timm: one after another, each in the shape that is wanted; another number of elements is an error."""
    made = {}
    for (key, want), tensor in zip(task.model.state_dict().items(), task.source.values(), strict=False):
        if want.numel() != tensor.numel():
            return None
        made[key] = tensor.reshape(want.shape)
    return made


def not_strict(task: Task) -> State | None:
    """`load_state_dict(strict=False)`: what has the name; another shape is an error."""
    want = task.model.state_dict()
    made = {key: tensor for key, tensor in task.source.items() if key in want}
    return made if all(tensor.shape == want[key].shape for key, tensor in made.items()) else None


def weightbridge(task: Task) -> State | None:
    import torch

    library = importlib.import_module("weightbridge")
    source = {key: tensor.numpy() for key, tensor in task.source.items()}
    target = {key: tensor.detach().numpy() for key, tensor in task.model.state_dict().items()}
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            made = library.adapt(source, target)
    except Exception:  # it says with many kinds of errors that it cannot tell
        return None
    return {key: torch.from_numpy(value.copy()) for key, value in made.items()}


WAYS: dict[str, Way] = {
    "ckpt": ours,
    "longest suffix": longest_suffix,
    "in order": in_order,
    "weightbridge": weightbridge,
    "strict=False": not_strict,
}


def available(only: str) -> dict[str, Way]:
    """The ways that can run here, and a line about each that cannot."""
    import ckptsurgeon as cs

    ways = {name: way for name, way in WAYS.items() if only in name}
    if "ckpt" in ways and "align" not in cs.__all__:
        print("ckpt: this version has no cs.align; left out")
        del ways["ckpt"]
    if "weightbridge" in ways and importlib.util.find_spec("weightbridge") is None:
        print("weightbridge: not installed (pip install weightbridge); left out")
        del ways["weightbridge"]
    return ways


def scrambled(count: int, first: int, folder: Path) -> Iterator[Task]:
    from scramble import judged, scrambles

    for s in scrambles(count, first):
        path = s.saved(folder / "source.pth")

        def verdict(made: State, s: Any = s) -> tuple[str, str]:
            return judged(s, True, lambda: made)

        yield Task(f"{s.name} {s.seed}", s.decidable, path, dict(s.source), s.model, verdict)


def paired(folder: Path, work: Path) -> Iterator[Task]:
    """The pairs of a folder, each with forward passes of both models."""
    import torch

    sys.path.insert(0, str(folder))
    pairs = importlib.import_module("pairs")
    for name in pairs.REG:
        pair, model = pairs.get(name), pairs.build_source(name)
        state = pairs.source_state(name, model)
        path = work / f"{name}.pth"
        torch.save(pair["wrap"](state) if pair["wrap"] else state, path)
        needed = set(pair["convert"](dict(state), pairs.build_target(name)))

        def verdict(made: State, name: str = name, model: Any = model, needed: set[str] = needed) -> tuple[str, str]:
            target = pairs.build_target(name)
            fitting = {k: v for k, v in made.items() if k in target.state_dict()}
            missing = sorted(needed - _with_ties(set(fitting), target) - _counts(needed))
            if missing:
                return "wrong", f"{missing[0]} is missing"
            try:
                target.load_state_dict(fitting, strict=False)
            except RuntimeError as error:
                return "wrong", str(error).splitlines()[-1].strip()
            difference = pairs.compare(name, model, target)
            return ("solved", "") if difference < TOLERANCE else ("wrong", f"outputs differ by {difference:.1e}")

        yield Task(name, str(pair.get("decidable", "")), path, state, pairs.build_target(name), verdict)
        getattr(pairs, "_c", pairs)._CACHE.pop(name, None)


def _counts(keys: set[str]) -> set[str]:
    return {key for key in keys if key.endswith("num_batches_tracked")}


def _with_ties(keys: set[str], model: nn.Module) -> set[str]:
    """The keys, and the other names of the parameters that they are."""
    state = model.state_dict(keep_vars=True)
    there = {id(state[key]) for key in keys}
    return {key for key, tensor in state.items() if id(tensor) in there}


def answer(name: str, way: Way, task: Task) -> tuple[str, str]:
    made = way(task)
    if made is None:
        return "asked", ""
    said, why = task.verdict(made)
    return ("asked", why) if name != "ckpt" and why.endswith("is missing") else (said, why)


def count(title: str, tasks: Iterator[Task], ways: dict[str, Way], show: bool) -> None:
    """Every way on every task, and a table of what came out."""
    found: dict[str, Counter[tuple[str, str]]] = {name: Counter() for name in ways}
    seconds = dict.fromkeys(ways, 0.0)
    kinds: Counter[str] = Counter()
    for task in tasks:
        kinds[task.decidable] += 1
        for name, way in ways.items():
            began = time.process_time()
            said, why = answer(name, way, task)
            seconds[name] += time.process_time() - began
            found[name][task.decidable, said] += 1
            if show:
                print(f"  {task.name:36} {name:16} {said:7} {why}", flush=True)
    told = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    print(f"{title}: {kinds.total()} ({told})")
    print(f"{'':16} solved  asked  wrong   CPU s   solved of " + "  ".join(f"{kind:>7}" for kind in kinds))
    for name, answers in found.items():
        sums = [sum(n for (_, said), n in answers.items() if said == word) for word in ("solved", "asked", "wrong")]
        parts = "  ".join(f"{answers[kind, 'solved']:3}/{kinds[kind]:3}" for kind in kinds)
        print(f"{name:16} {sums[0]:6} {sums[1]:6} {sums[2]:6} {seconds[name]:7.1f}             {parts}", flush=True)


ALIGN = """
import sys, json, time
import ckptsurgeon as cs
found = cs.align(sys.argv[1], sys.argv[2])
print(json.dumps([bool(found.certain), len(found.recipe.rules)]))
"""
OPEN = "import sys; import ckptsurgeon as cs; print(len(cs.open(sys.argv[1])) + len(cs.open(sys.argv[2])))"
Shapes = dict[str, tuple[int, ...]]


def experts(layers: int, each: int, theirs: bool, stacked: bool = False) -> Shapes:
    """A mixture of experts, under the names of one library or of another."""
    attn, mlp, parts = ("self_attn", "mlp", ("gate_proj", "up_proj", "down_proj"))
    q, k, v, o = (f"{word}_proj" for word in "qkvo")
    begin, norms, words = "model.", ("input_layernorm", "post_attention_layernorm"), ("embed_tokens", "norm")
    if theirs:
        attn, mlp, parts, q, k, v, o = "attn", "block_sparse_moe", ("w1", "w3", "w2"), "query", "key", "value", "dense"
        begin, norms, words = "module.", ("norm1", "norm2"), ("word_embeddings", "final_norm")
    made: Shapes = {f"{begin}{words[0]}.weight": (1000, 64)}
    for i in range(layers):
        at = f"{begin}layers.{i}"
        made.update({f"{at}.{attn}.{part}.weight": (64, 64) for part in (q, k, v, o)})
        made[f"{at}.{mlp}.gate.weight"] = (each, 64)
        for part, shape in zip(parts, ((96, 64), (96, 64), (64, 96)), strict=True):
            if stacked:
                made[f"{at}.{mlp}.experts.{part}"] = (each, *shape)
        if not stacked:
            for j in range(each):
                made.update(
                    {f"{at}.{mlp}.experts.{j}.{part}.weight": shape
                     for part, shape in zip(parts, ((96, 64), (96, 64), (64, 96)), strict=True)}
                )  # fmt: skip
        made.update({f"{at}.{norm}.weight": (64,) for norm in norms})
    return {**made, f"{begin}{words[1]}.weight": (64,)}


def nameless(count: int, seed: int) -> Shapes:
    """So many keys of random letters, of a few shapes."""
    drawn = random.Random(seed)
    shapes = [(8, 8), (8,), (16, 8), (8, 16), (32,)]
    return {"".join(drawn.choices("abcdefghijklmnop", k=12)): shapes[i % 5] for i in range(count)}


def header_only(path: Path, shapes: Shapes) -> None:
    """A safetensors file whose tensors are a hole: it takes no place on the disk."""
    header, at = {}, 0
    for key, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": (at, at + size)}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def spent(command: list[str], limit: int) -> tuple[str, float, float, float]:
    """What a process printed, its processor seconds, its seconds, and its peak MiB; one that takes longer is ended.

    This process must stay small, since a child's peak is never counted below its parent's.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    printed, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        ended = f"ended by signal {-process.returncode}" if process.returncode < 0 else "failed"
        printed = (errors.strip().splitlines() or [ended])[-1]
    seconds = time.perf_counter() - began
    return printed.strip(), usage.ru_utime + usage.ru_stime, seconds, usage.ru_maxrss / 1024


def _experts_both(layers: int, each: int, stacked: bool = False) -> tuple[Shapes, Shapes]:
    return experts(layers, each, theirs=True), experts(layers, each, theirs=False, stacked=stacked)


SCALES: dict[str, Callable[[], tuple[Shapes, Shapes]]] = {
    "10 layers x 32 experts": lambda: _experts_both(10, 32),
    "60 layers x 64 experts": lambda: _experts_both(60, 64),
    "128 layers x 256 experts": lambda: _experts_both(128, 256),
    "60 layers x 64 experts, stacked": lambda: _experts_both(60, 64, stacked=True),
    "10,000 random keys": lambda: (nameless(10_000, 1), nameless(10_000, 2)),
    "100,000 random keys": lambda: (nameless(100_000, 1), nameless(100_000, 2)),
}


def make(title: str, folder: Path) -> None:
    """The two files of a case; in a process of its own, as the one that measures must stay small."""
    for name, shapes in zip(("source", "target"), SCALES[title](), strict=True):
        header_only(folder / f"{name}.safetensors", shapes)


def scale(folder: Path, limit: int) -> None:
    """What aligning many keys costs, beside opening both files alone."""
    print(f"{'':34} keys of both  CPU s  of both opened  wall s  peak MiB  [certain, rules]")
    for title in SCALES:
        subprocess.run([sys.executable, __file__, "--make", title, str(folder)], check=True)
        names = [str(folder / "source.safetensors"), str(folder / "target.safetensors")]
        keys, opened, _, _ = spent([sys.executable, "-c", OPEN, *names], limit)
        printed, cpu, wall, peak = spent([sys.executable, "-c", ALIGN, *names], limit)
        print(f"{title:34} {keys:>12} {cpu:6.2f} {opened:15.2f} {wall:7.2f} {peak:9.0f}  {printed}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1, help="as the other parts have it; nothing is repeated here")
    parser.add_argument("--scrambles", type=int, default=150)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--pairs", type=Path, help="a folder with a module `pairs`")
    parser.add_argument("--scale", action="store_true", help="checkpoints of up to 100,000 keys")
    parser.add_argument("--limit", type=int, default=300, help="most processor seconds of a case of --scale")
    parser.add_argument("--only", default="", help="ways whose name holds this word")
    parser.add_argument("--show", action="store_true", help="a line for each pair and way")
    parser.add_argument("--make", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make[0], Path(options.make[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.scale:
            scale(folder, options.limit)
        if not options.scrambles and not options.pairs:
            return
        ways = available(options.only)
        if options.scrambles:
            count("scrambles", scrambled(options.scrambles, options.first, folder), ways, options.show)
        if options.pairs:
            count("pairs", paired(options.pairs.resolve(), folder), ways, options.show)


if __name__ == "__main__":
    main()
