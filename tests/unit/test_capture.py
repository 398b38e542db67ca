"""Routing captured from randomly initialised transformers models is what their routers chose."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import transformers

from calibrate.routing.capture import capture_routing
from calibrate.routing.routers import find_routers
from moesim.cli import main
from moesim.errors import TraceError
from moesim.routing import read_trace

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "moe_intermediate_size": 16, "head_dim": 8,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "gpt_oss": {
        "num_local_experts": 8, "num_experts_per_tok": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
LOGITS = [family for family in FAMILIES if family != "deepseek_v3"]
"""Families that hand their router logits out, and choose by these alone."""


def model_of(family, seed=0):
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # spread out, so that experts are chosen clearly
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompts():
    """Two rows of 7 tokens, the first padded by 3 on the left."""
    ids = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def sets(ids):
    """Experts of each token, their order left out."""
    return np.sort(np.asarray(ids, np.int64), axis=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_generating_records_what_one_pass_over_all_tokens_chooses(tmp_path, family):
    model = model_of(family)
    ids, mask = prompts()
    with torch.no_grad(), capture_routing(model, tmp_path / "g.safetensors") as capture:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    trace = read_trace(tmp_path / "g.safetensors")
    assert trace.offsets.tolist() == [0, 4 + 5, 4 + 5 + 7 + 5]  # the last token is not fed to the model
    assert (capture.n_tokens, capture.n_passes) == (
        {"prefill": 11, "decode": 10},
        {"prefill": 1, "decode": 5},
    )
    assert trace.phase == "mixed"
    whole_mask = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], dim=1)
    with torch.no_grad(), capture_routing(model, tmp_path / "p.safetensors"):
        model(out[:, :12], attention_mask=whole_mask, position_ids=(whole_mask.cumsum(1) - 1).clamp(min=0))
    whole = read_trace(tmp_path / "p.safetensors")
    assert whole.phase == "prefill"
    assert np.array_equal(sets(trace.expert_ids), sets(whole.expert_ids))
    assert np.asarray(trace.expert_weights, np.float32) == pytest.approx(
        np.asarray(whole.expert_weights, np.float32), abs=5e-3
    )


@pytest.mark.parametrize("family", LOGITS)
def test_prefill_equals_the_logits_that_transformers_returns(tmp_path, family):
    model = model_of(family)
    ids, _ = prompts()
    with torch.no_grad(), capture_routing(model, tmp_path / "t.safetensors"):
        told = model(ids, output_router_logits=True)
    trace = read_trace(tmp_path / "t.safetensors")
    logits = torch.stack([one.reshape(-1, one.shape[-1]) for one in told.router_logits], dim=1)
    expected = logits.topk(trace.top_k, dim=-1).indices.numpy()
    assert trace.layer_ids == (0, 1, 2)
    assert np.array_equal(sets(trace.expert_ids), sets(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_weights_equal_the_routers_own(tmp_path, family):
    model = model_of(family)
    ids, mask = prompts()
    seen = {}
    for router in find_routers(model):
        router.module.register_forward_hook(lambda m, a, o, layer=router.layer: seen.setdefault(layer, o))
    with torch.no_grad(), capture_routing(model, tmp_path / "t.safetensors"):
        model(ids, attention_mask=mask)
    trace = read_trace(tmp_path / "t.safetensors")
    real = mask.reshape(-1).bool()
    assert trace.layer_ids == tuple(sorted(seen))
    for number, layer in enumerate(trace.layer_ids):
        if not isinstance(seen[layer], tuple):
            pytest.skip("this release's router returns logits, and its block chooses")
        _, weights, chosen = seen[layer]
        assert np.array_equal(trace.expert_ids[:, number], chosen[real].numpy())
        assert np.array_equal(trace.expert_weights[:, number], weights[real].numpy().astype(np.float16))


def test_dense_first_layer_is_not_in_the_trace(tmp_path):
    assert [router.layer for router in find_routers(model_of("deepseek_v3"))] == [1, 2]


@pytest.mark.parametrize(("phase", "n_tokens"), [("prefill", 11), ("decode", 10)])
def test_one_phase_alone(tmp_path, phase, n_tokens):
    model = model_of("mixtral")
    ids, mask = prompts()
    with torch.no_grad(), capture_routing(model, tmp_path / "t.safetensors", phases=(phase,)):
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    trace = read_trace(tmp_path / "t.safetensors")
    assert (trace.phase, trace.n_tokens) == (phase, n_tokens)
    assert len(trace.offsets) == 3


def test_a_prompt_of_one_token_is_prefill(tmp_path):
    model = model_of("mixtral")
    with torch.no_grad(), capture_routing(model, tmp_path / "t.safetensors") as capture:
        model.generate(torch.tensor([[5]]), max_new_tokens=3, do_sample=False)
    assert capture.n_tokens == {"prefill": 1, "decode": 2}


def test_a_row_ends_with_its_end_token(tmp_path):
    model = model_of("mixtral")
    ids, mask = prompts()
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 7:].tolist()
    end = plain[0][2]
    fed = [
        min([*row, end].index(end), 5) for row in plain
    ]  # tokens before the end, the last one not being fed
    assert fed[0] < fed[1]
    model.generation_config.eos_token_id = end
    with torch.no_grad(), capture_routing(model, tmp_path / "t.safetensors"):
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert read_trace(tmp_path / "t.safetensors").offsets.tolist() == [0, 4 + fed[0], 4 + fed[0] + 7 + fed[1]]


def test_batches_follow_each_other_and_hooks_go(tmp_path):
    model = model_of("olmoe")
    ids, _ = prompts()
    with torch.no_grad(), capture_routing(model, tmp_path / "t.safetensors", name="toy"):
        for _ in range(3):
            model.generate(ids, max_new_tokens=2, do_sample=False)
    model(ids)
    trace = read_trace(tmp_path / "t.safetensors")
    assert trace.offsets.tolist() == [8 * n for n in range(7)]
    assert trace.model == "toy"
    assert not model._forward_hooks
    for router in find_routers(model):
        assert not router.module._forward_hooks
        assert not router.experts._forward_pre_hooks


def test_nothing_is_written_when_the_body_fails(tmp_path):
    model = model_of("mixtral")
    with pytest.raises(ZeroDivisionError), capture_routing(model, tmp_path / "t.safetensors"):
        model(prompts()[0])
        raise ZeroDivisionError
    with (
        pytest.raises(TraceError, match="ran at least one pass"),
        capture_routing(model, tmp_path / "t.safetensors"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    assert not model._forward_hooks


class OldBlock(torch.nn.Module):
    """A block as transformers 4 and models with their own code have them."""

    def __init__(self, gate):
        super().__init__()
        self.gate, self.top_k, self.num_experts = gate, 2, 8
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(8))

    def forward(self, hidden):
        self.gate(hidden.reshape(-1, 4))
        return hidden


class IdsFirstGate(torch.nn.Linear):
    def forward(self, hidden):
        weights, ids = super().forward(hidden).sigmoid().topk(2)
        return ids, weights


class ScoresRouter(torch.nn.Linear):
    def forward(self, hidden):
        best, ids = super().forward(hidden).topk(2)
        return torch.zeros(len(ids), 8).scatter_(1, ids, best.softmax(-1)), ids


class ChosenByTheBlock(OldBlock):
    """A block that gives its experts the least likely two, which no one could tell from the logits."""

    def __init__(self, gate):
        super().__init__(gate)
        self.experts = GivenIds()

    def forward(self, hidden):
        scores, ids = (-self.gate(hidden.reshape(-1, 4))).topk(2)
        return self.experts(hidden, ids, top_k_weights=scores)


class GivenIds(torch.nn.Module):
    def forward(self, hidden, ids, top_k_weights):
        return hidden


def test_ids_that_a_block_gives_its_experts(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block = torch.nn.Embedding(20, 4), ChosenByTheBlock(torch.nn.Linear(4, 8))

        def forward(self, input_ids):
            return self.block(self.embed(input_ids))

    torch.manual_seed(0)
    model, ids = Model(), torch.arange(6)[None]
    with torch.no_grad(), capture_routing(model, tmp_path / "t.safetensors"):
        model(ids)
        expected = (-model.block.gate(model.embed(ids)[0])).topk(2)
    trace = read_trace(tmp_path / "t.safetensors")
    assert np.array_equal(trace.expert_ids[:, 0], expected.indices.numpy())
    assert np.array_equal(trace.expert_weights[:, 0], expected.values.numpy().astype(np.float16))


@pytest.mark.parametrize("gate", [torch.nn.Linear, IdsFirstGate, ScoresRouter])
def test_older_layouts(tmp_path, gate):
    torch.manual_seed(0)

    class Old(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(20, 4)
            self.layers = torch.nn.ModuleList(OldBlock(gate(4, 8)) for _ in range(2))

        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    model, ids = Old(), torch.arange(6)[None]
    with torch.no_grad(), capture_routing(model, tmp_path / "t.safetensors"):
        model(ids)
        hidden = model.embed(ids)[0]
        logits = [torch.nn.functional.linear(hidden, b.gate.weight, b.gate.bias) for b in model.layers]
    trace = read_trace(tmp_path / "t.safetensors")
    assert np.array_equal(trace.expert_ids, torch.stack([one.topk(2).indices for one in logits], 1).numpy())
    best = torch.stack([one.topk(2).values for one in logits], 1)
    expected = best.sigmoid() if gate is IdsFirstGate else best.softmax(-1)
    assert np.asarray(trace.expert_weights, np.float32) == pytest.approx(expected.numpy(), abs=1e-3)


# ---- the command


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    config = transformers.AutoConfig.for_model("qwen3_moe", **SMALL, **FAMILIES["qwen3_moe"])
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    (tmp_path / "prompts.txt").write_text("Hello.\n\nA second, longer prompt.\n")
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["moesim", "trace", "capture", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


RUN = ("config.json", "--prompts", "prompts.txt", "-o", "t.safetensors", "--random-weights")


def test_command_captures_random_weights(command, tmp_path):
    code, out, err = command(*RUN, "--max-new-tokens", "3", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["n_experts"], told["top_k"], told["n_sequences"], told["weights"]) == (8, 3, 2, True)
    assert told["n_tokens"] == 6 + 24 + 2 * 2
    assert any("weights are random (seed 0)" in note for note in told["notes"])
    again = tmp_path / "again.safetensors"
    command(*RUN[:-3], "-o", str(again), "--random-weights", "--max-new-tokens", "3")
    assert again.read_bytes() == (tmp_path / "t.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("./nowhere", *RUN[1:]), "is not a causal language model"),
        (("config.json", "--prompts", "none.txt", *RUN[3:]), "--prompts: 'none.txt': there is no such file"),
        ((*RUN[:4], "absent/t.safetensors", RUN[5]), "its folder does not exist"),
        ((*RUN, "--phase", "train"), "--phase: 'train': is no phase"),
    ],
)
def test_command_refuses_in_one_line(command, tmp_path, arguments, said):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "t.safetensors").exists()


def test_command_refuses_a_dense_model(command, tmp_path):
    config = transformers.AutoConfig.for_model("llama", **{k: v for k, v in SMALL.items() if "moe" not in k})
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    code, _, err = command(*RUN)
    assert code == 2
    assert "has no router beside experts" in err


@pytest.mark.parametrize("absent", ["torch", "transformers"])
def test_command_without_the_extra_says_which(command, monkeypatch, absent):
    for name in [one for one in sys.modules if one.startswith("calibrate.routing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    code, _, err = command(*RUN)
    assert code == 2
    assert "pip install 'moesim[capture]'" in err
