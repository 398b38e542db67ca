"""GPUs and clusters by name: one YAML file each, every figure with its source."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moesim.errors import HardwareError
from moesim.hardware.cluster import Cluster, Fabric
from moesim.hardware.gpu import Gpu
from moesim.units import Bytes, BytesPerSecond, FlopsPerSecond, Hertz, Seconds, UsdPerGpuHour

__all__ = ["cluster_names", "gpu_names", "list_clusters", "list_gpus", "load_cluster", "load_gpu"]

CATALOG = Path(__file__).resolve().parents[1] / "catalog"


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Catalog name; the file is called after it."""
    aliases: tuple[str, ...] = ()
    """Other names that people use."""
    sources: dict[str, str]
    """Where each figure is from, by its key in the file."""

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> Self:
        choices = {"name", "aliases", "sources", "gpu", "nodes", "gpus_per_node"}
        figures = set(type(self).model_fields) - choices
        missing = sorted(figures - set(self.sources))
        if missing:
            raise PydanticCustomError(
                "source", "no source for {names}; fix: add it under sources", {"names": ", ".join(missing)}
            )
        return self


class _GpuFile(_File):
    """A GPU as its YAML file says it."""

    memory: Bytes
    hbm: BytesPerSecond
    flops: dict[str, FlopsPerSecond]
    sms: PositiveInt
    l2: Bytes
    clock: Hertz
    nvlink: BytesPerSecond
    pcie: BytesPerSecond
    price: UsdPerGpuHour

    def gpu(self) -> Gpu:
        return Gpu(
            name=self.name,
            memory_bytes=self.memory,
            hbm_bytes_per_s=self.hbm,
            flops_per_s=self.flops,
            n_sms=self.sms,
            l2_bytes=self.l2,
            clock_hz=self.clock,
            nvlink_bytes_per_s=self.nvlink,
            pcie_bytes_per_s=self.pcie,
            usd_per_gpu_hour=self.price,
            sources=self.sources,
        )


class _ClusterFile(_File):
    """A cluster as its YAML file says it: one kind of node, and how nodes meet."""

    gpu: str
    nodes: PositiveInt
    gpus_per_node: PositiveInt
    scale_up: Literal["node", "none"] | PositiveInt
    nic: BytesPerSecond
    nic_latency: Seconds
    oversubscription: PositiveFloat


_FileT = TypeVar("_FileT", bound=_File)


def load_gpu(name: str) -> Gpu:
    """Find a GPU by its catalog name, an alias, or the path of a YAML file like the catalog's.

    Raises
    ------
    HardwareError
        If there is no such GPU, or its file lacks a figure or a figure's source.
    """
    return _find(name, "gpus", _GpuFile, "GPU").gpu()


def list_gpus() -> tuple[Gpu, ...]:
    """Every GPU of the catalog, by name."""
    return tuple(entry.gpu() for entry in _entries("gpus", _GpuFile))


def list_clusters() -> tuple[Cluster, ...]:
    """Every cluster of the catalog, at its usual size."""
    return tuple(load_cluster(name) for name in cluster_names())


def gpu_names() -> tuple[str, ...]:
    """Catalog names of GPUs, without aliases."""
    return tuple(entry.name for entry in _entries("gpus", _GpuFile))


def cluster_names() -> tuple[str, ...]:
    """Catalog names of clusters, without aliases."""
    return tuple(entry.name for entry in _entries("clusters", _ClusterFile))


def load_cluster(
    name: str | None = None,
    *,
    gpu: str | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    scale_up_ranks: int | None = None,
    nic_bytes_per_s: float | None = None,
    nic_latency_s: float | None = None,
    usd_per_gpu_hour: float | None = None,
    uplink_oversubscription: float | None = None,
    fabric: Fabric | None = None,
) -> Cluster:
    """Build a cluster from the catalog; whatever is given replaces the catalog's figure.

    Parameters
    ----------
    name
        Cluster; where it is left out, the cluster that the catalog has for `gpu`.
    gpu
        GPU in place of the cluster's own.
    nodes, gpus_per_node
        Size.
    scale_up_ranks
        GPUs in one NVLink domain; 1 = none, so GPUs of a host speak over PCIe.
    nic_bytes_per_s
        Network rate of one GPU, per direction [bytes/s].
    nic_latency_s
        One-way latency between nodes [s].
    usd_per_gpu_hour
        Price of one GPU [USD/h].
    uplink_oversubscription
        Bandwidth of a node's NICs over what leaves its rail switch.
    fabric
        Wiring; by default NVLink through switches, one NIC a GPU on its own rail.

    Raises
    ------
    HardwareError
        If a name is unknown, or several nodes have no network between them.
    """
    file = _cluster_file(name, gpu)
    chip = load_gpu(gpu or file.gpu)
    size = gpus_per_node or file.gpus_per_node
    n_nodes = nodes or file.nodes
    nic = file.nic if nic_bytes_per_s is None else nic_bytes_per_s
    if n_nodes > 1 and nic == 0:
        raise HardwareError(
            f"{n_nodes} nodes of {chip.name} have no network between them",
            value=nic,
            fix='set cluster.nic, as "100 Gb/s", or nodes to 1',
        )
    domain = {"node": size, "none": 1}.get(str(file.scale_up), file.scale_up)
    if scale_up_ranks is not None:
        domain = scale_up_ranks
    if int(domain) == 1 and size > 1:
        # nobody at the other end of its NVLink
        chip = chip.model_copy(update={"nvlink_bytes_per_s": 0.0})
    return Cluster(
        gpu=chip,
        nodes=n_nodes,
        gpus_per_node=size,
        scale_up_ranks=int(domain) if chip.nvlink_bytes_per_s else 1,
        nic_bytes_per_s=nic,
        nic_latency_s=file.nic_latency if nic_latency_s is None else nic_latency_s,
        usd_per_gpu_hour=chip.usd_per_gpu_hour if usd_per_gpu_hour is None else usd_per_gpu_hour,
        uplink_oversubscription=uplink_oversubscription or file.oversubscription,
        fabric=fabric or Fabric(),
    )


def _cluster_file(name: str | None, gpu: str | None) -> _ClusterFile:
    if name is not None:
        return _find(name, "clusters", _ClusterFile, "cluster")
    if gpu is None:
        raise HardwareError("a cluster needs a name or a GPU", fix="set cluster.gpu, as h200-sxm")
    wanted = load_gpu(gpu).name
    for entry in _entries("clusters", _ClusterFile):
        if entry.gpu == wanted:
            return entry
    # A GPU from someone's own file: nodes as most of its kind have.
    usual = "dgx-h100" if load_gpu(gpu).nvlink_bytes_per_s else "pcie-l40s"
    return _find(usual, "clusters", _ClusterFile, "cluster")


def _entries(folder: str, kind: type[_FileT]) -> tuple[_FileT, ...]:
    return tuple(_read_once(path, kind) for path in sorted((CATALOG / folder).glob("*.yaml")))


_READ: dict[Path, _File] = {}


def _read_once(path: Path, kind: type[_FileT]) -> _FileT:
    """Read a catalog file; it does not change while the program runs."""
    entry = _READ.get(path)
    if not isinstance(entry, kind):
        entry = _READ[path] = _read(path, kind)
    return entry


def _find(name: str, folder: str, kind: type[_FileT], what: str) -> _FileT:
    """Look a name up in one folder of the catalog, or read the file that it is the path of."""
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name), kind)
    by_name = {alias: entry for entry in _entries(folder, kind) for alias in entry.aliases}
    by_name |= {entry.name: entry for entry in _entries(folder, kind)}
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted in by_name:
        return by_name[wanted]
    near = difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.5)
    known = ", ".join(sorted(entry.name for entry in _entries(folder, kind)))
    fix = f"did you mean {near[0]}? known: {known}" if near else f"use one of {known}"
    raise HardwareError(f"unknown {what}", value=name, fix=fix)


def _read(path: Path, kind: type[_FileT]) -> _FileT:
    try:
        content: Any = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        return kind.model_validate(content)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise HardwareError(f"cannot be read: {reason}", place=str(path)) from error
    except (YAMLError, RecursionError) as error:
        raise HardwareError(f"is not YAML: {str(error).splitlines()[0]}", place=str(path)) from error
    except ValidationError as error:
        raise _first(error, path) from error


def _first(error: ValidationError, path: Path) -> HardwareError:
    detail = error.errors()[0]
    context = detail.get("ctx", {})
    key = ".".join(str(part) for part in detail["loc"])
    rule = f"{key}: {detail['msg']}" if key else detail["msg"]
    value = context.get("unit_value") if detail["type"] == "unit" else None
    return HardwareError(rule, value=value, fix=context.get("fix") or None, place=str(path))
