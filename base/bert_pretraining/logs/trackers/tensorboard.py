"""TensorBoard: event files in the run's folder, or where `tensorboard_dir` says."""

from __future__ import annotations

import time

from bert_pretraining.logs.trackers.tracker import TrackedRun, Tracker, Value, markdown, numbers

FLUSH_SECONDS = 10  # between writes to the file, for those who look on


class TensorBoard(Tracker):
    """Scalars by step, notices and tables as text, and the settings in the HParams tab.

    It writes with the package itself: PyTorch's writer would import PyTorch once more.
    """

    def __init__(self) -> None:
        from tensorboard.summary.writer import event_file_writer

        self._writer_class = event_file_writer.EventFileWriter
        self._writer: event_file_writer.EventFileWriter | None = None

    def start(self, run: TrackedRun, facts: dict[str, Value]) -> None:
        from tensorboard.plugins.hparams import summary_v2

        self._writer = self._writer_class(run.tensorboard_dir, flush_secs=FLUSH_SECONDS)
        self._add(0, summary_v2.hparams_pb(facts, trial_id=f"{run.group}/{run.name}"))
        self._write_text(0, "settings", markdown(facts))
        self._writer.flush()

    def figures(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto import summary_pb2

        scalars = [
            summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()
        ]
        self._add(step, summary_pb2.Summary(value=scalars))

    def text(self, step: int, title: str, text: str) -> None:
        self._write_text(step, f"notice/{title}", text)

    def finish(self, step: int, status: str, table: dict[str, Value]) -> None:
        self.figures(step, numbers(table))
        self._write_text(step, "result", markdown({"status": status, **table}))
        self._add(step, _session_end(status))
        self._writer.close()

    def _write_text(self, step: int, tag: str, text: str) -> None:
        from tensorboard.plugins.text import summary_v2

        self._add(step, summary_v2.text_pb(tag, text))

    def _add(self, step: int, summary: object) -> None:
        from tensorboard.compat.proto import event_pb2

        # Whatever version of the package made it: one copy of the message's class reads it.
        event = event_pb2.Event(step=step, wall_time=time.time())
        event.summary.ParseFromString(summary.SerializeToString())
        self._writer.add_event(event)


def _session_end(status: str) -> object:
    """The end of the run, for the HParams tab. The package has no function for it without TF."""
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    known = {"finished": "STATUS_SUCCESS", "failed": "STATUS_FAILURE"}
    info = plugin_data_pb2.SessionEndInfo(
        status=getattr(api_pb2, known.get(status, "STATUS_UNKNOWN")), end_time_secs=time.time()
    )
    data = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    value = summary_pb2.Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(data),
        tensor=metadata.NULL_TENSOR,
    )
    return summary_pb2.Summary(value=[value])
