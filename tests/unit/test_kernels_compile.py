"""Grouped products compiled for Hopper: what nobody would notice until a GPU is slow, or refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calibrate.kernels.grouped_gemm import down_kernel, up_kernel
from calibrate.kernels.rows import combine_kernel, quantise_kernel
from calibrate.kernels.tiles import Product, Tile, candidates, choose_pair
from tests.kernel_tools import Compiled, DryRun, compile_sm90, faults

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "fp8_block": "fp8e4nv"}
SORTED = {
    "sorted_ptr": "*i32", "expert_ptr": "*i32", "used_ptr": "*i32",
    "n_pairs": "i32", "n_rows": "i32", "K": "i32", "N": "i32",
}  # fmt: skip


def compiled(product: Product, tile: Tile, dtype: str, *, even: bool = True) -> Compiled:
    """Compile a product as `up_swiglu` or `down_combine` launches it."""
    kind, fp8 = DTYPES[dtype], dtype == "fp8_block"
    constants: dict[str, Any] = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
        "SWAP": tile.transposed, "FP8": fp8,
    }  # fmt: skip
    if product == "up":
        joined, half = not (tile.transposed or fp8), tile.block_n // 2
        box = f"1,2,{half},{tile.block_k}" if joined else f"{half},{tile.block_k}"
        signature = {
            "x_ptr": f"*{kind}", "x_scale_ptr": "*fp32", "w_desc": f"tensordesc<{kind}[{box}]>",
            "w_scale_ptr": "*fp32", "h_desc": f"tensordesc<{kind}[{tile.block_m},{half}]>",
            "h_scale_ptr": "*fp32",
        }  # fmt: skip
        signature |= {"top_k": "i32"}
        constants |= {"JOINED": joined, "EVEN_K": even}
    else:
        signature = {
            "h_desc": f"tensordesc<{kind}[{tile.block_m},{tile.block_k}]>", "h_scale_ptr": "*fp32",
            "w_desc": f"tensordesc<{kind}[{tile.block_n},{tile.block_k}]>", "w_scale_ptr": "*fp32",
            "weight_ptr": "*fp32", "out_ptr": "*bf16" if fp8 else f"*{kind}",
        }  # fmt: skip
        constants |= {"EVEN_N": even}
    return compile_sm90(
        up_kernel if product == "up" else down_kernel,
        signature | SORTED, constants,
        num_warps=tile.num_warps, num_stages=tile.num_stages, divisible=("n_rows", "K", "N"),
    )  # fmt: skip


PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def documented(product: Product, tile: Tile, dtype: str, made: Compiled) -> str:
    """One row of the table in docs/kernels.md."""
    cells = (
        product, dtype, f"{tile.block_m} x {tile.block_n} x {tile.block_k}", tile.num_warps, tile.num_stages,
        made.registers, made.shared_bytes, tile.programs_per_sm, widest(made), made.instructions.total(),
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def widest(made: Compiled) -> str:
    """Matrix instruction with the most columns."""
    forms = [form.split(".") for form in made.forms if "GMMA" in form]
    name, shape = max(((form[0], form[1]) for form in forms), key=lambda one: int(one[1].split("x")[1]))
    return f"{name} {shape}"


SHIPPED = [
    pytest.param(
        product, tile, dtype, id=f"{product}-{dtype}-{tile.block_m}x{tile.block_n}x{tile.block_k}-{i}"
    )
    for dtype in DTYPES
    for product in ("up", "down")
    for height in (16, 32, 64, 128)
    for i, tile in enumerate(candidates(height, 4096, 4096, dtype, product=product))
    if i == 0 or dtype != "float16"  # float16 makes the same code as bfloat16
]


@pytest.mark.parametrize(("product", "tile", "dtype"), SHIPPED)
def test_a_shipped_tile_fits_and_uses_the_matrix_units(product: Product, tile: Tile, dtype: str) -> None:
    made = compiled(product, tile, dtype)
    assert faults(made, matrix=True) == []
    assert made.blocks_per_sm >= tile.programs_per_sm, "the persistent grid would not be resident"
    assert made.instructions["UTMALDG"] > 0, "weights do not come through the copy engine"
    width = int(widest(made).split("x")[1])
    assert width >= (tile.block_m if tile.transposed else 64)
    if dtype != "float16":
        assert documented(product, tile, dtype, made) in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_block"])
@pytest.mark.parametrize("product", ["up", "down"])
@pytest.mark.parametrize("height", [16, 128])
def test_remainders_cost_no_spill(product: Product, height: int, dtype: str) -> None:
    tile = candidates(height, 4096, 4096, dtype, product=product)[0]
    assert faults(compiled(product, tile, dtype, even=False), matrix=True) == []


@pytest.mark.parametrize("product", ["up", "down"])
@pytest.mark.parametrize("height", [16, 32, 64, 128])
def test_matrix_instructions_run_on_while_the_next_step_loads(product: Product, height: int) -> None:
    """ptxas serialises what it cannot prove safe: then every instruction has its own arrival and wait."""
    tile = candidates(height, 4096, 4096, "bfloat16", product=product)[0]
    made = compiled(product, tile, "bfloat16")
    assert made.instructions["WARPGROUP"] <= 4


def test_loads_are_sixteen_bytes_wide() -> None:
    tile = candidates(128, 4096, 4096, "bfloat16", product="up")[0]
    made = compiled("up", tile, "bfloat16")
    copies = [form for form in made.forms if form.startswith("LDGSTS")]
    assert copies
    assert all(".128" in form for form in copies)
    rows = compile_sm90(
        combine_kernel,
        {"rows_ptr": "*bf16", "pair_row_ptr": "*i32", "out_ptr": "*bf16", "H": "i32"},
        {"TOP_K": 8, "BLOCK": 1024},
        divisible=("H",),
    )
    assert faults(rows, matrix=False) == []
    assert any(form.startswith("LDG.E.128") for form in rows.forms)


def test_quantise_fits() -> None:
    made = compile_sm90(
        quantise_kernel,
        {"x_ptr": "*bf16", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "K": "i32"},
        {"GROUPS": 8},
        divisible=("K",),
    )
    assert faults(made, matrix=False) == []
    assert any(form.startswith("LDG.E.128") for form in made.forms)


# ---------------------------------------------------------------- what is launched


@pytest.fixture(scope="module")
def dry_run() -> Iterator[DryRun]:
    with DryRun() as one:
        yield one


def forward(n_tokens: int, dtype: str) -> None:
    """Call the whole feed-forward on tensors of the CPU: hidden 512, intermediate 256, top 2 of 8 experts."""
    import torch

    from calibrate.kernels.fused import moe_ffn

    kind = torch.float8_e4m3fn if dtype == "fp8_block" else torch.bfloat16
    scales = {}
    if dtype == "fp8_block":
        scales = {"w_up_scale": torch.ones(8, 4, 4), "w_down_scale": torch.ones(8, 4, 2)}
    moe_ffn(
        torch.zeros(n_tokens, 512, dtype=torch.bfloat16),
        torch.zeros(8, 512, 512).to(kind),
        torch.zeros(8, 512, 256).to(kind),
        torch.zeros(n_tokens, 2, dtype=torch.int32),
        torch.ones(n_tokens, 2),
        n_experts=8,
        **scales,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_block"])
@pytest.mark.parametrize("n_tokens", [3, 200, 2000])
def test_calls_launch_what_was_checked_above(dry_run: DryRun, n_tokens: int, dtype: str) -> None:
    launches = {launch.kernel: launch for launch in dry_run(forward, n_tokens, dtype)}
    assert ("quantise_kernel" in launches) == (dtype == "fp8_block")
    assert "combine_kernel" in launches
    up, down = choose_pair(n_tokens * 2 / 8, 512, 256, dtype, 1)
    for product, tile in (("up", up), ("down", down)):
        launch, made = launches[f"{product}_kernel"], compiled(product, tile, dtype)
        assert launch.shared_bytes == made.shared_bytes
        assert 32 * launch.num_warps == made.n_threads
        assert launch.descriptors == made.descriptors
        assert 1 <= launch.grid[0] <= 2 * max(3, tile.programs_per_sm)


# ---------------------------------------------------------------- the check itself


def test_a_hopeless_tile_compiles_and_is_caught() -> None:
    made = compiled("down", Tile(256, 256, 128, 8, 8, 4), "bfloat16")
    found = faults(made, matrix=True)
    assert made.shared_bytes > 232_448
    assert made.blocks_per_sm == 0
    assert any("bytes of shared memory, 232448 at most" in one for one in found)
    assert any("registers spill" in one for one in found)


def test_a_tile_that_only_spills_is_caught() -> None:
    made = compiled("down", Tile(128, 128, 128, 8, 4, 3), "fp8_block")
    assert made.shared_bytes < 232_448
    found = faults(made, matrix=True)
    assert any("registers spill" in one for one in found)
    assert any("bytes of stack" in one for one in found)


def test_the_slow_matrix_path_is_caught() -> None:
    slow = Compiled(64, 1024, 0, 0, 128, Counter(HMMA=16), frozenset({"HMMA.16816.F32.BF16"}), {})
    none = Compiled(64, 1024, 0, 0, 128, Counter(FFMA=16), frozenset({"FFMA"}), {})
    assert faults(slow, matrix=True) == ["16 warp matrix instructions, 0 of the warpgroup"]
    assert faults(none, matrix=True) == ["0 warp matrix instructions, 0 of the warpgroup"]
    assert faults(none, matrix=False) == []


def test_a_signature_that_is_not_the_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="rows_ptr"):
        compile_sm90(combine_kernel, {"rows_ptr": "*bf16"}, {"TOP_K": 8, "BLOCK": 1024})
