"""A run is told by a file and by overrides; what cannot be meant is refused where it was said."""

import json
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from lumen import config as config_module
from lumen.config import RunConfig, list_recipes, load_config, read_recipe, schema_json, write_toml
from lumen.errors import ConfigError

TOML = """
[model]
path = "base"
[lora]
rank = 8
[data]
train = ["a.jsonl", "/abs/b.jsonl"]
"""


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    return path


def refusal(source: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(source, overrides)
    return str(refused.value)


def test_overrides_win_over_the_file_and_the_file_over_defaults(run_toml):
    config = load_config(run_toml, ["train.lr=1e-3", "train.lr=5e-4", "train.epochs=3"])
    assert (config.lora.rank, config.train.lr, config.train.epochs, config.train.batch_size) == (8, 5e-4, 3.0, 2)


def test_every_value_knows_where_it_came_from(run_toml):
    config = load_config(run_toml, ["train.lr=1e-3"])
    origins = [config.origin(key) for key in ("lora.rank", "train.lr", "lora.alpha", "output.folder")]
    assert origins == ["run.toml", "override", "default", "default"]
    with pytest.raises(ConfigError, match=r"Did you mean 'lora.rank'\?"):
        config.origin("lora.rnak")


def test_an_override_is_a_toml_value_or_a_bare_word(run_toml):
    overrides = ["data.packing=false", "train.schedule=cosine", 'sample.prompts=["one", "two = 2"]', "data.eval="]
    config = load_config(run_toml, overrides)
    assert config.data.packing is False
    assert config.train.schedule == "cosine"
    assert config.sample.prompts == ("one", "two = 2")
    assert config.data.eval == ""


def test_one_override_stands_for_a_list_of_one(run_toml):
    assert load_config(run_toml, "lora.rank=4") == load_config(run_toml, ["lora.rank=4"])


def test_an_override_sets_nothing_but_its_own_key(run_toml):
    config = load_config(run_toml, ["sample.prompts=1\nother = 2"])
    assert config.sample.prompts == ("1\nother = 2",)


def test_one_string_stands_for_a_list_of_one(run_toml):
    assert load_config(run_toml, ["sample.prompts=Hello there"]).sample.prompts == ("Hello there",)
    assert load_config(run_toml, ["lora.targets=attn.q"]).lora.targets == ("attn.q",)


def test_all_linear_means_the_familys_own_list(run_toml):
    assert load_config(run_toml, ["lora.targets=all-linear"]).lora.targets == ()


def test_paths_are_relative_to_the_file_and_overrides_to_the_working_directory(run_toml, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(run_toml, ["data.eval=held/out.jsonl"])
    assert config.model.path == str(tmp_path / "base")
    assert config.data.train == (str(tmp_path / "a.jsonl"), "/abs/b.jsonl")
    assert config.data.eval == str(elsewhere / "held/out.jsonl")
    assert config.output.folder == str(elsewhere / "runs/run")


def test_a_plain_name_is_kept_unless_a_file_bears_it(run_toml):
    names = ["model.path=lumen-demo", "data.train=lumen-demo"]
    config = load_config(run_toml, names)
    assert (config.model.path, config.data.train) == ("lumen-demo", ("lumen-demo",))
    Path(run_toml.parent, "lumen-demo").mkdir()
    run_toml.write_text(TOML.replace("base", "lumen-demo"))
    assert load_config(run_toml).model.path == str(run_toml.parent / "lumen-demo")


def test_the_output_folder_is_always_a_path(run_toml):
    assert load_config(run_toml, ["output.folder=mine"]).output.folder == str(Path("mine").absolute())


def test_a_written_config_reads_back_equal(run_toml, tmp_path):
    config = load_config(run_toml, ['lora.targets=["attn.q"]', "train.eps=1e-9", 'sample.prompts=["a\\"\\n# b"]'])
    path = tmp_path / "copy" / "config.toml"
    path.parent.mkdir()
    path.write_text(write_toml(config))
    assert load_config(path) == config


def test_a_written_config_has_every_key_and_says_what_was_told(run_toml):
    text = write_toml(load_config(run_toml, ["train.lr=1e-3"]))
    written = tomllib.loads(text)
    assert {section: set(table) for section, table in written.items()} == {
        section.name: {field.name for field in fields(section.type)} for section in fields(RunConfig)
    }
    assert "# Set by run.toml: model.path, lora.rank, data.train\n" in text
    assert "# Set by override: train.lr\n" in text


def test_a_runs_folder_is_a_source_and_stays_where_it_is_now(run_toml, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.toml").write_text(write_toml(load_config(run_toml)))
    config = load_config(moved)
    assert config.output.folder == str(moved)
    assert config.lora.rank == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnak=32", "override lora.rnak=32: unknown key 'lora.rnak'. Did you mean 'rank'?"),
        ("loar.rank=32", "override loar.rank=32: unknown key 'loar'. Did you mean 'lora'?"),
        ("rank=32", "override rank=32: a key needs its section. Did you mean 'lora.rank'?"),
        ("lora.rank", "override lora.rank: wanted key=value, as lora.rank=32."),
        ("lora.rank=0", "override lora.rank=0: lora.rank: wanted int >= 1, found 0."),
        ("lora.rank=1.5", "lora.rank: wanted int, found 1.5."),
        ("lora.rank=true", "lora.rank: wanted int, found True."),
        ("lora.rank=many", "lora.rank: wanted int, found 'many'."),
        ("lora.alpha=0", "lora.alpha: wanted float > 0.0, found 0."),
        ("lora.dropout=1.0", "lora.dropout: wanted float < 1.0, found 1.0."),
        ("lora.dropout=-0.1", "lora.dropout: wanted float >= 0.0, found -0.1."),
        ("train.lr=0", "train.lr: wanted float > 0.0, found 0."),
        ("train.lr=inf", "train.lr: wanted a finite number, found inf."),
        ("train.weight_decay=nan", "train.weight_decay: "),
        ("train.batch_size=0", "train.batch_size: wanted int >= 1, found 0."),
        ("train.epochs=0", "train.epochs: wanted float > 0.0, found 0."),
        ("train.steps=-1", "train.steps: wanted int >= 0, found -1."),
        ("train.warmup_fraction=1.0", "train.warmup_fraction: wanted float < 1.0, found 1.0."),
        ("data.eval_fraction=1.0", "data.eval_fraction: wanted float < 1.0, found 1.0."),
        ("data.max_length=1", "data.max_length: wanted int >= 2, found 1."),
        ("train.schedule=cosin", "train.schedule must be one of linear, cosine, constant; found 'cosin'."),
        ("model.dtype=bf16", "Did you mean 'bfloat16'?"),
        ("sample.prompts=[one]", "[one] is not a TOML value"),
        ("sample.prompts=[1]", "sample.prompts[0]: wanted str, found 1."),
        ("_origins.x=1", "unknown key '_origins'"),
        ("output.folder=2026", """wanted text, and 2026 is a number or a truth. As text: output.folder='"2026"'"""),
        ("output.folder=nan", """As text: output.folder='"nan"'"""),
        ("data.workers=abc", "data.workers must be one of auto, a number; found 'abc'."),
        ("train.optimizer_bits=full", "train.optimizer_bits must be one of auto, 8, 32; found 'full'."),
        ('lora.modules_to_save=["lm_head"]', "must be one of embed, head; found 'lm_head'. Did you mean 'head'?"),
    ],
)
def test_a_wrong_override_is_refused_by_its_own_words(run_toml, override, message):
    assert message in refusal(run_toml, override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.method=full"], 'train.method="full" (override) and model.nf4=true (default) contradict each other'),
        (["data.eval=e.jsonl", "data.eval_fraction=0.1"], "hold out a share, not both"),
        (["train.eval_every=5"], "train.eval_every=5 (override) has nothing to evaluate on"),
        (["train.sample_every=5"], "train.sample_every=5 (override) has no prompts"),
        (["train.steps=10", "train.warmup_steps=10"], "warm-up must be shorter than the run"),
        (["model.path="], 'model.path="" (override) is missing'),
        (["data.train=[]"], "data.train=[] (override) is missing"),
    ],
)
def test_values_that_contradict_each_other_are_refused(run_toml, overrides, message):
    assert message in refusal(run_toml, *overrides)


def test_full_fine_tuning_without_nf4_is_accepted(run_toml):
    assert load_config(run_toml, ["train.method=full", "model.nf4=false"]).train.method == "full"


def test_a_wrong_file_is_refused_by_name_and_key(run_toml, tmp_path):
    run_toml.write_text(TOML.replace("rank", "rnak"))
    assert refusal(run_toml).startswith("run.toml: unknown key 'lora.rnak'. Did you mean 'rank'?")
    run_toml.write_text(TOML + "rank = = 3\n")
    assert "run.toml: not valid TOML: Invalid value (at line 8, column 8)" in refusal(run_toml)
    run_toml.write_bytes(b"\xff\xfe")
    assert "run.toml: not valid TOML" in refusal(run_toml)
    assert "no config.toml" in refusal(tmp_path)
    assert "there is no such file or run folder" in refusal(tmp_path / "none.toml")


def test_a_byte_order_mark_is_no_part_of_a_run_file(run_toml):
    before = load_config(run_toml)
    run_toml.write_bytes(b"\xef\xbb\xbf" + run_toml.read_bytes())
    assert load_config(run_toml) == before


def test_a_fault_of_the_file_is_not_blamed_on_an_override(run_toml):
    run_toml.write_text(TOML.replace("8", "0"))
    assert refusal(run_toml, "train.lr=1e-3").startswith("run.toml: lora.rank")


def test_every_recipe_loads_and_says_what_it_is():
    for name, line in list_recipes().items():
        assert line, f"{name}.toml must open with a comment of one line"
        assert read_recipe(name).startswith("#")
        assert load_config(name).output.folder == str(Path("runs", name).absolute())


def test_an_unknown_recipe_is_refused():
    assert "There is no recipe 'lumen-dmo'" in refusal(Path("lumen-dmo"))


def test_the_schema_describes_and_bounds_every_key():
    definitions = json.loads(schema_json())["$defs"]
    for section in fields(RunConfig):
        properties = definitions[section.type.__name__]["properties"]
        assert set(properties) == {field.name for field in fields(section.type)}
        assert all("description" in described for described in properties.values())
        assert definitions[section.type.__name__]["additionalProperties"] is False
    assert definitions["Lora"]["properties"]["rank"]["minimum"] == 1
    assert definitions["Data"]["properties"]["train"]["anyOf"][0] == {"type": "string"}


def test_the_tables_of_special_keys_name_real_keys():
    assert {*config_module.LISTS, *config_module.PATHS, *config_module.NAMES} <= set(config_module._keys())
