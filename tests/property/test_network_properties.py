"""Laws of every collective and exchange, whatever the bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.hardware.catalog import load_cluster
from moesim.hardware.profile import load_profile
from moesim.network import (
    NetworkParams,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    combine_s,
    dispatch_s,
    port_bound_s,
    reduce_scatter_s,
)
from moesim.work.ops import Combine, Dispatch

PARAMS = NetworkParams.from_profile(load_profile("h200-sxm"))
CLUSTER = load_cluster("dgx-h200", nodes=8)
NVLINK, NIC = CLUSTER.gpu.nvlink_bytes_per_s, CLUSTER.nic_bytes_per_s
collectives = st.sampled_from([all_reduce_s, all_gather_s, reduce_scatter_s, all_to_all_s])
payloads = st.floats(1.0, 1e11)
group_sizes = st.sampled_from([2, 3, 4, 8, 16, 24, 64])
kinds = st.sampled_from(["low-latency", "normal", "nccl"])
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=60, deadline=None)


def group(n_ranks: int) -> dict:
    return {
        "n_ranks": n_ranks, "ranks_per_node_in_group": min(n_ranks, 8), "cluster": CLUSTER, "params": PARAMS,
    }  # fmt: skip


def traffic(seed: int, n_ranks: int, kind: str, to: type, n_points: int = 1):
    """Copies of a random matrix between ranks: what one sends another receives."""
    rng = np.random.default_rng(seed)
    copies = rng.integers(0, 400, (n_points, 1, n_ranks, n_ranks)) * (1 - np.eye(n_ranks))
    node = np.arange(n_ranks) // 8
    near = node[:, None] == node[None, :]
    return to(
        n_tokens=rng.integers(1, 2000, (n_points, 1, n_ranks)).astype(float),
        sent_nvlink=(copies * near).sum(-1), received_nvlink=(copies * near).sum(-2),
        sent_nic=(copies * ~near).sum(-1), received_nic=(copies * ~near).sum(-2),
        token_bytes=float(rng.integers(512, 16384)), hidden=4096, top_k=int(rng.integers(1, 9)), n_experts=256,
        kind=kind,
    )  # fmt: skip


def price(op):
    return (combine_s if isinstance(op, Combine) else dispatch_s)(op, cluster=CLUSTER, params=PARAMS)


@few
@given(collective=collectives, payload=payloads, more=st.floats(1.0, 10.0), n_ranks=group_sizes)
def test_more_bytes_never_take_less_time(collective, payload: float, more: float, n_ranks: int) -> None:
    less_s, more_s = collective(np.array([payload, payload * more]), **group(n_ranks))
    assert more_s >= less_s * (1 - 1e-12)


@few
@given(collective=collectives, payload=payloads, n_ranks=group_sizes)
def test_no_collective_beats_its_links(collective, payload: float, n_ranks: int) -> None:
    time_s = collective(payload, **group(n_ranks))
    n_nodes = -(-n_ranks // 8)
    # the least that any algorithm sends: each rank must take in what it lacks, in-switch sums included
    local = min(n_ranks, 8)
    lacks = payload * (local - 1) / local
    if collective is all_to_all_s:
        lacks = payload * (local - 1) / n_ranks
        assert time_s >= payload * (n_ranks - local) / n_ranks / NIC
    elif n_nodes > 1:
        assert time_s >= payload * (n_nodes - 1) / n_nodes / 8 / NIC
    assert time_s >= lacks / NVLINK


@few
@given(seed=seeds, n_ranks=group_sizes, kind=kinds, to=st.sampled_from([Dispatch, Combine]))
def test_no_exchange_beats_its_busiest_port(seed: int, n_ranks: int, kind: str, to: type) -> None:
    op = traffic(seed, n_ranks, kind, to)
    slowest_s = price(op).max(axis=-1)
    near_s = port_bound_s(op.sent_nvlink * op.token_bytes, op.received_nvlink * op.token_bytes, NVLINK)
    far_s = port_bound_s(op.sent_nic * op.token_bytes, op.received_nic * op.token_bytes, NIC)
    assert np.all(slowest_s >= near_s) and np.all(slowest_s >= far_s)


@few
@given(seed=seeds, n_ranks=group_sizes, kind=kinds)
def test_renumbered_ranks_take_their_times_along(seed: int, n_ranks: int, kind: str) -> None:
    op = traffic(seed, n_ranks, kind, Dispatch)
    order = np.random.default_rng(seed).permutation(n_ranks)
    names = ("n_tokens", "sent_nvlink", "received_nvlink", "sent_nic", "received_nic")
    moved = replace(op, **{name: getattr(op, name)[..., order] for name in names})
    np.testing.assert_array_equal(price(moved), price(op)[..., order])


@few
@given(seed=seeds, n_ranks=group_sizes, kind=kinds, to=st.sampled_from([Dispatch, Combine]))
def test_skew_is_never_quicker_than_the_same_copies_spread_evenly(
    seed: int, n_ranks: int, kind: str, to: type
) -> None:
    op = traffic(seed, n_ranks, kind, to)
    op = replace(op, n_tokens=np.full_like(op.n_tokens, 700.0))
    names = ("sent_nvlink", "received_nvlink", "sent_nic", "received_nic")
    even = {name: np.full_like(getattr(op, name), getattr(op, name).mean()) for name in names}
    assert price(op).max() >= price(replace(op, **even)).max() * (1 - 1e-12)


@few
@given(
    seed=seeds,
    n_ranks=st.sampled_from([16, 24, 64]),
    share=st.floats(0.0, 1.0),
    to=st.sampled_from([Dispatch, Combine]),
)
def test_nccl_copies_are_never_cheaper_over_nics(seed: int, n_ranks: int, share: float, to: type) -> None:
    op = traffic(seed, n_ranks, "nccl", to)
    moved = replace(
        op,
        sent_nvlink=(1 - share) * op.sent_nvlink, received_nvlink=(1 - share) * op.received_nvlink,
        sent_nic=op.sent_nic + share * op.sent_nvlink, received_nic=op.received_nic + share * op.received_nvlink,
    )  # fmt: skip
    near_only = replace(
        op,
        sent_nvlink=op.sent_nvlink + op.sent_nic, received_nvlink=op.received_nvlink + op.received_nic,
        sent_nic=0 * op.sent_nic, received_nic=0 * op.received_nic,
    )  # fmt: skip
    near_only_s, before_s, after_s = (price(each) for each in (near_only, op, moved))
    assert np.all(near_only_s < before_s) and np.all(before_s <= after_s * (1 + 1e-12))
    fraction = PARAMS.nccl["inter_node"]["nic_rate_fraction"]
    far = np.maximum(moved.sent_nic, moved.received_nic) * op.token_bytes
    assert np.all(after_s >= far / (fraction * NIC))


@few
@given(seed=seeds, n_ranks=group_sizes, kind=kinds)
def test_more_copies_never_take_less_time(seed: int, n_ranks: int, kind: str) -> None:
    op = traffic(seed, n_ranks, kind, Dispatch)
    names = ("n_tokens", "sent_nvlink", "received_nvlink", "sent_nic", "received_nic")
    more = replace(op, **{name: 1.7 * getattr(op, name) for name in names})
    assert np.all(price(more) >= price(op) * (1 - 1e-12))


@few
@given(seed=seeds, n_ranks=group_sizes, kind=kinds)
def test_points_are_priced_each_by_itself(seed: int, n_ranks: int, kind: str) -> None:
    op = traffic(seed, n_ranks, kind, Dispatch, n_points=3)
    names = ("n_tokens", "sent_nvlink", "received_nvlink", "sent_nic", "received_nic")
    together = price(op)
    for point in range(3):
        alone = price(replace(op, **{name: getattr(op, name)[point : point + 1] for name in names}))
        np.testing.assert_allclose(together[point], alone[0], rtol=1e-12)
