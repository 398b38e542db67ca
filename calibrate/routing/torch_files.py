"""PyTorch's own files, opened without running what is in them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from moesim.errors import TraceError
from moesim.routing.importers.files import Bfloat16

__all__ = ["load_plain"]


def load_plain(path: Path) -> Any:
    """Open a ``.pt`` with ``torch.load(weights_only=True)``, mapped to the file where its format allows.

    Parameters
    ----------
    path
        A file that ``torch.save`` wrote.

    Returns
    -------
    object
        Its dictionaries, lists and tuples, with NumPy arrays (or `Bfloat16`) in place of tensors.

    Raises
    ------
    TraceError
        If PyTorch is absent, or the file is damaged or holds anything but tensors and plain values.
    """
    try:
        import torch
    except ImportError:
        fix = "pip install 'moesim[capture]'"
        raise TraceError(
            "a .pt file needs PyTorch, which is not installed", place=str(path), fix=fix
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            return _plain(content)
    except TraceError:
        raise
    # whatever a damaged pickle makes the reader raise: its rule is that nothing in it is run
    except Exception as error:
        rule = "is a whole .pt of tensors and plain values; code in it is never run"
        said = (str(error).splitlines() or [""])[0] or type(error).__name__
        fix = "copy it again, or save tensors, lists and dictionaries only"
        raise TraceError(rule, value=said, place=str(path), fix=fix) from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _plain(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu()
        if dense.dtype == torch.bfloat16:
            return Bfloat16(dense.view(torch.uint16).numpy())
        return dense.numpy()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple) and not all(isinstance(one, int) for one in value):
        return [_plain(one) for one in value]
    return value
