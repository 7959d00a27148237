"""One record per clip, the same for the puppet and for real video, and its form on disk (Arrow, fixed-size lists).

A `Records` table maps column names to tensors [N, ...] or, for captions, to lists of strings. Latents, images and audio
features are stored as float16: their quantization is 60 dB under the signal, and they are most of the bytes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

Records = dict[str, Any]  # name -> Tensor [N, ...] | list[str]
HALF = ("latents", "refs", "speak", "listen")


def concatenate(parts: list[Records]) -> Records:
    """Stack tables of the same columns."""
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(value, Tensor)
        else [text for part in parts for text in part[name]]
        for name, value in parts[0].items()
    }


def to_dataset(records: Records) -> tuple[datasets.Dataset, dict[str, list[int]]]:
    """Table -> (Arrow dataset, shapes of one row per tensor column, needed to read it back)."""
    import datasets
    import pyarrow as pa

    columns, shapes = {}, {}
    for name, value in records.items():
        if isinstance(value, Tensor):
            shapes[name] = list(value.shape[1:])
            columns[name] = _column((value.half() if name in HALF else value).contiguous().numpy())
        else:
            columns[name] = pa.array(value)
    return datasets.Dataset(pa.table(columns)), shapes


def from_dataset(dataset: datasets.Dataset, shapes: dict[str, list[int]], names: list[str]) -> Records:
    """The named columns of all rows of `dataset`; half-precision columns come back as float32."""
    import pyarrow as pa

    table = dataset.with_format("arrow")[:]
    result: Records = {}
    for name in names:
        column = table.column(name).combine_chunks()
        if name not in shapes:
            result[name] = column.to_pylist()
            continue
        flat = column.flatten() if isinstance(column, pa.FixedSizeListArray) else column
        # bool has no zero-copy form in Arrow, and torch wants memory that it may write to
        array = np.array(flat.to_numpy(zero_copy_only=False)).reshape(len(table), *shapes[name])
        result[name] = torch.from_numpy(array).float() if name in HALF else torch.from_numpy(array)
    return result


def _column(array: np.ndarray) -> pa.Array:
    import pyarrow as pa

    flat = pa.array(array.reshape(-1))
    return flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, math.prod(array.shape[1:]))
