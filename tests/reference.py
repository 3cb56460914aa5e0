"""The pages of the documentation that are made from the code.

    python tests/reference.py        writes docs/cli.md, docs/limits.md and docs/rules.md anew

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

from ckptsurgeon.cli.app import COMMANDS
from ckptsurgeon.limits import Limits
from ckptsurgeon.ops import OPERATIONS

DOCS = Path(__file__).resolve().parent.parent / "docs"
ENV = {**os.environ, "COLUMNS": "100"}
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
    """The grammar and the table of operations."""
    rows = [
        f"| `{_cell(op.usage())}` | {op.help} | {_loss(op.exactness)} | `{_cell(op.example)}` |"
        for op in OPERATIONS.values()
    ]
    return "\n".join(["# Rules", "", MADE, "", GRAMMAR, *rows, "", SHAPES])


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _loss(exactness: str) -> str:
    return {"exact": "exact", "names": "names only", "lossy": "lossy"}[exactness]


GRAMMAR = r"""A rule is one line, the same for `--rule`, in a recipe and in Python. PATTERN is a Python regular
expression, tried with `re.search` on the whole key; TEMPLATE is a replacement as `re.sub` takes it
(`\1`, `\g<name>`). A rename replaces every match in the key, the other operations with `=>` the first.

- Words are separated by blanks. A word that holds blanks is quoted, `'…'` or `"…"`, and ends at
  the same mark; backslashes are left alone. `''` is a word too.
- `=>` counts only as a whole, bare word. Nothing after it is the empty template.
- DIMS and SHAPE are one comma-separated word: `3,2,0,1`.
- An option (`when=target`) is a bare word after the required ones.
- A line whose first, bare word is the name of an operation is that operation; any other line is a
  rename. To rename a key called `drop`, quote it: `'drop' => x`.
- Rules run in order, each on the names that the one before it made.

Two tensors of one name, a rule that matches nothing, a template with an unknown group and a shape
that an operation cannot take are problems of the plan. All are shown at once, and nothing is written.
`--allow-unused` tolerates rules that match nothing.

`when=target` on a rename applies it, key by key, only where it makes a name of the target:
`\.net\. => . when=target` removes `.net` where the model has the shorter key, and leaves the rest.

| rule | what it does | loss | example |
|---|---|---|---|"""

SHAPES = """\
Operations on names and shapes move no byte before the file is written. `copy` writes the bytes a second
time under a storage of its own; names that were tied in the source stay tied in a torch file.

A recipe is a YAML file of rules, for `--recipe` and `cs.Recipe.load`:

```yaml
version: 1
description: DataParallel's ResNet to a plain one, without its head
select: state_dict
rules:
  - strip module.
  - rule: drop ^fc\\.
    note: the new task has other classes
```
"""


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

PAGES = {"cli.md": cli, "limits.md": limits, "rules.md": rules}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make())
