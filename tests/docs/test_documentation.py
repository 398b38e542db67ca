"""Every command and every Python snippet of the documentation runs, and prints what the page says."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from moesim.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "CONTRIBUTING.md"]
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


@dataclass(frozen=True)
class Block:
    """One fenced block, and the sample of its output if one follows."""

    page: str
    line: int
    language: str
    text: str
    sample: str | None

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        found = list(BLOCK.finditer(text))
        for match, after in zip(found, [*found, None][1:], strict=True):
            between = "" if after is None else text[match.end() : after.start()]
            told = after is not None and after[1] == "text" and not re.sub(r"<!--.*?-->", "", between).strip()
            yield Block(
                str(page.relative_to(REPOSITORY)),
                text[: match.start()].count("\n") + 1,
                match[1],
                match[2],
                after[2] if told and after is not None else None,
            )


def commands() -> Iterator[tuple[str, str, str | None]]:
    """Lines of shell blocks that call moesim: place, command, sample of what the last of them prints."""
    for block in blocks():
        if block.language not in ("bash", "console", "sh"):
            continue
        calls = [
            part.strip()
            for line in block.text.splitlines()
            for part in line.removeprefix("$ ").split("&&")
            if part.strip().startswith("moesim ")
        ]
        for number, call in enumerate(calls):
            yield block.name, call.partition("  #")[0], block.sample if number == len(calls) - 1 else None


COMMANDS = list(commands())
SNIPPETS = [block for block in blocks() if block.language == "python"]


TINY_MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of: the scenarios, SGLang's counts, a trace made from them."""
    (tmp_path / "scenarios").symlink_to(REPOSITORY / "scenarios")
    rng = np.random.default_rng(0)
    counts = np.sort(rng.lognormal(8, 1, (58, 256)).astype(int) + 1, axis=1)
    (tmp_path / "expert_distribution.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    np.save(
        tmp_path / "routed_experts.npy",
        np.argsort(rng.random((40, 32, 8)), axis=-1)[..., :2].astype(np.uint8),
    )
    (tmp_path / "prompts.txt").write_text("What is a router?\nWrite a poem.\n")
    (tmp_path / "tiny-mixtral").mkdir()
    (tmp_path / "tiny-mixtral" / "config.json").write_text(json.dumps(TINY_MIXTRAL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    call(
        "moesim trace import expert_distribution.json -o my-trace.safetensors --model deepseek-v3",
        monkeypatch,
    )
    return tmp_path


def call(command: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """Exit code, standard output and error of one command."""
    said, complained = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", shlex.split(command.partition(" > ")[0]))
    with redirect_stdout(said), monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", complained)
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue(), complained.getvalue()
    return 0, said.getvalue(), complained.getvalue()


def write_measurements(folder: Path) -> None:
    """Products that take what the catalog's profile says, give or take 3%."""
    import pandas as pd

    from calibrate.fit.gemm import predicted_s
    from moesim.hardware import load_gpu, load_profile

    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"op": "gemm", "device": "h200-sxm", "implementation": "vllm:torch.nn.functional.linear"}
        | {"software": "vllm 0.24.0", "dtype": "bfloat16", "m": 2 ** rng.integers(0, 13, 60)}
        | {"n": 2 ** rng.integers(9, 15, 60), "k": 2 ** rng.integers(9, 15, 60)}
    )
    values = load_profile("h200-sxm").family("gemm", "torch-cublas", "bfloat16").values()
    times = predicted_s(frame, values, load_gpu("h200-sxm"), "bfloat16")
    (folder / "measured").mkdir()
    frame.assign(latency_s=times * rng.normal(1, 0.03, 60)).to_csv(folder / "measured/gemm.csv", index=False)


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(("place", "command", "sample"), COMMANDS, ids=[f"{c[0]}: {c[1]}" for c in COMMANDS])
def test_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, command: str, sample: str | None
) -> None:
    if command.startswith("moesim calibrate"):
        write_measurements(folder)
    code, said, complained = call(command, monkeypatch)
    if sample is not None and sample.startswith("moesim: "):  # an example of a refusal
        assert code == 2
        assert complained == sample
        return
    assert code == 0, complained
    assert said
    if sample is not None:
        first = words(sample.splitlines()[0])
        assert first in words(said), f"{place} shows another title than {command} prints"


@pytest.mark.parametrize("block", SNIPPETS, ids=[block.name for block in SNIPPETS])
def test_snippet(folder: Path, block: Block) -> None:
    file = folder / "snippet.py"
    file.write_text(block.text)
    said = io.StringIO()
    with redirect_stdout(said):
        runpy.run_path(str(file))
    if block.sample is not None:
        assert said.getvalue() == block.sample


def test_there_is_something_to_check() -> None:
    assert {command.split()[1] for _, command, _ in COMMANDS} == {
        "plan",
        "run",
        "sweep",
        "explain",
        "network",
        "trace",
        "list",
        "schema",
        "calibrate",
    }
    assert len(SNIPPETS) >= 3
    assert any(command == "moesim plan" for _, command, _ in COMMANDS)


def test_first_command_installs_and_plans() -> None:
    shell = [
        block.text.strip() for block in blocks() if block.page == "README.md" and block.language == "bash"
    ]
    assert shell[0] == "python -m venv .venv && . .venv/bin/activate && pip install -q . && moesim plan"
    assert shell[1].endswith("&& python -m pytest -n 2 --cov")


def test_no_sample_is_missing() -> None:
    for page in PAGES:
        for match in re.finditer(r"<!-- output: .*? -->\n(.*)", page.read_text()):
            assert match[1].startswith("```text"), f"{page.name}: {match[0]}"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(REPOSITORY)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(BLOCK.sub("", page.read_text())):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_scenario_in_the_readme_is_the_file() -> None:
    (shown,) = [b.text for b in blocks() if b.page == "README.md" and b.language == "yaml"]
    assert shown == (REPOSITORY / "scenarios" / "deepseek-v3-h200-32.yaml").read_text()


def test_every_scenario_is_one() -> None:
    from moesim.scenario import read_scenario

    files = sorted((REPOSITORY / "scenarios").glob("*.yaml"))
    assert len(files) >= 10
    for file in files:
        assert read_scenario(file).model
