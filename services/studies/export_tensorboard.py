"""What is recorded of a run as an event file of TensorBoard, by TensorBoard's own writer, which needs neither TensorFlow nor PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from services.studies.display import one_line
from services.studies.export_files import Recorded
from services.studies.run_report import spec_toml

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary


def export_tensorboard(folder: Path, recorded: Recorded) -> None:
    """One file: a scalar for each measurement of a step by its name, for each of an evaluation as evaluation/SET/NAME, the histogram lag_versions,
    and the texts spec and events. TensorBoard's step is the version."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    with (folder / f"events.out.tfevents.{recorded.run.created_at:010.0f}.offbeat").open("wb") as file:
        writer = RecordWriter(file)
        for event in _events(recorded):
            writer.write(event.SerializeToString())
        writer.flush()


def _events(recorded: Recorded) -> Iterator[Event]:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    def event(at: float, version: int, values: list[Summary.Value]) -> Event:
        return Event(wall_time=at, step=version, summary=Summary(value=values))

    run = recorded.run
    yield Event(wall_time=run.created_at, file_version="brain.Event:2")
    yield event(run.created_at, 0, [_text("spec", "".join(f"    {line}\n" for line in spec_toml(run.spec).splitlines()))])
    for step in recorded.steps:
        lags = [Summary.Value(tag="lag_versions", histo=_histogram(step.lags))] if step.lags else []
        yield event(step.at, step.version, [*_scalars("", step.values), *lags])
    for one in recorded.evaluations:
        yield event(one.at, one.version, _scalars(f"evaluation/{one.name}/", one.values))
    for told in recorded.events:
        yield event(told.at, told.version or 0, [_text("events", f"{told.event}: {one_line(told.text)}")])


def _scalars(prefix: str, values: Mapping[str, float | None]) -> list[Summary.Value]:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return [Summary.Value(tag=prefix + name, simple_value=value) for name, value in values.items() if value is not None and math.isfinite(value)]


def _text(tag: str, text: str) -> Summary.Value:
    """A text, shown as Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary.Value(tag=tag, metadata=metadata, tensor=TensorProto(dtype=DT_STRING, string_val=[text.encode()]))


def _histogram(lags: Mapping[int, int]) -> HistogramProto:
    """Tokens by lag in versions: a bucket for each lag from the least to the greatest, around it."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    least, greatest = min(lags), max(lags)
    every = range(least, greatest + 1)
    return HistogramProto(
        min=least, max=greatest, num=sum(lags.values()),
        sum=sum(lag * n for lag, n in lags.items()), sum_squares=sum(lag * lag * n for lag, n in lags.items()),
        bucket_limit=[lag + 0.5 for lag in every], bucket=[lags.get(lag, 0) for lag in every],
    )  # fmt: skip
