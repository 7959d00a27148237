"""Identity that pose, mouth and lids do not explain.

An identity measure leans a little with the head; when the head hangs lower late in a stream, that looks like drift.
y = person and place in the block + b z + c time + rest is fitted by least squares (within-estimator: what each
person shows at each place of the block is taken out by its mean over the returns), and b (z - its mean) is removed.
Time is in the fit so that b does not swallow a drift that merely happens at the same time.
identity [N, R, C, D], confounds [N, R, C, Z] -> residual identity [N, R, C, D]
"""

from __future__ import annotations

import torch
from torch import Tensor


def without_confounds(identity: Tensor, confounds: Tensor, minutes: Tensor) -> Tensor:
    """identity and confounds as above (N people, R returns, C places in the block), minutes [R] -> residual identity.

    Confounds that do not vary explain nothing: the fit is a ridge of 1e-6 of their spread.
    """
    y, z = identity.double(), confounds.double()
    time = minutes.double()[None, :, None, None].expand(*z.shape[:3], 1)
    known = torch.cat([z, time], -1)
    inner = known - known.mean(1, keepdim=True)  # within a person and place
    x = inner.flatten(0, 2)  # [N R C, Z + 1]
    target = (y - y.mean(1, keepdim=True)).flatten(0, 2)  # [N R C, D]
    gram = x.T @ x
    ridge = 1e-6 * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    slopes = torch.linalg.solve(gram + ridge, x.T @ target)[:-1]  # [Z, D], time's own left out
    return y - inner[..., :-1] @ slopes
