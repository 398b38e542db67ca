"""`moesim trace` show, sample, fit and synth: what they print and write, and what they refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesim.cli import main
from moesim.routing import RoutingTrace, open_trace, read_trace, write_trace

Told = tuple[int, str, str]


@pytest.fixture
def moesim(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Told]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments: str) -> Told:
        monkeypatch.setattr(sys, "argv", ["moesim", "trace", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


@pytest.fixture
def trace(tmp_path: Path) -> RoutingTrace:
    rng = np.random.default_rng(0)
    keys = rng.gumbel(size=(3000, 4, 16)) - np.log(np.arange(1, 17))
    ids = np.argsort(-keys, axis=-1)[..., :2].astype(np.uint8)
    made = RoutingTrace(
        "toy", 16, 2, (1, 2, 3, 5), phase="decode", source="made up", licence="CC0", expert_ids=ids,
        sequence_domains=np.arange(50, dtype=np.uint8) % 2, domains=("code", "[prose]"),
        expert_weights=np.repeat(np.arange(3000) / 4096, 8).reshape(3000, 4, 2).astype(np.float16),
        sequence_offsets=np.arange(0, 3001, 60),
    )  # fmt: skip
    write_trace(made, tmp_path / "toy.safetensors")
    return made


@pytest.mark.usefixtures("trace")
class TestShow:
    def test_json_holds_every_part(self, moesim: Callable[..., Told]) -> None:
        code, out, _ = moesim("show", "toy.safetensors", "--json", "--ep", "2,4", "--redundant", "0")
        told = json.loads(out)
        assert code == 0
        assert [(row["ep"], row["placement"]) for row in told["balance"]] == [
            (ep, name) for ep in (2, 4) for name in ("contiguous", "permuted", "eplb")
        ]
        assert set(told["balancedness"]) == {"ep8", "ep16"}
        assert len(told["layers"][0]["load"]) == 16
        assert [one["layer"] for one in told["layers"]] == [1, 2, 3, 5]
        for key in (
            "locality",
            "layer_prediction",
            "drift",
            "domains",
            "known",
            "by_batch",
            "active_experts",
        ):
            assert told[key]
        assert len(told["known"]["models"]) > 20
        assert all(one["data"] and one["entry"] for one in told["known"]["models"])

    def test_tables(self, moesim: Callable[..., Told]) -> None:
        _, out, _ = moesim("show", "toy.safetensors", "--placement", "round-robin,balanced", "--ep", "4")
        for words in (
            "busiest expert over mean", "Share of experts with a token", "round-robin", "balanced", "Locality",
            "Next layer's experts", "Drift over", "Among known models", "> toy", "Most alike in skew",
            "Most skewed: layer", "(expert 0:", "Domains: knowing one tells", "[prose]",
        ):  # fmt: skip
            assert words in out

    def test_page(self, moesim: Callable[..., Told], tmp_path: Path) -> None:
        code, out, _ = moesim("show", "toy.safetensors", "--json", "--html", "page.html")
        assert code == 0
        assert json.loads(out)["report"] == "page.html"
        page = (tmp_path / "page.html").read_text()
        assert "Plotly" in page
        assert page.count('class="plot"') == 13
        assert "default-src 'none'" in page

    def test_a_placement_file(self, moesim: Callable[..., Told], tmp_path: Path) -> None:
        (tmp_path / "map.yaml").write_text(f"physical_to_logical_map: {[*range(16), 0, 1, 2, 3]}\n")
        code, out, _ = moesim("show", "toy.safetensors", "--json", "--ep", "4", "--placement", "map.yaml")
        assert code == 0
        (row,) = json.loads(out)["balance"]
        assert row["n_redundant"] == 4

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--ep", "8,x"), "--ep: '8,x': lists numbers of ranks"),
            (("--ep", "0"), "--ep: '0': lists numbers of ranks"),
            (("--ep", "5"), "16: expert slots divide over ep=5; fix: n_redundant=4"),
            (("--ep", "8", "--redundant", "3"), "fix: n_redundant=8"),
            (("--placement", "random"), "--placement: 'random': no such placement"),
            (("--placement", ","), "--placement"),
            (("--html", "none/page.html"), "--html: 'none/page.html': its folder does not exist"),
            (("--html", "."), "--html: '.': is a folder"),
            (("--model", "mixtral-8x7b"), "8 experts"),
            (("--redundant", "-1"), "redundant"),
        ],
    )
    def test_refusals(
        self, moesim: Callable[..., Told], tmp_path: Path, arguments: tuple[str, ...], said: str
    ) -> None:
        before = set(tmp_path.iterdir())
        code, out, err = moesim("show", "toy.safetensors", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
        assert set(tmp_path.iterdir()) == before


class TestSample:
    def test_decode_draws_tokens_of_the_trace(
        self, moesim: Callable[..., Told], trace: RoutingTrace, tmp_path: Path
    ) -> None:
        code, out, _ = moesim(
            "sample", "toy.safetensors", "--ranks", "4", "--tokens", "30", "-o", "b.safetensors"
        )
        assert code == 0
        assert "120 tokens in 120 sequences" in out
        drawn = read_trace(tmp_path / "b.safetensors")
        assert (drawn.phase, drawn.layer_ids, drawn.licence) == ("decode", trace.layer_ids, "CC0")
        known = {row.tobytes() for row in np.asarray(trace.expert_ids).reshape(3000, -1)}
        assert all(row.tobytes() in known for row in np.asarray(drawn.expert_ids).reshape(120, -1))
        at = np.round(np.asarray(drawn.expert_weights, dtype=float)[:, 0, 0] * 4096).astype(int)
        # half floats hold 11 bits: the neighbour of a token may stand for it
        sequences = at // 60
        assert drawn.domains == ("code", "[prose]")
        surely = np.round(at) % 60 > 1
        assert np.array_equal(np.asarray(drawn.sequence_domains)[surely], (sequences % 2)[surely])
        for rank in range(4):
            assert np.unique(sequences[30 * rank : 30 * rank + 30]).size >= 28

    def test_prefill_keeps_runs_of_requests(
        self, moesim: Callable[..., Told], trace: RoutingTrace, tmp_path: Path
    ) -> None:
        size = ("--ranks", "3", "--tokens", "150", "--phase", "prefill")
        moesim("sample", "toy.safetensors", *size, "-o", "b.safetensors")
        drawn = read_trace(tmp_path / "b.safetensors")
        assert np.array_equal(np.diff(drawn.offsets), [60, 60, 30] * 3)
        ids = np.asarray(trace.expert_ids)
        for begin, end in zip(drawn.offsets[:-1], drawn.offsets[1:], strict=True):
            run = np.asarray(drawn.expert_ids)[begin:end]
            assert any(np.array_equal(ids[s : s + len(run)], run) for s in range(0, 3000, 60))

    @pytest.mark.usefixtures("trace")
    def test_a_seed_decides(self, moesim: Callable[..., Told], tmp_path: Path) -> None:
        drawn = []
        for seed in ("1", "1", "2"):
            moesim(
                "sample", "toy.safetensors", "--ranks", "2", "--tokens", "9", "--seed", seed, "-o", "b.safetensors"
            )  # fmt: skip
            drawn.append(np.array(read_trace(tmp_path / "b.safetensors").expert_ids))
        assert np.array_equal(drawn[0], drawn[1])
        assert not np.array_equal(drawn[0], drawn[2])

    @pytest.mark.parametrize("phase", ["decode", "prefill"])
    def test_of_a_generator(self, moesim: Callable[..., Told], tmp_path: Path, phase: str) -> None:
        code, out, _ = moesim(
            "sample", "default", "--model", "mixtral-8x7b", "--ranks", "2", "--tokens", "600", "--phase", phase,
            "-o", "b.safetensors", "--json",
        )  # fmt: skip
        told = json.loads(out)
        assert code == 0
        assert told["n_sequences"] == (1200 if phase == "decode" else 4)
        assert read_trace(tmp_path / "b.safetensors").n_experts == 8

    @pytest.mark.usefixtures("trace")
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("toy.safetensors", "-o", "b.npz"), "'b.npz': a trace is a .safetensors file"),
            (("toy.safetensors", "-o", "none/b.safetensors"), "its folder does not exist"),
            (("toy.safetensors", "-o", "b.safetensors", "--phase", "mixed"), "--phase: 'mixed'"),
            (("default", "-o", "b.safetensors"), "fix: add --model NAME"),
            (("toy.safetensors", "-o", "b.safetensors", "--model", "mixtral-8x7b"), "8 experts"),
            (("toy.safetensors", "-o", "b.safetensors", "--tokens", "999999999"), "2**31"),
            (("none.safetensors", "-o", "b.safetensors"), "none.safetensors"),
        ],
    )
    def test_refusals(
        self, moesim: Callable[..., Told], tmp_path: Path, arguments: tuple[str, ...], said: str
    ) -> None:
        before = set(tmp_path.iterdir())
        tokens = () if "--tokens" in arguments else ("--tokens", "4")
        code, out, err = moesim("sample", *arguments, "--ranks", "2", *tokens)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
        assert set(tmp_path.iterdir()) == before


class TestFitAndSynth:
    @pytest.mark.usefixtures("trace")
    def test_there_and_back(self, moesim: Callable[..., Told], tmp_path: Path) -> None:
        code, out, _ = moesim("fit", "toy.safetensors", "-o", "g.yaml", "--json")
        assert code == 0
        quality = json.loads(out)["quality"]
        assert quality["gini"]["generated"] == pytest.approx(quality["gini"]["real"], abs=0.1)
        code, out, _ = moesim(
            "synth", "g.yaml", "--experts", "64", "--top-k", "4", "--layers", "6", "--sequences", "20", "--length",
            "100", "-o", "s.safetensors",
        )  # fmt: skip
        assert code == 0
        assert "2,000 tokens in 20 sequences, 6 layers x 64 experts, top 4" in out
        made = open_trace(tmp_path / "s.safetensors")
        assert isinstance(made, RoutingTrace)
        assert (made.n_layers, made.n_experts, made.top_k, made.phase) == (6, 64, 4, "decode")
        assert "real," in moesim("fit", "toy.safetensors", "-o", "g.yaml")[1]

    def test_counts_take_the_name_and_top_k_of_the_model(
        self, moesim: Callable[..., Told], tmp_path: Path
    ) -> None:
        counts = np.random.default_rng(0).integers(50, 99, (32, 8))
        (tmp_path / "counts.json").write_text(json.dumps({"logical_count": counts.tolist()}))
        code, out, _ = moesim("fit", "counts.json", "-o", "g.yaml", "--model", "mixtral-8x7b", "--json")
        assert (code, json.loads(out)["name"]) == (0, "fitted to mixtral-8x7b")
        told = json.loads(moesim("show", "counts.json", "--model", "mixtral-8x7b", "--json")[1])
        assert (told["name"], told["top_k"]) == ("mixtral-8x7b", 2)

    def test_by_name_for_a_model(self, moesim: Callable[..., Told], tmp_path: Path) -> None:
        code, out, _ = moesim(
            "synth", "zipf", "--model", "mixtral-8x7b", "--sequences", "2", "--length", "50", "-o", "s.safetensors",
            "--phase", "prefill", "--json",
        )  # fmt: skip
        told = json.loads(out)
        assert (code, told["n_experts"], told["n_tokens"], told["phase"]) == (0, 8, 100, "prefill")

    @pytest.mark.usefixtures("trace")
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("fit", "toy.safetensors", "-o", "g.json"), "a generator is a .yaml file"),
            (("fit", "toy.safetensors", "-o", "none/g.yaml"), "its folder does not exist"),
            (("fit", "default", "-o", "g.yaml"), "is a generator already"),
            (("synth", "toy.safetensors", "--model", "mixtral-8x7b"), "fix: moesim trace fit"),
            (("synth", "default"), "--model NAME, or all of"),
            (("synth", "default", "--experts", "8", "--top-k", "2"), "--model NAME, or all of"),
            (("synth", "default", "--model", "mixtral-8x7b", "--layers", "3"), "a model has its own sizes"),
            (("synth", "default", "--model", "llama-3.1-8b"), "has no router"),
            (("synth", "default", "--experts", "4", "--top-k", "8", "--layers", "2"), "top_k at most"),
            (("synth", "default", "--model", "mixtral-8x7b", "--length", "999999999"), "2**32"),
            (("synth", "defalt", "--model", "mixtral-8x7b"), "did you mean default"),
        ],
    )
    def test_refusals(
        self, moesim: Callable[..., Told], tmp_path: Path, arguments: tuple[str, ...], said: str
    ) -> None:
        before = set(tmp_path.iterdir())
        if arguments[0] == "synth":
            length = () if "--length" in arguments else ("--length", "9")
            arguments = (*arguments, "--sequences", "3", *length, "-o", "s.safetensors")
        code, out, err = moesim(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
        assert set(tmp_path.iterdir()) == before
