"""What fuzzing found: every case says now what it is, at once, and costs no more than its file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import findings
import pytest

import ckptsurgeon as cs
from ckptsurgeon.dtypes import DTYPES
from ckptsurgeon.formats import _pickle
from ckptsurgeon.formats._values import tensor_of
from ckptsurgeon.inert import UNKNOWN, Opaque
from ckptsurgeon.report import extras, listing, tree
from ckptsurgeon.sources import Inline
from ckptsurgeon.stream import publishing
from ckptsurgeon.tensor import TensorRef, TensorSpec

SECONDS = 60
"""Most of the processor's time that a case may take in all ways of looking at it; each took longer, or had no end."""
SAID: dict[str, tuple[str, str]] = {
    "a_compressed_record_that_ends_early": ("1 tensors", "1 tensors"),
    "a_count_without_end": ("damaged a/data.pkl: a storage size is a tuple, no count", ""),
    "a_device_without_end": ("damaged a/data.pkl: a device is a tuple, no text", ""),
    "a_layout_without_end": ("1 tensors", "1 tensors"),
    "a_protocol_without_end": ("damaged: protocol a tuple of torch's legacy format is not known", ""),
    "metadata_without_end": ("damaged: no Metadata, but a tuple", ""),
    "a_tar_key_without_end": ("damaged torch tar: the size of the storage a tuple is -1, no count", ""),
    "a_member_past_all_files": ("damaged zip archive: 31 bytes are announced at byte 18446744073709551615", ""),
    "a_side_file_whose_header_ends_before_its_length": (
        "the side file of an in-place change ends inside of a header, and cannot be its own",
        "the side file of an in-place change ends inside of a header, and cannot be its own",
    ),
    "a_side_file_that_is_a_number": (
        "note: .a.inplace is of another state of the file, and not used; `ckpt verify --repair` removes it",
        "1 tensors",
    ),
    "state_dicts_in_pairs": ("1 tensors", "objects that share each other, over the limit of 100000"),
    "optimizers_in_pairs": (
        "holds no state dict, but a tuple of 2 items",
        "objects that share each other, over the limit of 100000",
    ),
    "modules_in_pairs": ("objects that share each other, over the limit of 100000", ""),
    "state_dicts_far_down": ("10000 state dicts could be meant: a.a.a.", "10000 tensors"),
    "names_of_a_megabyte": ("1000 tensors", "longer names of what it holds, over the limit of 134217728"),
    "a_list_far_down": ("holds no state dict, but a list of 1 item", "is nested too deeply, over the limit of 200"),
    "tensors_named_as_an_optimizer": ("2 tensors", "2 tensors"),
    "half_a_character": ("damaged safetensors header: 'utf-8' codec can't encode character '\\ud800'", ""),
    "integers_of_one_hash": ("more than 64 keys of dicts or sets with one hash", ""),
    "tuples_of_one_hash": ("more than 64 keys of dicts or sets with one hash", ""),
    "numbers_of_one_hash": ("damaged a/data.pkl: a memo index below 0 or over 32 bits, near byte 24", ""),
    "a_pair_as_a_key": ("holds no state dict, but an OrderedDict of 1 item", "--select . names nothing"),
    "sparse_of_sparse": (
        "'x': damaged a/data.pkl: a tensor that is made of others in more than 256 places",
        "",
    ),
    "a_meta_tensor_of_half_a_byte": ("1 tensors", "1 tensors"),
    "a_sparse_tensor_of_half_a_byte": (
        "'w': damaged a/data.pkl: a tensor of shape [3], whose float4_e2m1 elements do not end on a whole byte",
        "",
    ),
    "a_product_that_overflows_before_its_zero": (
        "damaged safetensors header: the shape [12, 4611686018427387904, 0] has more elements before its 0",
        "",
    ),
    "words_about_a_tensor": ("a tensor with e, d, c, b, a; its bytes are not here", "1 tensors"),
}
"""What `ckpt ls` says of a case, and what with `--select .`, where that is something else."""


def said(act: Callable[[], Any]) -> str:
    try:
        return str(act())
    except cs.CkptError as error:
        return str(error)


def shown() -> str:
    ckpt = cs.open("a")
    return "\n".join([repr(ckpt), *listing.lines(ckpt, list(ckpt), 0, None)])


def looked() -> str:
    """Everything else that looks at the object in a file; how many lines its tree has."""
    document = cs.inspect("a")
    json.dumps(extras.data(document, document.root, None))
    assert all(len(name) < 2_000_000 for name, _ in document.tensors())
    lines = tree.text(tree.tree(document)).split("\n")
    assert len(lines) < 25_000
    return f"{len(lines)} lines"


LARGE = (findings.state_dicts_far_down, findings.a_list_far_down)
"""Cases in which the same lines run a hundred thousand times."""


def parameter(case: Callable[[Path], None]) -> Any:
    marks = [pytest.mark.no_cover] if case in LARGE else []
    return pytest.param(case, marks=marks, id=case.__name__)


@pytest.mark.parametrize("case", [parameter(case) for case in findings.CASES])
def test_a_finding_is_told_at_once(case: Callable[[Path], None]) -> None:
    """The journal is nothing that a reader opens: the next test is about it."""
    case(Path("a"))
    if not Path("a").exists():
        return
    begin = time.process_time()
    first, second = SAID[case.__name__]
    assert first in said(shown)
    assert (second or first) in said(lambda: repr(cs.open("a", ".")))
    said(looked)
    assert time.process_time() - begin < SECONDS


def test_every_finding_is_asserted() -> None:
    assert {case.__name__ for case in findings.CASES} - set(SAID) == {"a_journal_with_a_nul"}


def test_a_journal_with_a_nul_in_a_name_is_not_understood_and_moves_nothing() -> None:
    findings.a_journal_with_a_nul(Path("a"))
    with pytest.raises(
        cs.InputError, match=r"^.*/\.a\.journal: cannot be understood \('a\\x00b' is no file beside it\)"
    ):
        publishing.recover("a", publishing.no_kin)
    assert sorted(path.name for path in Path().iterdir()) == [".a.0123abcd.part", ".a.journal"]


def test_keys_whose_hashes_may_be_chosen_are_keys_where_they_are_few_alike() -> None:
    """Sixty-four of one hash; integers of usual size, texts and pairs of them are keys, however many."""
    keys = b"".join(findings.integer(i * findings.P) + b"N" for i in range(1, 65))
    usual = b"".join(b"J" + i.to_bytes(4, "little") + b"N" for i in range(2000))
    usual += b"".join(findings.text(f"k{i}") + b"K\1\x86N" for i in range(2000))
    findings.zipped(Path("a"), b"}(" + keys + usual + b"u")
    assert len(cs.inspect("a").root) == 64 + 4000
    findings.zipped(Path("a"), b"}(" + keys + findings.integer(65 * findings.P) + b"Nu")
    with pytest.raises(cs.InputError, match="more than 64 keys of dicts or sets with one hash"):
        cs.inspect("a")


def test_a_compressed_record_that_ends_early_is_damaged_however_it_is_read() -> None:
    """Its end was waited for without an end."""
    findings.a_compressed_record_that_ends_early(Path("a"))
    words = "a compressed record is shorter than the archive says"
    with pytest.raises(cs.InputError, match=words):
        list(cs.open("a")["w"].blocks())
    assert words in str(cs.verify("a").problems[0])
    with pytest.raises(cs.InputError, match=words):
        cs.convert("a", "out.safetensors")
    assert [path.name for path in Path().iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("literal", "value"),
    [(rb"'a\n\x41\101\\\''", "a\nAA\\'"), (rb'"\q\Z"', "\\q\\Z"), (rb"'\777'", "\xff")],
)
def test_a_literal_of_python_2_is_read_as_python_does_and_without_a_warning(literal: bytes, value: str) -> None:
    """An escape that is none stays as it stands, which Python's own decoder warns of."""
    assert _pickle.loads(b"S" + literal + b"\n.")[0] == value


def test_half_of_an_escape_is_no_text() -> None:
    with pytest.raises(_pickle.BadPickle, match="a string with half of an escape"):
        _pickle.loads(b"S'\\x4'\n.")


def test_a_tree_of_what_is_shared_is_made_of_few_lines() -> None:
    findings.state_dicts_in_pairs(Path("a"))
    builder = tree._Builder()
    builder.node("a", cs.inspect("a").root, 0)
    assert builder.lines < 40_000


def test_a_sharded_tensor_of_half_a_byte_is_none() -> None:
    """Its dtype is that of its first shard, two elements of four bits; three of them are no whole bytes."""
    shard, metadata = Opaque("x.Shard", ()), Opaque("x.ShardedTensorMetadata", ())
    half = TensorRef(TensorSpec(DTYPES["float4_e2m1"], (2,)), Inline(b"\x00"))
    shard.state, metadata.state = {"tensor": half}, {"size": (3,)}
    sharded = Opaque("x.ShardedTensor", ())
    sharded.state = ([shard], metadata)
    assert tensor_of(sharded) is None
    sharded.tensor, metadata.state = UNKNOWN, {"size": (4,)}
    assert tensor_of(sharded).nbytes == 2  # type: ignore[union-attr]
