"""Read single values of a Hugging Face configuration, each checked, each refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moesim.errors import ModelError

__all__ = ["ConfigReader"]

_LARGEST = 2**31 - 1
"""Counts above it are typing errors, and would overflow arrays further on."""
_REQUIRED = object()


class ConfigReader:
    """Typed access to one configuration object.

    Parameters
    ----------
    config
        The object as JSON gives it.
    architecture
        Named in every error.
    prefix
        Path of the object inside the file, such as ``text_config.``.

    Notes
    -----
    ``null`` counts as absent: Hugging Face writes it for options that are off.
    """

    def __init__(self, config: object, architecture: str, prefix: str = "") -> None:
        if not isinstance(config, Mapping):
            raise ModelError(
                f"{prefix.rstrip('.') or 'a model configuration'} must be a JSON object of keys and values",
                value=type(config).__name__,
            )
        self._config: Mapping[str, Any] = config
        self.architecture = architecture
        self.prefix = prefix

    def count(self, *keys: str, default: Any = _REQUIRED, minimum: int = 1) -> int:
        """Whole number of at least `minimum` under the first of `keys` that is present."""
        key, value = self._find(keys, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._refuse(key, value, f"must be a whole number of at least {minimum}")
        if not minimum <= value <= _LARGEST:
            raise self._refuse(key, value, f"must be between {minimum} and {_LARGEST}")
        return value

    def number(self, key: str, default: float) -> float:
        """Finite number above 0."""
        _, value = self._find((key,), default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refuse(key, value, "must be a number above 0")
        if not (0 < value < math.inf):
            raise self._refuse(key, value, "must be a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Read true or false."""
        _, value = self._find((key,), default)
        if not isinstance(value, bool):
            raise self._refuse(key, value, "must be true or false")
        return value

    def text(self, key: str, default: str = "") -> str:
        """Read a string."""
        _, value = self._find((key,), default)
        if not isinstance(value, str):
            raise self._refuse(key, value, "must be a string")
        return value

    def one_of(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """Read one of the `allowed` strings."""
        value = self.text(key, default)
        if value not in allowed:
            raise self._refuse(key, value, f"must be one of {', '.join(allowed)}")
        return value

    def indices(self, key: str, length: int) -> frozenset[int]:
        """List of layer indices below `length`; empty where absent."""
        values = self._list(key, [])
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < length:
                raise self._refuse(key, value, f"must be layer indices from 0 to {length - 1}")
        return frozenset(values)

    def flags(self, key: str, length: int) -> tuple[bool, ...] | None:
        """Read a list of `length` values of 0 or 1; None where absent or empty."""
        values = self._list(key, [])
        if not values:
            return None
        if len(values) != length or any(value not in (0, 1) for value in values):
            raise self._refuse(key, values, f"must be {length} values of 0 or 1, one per layer")
        return tuple(bool(value) for value in values)

    def choices(self, key: str, allowed: tuple[str, ...], length: int) -> tuple[str, ...] | None:
        """List of `length` strings out of `allowed`; None where absent."""
        if not self.has(key):
            return None
        values = self._list(key, [])
        if len(values) != length:
            raise self._refuse(key, f"{len(values)} entries", f"must have one entry per layer, {length}")
        for value in values:
            if value not in allowed:
                raise self._refuse(key, value, f"must be one of {', '.join(allowed)}")
        return tuple(values)

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self._config.get(key) is not None

    def raw(self, key: str) -> object:
        """Return the value unread, or None."""
        return self._config.get(key)

    def inner(self, key: str) -> ConfigReader:
        """Read an object inside this one; this one where it is absent."""
        if not self.has(key):
            return self
        return ConfigReader(self._config[key], self.architecture, f"{self.prefix}{key}.")

    def refuse_missing(self, key: str) -> ModelError:
        """Build the error for a key that the architecture needs."""
        return ModelError(f"{self.prefix}{key} is missing and {self.architecture} models need it")

    def _list(self, key: str, default: list[Any]) -> list[Any]:
        _, value = self._find((key,), default)
        if not isinstance(value, list | tuple):
            raise self._refuse(key, value, "must be a list")
        return list(value)

    def _find(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for key in keys:
            if self.has(key):
                return key, self._config[key]
        if default is _REQUIRED:
            raise self.refuse_missing(" or ".join(keys))
        return keys[0], default

    def _refuse(self, key: str, value: object, rule: str) -> ModelError:
        return ModelError(f"{self.prefix}{key} of a {self.architecture} model {rule}", value=value)
