"""Steps that change nothing but names, and the order in which they stand."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from random import Random

import scramble_words as words
from scramble_steps import State, Step


def step(kind: str, said: str, state: State, change: Callable[[str], str], **more: frozenset[str]) -> Step | None:
    """A step that renames; nothing where no name changes, or the names could not be those of one module."""
    made = {key: change(key) for key in state}
    if made == {key: key for key in state} or not possible(list(made.values())):
        return None
    return Step(kind, said, lambda s: {change(key): entry for key, entry in s.items()}, **more)  # type: ignore[arg-type]


def possible(keys: list[str]) -> bool:
    """Whether each key is there once and none is a module of another."""
    parents = {key[:at] for key in keys for at in range(len(key)) if key[at] == "."}
    return len(set(keys)) == len(keys) and not parents & set(keys) and all("" not in key.split(".") for key in keys)


def synonyms(state: State, random: Random) -> Step | None:
    """Some concepts named in another way of the field, all through the model."""
    keys, said, done = list(state), list[str](), set[str]()
    chosen: list[tuple[words.Way, words.Way]] = []
    for concept in random.sample(words.CONCEPTS, len(words.CONCEPTS)):
        if (
            random.random() >= concept.often
            or concept.name in done
            or any(re.search(concept.without, key) for key in keys)
        ):
            continue
        if not any(re.search(concept.needs, key) for key in keys):
            continue
        there = [way for way in concept.ways if words.used(way, keys)]
        others = [way for way in concept.ways if not any(words.pattern(p).search(k) for p in way for k in keys)]
        if len(there) != 1 or not others:
            continue
        new = random.choice(others)
        changed = [words.renamed(key, there[0], new) for key in keys]
        if possible(changed):
            keys = changed
            done.add(concept.name)
            chosen.append((there[0], new))
            said.append(f"{'/'.join(there[0])} is {'/'.join(new)}")
    if random.random() < 0.3 and any("LayerNorm." in key for key in keys):
        said.append("LayerNorm.weight is LayerNorm.gamma")
        chosen.append((("LayerNorm.weight", "LayerNorm.bias"), ("LayerNorm.gamma", "LayerNorm.beta")))

    def change(key: str) -> str:
        for old, new in chosen:
            key = words.renamed(key, old, new)
        return key

    return step("synonyms", "; ".join(said), state, change)


def neutral(state: State, random: Random) -> Step | None:
    """A few words that mean something, replaced by words that do not."""
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    found = sorted({part for key in state for part in key.split(".") if not part.isdigit() and part not in leaves})
    chosen = random.sample(found, min(len(found), random.choice((1, 2, 3))))
    free = [word for word in words.NEUTRAL if word not in found]
    table = dict(zip(chosen, random.sample(free, len(chosen)), strict=True))
    said = ", ".join(f"{old} is {new}" for old, new in table.items())

    def change(key: str) -> str:
        return ".".join(table.get(part, part) for part in key.split("."))

    return step("neutral", said, state, change, opaque=frozenset(table.values()), hides=frozenset(table))


def prefix(state: State, random: Random) -> Step | None:
    """What a wrapper puts before every key."""
    before = random.choice(words.WRAPPERS)
    return step("prefix", f"every key begins with {before}", state, lambda key: before + key)


def strip(state: State, random: Random) -> Step | None:
    """The word that most keys begin with, gone."""
    first = [key.partition(".")[0] for key in state]
    most = max(set(first), key=lambda word: (first.count(word), word))
    if first.count(most) * 5 < len(first) * 4 or most.isdigit():
        return None
    return step("strip", f"{most}. is gone", state, lambda key: key.removeprefix(f"{most}."))


def _lists(state: State) -> dict[str, list[int]]:
    """Numbered lists of modules that hold modules again, by what stands before the number."""
    found: dict[str, set[int]] = {}
    for key in state:
        for match in re.finditer(r"\.(\d+)(?=\.[A-Za-z_]\w*\.|\.\d+\.)", key):
            found.setdefault(key[: match.start()], set()).add(int(match[1]))
    return {where: sorted(numbers) for where, numbers in found.items() if len(numbers) > 1}


def renumber(state: State, random: Random) -> Step | None:
    """A list that counts from one, or takes every second number."""
    lists = [where for where in _lists(state) if not where[-1].isdigit()]
    if not lists:
        return None
    last = random.choice(sorted({where.rpartition(".")[2] for where in lists}))
    times, plus = random.choice(((1, 1), (1, 1), (2, 0), (2, 1), (1, 3)))
    found = re.compile(rf"(?<![^.])({re.escape(last)})\.(\d+)(?=\.)")

    def change(key: str) -> str:
        return found.sub(lambda m: f"{m[1]}.{int(m[2]) * times + plus}", key)

    return step("renumber", f"{last} are counted {times} * i + {plus}", state, change)


def spelled(state: State, random: Random) -> Step | None:
    """The number of a list within its word: layers.0. as layer_0., h_0. or layers0."""
    lists = [where for where in _lists(state) if not where[-1].isdigit()]
    if not lists:
        return None
    last = random.choice(sorted({where.rpartition(".")[2] for where in lists}))
    one = last.removesuffix("s")
    new = random.choice((f"{one}", f"{one}_", f"{last}.{one}_", f"{last}_", f"{last}.{one}"))
    found = re.compile(rf"(?<![^.]){re.escape(last)}\.(\d+)(?=\.)")
    return step("spelled", f"{last}.0 is {new}0", state, lambda key: found.sub(rf"{new}\1", key))


NESTED = re.compile(r"^((?:.*\.)?[A-Za-z_]+)\.?(\d+)\.((?:blocks|layers|layer|block)\.)?(\d+)\.(?=[A-Za-z_0-9])")


def flatten(state: State, random: Random) -> Step | None:
    """The blocks of all stages as one list."""
    outer: dict[str, set[tuple[int, int]]] = {}
    for key in state:
        if (match := NESTED.match(key)) and not re.search(r"\d", match[1]):
            outer.setdefault(match[1] + "/" + (match[3] or ""), set()).add((int(match[2]), int(match[4])))
    able = [where for where, pairs in outer.items() if len({i for i, _ in pairs}) > 1 and len(pairs) > 3]
    if not able:
        return None
    where = random.choice(sorted(able))
    place = {pair: n for n, pair in enumerate(sorted(outer[where]))}
    stage, _, inner = where.partition("/")
    new = stage.rpartition(".")[0]
    word = random.choice(("blocks", "units", "trunk"))

    def change(key: str) -> str:
        match = NESTED.match(key)
        if not match or match[1] != stage or (match[3] or "") != inner:
            return key
        begin = f"{new}.{word}" if new else word
        return f"{begin}.{place[int(match[2]), int(match[4])]}.{key[match.end() :]}"

    return step("flatten", f"the stages {stage} are one list of {word}", state, change)


def cut(state: State, random: Random) -> Step | None:
    """One list in stages of so many each."""
    lists = {
        where: numbers for where, numbers in _lists(state).items() if len(numbers) > 2 and not re.search(r"\d", where)
    }
    if not lists or max(map(len, lists.values())) > 40:
        return None
    where = random.choice(sorted(lists))
    each = random.choice((2, 3)) if len(lists[where]) > 3 else 2
    place = {number: n for n, number in enumerate(lists[where])}
    before, _, last = where.rpartition(".")
    begin = f"{before}.stages" if before else "stages"
    found = re.compile(rf"^{re.escape(where)}\.(\d+)\.")

    def change(key: str) -> str:
        match = found.match(key)
        if not match or int(match[1]) not in place:
            return key
        n = place[int(match[1])]
        return f"{begin}.{n // each}.{last}.{n % each}.{key[match.end() :]}"

    return step("cut", f"{where} is in stages of {each}", state, change)


def _hashed(word: str, salt: int) -> str:
    return hashlib.sha256(f"{salt} {word}".encode()).hexdigest()[:10]


def hash_keys(state: State, random: Random) -> Step | None:
    """Each key a hash."""
    salt = random.randrange(1 << 20)
    made = frozenset(_hashed(key, salt) for key in state)
    return step("hash keys", "each key is a hash", state, lambda key: _hashed(key, salt), opaque=made)


def hash_segments(state: State, random: Random) -> Step | None:
    """Each word between dots a hash, numbers too or not."""
    salt, numbers = random.randrange(1 << 20), random.random() < 0.5

    def one(part: str) -> str:
        return part if part.isdigit() and not numbers else _hashed(part, salt)

    made = frozenset(one(part) for key in state for part in key.split(".") if one(part) != part)
    said = "each word is a hash" + (", and each number" if numbers else "")
    return step("hash segments", said, state, lambda key: ".".join(map(one, key.split("."))), opaque=made)


def in_order(state: State, random: Random, how: str) -> Step:
    """The keys sorted, or at random."""
    seed = random.randrange(1 << 20)

    def apply(s: State) -> State:
        keys = sorted(s)
        if how == "random":
            Random(seed).shuffle(keys)
        return {key: s[key] for key in keys}

    return Step(how, f"the keys are in {how} order", apply)
