"""The pages of the documentation that are made from the code.

    python tests/reference.py        writes docs/cli.md, docs/limits.md, docs/recipes.md and docs/rules.md anew

`tests/test_docs.py` fails when they are not what this makes.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from ckptsurgeon import cookbook
from ckptsurgeon.cli.app import COMMANDS
from ckptsurgeon.limits import Limits
from ckptsurgeon.ops import OPERATIONS, Operation
from ckptsurgeon.ops._registry import OPTIONAL, WHERE
from ckptsurgeon.report.operations import LOSS

DOCS = Path(__file__).resolve().parent.parent / "docs"
ENV = {**os.environ, "COLUMNS": "100"}
MADE_TABLE = "<!-- The table is made by `python tests/reference.py`. -->"
MADE = "<!-- Made by `python tests/reference.py`; change the code, not this page. -->"


def cli() -> str:
    """Every command's help."""
    parts = ["# The command line", MADE, "`ckptsurgeon` is the same program as `ckpt`.", EXIT_CODES]
    for words in [[], *[[name] for name in COMMANDS]]:
        script = f"import sys; sys.argv = {['ckpt', *words, '--help']}; from ckptsurgeon.cli.app import main; main()"
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=ENV)
        help = ran.stdout
        title = " ".join(["ckpt", *words])
        parts.append(f"## {title}\n\n```console\n$ {title} --help\n{help.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


EXIT_CODES = """\
| exit code | means |
|---|---|
| 0 | done; `diff`: the same |
| 1 | the answer is no: `diff` found differences, or the plan of a `remap` has problems and nothing was written |
| 2 | bad usage or bad input: options, rules, a model spec, a file that is none of ours, no permission, a full disk |

Results go to stdout, notes and errors to stderr. With `--json` there is one object on stdout and
nothing else ([the objects](json.md)); with `--quiet` there is nothing but errors."""


def rules() -> str:
    """The grammar and the table of operations, family by family."""
    parts = ["# Rules", MADE, GRAMMAR]
    for family in dict.fromkeys(op.family for op in OPERATIONS.values()):
        some = [op for op in OPERATIONS.values() if op.family == family]
        rows = [
            f"| `{_cell(op.usage())}` | {_cell(op.help)}{_cell(_options(op))} | {LOSS[op.exactness]} "
            f"| `{_cell(op.example)}` |"
            for op in some
        ]
        title = f"## {family[0].upper()}{family[1:]}"
        parts += [title, "\n".join(["| rule | what it does | loss | example |", "|---|---|---|---|", *rows])]
    return "\n\n".join([*parts, SHAPES])


def _options(op: Operation) -> str:
    words = [f"`{option.name}`: {option.help}" for option in op.options if option.help and option not in EVERYWHERE]
    return f" {'; '.join(words)}." if words else ""


EVERYWHERE = (WHERE, OPTIONAL)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


GRAMMAR = r"""A rule is one line, the same for `--rule`, in a recipe and in Python. PATTERN is a Python regular
expression, tried with `re.search` on the whole key; TEMPLATE is a replacement as `re.sub` takes it
(`\1`, `\g<name>`). A rename replaces every match in the key, the other operations with `=>` the first.

- Words are separated by blanks. A word that holds blanks is quoted, `'…'` or `"…"`, and ends at
  the same mark; backslashes are left alone. `''` is a word too.
- `=>` counts only as a whole, bare word. Nothing after it is the empty template.
- DIMS, SHAPE, SIZES, SPEC and INDICES are one comma-separated word: `3,2,0,1`, `0:10,:`, `1:91,0`.
- An option (`dim=1`) is a bare word after the required ones.
- Where there may be many patterns or templates (`PATTERN1 PATTERN2 …`), every word up to the options is one.
- A line whose first, bare word is the name of an operation is that operation; any other line is a
  rename. To rename a key called `drop`, quote it: `'drop' => x`.
- Rules run in order, each on the names that the one before it made.

Braces in a template hold arithmetic on groups: `^layers\.(\d+)\. => blocks.{\1+1}.` counts from 1, `{11-\1}` turns the
order around, `{2*\1}` makes room between, `{\1//2}` takes every second one. A literal brace is doubled. In `stack` and
`unstack` `{i}` stands for the number.

Two options go with nearly every operation. `where=COND` applies it only to keys of which all conditions are
so: they are comparisons, with commas between them, of groups and of the tensor's `rank`, `numel` and sizes
`d0`, `d1` …: `drop ^layers\.(\d+)\. where=\1%2==1` keeps every second layer, `clamp weight$ min=0
where=rank==4,d2==1,d3==1` is about 1×1 convolutions. `optional=yes` lets the rule match nothing.

`when=target` on a rename applies it, key by key, only where it makes a name of the target:
`\.net\. => . when=target` removes `.net` where the model has the shorter key, and leaves the rest.

Operations that take several tensors (`concat`, `join_qkv` and others) group them by the name that each
pattern makes of its key; a group in which one is missing is a problem. Along the leading dimension `split`,
`concat`, `stack`, `unstack`, `slice` and `take` are arithmetic on places in the file: nothing is computed,
and safetensors can be cut `--in-place`.

Two tensors of one name, a rule that matches nothing, a template with an unknown group and a shape that an operation
cannot take are problems of the plan; so are gaps in numbers, sizes that do not add up, and heads that do not divide
them. All are shown at once, each with the rule, the key and the shapes, and nothing is written. `--allow-unused`
tolerates rules that match nothing."""

SHAPES = """\
"exact" operations have an inverse that gives back every bit, those with "rounding" one that gives back values
but for rounding, "lossy" ones none ([`ckpt invert`](recipes.md) says which line is concerned). `take` is
exact where no entry is left out, and `cast` where the new dtype holds the old one (but for the bits of NaN);
what a narrower one cannot hold becomes infinite, as in torch. What `fill` draws follows from the seed and the
name of the tensor alone.

Operations on names and shapes move no byte before the file is written. `copy` writes the bytes a second
time under a storage of its own; `tie` gives a second name to the same, which torch files keep.

Rules are kept in [recipes](recipes.md).
"""


def recipes() -> str:
    """The page on recipes with the table of those that come with the package."""
    rows = [
        f"| `{one.name}` | {_cell(one.description)} | {', '.join(f'`{name}`' for name in one.variables)} |"
        for one in cookbook.recipes()
    ]
    table = ["| recipe | from and to | variables |", "|---|---|---|", *rows]
    written = (DOCS / "recipes.md").read_text().partition(MADE_TABLE)[0]
    return "\n".join([f"{written}{MADE_TABLE}", "", *table]) + "\n"


def limits() -> str:
    """The table of limits, with what each is about from its own docstring."""
    (declared,) = (node for node in ast.parse(inspect.getsource(Limits)).body if isinstance(node, ast.ClassDef))
    words: dict[str, str] = {}
    for field, text in itertools.pairwise(declared.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            words[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    rows = [
        f"| `{field.name.replace('_', '-')}` | {field.default:,} | {words[field.name]} |" for field in fields(Limits)
    ]
    return "\n".join(["# Limits", "", MADE, "", LIMITS, *rows]) + "\n"


LIMITS = """\
What a file may ask for before it is refused. Real checkpoints stay far below. Meeting one is an error that names it;
`--reader-limit NAME=N` (of every command that opens a file) raises or lowers it. So do, in Python,
`cs.open(path, limits=cs.Limits(dimensions=128))` and `with cs.limited(cs.Limits(dimensions=128)):` around any calls,
where a name is spelled with `_`. Sizes are bytes, and may be written as `4GiB`.

| name | default | what it bounds |
|---|---|---|"""

PAGES = {"cli.md": cli, "limits.md": limits, "recipes.md": recipes, "rules.md": rules}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make())
