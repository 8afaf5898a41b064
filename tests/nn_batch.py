"""A padded batch as users have it: a modality that is missing, samples of other lengths, times and a look back."""

from typing import Any

import torch

WIDTHS = {"price": 5, "text": 32, "audio": 7}


def padded_batch() -> dict[str, Any]:
    """Arguments of a module or of `MultimodalBatch.build`: 3 samples, 4 queries of width 64."""
    tokens = {"price": torch.randn(3, 10, 5), "text": torch.randn(3, 6, 32)}  # audio is missing everywhere
    masks = {"text": torch.tensor([[1, 1, 0, 1, 0, 0], [0] * 6, [1] * 6]).bool()}
    times = {"price": torch.arange(10).expand(3, 10) * 10, "text": torch.randint(0, 100, (3, 6))}
    query_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]]).bool()
    return {
        "query": torch.randn(3, 4, 64),
        "tokens": tokens,
        "masks": masks,
        "query_mask": query_mask,
        "times": times,
        "query_time": torch.full((3, 4), 55),
        "lookback": {"price": 20},
    }
