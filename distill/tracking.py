"""What a run tells while it works: a progress bar or plain lines, TensorBoard, metrics.jsonl, and how it is stopped.

`Tracker.log(step, {"train/dmd": value, ...})` is called at every step; values are averaged over `log_every` steps and
then go to all three places. After a resume, records beyond the resumed step are dropped and `pending` continues an
interval that the checkpoint cut in two: the curves are those of a run that was never stopped.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from distill.errors import ExitCode, UserError

Item = TypeVar("Item")
REPEAT_SECONDS = 5.0
PLAIN_SECONDS = 10.0  # without a terminal: one line of progress in this time


class Tracker:
    """Progress and curves of one stage; a context manager."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        description: str,
        start_step: int = 0,
        log_every: int = 10,
        say: Callable[[str], None] = tqdm.write,
        pending: Mapping[str, tuple[float, int]] | None = None,
    ) -> None:
        """pending: what `pending()` returned when the checkpoint of `start_step` was saved."""
        self.folder, self.total, self.log_every, self.say = Path(folder), total_steps, log_every, say
        self.bar = tqdm(
            total=total_steps, initial=start_step, desc=description, unit="step", disable=not sys.stderr.isatty()
        )
        self.step = start_step
        self.sums = {name: torch.tensor(total) for name, (total, _) in (pending or {}).items()}
        self.counts = {name: count for name, (_, count) in (pending or {}).items()}
        self.since, self.since_step = time.monotonic(), start_step
        self.begun, self.begun_step = self.since, start_step
        self.metrics = self.folder / "metrics.jsonl"
        truncate(self.metrics, start_step if start_step else -1)  # from the beginning, step 0 is measured again
        self.records = open(self.metrics, "a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter  # imported here: it costs a second

        self.writer = SummaryWriter(str(self.folder / "tb"), purge_step=start_step + 1 if start_step else 0)

    def log(self, step: int, scalars: Mapping[str, float | Tensor]) -> None:
        """Take in the scalars of one step; every `log_every` steps their means are written."""
        for name, value in scalars.items():
            value = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.bar.update(step - self.step)
        self.step = step
        if step % self.log_every == 0 or step == self.total:
            self._write()

    def pending(self) -> dict[str, tuple[float, int]]:
        """(sum, count) of every scalar since the last record: goes into the checkpoint, exact as JSON."""
        return {name: (total.item(), self.counts[name]) for name, total in self.sums.items()}

    def event(self, step: int, scalars: Mapping[str, float]) -> None:
        """Scalars that are measured once in a while (`eval/...`, `health/...`): written as they are, at once."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self._record({"step": step, **scalars})

    def image(self, tag: str, step: int, image: Tensor) -> None:
        """A picture, uint8 [H, W, 3]."""
        self.writer.add_image(tag, image, step, dataformats="HWC")

    def text(self, tag: str, step: int, text: str) -> None:
        """Words for a text panel."""
        self.writer.add_text(tag, text, step)

    def close(self) -> None:
        """Close the files. Half an interval is not written: after a resume it would stand there besides the whole."""
        self.bar.close()
        self.records.close()
        self.writer.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write(self) -> None:
        now = time.monotonic()
        seconds = (now - self.since) / max(self.step - self.since_step, 1)
        self.since, self.since_step = now, self.step
        means = {name: (total / self.counts[name]).item() for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        means["perf/step_s"] = seconds
        for name, value in means.items():
            self.writer.add_scalar(name, value, self.step)
        self.writer.flush()
        self._record({"step": self.step, **means})
        overall = (now - self.begun) / max(self.step - self.begun_step, 1)
        self.say(line(self.step, self.total, means, overall * (self.total - self.step)))

    def _record(self, record: dict[str, Any]) -> None:
        clean = {k: v if isinstance(v, str) or math.isfinite(v) else str(v) for k, v in record.items()}
        self.records.write(json.dumps(clean) + "\n")
        self.records.flush()


class Silence:
    """What stands in for a tracker in the processes that write nothing."""

    def log(self, step: int, scalars: Mapping[str, float | Tensor]) -> None: ...

    def pending(self) -> dict[str, tuple[float, int]]:
        return {}

    def event(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def image(self, tag: str, step: int, image: Tensor) -> None: ...

    def text(self, tag: str, step: int, text: str) -> None: ...

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def line(step: int, total: int, means: Mapping[str, float], seconds_left: float) -> str:
    """The terminal line: step, every train/ and optim/ scalar, seconds per step, time left."""
    shown = [f"{name.rpartition('/')[2]} {value:.4g}" for name, value in means.items() if name != "perf/step_s"]
    return " | ".join(
        [f"step {step}/{total}", *shown, f"{means['perf/step_s']:.2f} s/it", f"ETA {clock(seconds_left)}"]
    )


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def truncate(metrics: Path, step: int) -> None:
    """Drop records beyond `step`, and a last line that was cut in the middle of a write."""
    if not metrics.is_file():
        return
    kept = []
    for text in metrics.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = metrics.with_name(f".{metrics.name}.{os.getpid()}.partial")
    temporary.write_text("".join(text + "\n" for text in kept), encoding="utf-8")
    os.replace(temporary, metrics)


def progress(
    items: Iterable[Item], description: str, total: int | None = None, note: Callable[[], str] = str
) -> Iterator[Item]:
    """Yield `items` under a progress bar with ETA; without a terminal, a plain line every ten seconds.

    What `note` returns is shown behind the numbers.
    """
    total = len(items) if total is None and isinstance(items, Sized) else total
    if sys.stderr.isatty():
        with tqdm(items, desc=description, total=total) as bar:
            for item in bar:
                yield item
                bar.set_postfix_str(note(), refresh=False)
        return
    begun = told = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - told >= PLAIN_SECONDS:
            told = now
            left = f"/{total}, ETA {clock((now - begun) / count * (total - count))}" if total else ""
            print(f"{description}: {count}{left}{', ' if note() else ''}{note()}", flush=True)


class StopSignal:
    """SIGTERM or ctrl-C once: `requested` becomes true, the loop finishes its step and saves; twice: stop at once.

    repeated: the launcher of several processes passes a ctrl-C on to those that the terminal has told already, so that
    within a few seconds the second does not count."""

    def __init__(self, say: Callable[[str], None] = tqdm.write, repeated: bool = False) -> None:
        self.requested, self.say, self.repeated, self.since = False, say, repeated, 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if self.repeated and time.monotonic() - self.since < REPEAT_SECONDS:
                return
            raise KeyboardInterrupt
        self.requested, self.since = True, time.monotonic()
        self.say("stopping: the step is finished and saved first; once more stops at once")

    def error(self, step: int) -> UserError:
        """What to raise after saving."""
        return UserError(f"Stopped and saved at step {step}; the same command resumes.", ExitCode.STOPPED)
