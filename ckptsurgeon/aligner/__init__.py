"""How one naming of an architecture becomes another: rules found from names, shapes and structure, or questions."""

from ckptsurgeon.aligner.alignment import Alignment, Edge, Leftover, Match, Question
from ckptsurgeon.aligner.finding import align
from ckptsurgeon.aligner.hints import Hint, parsed
from ckptsurgeon.aligner.openings import Opening, Verdict

__all__ = ["Alignment", "Edge", "Hint", "Leftover", "Match", "Opening", "Question", "Verdict", "align", "parsed"]
