"""Ways to check a Triton kernel where there is no GPU: run it in the interpreter, and compile it for Hopper.

Triton decides at import whether kernels are interpreted, for the whole process. So the interpreter lives in a
process of its own (`Interpreter`), and nothing here sets its variable for the tests' process, which compiles.
The interpreter multiplies the raw bits of bfloat16: kernels are run there in float16. A third process (`DryRun`)
follows real calls as far as the launch: what is compiled there is what a GPU would get.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

__all__ = [
    "MAX_SHARED_BYTES",
    "Compiled",
    "DryRun",
    "Interpreter",
    "Launch",
    "compile_sm90",
    "faults",
]

MAX_SHARED_BYTES = 232_448
"""Most that one block may have on sm_90 (CUDA C++ Programming Guide, table of compute capabilities: 227 KB)."""
SM_SHARED_BYTES = 233_472
"""All of an SM's (228 KB, same table); each block takes 1 KB beside its own."""
SM_REGISTERS = 65_536
SM_THREADS = 2048


# ---------------------------------------------------------------- processes


class _Process:
    """A process made ready by `become`; use as a module's fixture, inside ``with``.

    ``process(function, *arguments)`` calls a module-level function there and returns what it returns, or raises
    what it raises. The process starts at the first call.
    """

    def __init__(self, become: Callable[[], None]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=become)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._pool.submit(function, *arguments).result(timeout=300)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(cancel_futures=True)


class Interpreter(_Process):
    """A process in which kernels are interpreted."""

    def __init__(self) -> None:
        super().__init__(_become_interpreter)


def _become_interpreter() -> None:
    """Make kernels of this process run as NumPy; before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"


@dataclass(frozen=True)
class Launch:
    """One launch that a dry run saw."""

    kernel: str
    grid: tuple[int, ...]
    shared_bytes: int
    num_warps: int
    descriptors: dict[str, str]
    """Type of each tensor descriptor: ``tensordesc<bf16[64,64]>``."""


class DryRun(_Process):
    """A process in which launches on CPU tensors are compiled for an H200, noted, and not started.

    ``process(function, *arguments)`` returns the list of `Launch` that the call made.
    """

    def __init__(self) -> None:
        super().__init__(_become_dry)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Launch]:
        launches: list[Launch] = super().__call__(_noted, function, *arguments)
        return launches


_LAUNCHES: list[Launch] = []


def _noted(function: Callable[..., Any], *arguments: Any) -> list[Launch]:
    """Run in the process of a `DryRun`."""
    _LAUNCHES.clear()
    function(*arguments)
    return list(_LAUNCHES)


class _StubDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _become_dry() -> None:
    """Have every launch of this process compile and stop there."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_StubDriver())
    real_run = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = real_run(self, *arguments, grid=grid, warmup=True, **options)
        types = {name: str(kind).replace(" ", "") for name, kind in made.src.signature.items()}
        boxes = {name: kind for name, kind in types.items() if kind.startswith("tensordesc")}
        size = (made.metadata.shared, made.metadata.num_warps)
        _LAUNCHES.append(Launch(self.fn.__name__, tuple(grid), *size, boxes))
        return made

    JITFunction.run = run


# ---------------------------------------------------------------- compiler


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a kernel for sm_90."""

    registers: int
    """Of a thread."""
    shared_bytes: int
    """Dynamic shared memory of a block."""
    stack_bytes: int
    local_bytes: int
    n_threads: int
    """Threads of a block."""
    instructions: Counter[str]
    """How often each opcode stands in the machine code, without its modifiers."""
    forms: frozenset[str]
    """Opcodes with their modifiers: ``HGMMA.64x256x16.F32.BF16``."""
    descriptors: dict[str, str]
    """Type of each argument that is a tensor descriptor."""

    @property
    def n_matrix(self) -> int:
        """Warpgroup matrix instructions: HGMMA (16 bits), QGMMA (fp8), IGMMA (int8)."""
        return sum(self.instructions[name] for name in ("HGMMA", "IGMMA", "QGMMA"))

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that an SM holds at once."""
        registers = -(-self.registers // 8) * 8 * self.n_threads
        return min(
            SM_SHARED_BYTES // (self.shared_bytes + 1024),
            SM_REGISTERS // registers,
            SM_THREADS // self.n_threads,
        )


def compile_sm90(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: tuple[str, ...] = (),
) -> Compiled:
    """Compile a ``@triton.jit`` function for an H100 or H200; needs no GPU.

    Parameters
    ----------
    kernel
        The function.
    signature
        Triton type of each argument that is no constexpr: ``*bf16``, ``i32``, ``fp32``,
        ``tensordesc<bf16[64,64]>``. Pointers count as aligned to 16 bytes, as PyTorch's are.
    constants
        Value of each constexpr.
    num_warps, num_stages
        Launch options.
    divisible
        Integer arguments that are multiples of 16, which the launcher sees in their values.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    if set(types) != set(signature) | set(constants):
        raise ValueError(f"arguments of the kernel are {kernel.arg_names}")
    aligned = {i for i, (name, kind) in enumerate(types.items()) if kind.startswith("*") or name in divisible}
    source = ASTSource(
        kernel, types, constexprs=dict(constants), attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    usage, code = _disassemble(made.asm["cubin"])
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    forms = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, flags=re.MULTILINE)
    return Compiled(
        registers=found["REG"],
        shared_bytes=made.metadata.shared,
        stack_bytes=found["STACK"],
        local_bytes=found["LOCAL"],
        n_threads=32 * num_warps,
        instructions=Counter(form.split(".")[0] for form in forms),
        forms=frozenset(forms),
        descriptors={name: kind for name, kind in types.items() if kind.startswith("tensordesc")},
    )


def faults(compiled: Compiled, *, matrix: bool) -> list[str]:
    """Why a kernel must not ship; nothing of this fails the compiler.

    `matrix`: it is a product, whose work belongs in warpgroup matrix instructions.
    """
    found = []
    if compiled.shared_bytes > MAX_SHARED_BYTES:
        found.append(f"{compiled.shared_bytes} bytes of shared memory, {MAX_SHARED_BYTES} at most")
    if compiled.stack_bytes or compiled.local_bytes:
        found.append(f"{compiled.stack_bytes} bytes of stack, {compiled.local_bytes} of local memory")
    spills = compiled.instructions["LDL"] + compiled.instructions["STL"]
    if spills:
        found.append(f"{spills} local loads and stores: registers spill")
    if compiled.blocks_per_sm < 1:
        found.append("no SM can hold one block")
    slow = sum(compiled.instructions[name] for name in ("HMMA", "IMMA", "QMMA"))
    if matrix and (slow or not compiled.n_matrix):
        found.append(f"{slow} warp matrix instructions, {compiled.n_matrix} of the warpgroup")
    return found


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        commands = (["cuobjdump", "-res-usage", str(file)], ["nvdisasm", "-c", str(file)])
        usage, code = (
            subprocess.run([_tools() / name, *rest], capture_output=True, text=True, check=True).stdout
            for name, *rest in commands
        )
    return usage, code


@cache
def _tools() -> Path:
    """Folder of the CUDA tools that Triton carries."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
