"""Finds the line of code that reported an event."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

_LOGS = str(Path(__file__).parent)


def calling_frame() -> tuple[FrameType, int]:
    """The innermost frame outside this folder, and how many callers up from the caller it is."""
    frame, depth = sys._getframe(1), 0
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LOGS):
        frame, depth = frame.f_back, depth + 1
    return frame, depth
