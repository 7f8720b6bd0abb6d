"""Mixed precision."""

import torch

from tmkd_ray.settings import Precision


def autocast(device: torch.device | str, precision: Precision) -> torch.autocast:
    """Return the context in which the forward pass runs; with `float32` it changes nothing."""
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=precision != "float32")
