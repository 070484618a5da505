"""The generators that everyone shares: dropout draws from torch's, and parts of one's own may draw from any."""

import random
from typing import Any

import numpy as np
import torch


def state() -> dict[str, Any]:
    """Return the state of torch's generators, Python's and numpy's, as plain values and tensors."""
    version, words, spare = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - it is the shared one
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), spare],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
    }


def restore(saved: dict[str, Any]) -> None:
    """Go on drawing where `state` was taken."""
    torch.set_rng_state(saved["torch"])
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
    version, words, spare = saved["python"]
    random.setstate((version, tuple(words), spare))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002 - it is the shared one
