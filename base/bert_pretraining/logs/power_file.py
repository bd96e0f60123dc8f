"""`power.csv`: what each device took and did at every sample."""

from __future__ import annotations

from bert_pretraining.logs.line_file import LineFile
from bert_pretraining.runtime.power import State

NAMES = "power*.csv"  # one for each machine; power.csv is of the first
COLUMNS = (
    "time_s", "device", "watts", "joules", "temperature_c", "clock_mhz", "utilisation_percent",
    "reasons",
)  # fmt: skip
SEPARATOR = "|"  # between the reasons of one sample


class PowerFile:
    """One line for each device and sample; a field is empty where the device does not tell it.

    time_s is Unix time; joules are since the first sample, and watts their mean since the sample
    before.
    """

    def __init__(self, file: LineFile) -> None:
        self._file = file
        file.line(",".join(COLUMNS))

    def write(
        self, now: float, device: str, watts: float | None, joules: float, state: State
    ) -> None:
        """Write one line. Raises OSError."""
        shown = (
            f"{now:.3f}", device, "" if watts is None else f"{watts:.1f}", f"{joules:.3f}",
            *("" if value is None else str(value) for value in state[:3]),
            SEPARATOR.join(state.reasons),
        )  # fmt: skip
        self._file.line(",".join(shown))

    def close(self) -> None:
        self._file.close()
