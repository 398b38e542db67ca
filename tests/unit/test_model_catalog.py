"""Names, aliases, paths, and files that are no models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesim.errors import ModelError
from moesim.model import list_models, load_model

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def refused(name) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_aliases_in_any_case_give_the_same_model():
    assert load_model("DeepSeek-V3") is load_model("deepseek-ai/DeepSeek-R1")
    assert load_model("deepseek-r1").name == "deepseek-v3"
    for row in list_models():
        for alias in row.aliases:
            assert load_model(alias.upper()).name == row.name


def test_rows_hold_experts_of_moe_and_zero_for_dense():
    rows = {row.name: row for row in list_models()}
    deepseek = rows["deepseek-v3"]
    assert (deepseek.n_experts, deepseek.top_k, deepseek.n_layers) == (256, 8, 61)
    assert (rows["llama-3.1-8b"].n_experts, rows["llama-3.1-8b"].top_k) == (0, 0)
    assert rows["llama-3.1-8b"].active == rows["llama-3.1-8b"].total
    assert list(rows) == sorted(rows)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("deepseek-v33", "deepseek-v3"),
        ("mixtral8x7b", "mixtral-8x7b"),
        ("gptoss-120b", "gpt-oss-120b"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", "qwen3-235b-a22b"),
        ("someone/Mixtral-8x7B", "mixtral-8x7b"),
    ],
)
def test_unknown_name_suggests_the_nearest(typed, meant):
    message = refused(typed)
    assert typed in message
    assert meant in message.split("fix:")[1]


def test_a_name_near_to_nothing_lists_the_catalog():
    assert "olmoe-1b-7b" in refused("zzzz")


def test_missing_file_is_called_a_file():
    assert "no such model file" in refused("./nowhere.json")
    assert "no such model file" in refused("/nowhere/model.yaml")


def test_hugging_face_directory_and_file(tmp_path):
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    assert "no config.json" in refused(folder)
    (folder / "config.json").write_text(json.dumps(TINY))
    assert load_model(folder).name == "tiny-llama"
    assert load_model(str(folder / "config.json")).hidden == 64


def test_own_yaml_with_and_without_wrapping(tmp_path):
    bare = tmp_path / "bare.yaml"
    bare.write_text("\n".join(f"{k}: {v}" for k, v in TINY.items()))
    assert load_model(bare).name == "bare"
    wrapped = tmp_path / "wrapped.yml"
    config = "\n".join(f"  {k}: {v}" for k, v in TINY.items())
    head = "name: mine\nsource: my notes\npublished: {total: 1M, source: notes}\n"
    wrapped.write_text(f"{head}config:\n{config}\n")
    spec = load_model(wrapped)
    assert (spec.name, spec.source, spec.published.total) == ("mine", "my notes", "1M")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"", "empty"),
        ("a.json", b" \n ", "empty"),
        ("a.json", b'{"model_type": "llama",', "a.json:1:"),
        ("a.json", b"[1, 2]", "must hold an object"),
        ("a.json", b"\xff\xfe\x00", "not a text file"),
        ("a.json", b"[" * 200_000, "not valid JSON"),
        ("a.json", b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        ("a.json", b'{"model_type": "bert"}', "'bert'"),
        ("a.yaml", b"a: [1, 2", "a.yaml:"),
        ("a.yaml", b"- 1\n- 2\n", "must hold an object"),
        ("a.yaml", b"a: !!python/object:os.system x\n", "not valid YAML"),
        ("a.yaml", b"config: 3\n", "model_type is missing"),
        ("a.yaml", b"\x00", "not valid YAML"),
    ],
)
def test_damaged_file_is_refused_with_its_place(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(path)
    assert words in message
    assert str(path) in message


def test_damaged_published_block_names_the_key(tmp_path):
    path = tmp_path / "a.yaml"
    config = "\n".join(f"  {k}: {v}" for k, v in TINY.items())
    path.write_text(f"published: {{total: many, source: x}}\nconfig:\n{config}\n")
    assert "published.total" in refused(path)


def test_checkpoint_given_by_mistake(tmp_path):
    path = tmp_path / "weights.json"
    path.write_bytes(b" " * 10_000_001)
    assert "too large" in refused(path)


def test_impossible_path():
    assert "neither" in refused("a\x00b") or "unknown" in refused("a\x00b")
    refused("x" * 5000)
    refused("")


def test_documentation_lists_every_model_with_its_count():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    for row in list_models():
        line = next(line for line in page.splitlines() if line.startswith(f"| {row.name} |"))
        shown = {f"{row.total / 1e12:.3f}T", f"{row.total / 1e9:.2f}B", f"{row.total / 1e6:.0f}M"}
        assert shown & {cell.strip() for cell in line.split("|")}, line


def test_example_of_the_documentation_loads(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    path = tmp_path / "my-moe.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0])
    assert load_model(path).moe == load_model("qwen3-30b-a3b").moe
