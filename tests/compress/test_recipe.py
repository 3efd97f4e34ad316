"""Recipes: what they say, what they may not say, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.compress.recipe import METHODS, SHIPPED, find_recipe, method_of, needs_text, parse_recipe
from gossamer.config.compression import GPTQ, Recover, SparseGPT
from gossamer.errors import ConfigError

WHOLE = """
name = "all"
[data]
text = ["a.txt", "b.txt.xz"]
context = 128
[[step]]
prune = "sparsegpt"
pattern = "2:4"
[[step]]
train = "recover"
steps = 20
lr = 1
[[step]]
quantize = "gptq"
overrides = { "layers.0.*" = "int8" }
"""


def test_a_recipe_is_its_steps_in_order_with_their_data() -> None:
    recipe = parse_recipe(WHOLE, base=Path("/books"))
    assert recipe.name == "all"
    assert recipe.steps == (
        SparseGPT(pattern="2:4"),
        Recover(steps=20, lr=1),
        GPTQ(overrides=(("layers.0.*", "int8"),)),
    )
    assert recipe.data.text == (Path("/books/a.txt"), Path("/books/b.txt.xz"))
    assert recipe.data.context == 128
    assert needs_text(recipe)
    assert [method_of(step) for step in recipe.steps] == [
        ("prune", "sparsegpt"),
        ("train", "recover"),
        ("quantize", "gptq"),
    ]


def test_what_may_be_resumed_depends_on_steps_and_data_alone() -> None:
    key = parse_recipe(WHOLE).key
    assert parse_recipe(WHOLE.replace('"all"', '"another name"')).key == key
    assert parse_recipe(WHOLE.replace("steps = 20", "steps = 21")).key != key
    assert parse_recipe(WHOLE.replace("context = 128", "context = 64")).key != key


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_read_and_say_what_they_do(path: Path) -> None:
    recipe = find_recipe(path.stem)
    assert recipe.steps
    assert "description" in path.read_text()
    assert not recipe.data.text  # whoever runs it names the text


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("", "no steps"),
        ("step = 3", r"\[\[step\]\]"),
        ("[[step]]\nquantize = 'gptqq'", "gptqq.*choose rtn, gptq"),
        ("[[step]]\nformat = 'int8'", "nothing of what to do"),
        ("[[step]]\nquantize = 'rtn'\nprune = 'wanda'", "prune and quantize"),
        ("[[step]]\nquantize = 'rtn'\nformt = 'int8'", "unknown key 'formt'; did you mean 'format'"),
        ("[[step]]\nquantize = 'rtn'\nformat = 'int5'", "int5"),
        ("[[step]]\nquantize = 'rtn'\nformat = 'nf4'", "made at load"),
        ("[[step]]\nquantize = 'gptq'\ndamping = 'much'", "damping is 'much'; a number is right"),
        ("[[step]]\nquantize = 'gptq'\ndamping = 7", "damping is 7.*1e-06 to 1"),
        ("[[step]]\nprune = 'wanda'\npattern = '4:2'", "4:2.*n:m"),
        ("[[step]]\nprune = 'wanda'\nsparsity = 0.7\npattern = '2:4'", "agree"),
        ("[[step]]\nprune = 'wanda'\nskip = ['head', 1]", "prune.skip has 1; patterns in quotes"),
        ("[[step]]\nprune = 'structured'", "above 0"),
        ("[[step]]\ntrain = 'recover'\nbatch = true", "batch is True; a whole number"),
        ("[[step]]\nquantize = 'mixed_bits'", "exactly one"),
        ("[data]\ncontxt = 3\n[[step]]\nquantize = 'rtn'", "contxt.*did you mean 'context'"),
        ("[data]\ncontext = 1\n[[step]]\nquantize = 'rtn'", "data.context"),
        ("[data]\ntext = 3\n[[step]]\nquantize = 'rtn'", "list of file names"),
        ("stepp = 1", "unknown key 'stepp'"),
        ("[data]\ntext = ['a', \"b\\u0000\"]\n[[step]]\nquantize = 'rtn'", "list of file names"),
        ("[[step]", "is not TOML"),
        (f"step = 1{'0' * 5000}", "is not TOML"),
        (f"name = 0x{'f' * 5000}", "is not TOML"),
        (f"step = {'[' * 9000}", "nested too deep"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(toml: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_recipe(toml)


@pytest.mark.parametrize(
    ("verbs", "says"),
    [
        (["quantize = 'rtn'", "prune = 'wanda'"], "quantize last"),
        (["quantize = 'rtn'", "train = 'recover'"], "quantize last"),
        (["quantize = 'rtn'", "quantize = 'gptq'"], "quantize last"),
        (["quantize = 'rtn'", "quantize = 'kv_calibration'"], "quantize last"),
        (["prune = 'wanda'", "prune = 'structured'\nffn = 0.2"], "prune structure first"),
        (["prune = 'wanda'", "train = 'distil'\nstudent = 'c.json'"], "would be lost"),
    ],
)
def test_impossible_orders_are_refused(verbs: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_recipe("".join(f"[[step]]\n{verb}\n" for verb in verbs))


def test_a_recipe_that_is_nowhere_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean int4-gptq"):
        find_recipe("int4-gtpq")
    with pytest.raises(ConfigError, match="neither a file nor one of"):
        find_recipe(str(tmp_path / "absent.toml"))
    (tmp_path / "own.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read"):
        find_recipe(str(tmp_path / "own.toml"))


def test_every_method_has_a_config_with_defaults_that_hold() -> None:
    for methods in METHODS.values():
        for method, kind in methods.items():
            if method not in ("structured", "mixed_bits"):
                kind()


@pytest.mark.parametrize(
    "step",
    [
        'train = "distil"\nteacher = 1',
        'train = "distil"\nstudent = []',
        'train = "distil"\nteacher = ""',
        'quantize = "mixed_bits"\naverage_bits = 5\ncandidates = [1, "int8"]',
    ],
)
def test_names_that_are_no_text_are_refused(step: str) -> None:
    with pytest.raises(ConfigError, match="in quotes is right"):
        parse_recipe(f"[[step]]\n{step}\n")
