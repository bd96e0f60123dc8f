"""MLPerf's power log of one machine: `power/node_N.txt`, from run_start to run_stop.

The keys are those of MLPerf Training's power submissions. The readings are those of counters inside
the machine: MLPerf wants them at the power supply; see docs/energy.md.
"""

from __future__ import annotations

from bert_pretraining.logs.line_file import LineFile
from bert_pretraining.logs.mllog_line import END, POINT, START, line_maker

FEWEST_READINGS = 60  # that MLPerf takes


class MlperfPower:
    """One machine's file. Between `start` and `stop`, each reading is the mean watts since the
    reading before.

    MLPerf's energy, the sum of each reading times the time since the reading before, is then what
    the counters counted. Times are Unix times in seconds; every method may raise OSError.

    Args:
        host: the machine's name, "node_0" for the first.
        shortest: seconds that a reading stands for at least.
    """

    def __init__(self, file: LineFile, host: str, shortest: float) -> None:
        self._file, self._host, self._shortest = file, host, shortest
        self._line = line_maker()
        self._runs = False
        self._begun = self._now = 0  # ms: the time that the next reading stands for
        self._joules = 0.0  # in that time
        # A reading (its begin, its end, its joules) that is written only when another one follows:
        # a short rest at the end becomes a part of it.
        self._held: tuple[int, int, float] | None = None
        self.readings = 0

    def start(self, now: float) -> None:
        """The clock starts."""
        self._runs, self._begun = True, int(now * 1000)
        self._write(self._begun, START, "power_measurement_start")
        # 1: what is read is direct current, behind the power supply. That is not measured.
        metadata = {"measurement_type": "DC"}
        self._write(self._begun, POINT, "conversion_eff", 1.0, metadata)

    def read(self, now: float, joules: float) -> None:
        """The machine took `joules` since the last call."""
        if not self._runs:
            return
        self._now = round(now * 1000)
        self._joules += joules
        if self._now - self._begun >= self._shortest * 1000:
            self._write_held()
            self._held = (self._begun, self._now, self._joules)
            self._begun, self._joules = self._now, 0.0

    def stop(self) -> None:
        """The clock stopped before the last `read`."""
        if not self._runs:
            return
        begun, _, joules = self._held or (self._begun, 0, 0.0)
        self._held = (begun, self._now, joules + self._joules)
        self._write_held()
        self._write(self._now, END, "power_measurement_stop")
        self._runs = False

    def close(self) -> None:
        try:
            self._write_held()
        finally:
            self._file.close()

    def _write_held(self) -> None:
        if self._held is not None:
            begun, now, joules = self._held
            watts = joules * 1000 / max(now - begun, 1)
            self._write(now, POINT, "power_reading", round(watts, 3), {"host": self._host})
            self.readings += 1
            self._held = None

    def _write(
        self,
        time_ms: int,
        kind: str,
        key: str,
        value: float | None = None,
        metadata: dict | None = None,
    ) -> None:
        self._file.line(self._line(kind, key, value, metadata, time_ms, 0))
