"""Models come from the Hub and go to it: the real client, against a server on the loopback interface.

Each call runs in a process of its own whose Hub is that server; the cache is a temporary folder.
"""

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import tiny_models
from hub_server import TOKEN, HubServer, Refused, client

from lumen.config import load_config, write_toml
from lumen.formats.safetensors import INDEX
from lumen.hub import TEXT, is_id, parse_id
from lumen.text.tokenizer import FILES

PROMPT = "the quick brown"
NOISE = {  # what a repository holds beside a model, and lumen does not read
    "pytorch_model.bin": b"a pickle",
    "model.gguf": b"GGUF",
    "flax_model.msgpack": b"flax",
    "onnx/model.onnx": b"onnx",
    "picture.png": b"png",
    "README.md": b"# A model",
    "consolidated.safetensors": b"the same weights once more",
    "sub/config.json": b"{}",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.llama(folder, vocab_size=320)
    tiny_models.byte_level_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def files(model_folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model_folder.iterdir()}


@pytest.fixture(scope="module")
def hub():
    server = HubServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    lines = [{"prompt": PROMPT, "completion": " fox jumps over"}, {"prompt": "the lazy", "completion": " dog"}]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def online(hub, home, work):
    with client(hub.url, home, work, HF_TOKEN=TOKEN) as process:
        yield process


@pytest.fixture(scope="module")
def stranger(hub, work, tmp_path_factory):
    """Has no token, and an empty cache."""
    with client(hub.url, tmp_path_factory.mktemp("empty"), work) as process:
        yield process


@pytest.fixture(scope="module")
def offline(home, work):
    """Has the cache of `online`, a Hub that does not answer, and no sockets."""
    with client("http://127.0.0.1:9", home, work, sockets=False, HF_HUB_OFFLINE="1") as process:
        yield process


def fetch(process, id: str, **options) -> Path:
    return Path(process.call("lumen.hub:fetch", id, **options))


def refusal(process, id: str, **options) -> tuple[str, str]:
    """The kind of the error, and what it says."""
    with pytest.raises(Refused) as refused:
        process.call("lumen.hub:fetch", id, **options)
    return refused.value.kind, str(refused.value)


def answer(process, source: str) -> dict:
    arguments = [source, "--prompt", PROMPT, "--max-tokens", "8", "--json"]
    assert process.call("lumen.chat:main", arguments) == 0, process.err
    return json.loads(process.out)["answer"]


# Reading


def test_what_lumen_reads_is_downloaded_and_nothing_else(hub, online, files):
    hub.add("tests/whole", files | NOISE)
    folder = fetch(online, "tests/whole")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert f"in {folder}" in online.err
    got = {name.rpartition("/")[2] for name in hub.requests if name.startswith("GET /tests/whole/resolve")}
    assert got == set(files)


def test_a_second_start_asks_which_commit_it_is_and_downloads_nothing(hub, online, files):
    hub.add("tests/twice", files)
    first = fetch(online, "tests/twice")
    hub.requests.clear()
    assert fetch(online, "tests/twice") == first
    assert hub.requests == ["GET /api/models/tests/twice"]


def test_a_commit_that_is_here_is_read_without_asking_anybody(hub, online, files):
    commit = hub.add("tests/pinned", files)
    id = online.call("lumen.hub:pin", "tests/pinned")
    assert id == f"tests/pinned@{commit}"
    hub.requests.clear()
    fetch(online, id)
    assert hub.requests == []


def test_a_newer_commit_is_found_and_brings_only_what_changed(hub, online, files):
    hub.add("tests/moving", files)
    before = fetch(online, "tests/moving")
    hub.add("tests/moving", files | {"generation_config.json": b'{"eos_token_id": 7}'})
    hub.requests.clear()
    after = fetch(online, "tests/moving")
    assert after != before
    assert (after / "generation_config.json").read_bytes() == b'{"eos_token_id": 7}'
    assert not [name for name in hub.requests if name.startswith("GET") and name.endswith(".safetensors")]


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1"])
def test_a_revision_is_its_own_files(hub, online, files, revision):
    hub.add("tests/branches", files)
    commit = hub.add("tests/branches", files | {"generation_config.json": revision.encode()}, branch=revision)
    folder = fetch(online, f"tests/branches@{revision}")
    assert folder.name == commit
    assert (folder / "generation_config.json").read_bytes() == revision.encode()


def test_of_a_sharded_checkpoint_the_shards_that_the_index_names_are_fetched(hub, online, files):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shards = dict.fromkeys(index["weight_map"].values(), b"shard")
    hub.add("tests/shards", {"config.json": b"{}", INDEX: json.dumps(index).encode(), "old.safetensors": b"o"} | shards)
    names = {path.name for path in fetch(online, "tests/shards").iterdir()}
    assert names == {"config.json", INDEX, *shards}


def test_an_id_answers_as_its_folder_does(hub, online, files, model_folder):
    hub.add("tests/talker", files)
    assert answer(online, "tests/talker") == answer(online, str(model_folder))


def test_a_folder_that_is_there_goes_before_an_id(hub, online, files, model_folder, work):
    shutil.copytree(model_folder, work / "local/model")
    hub.requests.clear()
    assert answer(online, "local/model") == answer(online, str(model_folder))
    assert hub.requests == []


def test_every_file_that_a_tokenizer_reads_is_among_those_fetched():
    assert all(any(Path(name).match(pattern) for pattern in TEXT) for name in FILES)


def test_a_run_file_keeps_an_id_unless_a_folder_beside_it_bears_the_name(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[model]\npath = "owner/name@v1"\n[data]\ntrain = "data.jsonl"\n')
    assert load_config(file).model.path == "owner/name@v1"
    assert load_config(file, ["model.path=owner/other"]).model.path == "owner/other"
    assert load_config(file, ["model.path=./owner/other"]).model.path == str(Path("owner/other").absolute())
    (tmp_path / "owner/name@v1").mkdir(parents=True)
    assert load_config(file).model.path == str(tmp_path / "owner/name@v1")


def test_the_origins_of_a_runs_values_stay_when_its_model_is_pinned(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[model]\npath = "owner/name"\n[data]\ntrain = "data.jsonl"\n')
    pinned = load_config(file, ["lora.rank=4"]).with_path("model.path", "owner/name@" + "0" * 40)
    assert (pinned.origin("model.path"), pinned.origin("lora.rank")) == ("run.toml", "override")
    assert f'path = "owner/name@{"0" * 40}"' in write_toml(pinned)


# Refusing


@pytest.mark.parametrize(
    ("listed", "kind", "words"),
    [
        (["config.json", "pytorch_model.bin"], "CheckpointError", r"pytorch_model\.bin.*can run any program.*refs/pr/"),
        (["config.json", "model.Q4.gguf"], "CheckpointError", "GGUF file is an export"),
        (["weights.safetensors", "README.md"], "CheckpointError", "neither config.json nor adapter_config.json"),
        (["adapter_config.json", "adapter_model.bin"], "CheckpointError", r"adapter_model\.bin.*can run any program"),
        (["config.json", INDEX, "model.safetensors"], "CheckpointError", "two checkpoints"),
        (["config.json", INDEX], "CheckpointError", "a.safetensors was wanted, the repository lacks it"),
    ],
    ids=["bin", "gguf", "no config", "bin adapter", "two checkpoints", "shard missing"],
)
def test_a_repository_that_lumen_cannot_read_is_refused_before_its_weights_come(hub, online, listed, kind, words):
    id = "refused/" + re.sub(r"\W", "", "".join(listed))
    index = json.dumps({"weight_map": {"t": "a.safetensors"}}).encode()
    hub.add(id, {name: index if name == INDEX else b"{}" for name in listed})
    found, message = refusal(online, id)
    assert found == kind
    assert re.search(words, message)
    fetched = [name.rpartition("/")[2] for name in hub.requests if name.startswith(f"GET /{id}/resolve")]
    assert set(fetched) <= {"config.json", "adapter_config.json", INDEX}


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/evil.safetensors", "sub/a.safetensors", "evil.bin", ""])
def test_an_index_that_names_anything_but_a_plain_file_is_not_followed(hub, online, shard):
    id = f"tests/index-{len(shard)}"
    index = json.dumps({"weight_map": {"t": shard}}).encode()
    hub.add(id, {"config.json": b"{}", INDEX: index, shard or "x": b"evil"})
    kind, message = refusal(online, id)
    assert kind == "CheckpointError"
    assert "Do not trust" in message
    assert not any("evil" in name for name in hub.requests)


def test_a_listed_path_that_leads_out_of_the_folder_is_never_written(hub, online, files, home):
    hub.add("tests/climber", files)
    hub.repos["tests/climber"].extra_paths = ["../evil.json", "..\\tokenizer.json", "/tmp/evil.json", "a/../../evil"]
    folder = fetch(online, "tests/climber")
    assert {path.name for path in folder.iterdir()} == set(files)
    assert not [path for path in home.rglob("*") if "evil" in path.name]


def test_an_unknown_id_is_refused_under_both_readings(online, work):
    (work / "models/llama-3").mkdir(parents=True)
    kind, message = refusal(online, "models/lama-3")
    assert kind == "ConfigError"
    assert "as a path, there is nothing of this name" in message and "Did you mean 'llama-3'?" in message
    assert "as an id of the Hub" in message and "hf auth login" in message


def test_an_unknown_revision_is_named(hub, online, files):
    hub.add("tests/plain", files)
    kind, message = refusal(online, "tests/plain@v9")
    assert (kind, "no revision 'v9'" in message) == ("ConfigError", True)


def test_a_gated_model_says_where_its_licence_is(hub, online, stranger, files):
    hub.add("tests/gated", files)
    hub.repos["tests/gated"].gated = True
    _, message = refusal(stranger, "tests/gated")
    assert f"Accept its licence on {hub.url}/tests/gated" in message and "no token was found" in message
    assert fetch(online, "tests/gated").is_dir()


def test_a_private_model_wants_the_token_that_the_tools_of_the_hub_keep(hub, online, stranger, files):
    hub.add("tests/private", files)
    hub.repos["tests/private"].private = True
    _, message = refusal(stranger, "tests/private")
    assert "if it is private" in message
    assert fetch(online, "tests/private").is_dir()


def test_weights_that_do_not_fit_on_the_disk_are_not_begun(hub, online, files):
    hub.add("tests/huge", {"config.json": b"{}", "model.safetensors": b"x"})
    hub.repos["tests/huge"].sizes["model.safetensors"] = 10**18
    kind, message = refusal(online, "tests/huge")
    assert kind == "LumenError"
    assert "1,000,000,000,000,000,000 bytes are to be downloaded" in message and "HF_HOME" in message
    assert not any(name.endswith("model.safetensors") and "huge" in name for name in hub.requests)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("owner/name", True),
        ("Qwen/Qwen2.5-0.5B-Instruct", True),
        ("owner/name@main", True),
        ("owner/name@refs/pr/4", True),
        ("owner/name@../../x", False),
        ("./name", False),
        ("../name", False),
        ("owner/..", False),
        ("/owner/name", False),
        ("~/name", False),
        ("owner/name/", False),
        ("a/b/c", False),
        ("name", False),
        ("owner/na--me", False),
        ("owner/name.git", False),
        ("owner/" + "n" * 96, False),
        ("owner/name\n", False),
    ],
)
def test_the_shape_of_an_id(text, fits):
    assert is_id(text) is fits


def test_an_id_comes_apart_and_together():
    id = parse_id("owner/name@v1")
    assert (id.repo, id.revision, id.at("v2"), id.at(None)) == ("owner/name", "v1", "owner/name@v2", "owner/name")


# Offline


def test_offline_a_cached_model_loads_and_no_socket_is_opened(hub, online, offline, files):
    hub.add("tests/cached", files)
    folder = fetch(online, "tests/cached")
    assert fetch(offline, "tests/cached") == folder
    assert answer(offline, "tests/cached") == answer(online, "tests/cached")


def test_the_offline_process_could_not_have_opened_a_socket(home, work):
    with (
        client("http://127.0.0.1:9", home, work, sockets=False) as process,
        pytest.raises(AssertionError, match="process has ended"),
    ):
        process.call("urllib.request:urlopen", "http://127.0.0.1:9")


def test_offline_what_is_missing_is_named(hub, online, offline, files):
    commit = hub.add("tests/torn", files)
    folder = fetch(online, "tests/torn")
    (folder / "tokenizer.json").unlink()
    for process, options in ((offline, {}), (online, {"offline": True})):
        kind, message = refusal(process, f"tests/torn@{commit}", **options)
        assert (kind, "lacks tokenizer.json" in message) == ("CheckpointError", True)
    kind, message = refusal(offline, "tests/never")
    assert "lacks revision main" in message and "Go online once" in message
    assert (fetch(online, "tests/torn") / "tokenizer.json").is_file()


def test_the_option_of_a_run_is_offline_as_well(hub, online, files):
    hub.add("tests/option", files)
    fetch(online, "tests/option")
    hub.requests.clear()
    fetch(online, "tests/option", offline=True)
    assert hub.requests == []


def test_without_a_network_the_cache_serves_and_says_so(hub, home, work, online, files):
    hub.add("tests/cut", files)
    folder = fetch(online, "tests/cut")
    with client("http://127.0.0.1:9", home, work) as cut:
        assert fetch(cut, "tests/cut") == folder
        assert "Could not reach the Hub" in cut.err
        kind, message = refusal(cut, "tests/not-here")
    assert kind == "LumenError"
    assert "http://127.0.0.1:9 does not answer" in message and "no whole copy" in message


def test_what_other_tools_cached_file_by_file_is_used_offline_if_it_is_whole(hub, online, offline, files):
    hub.add("tests/foreign", files)
    folder = fetch(online, "tests/foreign")
    shutil.rmtree(folder.parents[1] / "trees")  # they leave no list of the repository
    assert fetch(offline, "tests/foreign") == folder
    (folder / "model.safetensors").unlink()
    _, message = refusal(offline, "tests/foreign")
    assert "lacks model.safetensors" in message


# A run on a model of the Hub, and what comes of it


@pytest.fixture(scope="module")
def run(hub, online, files, work) -> Path:
    """A finished run on tests/base, whose main branch has moved since."""
    hub.add("tests/base", files)
    config = ["[model]", 'path = "tests/base"', "nf4 = false", "[data]", 'train = "data.jsonl"', "max_length = 32"]
    config += ["[train]", "steps = 2", "save_every = 1", "[lora]", "rank = 2"]
    (work / "run.toml").write_text("\n".join(config))
    code = online.call("lumen.train:main", ["run.toml"])
    assert code == 0, online.err
    hub.add("tests/base", files | {"model.safetensors": b"other weights"})
    return work / "runs/run"


def commit_of(hub, id: str) -> str:
    return next(iter(hub.repos[id].commits))


def test_a_run_names_the_commit_that_it_was_trained_on(hub, run):
    commit = commit_of(hub, "tests/base")
    assert f'path = "tests/base@{commit}"' in (run / "config.toml").read_text()
    config = peft.PeftConfig.from_pretrained(run / "adapter")
    assert (config.base_model_name_or_path, config.revision) == ("tests/base", commit)


def test_a_run_is_resumed_and_talked_to_on_its_own_commit(hub, online, offline, run):
    hub.requests.clear()
    assert online.call("lumen.train:main", ["run.toml", "train.steps=3", "--resume"]) == 0, online.err
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    assert answer(offline, str(run)) == answer(online, str(run))
    assert hub.requests == []


def test_a_pushed_adapter_reads_back_and_finds_its_base_by_id(hub, online, run):
    arguments = [str(run), "adapter-out", "--as", "adapter", "--push", "me/adapter"]
    assert online.call("lumen.export.__main__:main", arguments) == 0, online.err
    assert online.out.strip() == f"{hub.url}/me/adapter"
    stored = hub.repos["me/adapter"].newest()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        assert stored[name] == (run / "adapter" / name).read_bytes()
    card = stored["README.md"].decode()
    for line in ('base_model: "tests/base"', 'base_model_relation: "adapter"', 'library_name: "peft"', "rank 2"):
        assert line in card
    assert str(run.parent) not in card
    assert answer(online, "me/adapter") == answer(online, str(run))


def test_an_adapter_from_the_cache_is_exported_although_its_files_are_links(online, run, work):
    arguments = ["me/adapter", "again", "--as", "adapter"]
    assert online.call("lumen.export.__main__:main", arguments) == 0, online.err
    assert (work / "again/adapter_model.safetensors").read_bytes() == (
        run / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_an_adapter_of_the_hub_is_trained_further_and_the_run_names_its_commit(hub, online, run, work):
    told = ["run.toml", f"model.path=tests/base@{commit_of(hub, 'tests/base')}", "lora.adapter=me/adapter"]
    assert online.call("lumen.train:main", [*told, "output.folder=further", "train.steps=1"]) == 0, online.err
    newest = list(hub.repos["me/adapter"].commits)[-1]
    assert f'adapter = "me/adapter@{newest}"' in (work / "further/config.toml").read_text()
    again = [*told, "output.folder=further", "train.steps=2", "--resume"]
    assert online.call("lumen.train:main", again) == 0, online.err


def test_a_pushed_merge_takes_the_place_of_older_shards(hub, online, run, work):
    hub.add("me/merged", {"model-00001-of-00002.safetensors": b"old", INDEX: b"old", "notes.txt": b"mine"})
    arguments = [str(run), "merged-out", "--as", "merged", "--push", "me/merged", "--json"]
    assert online.call("lumen.export.__main__:main", arguments) == 0, online.err
    assert json.loads(online.out)["pushed"] == f"{hub.url}/me/merged"
    stored = hub.repos["me/merged"].newest()
    assert stored["model.safetensors"] == (work / "merged-out/model.safetensors").read_bytes()
    assert "model-00001-of-00002.safetensors" not in stored and INDEX not in stored and stored["notes.txt"] == b"mine"
    assert 'base_model_relation: "finetune"' in stored["README.md"].decode()
    assert answer(online, "me/merged") == answer(online, str(work / "merged-out"))


def test_a_pushed_gguf_keeps_its_readme_below_the_metadata(hub, online, run, work):
    arguments = [str(run), "gguf-out", "--as", "gguf", "--quant", "f16", "--no-modelfile", "--push", "me/gguf"]
    assert online.call("lumen.export.__main__:main", arguments) == 0, online.err
    stored = hub.repos["me/gguf"].newest()
    assert stored["run-f16.gguf"] == (work / "gguf-out/run-f16.gguf").read_bytes()
    card = stored["README.md"].decode()
    assert card.startswith('---\nbase_model: "tests/base"\nbase_model_relation: "quantized"\nlibrary_name: "gguf"\n')
    assert "| run-f16.gguf | f16 |" in card


def test_a_private_push_is_private_and_refuses_a_public_repository(hub, online, run):
    arguments = [str(run), "private-out", "--as", "adapter", "--push", "me/secret", "--private"]
    assert online.call("lumen.export.__main__:main", arguments) == 0, online.err
    assert hub.repos["me/secret"].private
    hub.add("me/public", {"a.txt": b"a"})
    arguments = [str(run), "public-out", "--as", "adapter", "--push", "me/public", "--private"]
    assert online.call("lumen.export.__main__:main", arguments) == 2
    assert "already and public" in online.err and "The export is whole" in online.err
    assert hub.repos["me/public"].newest() == {"a.txt": b"a"}


def test_a_push_without_a_token_is_refused_before_the_work(stranger, run, work):
    arguments = [str(run), "no-token", "--as", "adapter", "--push", "me/none"]
    assert stranger.call("lumen.export.__main__:main", arguments) == 1
    assert "token that may write" in stranger.err
    assert not (work / "no-token").exists()


def test_the_doctor_asks_the_hub_only_if_told(hub, online):
    hub.requests.clear()
    assert online.call("lumen.doctor:examine")["hub"] == {"token": True, "reachable": None}
    assert hub.requests == []
    found = online.call("lumen.doctor:examine", online=True)["hub"]
    assert (found["reachable"], found["address"]) == (True, hub.url)
    assert hub.requests == ["GET /api/models/lumen/reach"]
