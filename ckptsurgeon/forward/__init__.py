"""Whether a surgery keeps what a network computes: the model before and the model after, run on the same inputs."""

from ckptsurgeon.forward.checking import TOLERANCE, check_forward
from ckptsurgeon.forward.inputs import Inputs, described
from ckptsurgeon.forward.report import ForwardCheck, OutputCheck
from ckptsurgeon.forward.trying import try_alignment

__all__ = ["TOLERANCE", "ForwardCheck", "Inputs", "OutputCheck", "check_forward", "described", "try_alignment"]
