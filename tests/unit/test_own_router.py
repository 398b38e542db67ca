"""The router of our own model: choice, capacity, balancing and losses against hand-worked cases and loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import ModelError, TraceError
from moesim.routing import read_trace

torch = pytest.importorskip("torch", reason="the calibrate extra is not installed")

from calibrate.routing import record as record_command  # noqa: E402
from calibrate.routing import train as train_command  # noqa: E402
from calibrate.routing.corpus import Corpus, Domain, find_corpus, read_text  # noqa: E402
from calibrate.routing.model import ModelConfig, MoeLayer, MoeModel, config_from_dict, fine_grained  # noqa: E402
from calibrate.routing.record import record, run  # noqa: E402
from calibrate.routing.router import (  # noqa: E402
    RouterConfig,
    assign,
    balance_loss,
    bias_step,
    capacity,
    router_scores,
    z_loss,
)
from calibrate.routing.training import (  # noqa: E402
    Recipe,
    evaluate,
    load_checkpoint,
    save_checkpoint,
    train,
)

TINY = ModelConfig(n_layers=2, hidden=16, n_heads=2, n_experts=4, top_k=2, expert_width=8)
QUICK = Recipe(steps=6, batch=4, context=16, warmup=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    def text(word: bytes) -> np.ndarray:
        return np.frombuffer(word * 200, dtype=np.uint8)

    return Corpus(
        (
            Domain("one", "made up", "CC0-1.0", text(b"abcdefgh"), text(b"abcdefgh")),
            Domain("two", "made up", "CC0-1.0", text(b"0123 "), text(b"0123 ")),
        )
    )


def scores_of(n_tokens: int, n_experts: int, seed: int = 0, skew: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_tokens, n_experts, generator=generator)
    return router_scores(logits + skew * torch.linspace(1, -1, n_experts), "softmax")


# Choice and capacity


def test_tokens_go_to_their_largest_scores_with_weights_that_add_up_to_one():
    scores = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.1, 0.4]])
    found = assign(scores, torch.zeros(3), 2, RouterConfig())
    assert found.ids.tolist() == [[1, 2], [0, 2]]
    assert found.ids_weight.flatten().tolist() == pytest.approx([2 / 3, 1 / 3, 5 / 9, 4 / 9])
    assert found.expert.tolist() == [0, 1, 2, 2]
    assert found.token.tolist() == [1, 0, 0, 1]


def test_top_1_keeps_the_score_as_weight():
    found = assign(torch.tensor([[0.7, 0.3]]), torch.zeros(2), 1, RouterConfig())
    assert found.weight.tolist() == pytest.approx([0.7])


def test_bias_moves_the_choice_and_not_the_weight():
    scores = torch.tensor([[0.5, 0.4, 0.1]])
    found = assign(scores, torch.tensor([0.0, 0.0, 1.0]), 1, RouterConfig(scoring="sigmoid"))
    assert found.ids.tolist() == [[2]]
    assert found.weight.tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("drop", ["position", "weight"])
@pytest.mark.parametrize("factor", [0.3, 0.75, 1.0, 1.4, 5.0])
def test_drops_are_those_of_a_loop_over_tokens(drop, factor):
    scores = scores_of(37, 5)
    found = assign(scores, torch.zeros(5), 2, RouterConfig(capacity_factor=factor, drop=drop))
    slots = math.ceil(factor * 37 * 2 / 5)
    expected = set()
    for expert in range(5):
        mine = []
        for token in range(37):
            best = sorted(range(5), key=lambda e: -float(scores[token, e]))[:2]
            if expert in best:
                weight = float(scores[token, expert]) / sum(float(scores[token, e]) for e in best)
                mine.append((token if drop == "position" else -weight, token))
        assert int(found.chosen[expert]) == len(mine)
        assert int(found.kept[expert]) == min(slots, len(mine))
        expected |= {(expert, token) for _, token in sorted(mine)[:slots]}
    assert set(zip(found.expert.tolist(), found.token.tolist(), strict=True)) == expected


def test_capacity_is_megatrons():
    assert capacity(100, 2, 8, 1.25) == 32  # ceil(31.25)
    assert capacity(1, 1, 64, 1.0) == 1


def test_expert_choice_gives_every_expert_exactly_its_capacity():
    scores = scores_of(64, 4, skew=3.0)
    found = assign(scores, torch.zeros(4), 2, RouterConfig(expert_choice=True, capacity_factor=0.5))
    assert found.kept.tolist() == [16] * 4
    for expert in range(4):
        mine = found.token[found.expert == expert]
        assert mine.unique().numel() == 16
        others = torch.ones(64, dtype=torch.bool)
        others[mine] = False
        assert scores[mine, expert].min() >= scores[others, expert].max()


def test_experts_equal_a_loop_over_tokens():
    torch.manual_seed(0)
    config = replace(TINY, n_shared=1, router=RouterConfig(capacity_factor=0.6))
    layer = MoeLayer(config)
    x = torch.randn(20, 16)
    y, chosen, _, _ = layer(x)
    expected = layer.shared(x)
    for token, expert, weight in zip(chosen.token, chosen.expert, chosen.weight, strict=True):
        row = x[token]
        inner = torch.nn.functional.silu(row @ layer.gate[expert]) * (row @ layer.up[expert])
        expected[token] = expected[token] + weight * (inner @ layer.down[expert])
    torch.testing.assert_close(y, expected)


# Losses and balancing


def test_balance_loss_by_hand():
    even = torch.full((4, 2), 0.5)
    assert float(balance_loss(even, torch.tensor([4, 4]))) == pytest.approx(1.0)
    collapsed = torch.tensor([[1.0, 0.0]] * 4)
    assert float(balance_loss(collapsed, torch.tensor([4, 0]))) == pytest.approx(2.0)
    # f = (3/4, 1/4), P = (0.6, 0.4): 2 x (0.45 + 0.1)
    mixed = torch.tensor([[0.6, 0.4]] * 4)
    assert float(balance_loss(mixed, torch.tensor([3, 1]))) == pytest.approx(1.1)
    # Sigmoid scores are shares of their sum: (0.9, 0.6) is (0.6, 0.4).
    assert float(balance_loss(1.5 * mixed, torch.tensor([3, 1]))) == pytest.approx(1.1)


def test_z_loss_by_hand():
    logits = torch.log(torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
    assert float(z_loss(logits)) == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_bias_steps_towards_the_mean():
    bias = bias_step(torch.tensor([0.0, 0.1, 0.0]), torch.tensor([9, 0, 3]), 0.01)
    assert bias.tolist() == pytest.approx([-0.01, 0.11, 0.01])
    assert bias_step(torch.zeros(2), torch.tensor([5, 5]), 0.01).tolist() == [0, 0]


def test_bias_balances_a_router_that_does_not_learn():
    scores = router_scores(torch.log(scores_of(400, 8, skew=1.5)), "sigmoid")
    bias = torch.zeros(8)
    router = RouterConfig(scoring="sigmoid", bias_rate=0.002)
    loads = []
    for _ in range(400):
        chosen = assign(scores, bias, 2, router).chosen
        loads.append(float(chosen.max() / chosen.float().mean()))
        bias = bias_step(bias, chosen, router.bias_rate)
    assert loads[0] > 1.8
    assert max(loads[-10:]) < 1.15


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(aux_weight=0.0),
        RouterConfig(aux_weight=0.0, scoring="sigmoid"),
        RouterConfig(aux_weight=0.0, capacity_factor=0.7, drop="weight"),
        RouterConfig(aux_weight=0.0, expert_choice=True),
        RouterConfig(aux_weight=0.0, jitter=0.1),
    ],
)
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_models_loss_reaches_the_router(router, top_k):
    torch.manual_seed(0)
    model = MoeModel(replace(TINY, top_k=top_k, router=router))
    model(torch.randint(0, 256, (2, 8)))[0].square().mean().backward()
    for block in model.blocks:
        assert block.ffn.router.grad.abs().max() > 0
        assert block.ffn.down.grad.abs().max() > 0


def test_balance_and_z_loss_reach_the_router_of_every_layer():
    for name in ("balance", "z"):
        torch.manual_seed(0)
        model = MoeModel(TINY)
        getattr(model(torch.randint(0, 256, (2, 8)))[1], name).backward()
        assert all(block.ffn.router.grad.abs().max() > 0 for block in model.blocks)


# Model


@pytest.mark.parametrize(
    "config", [TINY, replace(TINY, n_shared=1), replace(TINY, n_experts=0), fine_grained(TINY, 2)]
)
def test_parameters_are_counted_as_they_are(config):
    assert config.n_parameters == sum(p.numel() for p in MoeModel(config).parameters())
    idle = (config.n_experts - config.top_k) * 3 * 16 * config.expert_width * 2 if config.n_experts else 0
    assert config.n_active == config.n_parameters - idle


def test_finer_experts_have_the_same_active_parameters_but_the_routers():
    finer = fine_grained(TINY, 4)
    assert (finer.n_experts, finer.top_k, finer.expert_width) == (16, 8, 2)
    assert finer.n_active - TINY.n_active == 2 * 16 * (16 - 4)


def test_a_byte_does_not_see_later_ones():
    torch.manual_seed(0)
    model = MoeModel(TINY).eval()
    tokens = torch.randint(0, 256, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = 7
    torch.testing.assert_close(model(tokens)[0][:, :8], model(changed)[0][:, :8])


def test_configuration_survives_its_dictionary():
    config = replace(TINY, router=RouterConfig(capacity_factor=1.25, drop="weight"))
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: replace(TINY, top_k=5), "top_k: 5: lies in 1..4"),
        (lambda: replace(TINY, hidden=15), "hidden: 15: divides over 2 heads"),
        (lambda: replace(TINY, n_layers=0), "n_layers: 0: is at least 1"),
        (lambda: fine_grained(TINY, 3), "granularity: 3: divides expert_width 8"),
        (lambda: RouterConfig(capacity_factor=0.0), "router.capacity_factor: 0.0: is positive"),
        (lambda: RouterConfig(aux_weight=math.nan), "router.aux_weight: nan"),
        (lambda: RouterConfig(jitter=1.0), "router.jitter: 1.0: lies in 0..1"),
        (lambda: RouterConfig(drop="last"), "router.drop: 'last': is position or weight"),
        (lambda: RouterConfig(scoring="top"), "router.scoring: 'top': is softmax or sigmoid"),
        (lambda: replace(QUICK, steps=0), "steps: 0: is at least 1"),
        (lambda: replace(QUICK, learning_rate=0.0), "learning_rate: 0.0: is positive"),
        (lambda: replace(QUICK, dtype="fp8"), "dtype: 'fp8': is float32 or bfloat16"),
    ],
)
def test_bad_settings_are_refused(make, said):
    with pytest.raises(ModelError, match=said):
        make()


# Training


def test_training_on_repetitive_text_lowers_the_loss(corpus):
    steps = []
    trained = train(TINY, replace(QUICK, steps=80), corpus, after=lambda step, at: steps.append(step))
    assert steps[0].bits_per_byte > 7.5
    assert steps[-1].bits_per_byte < 3.0
    assert steps[0].chosen.sum(1).tolist() == [4 * 16 * 2] * 2
    found = evaluate(trained.model, corpus, context=16, n_sequences=8)
    assert found.bits_per_byte < 3.0
    assert set(found.by_domain) == {"one", "two"}


def test_same_seed_same_loss_and_another_seed_another(corpus):
    config = replace(TINY, router=RouterConfig(jitter=0.1, z_weight=0.001))

    def losses(seed):
        found = []
        train(config, replace(QUICK, seed=seed), corpus, after=lambda s, at: found.append(s.bits_per_byte))
        return found

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(corpus, tmp_path):
    config = replace(TINY, router=RouterConfig(bias_rate=0.01, scoring="sigmoid", jitter=0.1))
    whole = train(config, QUICK, corpus)
    half = train(config, QUICK, corpus, after=lambda step, at: at.done == 3)
    back = load_checkpoint(save_checkpoint(half, tmp_path / "half.safetensors"))
    assert back.done == 3
    resumed = train(config, QUICK, corpus, resume=back)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


def test_a_damaged_checkpoint_is_refused_in_one_line(corpus, tmp_path):
    file = save_checkpoint(train(TINY, QUICK, corpus), tmp_path / "a.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-50])
    with pytest.raises(ModelError, match="is damaged") as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "b.safetensors")


def test_evaluation_counts_drops(corpus):
    config = replace(TINY, router=RouterConfig(capacity_factor=0.5))
    found = evaluate(MoeModel(config), corpus, context=16, n_sequences=8, batch=4)
    assert found.dropped_fraction >= 0.5
    assert evaluate(MoeModel(TINY), corpus, context=16, n_sequences=8).dropped_fraction == 0


def test_too_little_text_is_refused(corpus):
    with pytest.raises(TraceError, match="text two: 1000: has more than 1000 bytes"):
        train(TINY, replace(QUICK, context=1000), corpus)


# Recording


def test_recording_gives_what_the_model_chose():
    rng = np.random.default_rng(0)
    text = [rng.integers(0, 256, 500, dtype=np.uint8) for _ in range(4)]
    corpus = Corpus(
        (
            Domain("one", "made up", "CC0-1.0", text[0], text[1]),
            Domain("two", "made up", "MIT", text[2], text[3]),
        )
    )
    torch.manual_seed(0)
    model = MoeModel(TINY)
    trace = record(model, corpus, n_sequences=6, context=16, name="tiny", batch=4)
    assert trace.expert_ids.shape == (96, 2, 2)
    assert trace.domains == ("one", "two")
    assert trace.sequence_domains.tolist() == [0, 1, 0, 1, 0, 1]
    assert "one: CC0-1.0; two: MIT" in trace.licence
    windows, _ = corpus.held_out(6, 16)
    for sequence, window in enumerate(windows):
        assert window.astype(np.uint8).tobytes() in text[2 * (sequence % 2) + 1].tobytes()
        mine = slice(*trace.sequence_offsets[sequence : sequence + 2])
        _, routed = model.eval()(torch.from_numpy(window[None]))
        for layer, chosen in enumerate(routed.assignments):
            assert np.array_equal(trace.expert_ids[mine, layer], chosen.ids.numpy())
            weights = chosen.ids_weight.detach().numpy()
            assert trace.expert_weights[mine, layer] == pytest.approx(weights, abs=1e-3)


@pytest.mark.parametrize(
    "config", [replace(TINY, n_experts=0), replace(TINY, router=RouterConfig(expert_choice=True))]
)
def test_what_has_no_token_choice_is_not_recorded(config, corpus):
    with pytest.raises(ModelError, match="tokens choose experts"):
        record(MoeModel(config), corpus, n_sequences=2, context=16, name="tiny")


# Text


def test_the_standard_library_is_text_that_every_machine_has():
    found = find_corpus(limit=100_000, only=["python"])
    (domain,) = found.domains
    assert domain.licence == "PSF-2.0"
    assert domain.train.size > 2 * domain.held_out.size > 0  # one document in ten, of the few that fit
    assert b"def " in domain.train.tobytes()


def test_own_text_by_file_and_folder(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02d}.txt").write_text(f"document {number} " * 40)
    one = tmp_path / "one.bin"
    one.write_bytes("".join(f"line {i}\n" for i in range(9000)).encode())
    found = read_text({"folder": tmp_path, "file": one})
    assert found.names == ("folder", "file")
    assert b"document 9 " in found.domains[0].held_out.tobytes()
    assert b"document 9 " not in found.domains[0].train.tobytes()
    windows, domains = found.held_out(5, 32)
    assert windows.shape == (6, 32)
    assert domains.tolist() == [0, 1, 0, 1, 0, 1]


def test_text_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TraceError, match=r"no such domain of text.*--text DOMAIN=PATH"):
        find_corpus(only=["latin"])
    with pytest.raises(TraceError, match=r"--text a: .*no such file"):
        read_text({"a": tmp_path / "absent"})
    (tmp_path / "short").write_text("too little")
    with pytest.raises(TraceError, match="needs ten documents"):
        read_text({"a": tmp_path / "short"})


# Command line


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_bytes("".join(f"line {i}\n" for i in range(9000)).encode())
    return file


def call(module, monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        run(module.main)
    return stop.value.code or 0, capsys.readouterr()


SIZES = [
    *("--layers", "1", "--hidden", "8", "--heads", "1", "--experts", "4", "--expert-width", "4"),
    *("--steps", "4", "--batch", "2", "--context", "16"),
]


def test_train_then_record_from_the_command_line(text, tmp_path, monkeypatch, capsys):
    checkpoint, trace = tmp_path / "own.safetensors", tmp_path / "trace.safetensors"
    options = ["-o", checkpoint, "--text", f"lines={text}"]
    code, said = call(
        train_command, monkeypatch, capsys, *options, *SIZES, "--granularity", 2, "--capacity-factor", 1
    )
    assert code == 0, said.err
    assert "held out: " in said.out
    assert load_checkpoint(checkpoint).model.config.n_experts == 8
    code, _ = call(train_command, monkeypatch, capsys, *options, "--resume")
    assert code == 0
    code, said = call(
        record_command,
        monkeypatch,
        capsys,
        checkpoint,
        "-o",
        trace,
        "--text",
        f"lines={text}",
        "--sequences",
        3,
    )
    assert "48 tokens x 1 layers x top-4" in said.out
    assert read_trace(trace).domains == ("lines",)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--top-k", "9"], "top_k: 9: lies in 1..4"),
        (["--drop", "first"], "router.drop: 'first': is position or weight"),
        (["--text", "nothing"], "--text: 'nothing': is DOMAIN=PATH"),
        (["--text", "a=absent"], "no such file or folder of text"),
        (["--domains", "latin"], "no such domain of text"),
        (["--resume"], "no such checkpoint"),
        (["-o", "own.pt"], "is a .safetensors file"),
    ],
)
def test_bad_options_are_refused_in_one_line_and_nothing_is_written(
    words, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code, found = call(train_command, monkeypatch, capsys, "-o", "own.safetensors", *SIZES, *words)
    assert code == 2
    assert said in found.err
    assert found.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
