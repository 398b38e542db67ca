"""A cluster: GPUs, nodes, and the links between them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt

from moesim.hardware.gpu import Gpu

__all__ = ["Cluster"]


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
