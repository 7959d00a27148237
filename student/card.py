"""The model card (README.md) of an Online LPM: YAML front matter as the Hub reads it, then what the caller knows.

stream configuration, sections {title: markdown}, scores -> text
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from student.causal_dit import StreamConfig
from student.hearing import LATENT_RATE
from teacher.codec import STRIDE

LIBRARY, LICENSE = "online-lpm-distill", "apache-2.0"
TAGS = ("online-lpm", "video-generation", "audio-to-video", "talking-head", "streaming", "distillation", "safetensors")


def card(
    stream: StreamConfig,
    title: str = "Online LPM",
    sections: Mapping[str, str] | None = None,
    scores: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A whole card; `sections` follow the usage in their order.

    `scores` are results as the Hub's model-index wants them: {name, type, value}.
    """
    seconds = stream.chunk_frames / LATENT_RATE
    usage = f"""# {title}

A causal, few-step, streaming character: {len(stream.steps) - 1} backbone evaluations and 1 of the refiner per chunk
of {seconds:g} s, no guidance, {stream.sink_chunks} sink and {stream.window_chunks} window chunks of history, steps
{list(stream.steps)}, history {stream.history.kind}, noise {stream.history.noise}.

```python
from student.online import OnlineLPM

model = OnlineLPM.from_pretrained("path/to/this/folder")
session = model.stream(references, text="smiling")  # references: images [R, 3, H, W] in [0, 1]
session.push(speak=wave)  # [S] at 16 kHz; listen=wave for what the character hears
for chunk in session:
    chunk.frames  # uint8 [{STRIDE[0] * stream.chunk_frames}, H, W, 3]
```
"""
    parts = [f"## {name}\n\n{text.strip()}\n" for name, text in (sections or {}).items()]
    return "\n".join([_front_matter(title, scores), usage, *parts])


def _front_matter(title: str, scores: Sequence[Mapping[str, Any]]) -> str:
    """JSON is YAML, so that values need no rules of quoting of their own."""
    lines = [
        "---",
        f"license: {LICENSE}",
        f"library_name: {LIBRARY}",
        f"tags: {json.dumps(list(TAGS))}",
    ]
    if scores:
        result = {
            "task": {"type": "audio-to-video"},
            "dataset": {"type": "puppet-world", "name": "puppet world, held-out characters and speech"},
            "metrics": list(scores),
        }
        lines.append(f"model-index: {json.dumps([{'name': title, 'results': [result]}])}")
    return "\n".join([*lines, "---", ""])
