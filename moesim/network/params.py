"""Parameters of the collectives, out of a hardware profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moesim.errors import ProfileError
from moesim.hardware.profile import Profile

__all__ = ["CUSTOM_ALL_REDUCE", "NetworkParams", "Values"]

Values = Mapping[str, float]
"""Values of one family by name: SI units, rates as fractions of a link's datasheet rate."""

CUSTOM_ALL_REDUCE = ("vllm-custom", "sglang-custom", "trtllm")
"""Engines' own all-reduce kernels."""

_NCCL = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "inter_node", "pcie", "send_recv")
_EXCHANGES = ("deepep-low-latency", "deepep-normal", "one-sided")


@dataclass(frozen=True, eq=False)
class NetworkParams:
    """What a profile says of its collectives."""

    nccl: Mapping[str, Values]
    """By operator: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``inter_node``..."""
    custom: Mapping[str, Values]
    """By engine kernel: those of `CUSTOM_ALL_REDUCE`."""
    dispatch: Mapping[str, Values]
    """By library: ``deepep-low-latency``, ``deepep-normal``, ``one-sided``."""
    combine: Mapping[str, Values]
    """The same, the way back."""
    exchange_stretch: float = 1.0
    """Time of an exchange that SMs copy while compute runs on the same GPU, over that alone."""
    compute_stretch: float = 1.0
    """Time of compute on the SMs that are left meanwhile, over that alone on as many."""

    @classmethod
    def from_profile(cls, profile: Profile) -> NetworkParams:
        """Collect the families of collectives.

        Raises
        ------
        ProfileError
            If one is missing.
        """
        stretch = {
            name: profile.family("beside", name).values()["stretch"] if profile.has("beside", name) else 1.0
            for name in ("exchange", "compute")
        }
        return cls(
            nccl={op: profile.family(op, "nccl", "bfloat16").values() for op in _NCCL},
            custom={name: profile.family("all_reduce", name).values() for name in CUSTOM_ALL_REDUCE},
            dispatch={name: profile.family("ep_dispatch", name).values() for name in _EXCHANGES},
            combine={name: profile.family("ep_combine", name).values() for name in _EXCHANGES},
            exchange_stretch=stretch["exchange"],
            compute_stretch=stretch["compute"],
        )

    def sms_taken(self, kind: str) -> int:
        """SMs that an exchange keeps from compute while it runs; 0 for low latency.

        Raises
        ------
        ProfileError
            If `kind` is not one of ``low-latency``, ``normal``, ``nccl``, ``one-sided``, or their library's name.
        """
        if kind == "nccl":
            return int(self.nccl["all_to_all"]["n_sms"])
        name = {"low-latency": "deepep-low-latency", "normal": "deepep-normal"}.get(kind, kind)
        if name not in self.dispatch:
            raise ProfileError(
                "is no kind of exchange", value=kind, fix="low-latency, normal, nccl, one-sided"
            )
        return int(self.dispatch[name]["n_sms"])
