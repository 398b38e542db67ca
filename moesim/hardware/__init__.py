"""GPUs, clusters and the profiles of what was measured on them."""

from moesim.hardware.catalog import (
    cluster_names,
    gpu_names,
    list_clusters,
    list_gpus,
    load_cluster,
    load_gpu,
)
from moesim.hardware.cluster import Cluster
from moesim.hardware.gpu import Gpu, compute_dtype, weight_bytes_per_element
from moesim.hardware.profile import Family, Profile, load_profile, open_profile, read_profile

__all__ = [
    "Cluster",
    "Family",
    "Gpu",
    "Profile",
    "cluster_names",
    "compute_dtype",
    "gpu_names",
    "list_clusters",
    "list_gpus",
    "load_cluster",
    "load_gpu",
    "load_profile",
    "open_profile",
    "read_profile",
    "weight_bytes_per_element",
]
