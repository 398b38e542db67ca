"""Timelines as Chrome trace JSON, which https://ui.perfetto.dev opens."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

from moesim.engine.program import STREAMS
from moesim.engine.timeline import Timeline

__all__ = ["trace_events", "write_perfetto"]

US_PER_S = 1e6


def trace_events(timeline: Timeline) -> Iterator[dict[str, object]]:
    """Events of the Chrome trace format: a process for each rank, a thread for each stream.

    Names come first, then one complete event (``ph: X``) a span, with times in microseconds and, under
    ``args``, the position in the program, when the rank was ready and how long it waited for its peers.

    References
    ----------
    "Trace Event Format", Google, section "Complete Events".
    """
    labels = timeline.program.labels or tuple(f"rank {rank}" for rank in range(timeline.program.n_ranks))
    used = {task.stream for task in timeline.program.tasks}
    threads = {stream: thread for thread, stream in enumerate(STREAMS) if stream in used}
    for rank, label in enumerate(labels):
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": label}}
        yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}
        for stream, thread in threads.items():
            yield {"ph": "M", "pid": rank, "tid": thread, "name": "thread_name", "args": {"name": stream}}
    for span in timeline.spans():
        yield {
            "ph": "X",
            "pid": span.rank,
            "tid": threads[span.stream],
            "name": span.name,
            "cat": span.category or span.stream,
            "ts": span.start_s * US_PER_S,
            "dur": (span.end_s - span.start_s) * US_PER_S,
            "args": {
                "task": span.task,
                "ready_us": span.ready_s * US_PER_S,
                "waiting_us": (span.start_s - span.ready_s) * US_PER_S,
            },
        }


def write_perfetto(timeline: Timeline, path: Path | str) -> Path:
    """Write a timeline for Perfetto or chrome://tracing.

    Parameters
    ----------
    timeline
        One simulated step.
    path
        Where to; compressed if it ends with ``.gz``.

    Returns
    -------
    Path
        The file, complete: it is written beside its place and then renamed.
    """
    path = Path(path)
    events = ",\n".join(json.dumps(event, separators=(",", ":")) for event in trace_events(timeline))
    text = f'{{"displayTimeUnit":"ns","traceEvents":[\n{events}\n]}}\n'
    content = text.encode()
    if path.suffix == ".gz":
        content = gzip.compress(content, compresslevel=6, mtime=0)  # the same timeline, the same bytes
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
