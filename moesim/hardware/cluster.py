"""A cluster: GPUs, nodes, and the links between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from moesim.hardware.gpu import Gpu

__all__ = ["Cluster", "Fabric"]


class Fabric(BaseModel):
    """How the GPUs of a cluster are wired, beyond their rates."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    scale_up: Literal["switch", "mesh"] = "switch"
    """NVLink through a switch, or a cable to each peer that shares the GPU's rate."""
    gpus_per_nic: PositiveInt = 1
    """GPUs that share one NIC of as many times their network rate."""
    gpus_per_pcie_switch: PositiveInt | None = None
    """GPUs behind one PCIe switch with one uplink; none = each on a root port of its own."""
    gpus_per_socket: PositiveInt | None = None
    """GPUs whose PCIe lanes end at one CPU socket of a node; none = one socket has all."""
    socket_oversubscription: PositiveFloat = 1.0
    """PCIe bandwidth of a socket's GPUs over what leaves for the node's other sockets."""
    network: Literal["rail", "fat-tree"] = "rail"
    """NICs of equal position on a switch of their own, or all NICs of a node on one leaf."""
    cross_rail: Literal["pxn", "spine", "direct"] = "pxn"
    """To another rail: over NVLink to the neighbour on it, over the spine, or straight where nothing blocks."""
    nodes_per_pod: PositiveInt | None = None
    """Nodes of one pod; none = one pod holds all."""
    pod_oversubscription: PositiveFloat = 1.0
    """Bandwidth of a pod's NICs over what leaves the pod."""
    degraded: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """Share of its rate that a link has left, by name (`node0.nic3.out`, `gpu5.nvlink.*`); 0 = dead."""


class Cluster(BaseModel):
    """Nodes of equal GPUs; ranks are numbered node by node."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    gpu: Gpu
    """The GPU of every rank."""
    nodes: PositiveInt
    """Nodes in the cluster."""
    gpus_per_node: PositiveInt
    """GPUs that share a host."""
    scale_up_ranks: PositiveInt
    """GPUs in one scale-up domain (NVSwitch node: `gpus_per_node`; NVL72: 72; PCIe box: 1)."""
    nic_bytes_per_s: NonNegativeFloat
    """Network rate of one GPU, per direction [bytes/s]; 0 where the box stands alone."""
    nic_latency_s: NonNegativeFloat = 5e-6
    """One-way latency between nodes [s]."""
    usd_per_gpu_hour: NonNegativeFloat
    """Price of one GPU for one hour [USD]."""
    uplink_oversubscription: PositiveFloat = 1.0
    """Bandwidth of a node's NICs over what leaves its rail switch; 1 = non-blocking."""

    fabric: Fabric = Fabric()
    """Wiring."""

    @property
    def n_gpus(self) -> int:
        """GPUs in the whole cluster."""
        return self.nodes * self.gpus_per_node

    @property
    def near_ranks(self) -> int:
        """GPUs that reach each other without a NIC: a scale-up domain, or without NVLink a host (over PCIe)."""
        return self.scale_up_ranks if self.gpu.nvlink_bytes_per_s > 0 else self.gpus_per_node

    def domain_of(self, rank: int) -> int:
        """Scale-up domain that a rank is in."""
        return rank // self.scale_up_ranks
