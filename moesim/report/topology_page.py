"""The page of ``moesim network``: the cluster's links coloured by how busy they are, times, rank-to-rank bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from moesim.hardware.cluster import Cluster
from moesim.network.playing import Played
from moesim.report import maps, palette
from moesim.report.detail import LayoutDetail
from moesim.report.figures import Figure, base_layout
from moesim.report.page import Page, write_page
from moesim.report.text import Record, share
from moesim.units import format_bytes, format_bytes_per_s, format_seconds

__all__ = ["network_rows", "topology_figure", "write_network_report"]

STEPS = 8
"""Shades of a link's colour; one line trace each."""
LEVELS = {
    "core": -3.2,
    "spine": -2.4,
    "rail": -1.6,
    "nic": -0.8,
    "host": -0.35,
    "socket": -0.55,
    "gpu": 0.0,
    "switch": 0.9,
}
"""Height of each class of device."""
LEAST_GAIN = 0.005
"""Gains below it are not told."""
LINK = re.compile(
    r"(?:node(\d+)|pod(\d+)|gpu(\d+))(?:\.(nvlink|pcie|socket|nic|rail|leaf)(\d*))?\.(?:(in|out)|to(\d+))$"
)
Point = tuple[float, float]


class _Places:
    """Where devices stand in the figure; x in GPUs."""

    def __init__(self, cluster: Cluster) -> None:
        fabric = cluster.fabric
        self.cluster, self.size = cluster, cluster.gpus_per_node
        self.per_switch = fabric.gpus_per_pcie_switch or self.size
        self.per_socket = fabric.gpus_per_socket or self.size
        self.shared = fabric.gpus_per_nic
        self.n_rails = -(-self.size // self.shared)
        self.pod = fabric.nodes_per_pod or cluster.nodes

    def gpu(self, rank: int, level: str = "gpu") -> Point:
        return rank + 0.9 * (rank // self.size), LEVELS[level]

    def node(self, node: int, level: str) -> Point:
        first, last = self.gpu(node * self.size), self.gpu(node * self.size + self.size - 1)
        return (first[0] + last[0]) / 2, LEVELS[level]

    def domain(self, rank: int) -> Point:
        size = self.cluster.scale_up_ranks
        first = rank // size * size
        last = min(first + size, self.cluster.n_gpus) - 1
        return (self.gpu(first)[0] + self.gpu(last)[0]) / 2, LEVELS["switch"]

    def nic(self, node: int, nic: int) -> Point:
        first = node * self.size + nic * self.shared
        last = min(first + self.shared, (node + 1) * self.size) - 1
        return (self.gpu(first)[0] + self.gpu(last)[0]) / 2, LEVELS["nic"]

    def pcie(self, node: int, switch: int) -> Point:
        return self._above(node, switch, self.per_switch, "host")

    def socket(self, node: int, socket: int) -> Point:
        return self._above(node, socket, self.per_socket, "socket")

    def _above(self, node: int, number: int, each: int, level: str) -> Point:
        first = node * self.size + number * each
        last = min(first + each, (node + 1) * self.size) - 1
        return (self.gpu(first)[0] + self.gpu(last)[0]) / 2, LEVELS[level]

    def pod_middle(self, pod: int, level: str) -> Point:
        last = min((pod + 1) * self.pod, self.cluster.nodes) - 1
        return (self.node(pod * self.pod, level)[0] + self.node(last, level)[0]) / 2, LEVELS[level]

    def rail(self, pod: int, rail: int) -> Point:
        middle, level = self.pod_middle(pod, "rail")
        wide = self.gpu(min(self.pod, self.cluster.nodes) * self.size - 1)[0]
        return middle + (rail - (self.n_rails - 1) / 2) * wide / max(self.n_rails, 1) * 0.8, level

    def ends(self, name: str) -> tuple[Point, Point]:
        """Both ends of a link."""
        found = LINK.match(name)
        if found is None:
            return (0.0, LEVELS["core"]), (0.0, LEVELS["core"])
        node, pod, gpu, kind, number, _, peer = found.groups()
        if gpu is not None:
            rank = int(gpu)
            if peer is not None:
                return self.gpu(rank), self.gpu(
                    rank // self.cluster.scale_up_ranks * self.cluster.scale_up_ranks + int(peer)
                )
            return self.gpu(rank), self.domain(rank) if kind == "nvlink" else self.gpu(rank, "host")
        if pod is not None:
            if kind == "rail":
                return self.rail(int(pod), int(number)), self.pod_middle(int(pod), "spine")
            return self.pod_middle(int(pod), "spine"), (
                self.gpu(self.cluster.n_gpus - 1)[0] / 2,
                LEVELS["core"],
            )
        return self._of_node(int(node), kind, int(number or 0))

    def _of_node(self, node: int, kind: str, number: int) -> tuple[Point, Point]:
        if kind == "pcie":
            return self.pcie(node, number), self.node(node, "host")
        if kind == "socket":
            return self.socket(node, number), self.node(node, "socket")
        if kind == "leaf":
            return self.node(node, "rail"), self.pod_middle(node // self.pod, "spine")
        leaf = self.cluster.fabric.network == "fat-tree"
        above = self.node(node, "rail") if leaf else self.rail(node // self.pod, number)
        return self.nic(node, number), above


def topology_figure(played: Played) -> Figure:
    """Every link of a cluster, out and in beside each other, coloured by the share of the time that it is busy."""
    places, topology = _Places(played.topology.cluster), played.topology
    whole_s = played.makespan_s or 1.0
    busy = np.clip(played.link_s / whole_s, 0.0, 1.0)
    shade = np.minimum((busy * STEPS).astype(int), STEPS - 1)
    lines: list[dict[str, list[float | None]]] = [{"x": [], "y": []} for _ in range(STEPS)]
    at: list[Point] = []
    for number, name in enumerate(topology.names):
        (x0, y0), (x1, y1) = places.ends(name)
        side = 0.09 if name.endswith(".in") or (x1 < x0 and not name.endswith(".out")) else -0.09
        bow = (
            0.2 + 0.08 * abs(x1 - x0) if y0 == y1 else 0.0
        )  # cables between GPUs would lie under one another
        middle = ((x0 + x1) / 2 + side, (y0 + y1) / 2 + bow)
        lines[shade[number]]["x"] += [x0 + side, middle[0], x1 + side, None]
        lines[shade[number]]["y"] += [y0, middle[1], y1, None]
        at.append(middle)
    data = [_line(one, step) for step, one in enumerate(lines) if one["x"]]
    data += [_marks(played, at, busy), _gpus(places)]
    layout = base_layout(430, "", hovermode="closest", showlegend=False)
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {
            "showgrid": False,
            "showticklabels": False,
            "ticks": "",
            "linecolor": "rgba(0,0,0,0)",
        }
    return {"data": data, "layout": layout}


def _color(step: int) -> str:
    """Shade of a step, the scale's stops mixed."""
    at = (step + 0.5) / STEPS
    for (low, first), (high, last) in zip(palette.SCALE, palette.SCALE[1:], strict=False):
        if at <= high:
            part = (at - low) / (high - low)
            mixed = [
                round(int(first[i : i + 2], 16) * (1 - part) + int(last[i : i + 2], 16) * part)
                for i in (1, 3, 5)
            ]
            return "#{:02x}{:02x}{:02x}".format(*mixed)
    return palette.SCALE[-1][1]


def _line(points: dict[str, list[float | None]], step: int) -> dict[str, Any]:
    width = 1.0 + 2.5 * step / (STEPS - 1)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [None if x is None else float(f"{x:.5g}") for x in points["x"]],
        "y": [None if y is None else float(f"{y:.5g}") for y in points["y"]],
        "line": {"color": _color(step), "width": width},
        "hoverinfo": "skip",
    }


def _marks(played: Played, at: Sequence[Point], busy: np.ndarray) -> dict[str, Any]:
    text = [
        f"{escape(name)}<br>{format_bytes_per_s(rate)}<br>{format_bytes(size)}, busy {share(float(part))}"
        for name, rate, size, part in zip(
            played.topology.names, played.bytes_per_s, played.link_bytes, busy, strict=True
        )
    ]
    colorbar = {"title": {"text": "busy"}, "tickformat": ".0%", "thickness": 12, "outlinewidth": 0}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [float(f"{x:.5g}") for x, _ in at],
        "y": [float(f"{y:.5g}") for _, y in at],
        "text": text,
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {
            "size": 4,
            "color": [float(f"{part:.3g}") for part in busy],
            "cmin": 0,
            "cmax": 1,
            "colorscale": [list(stop) for stop in palette.SCALE],
            "colorbar": colorbar,
        },
    }


def _gpus(places: _Places) -> dict[str, Any]:
    ranks = range(places.cluster.n_gpus)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [places.gpu(rank)[0] for rank in ranks],
        "y": [places.gpu(rank)[1] for rank in ranks],
        "text": [f"GPU {rank}, node {rank // places.size}" for rank in ranks],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"size": 7, "symbol": "square", "color": palette.INK},
    }


HEAD = ("collective", "routing", "time", "by ports", "bound", "busiest link", "next kind", "2x rate saves")


def network_rows(told: Record) -> list[list[str]]:
    """Cells of the table of collectives: heads, then a row each."""
    rows = [list(HEAD)]
    for one in told["collectives"]:
        link = one["link"] or {}
        others = [kind for kind in one["by_kind"] if kind != link.get("kind")]
        after = f"{others[0]} {share(one['by_kind'][others[0]]['utilisation'])}" if others else "none"
        gains = [f"{kind} {gain:.0%}" for kind, gain in one["gain"].items() if abs(gain) >= LEAST_GAIN]
        rows.append(
            [
                one["collective"],
                one["routing"],
                format_seconds(one["time_s"]),
                format_seconds(one["port_bound_s"]),
                one["bound"],
                f"{link['name']} {share(link['utilisation'])}" if link else "none",
                after,
                ", ".join(gains) or "nothing",
            ]
        )
    return rows


def write_network_report(
    path: Path | str, told: Record, views: Sequence[tuple[str, Played, np.ndarray | None]]
) -> Path:
    """Write one HTML file about a layer's collectives.

    Parameters
    ----------
    path
        Where to; an older file there is replaced at once.
    told
        The object of ``moesim network --json``.
    views
        Title, flows and rank-to-rank bytes of each collective to draw.
    """
    page = Page()
    dispatch, cluster = told["dispatch"], told["cluster"]
    where = f"{cluster['n_gpus']} {cluster['gpu']} on {cluster['nodes']} nodes"
    named = f"{told['model']} on {where}, {told['phase']}"
    page.add(
        f'<header><p class="eyebrow">Network: {escape(named)}</p><h1>{escape(_answer(told))}</h1></header><main>'
    )
    page.add(
        f"<section><h2>Collectives of one layer</h2><p class='note'>{escape(dispatch['library'])}: "
        f"{escape(dispatch['why'])}. {told['tokens_per_rank']:,.0f} tokens a rank; {escape(str(told['routing']))}.</p>"
        f"{_table(network_rows(told))}</section>"
    )
    for title, played, pairs in views:
        page.add(f"<section><h2>Links: {escape(title)}</h2>")
        page.add(
            "<p class='note'>NVLink switches above the GPUs, NICs, rails and spine below; out left, in right.</p>"
        )
        page.figure(topology_figure(played), f"Links of the cluster by how busy they are during {title}")
        if pairs is not None:
            page.add("<h3>Bytes from rank to rank</h3>")
            heat = maps.traffic_map(LayoutDetail(title, traffic=pairs))
            page.figure(heat, f"Bytes from rank to rank during {title}", max_width=620)
        page.add("</section>")
    page.add("</main><footer></footer>")
    return write_page(path, page, f"moesim network: {named}")


def _answer(told: Record) -> str:
    """The sentence that the page is made for."""
    row = next(
        (one for one in told["collectives"] if one["routing"].startswith("as routed")), told["collectives"][0]
    )
    said = f"{row['collective'].capitalize()} takes {format_seconds(row['time_s'])}, bound by {row['bound']}"
    if row["gain"]:
        kind, gain = max(row["gain"].items(), key=lambda pair: pair[1])
        said += f"; twice the rate of {kind} links takes {gain:.0%} off"
    return said + "."


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[escape(cell) for cell in row] for row in rows]
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
