"""A run's TensorBoard event files: its curves, the captions of its validations, its resumes and rollbacks.

A run writes START events when it begins, resumes or rolls back (``train/writer.py``): logged steps from there on are
repeated. TensorBoard hides the values that were logged before; here they are kept apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Point = tuple[int, float]  # step, value
_TEXT = "/text_summary"  # TensorBoard's suffix of a text's tag


@dataclass
class Curve:
    """One scalar.

    Attributes:
        kept: the values that TensorBoard shows, in the order in which they were written.
        repeated: values that a later start or rollback replaced, a list for each of these.
    """

    kept: list[Point] = field(default_factory=list)
    repeated: list[list[Point]] = field(default_factory=list)


@dataclass(frozen=True)
class Mark:
    """A start, resume or rollback.

    Attributes:
        kind: "started", "resumed" or "rolled back".
        step: the run continued after this step; 0: from the beginning.
    """

    kind: str
    step: int


@dataclass
class RunLog:
    """What the event files hold.

    Attributes:
        curves: by tag, for example "lm loss".
        marks: in the order of time.
        captions: (step, text) of each validation image, by tag, for example "validation/0".
        images: newest PNG of each validation image, by the same tags.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    captions: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    images: dict[str, bytes] = field(default_factory=dict)

    def last(self, tag: str) -> float | None:
        """The newest value of a curve; None without one."""
        curve = self.curves.get(tag)
        return curve.kept[-1][1] if curve and curve.kept else None

    def add(self, step: int, value: Any) -> None:
        """Add a value of a TensorBoard summary."""
        from tensorboard.util import tensor_util

        if value.HasField("simple_value"):
            self.curves.setdefault(value.tag, Curve()).kept.append((step, value.simple_value))
        elif value.HasField("image"):
            self.images[value.tag] = value.image.encoded_image_string
        elif value.HasField("tensor") and value.tag.endswith(_TEXT):
            text = tensor_util.make_ndarray(value.tensor)[0].decode("utf-8", "replace")
            self.captions.setdefault(value.tag.removesuffix(_TEXT), []).append((step, text))

    def rewind(self, first: int, kind: str) -> None:
        """Put aside everything from step ``first`` on, because it is repeated."""
        for curve in self.curves.values():
            if repeated := [point for point in curve.kept if point[0] >= first]:
                curve.repeated.append(repeated)
                curve.kept = [point for point in curve.kept if point[0] < first]
        for tag, texts in list(self.captions.items()):
            self.captions[tag] = [text for text in texts if text[0] < first]
            if not self.captions[tag]:
                del self.captions[tag]
        self.marks.append(Mark(kind if self.marks or first else "started", max(first - 1, 0)))


def read_log(folder: Path) -> RunLog:
    """Read the event files of a folder in TensorBoard's order. A record that is still being written is left out."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog

    log = RunLog()
    for path in sorted(folder.glob("*tfevents*")):
        kind, before = "resumed", None
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                if event.step != before:  # the writer repeats each mark
                    log.rewind(event.step, kind)
                before = event.step
                continue
            for value in event.summary.value:
                kind, before = "rolled back", None
                log.add(event.step, value)
    return log
