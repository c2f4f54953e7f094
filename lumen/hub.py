"""The Hugging Face Hub: a model's id becomes a folder on this disk, and a folder becomes a repository.

The only module that reaches a network, and only for an id that somebody named. Files lie in the cache that the Hub's
own tools use (HF_HOME), one folder for each commit, so that what was downloaded once is found by all of them:

    owner/name              the newest commit of the main branch; the Hub is asked which that is
    owner/name@revision     a branch, a tag, refs/pr/N
    owner/name@commit       40 hexadecimal digits: always the same bytes, and nobody is asked once they are here

Offline (model.offline = true, or HF_HUB_OFFLINE=1) opens no socket at all. A token comes from where the Hub's tools
keep it (`hf auth login`, or HF_TOKEN), never from a run file.

A repository is foreign: of its files only those are fetched that lumen reads, by plain names from its top folder.
Weights as .bin or .pt are pickles, which can run a program when they are opened, and are refused.

*Decision* huggingface_hub is a core dependency, not an extra. *Because* tokenizers, which lumen cannot do without,
installs it anyway. *Revisit when* tokenizers stops doing so.
"""

import errno
import glob
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lumen.errors import CheckpointError, ConfigError, LumenError, closest

ID = re.compile(r"(\w(?:[\w.-]*\w)?)/(\w(?:[\w.-]*\w)?)(?:@(\w(?:[\w./-]*\w)?))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
LONGEST = 96  # characters of owner/name

CONFIG, ADAPTER_CONFIG, INDEX = "config.json", "adapter_config.json", "model.safetensors.index.json"
FIRST = (CONFIG, ADAPTER_CONFIG, INDEX)  # they say which of the others are wanted
MODEL_WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
TEXT = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "generation_config.json"),
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # told from other files only to say why they are refused; never opened


@dataclass(frozen=True, kw_only=True)
class ModelId:
    """`owner/name@revision`, taken apart."""

    owner: str
    name: str
    revision: str | None

    @property
    def repo(self) -> str:
        return f"{self.owner}/{self.name}"

    def at(self, revision: str | None) -> str:
        """The same repository at another revision, as text."""
        return f"{self.repo}@{revision}" if revision else self.repo


def is_id(text: str) -> bool:
    """Whether `text` has the shape of a Hub id. So has many a relative path: look for a folder first."""
    return _match(text) is not None


def parse_id(text: str) -> ModelId:
    """ConfigError for what has not the shape of an id."""
    match = _match(text)
    if match is None:
        raise ConfigError(f"{text!r} is no id of the Hub: wanted owner/name or owner/name@revision.")
    return ModelId(owner=match[1], name=match[2], revision=match[3])


def _match(text: str) -> re.Match | None:
    match = ID.fullmatch(text)
    repo = text.partition("@")[0]
    refused = len(repo) > LONGEST or "--" in repo or ".." in text or repo.endswith(".git")  # as the Hub has it
    return None if refused else match


# Down


def fetch(text: str, *, offline: bool = False) -> Path:
    """The folder in the cache with all that lumen reads of a model or adapter; downloads what is missing there.

    text     owner/name, owner/name@revision or owner/name@commit
    offline  open no socket; HF_HUB_OFFLINE=1 means the same

    Without a network, what the cache has is used. ConfigError for an id or a revision that is not there;
    CheckpointError for a repository without safetensors and for a copy that is not whole; LumenError for a gated
    model, a network that does not answer, a full disk. Progress goes to stderr.
    """
    id, hub = parse_id(text), _library()
    offline = offline or hub.is_offline_mode()
    with _explained(hub, id, text):
        revision = hub.HfApi().resolve_revision(id.repo, revision=id.revision, local_files_only=offline)
        copy = _Copy(hub=hub, id=id, text=text, revision=revision, offline=offline)
        copy.bring(copy.present(FIRST))
        copy.bring(copy.wanted())
    return copy.folder


def pin(text: str, *, offline: bool = False) -> str:
    """The id with the commit that it stands for today, which is then in the cache."""
    return parse_id(text).at(fetch(text, offline=offline).name)


def cache_folder() -> Path:
    """Where the Hub's tools keep what they download."""
    return Path(_library().constants.HF_HUB_CACHE).expanduser()


def is_cached(file: Path) -> bool:
    """Whether `file` is a link of the cache to its own bytes, the only kind of link that leads out of a folder."""
    folder = file.absolute().parent
    if folder.parent.name != "snapshots":
        return False
    blobs = [folder.parents[1] / "blobs", folder.parents[2] / "blobs"]  # the repository's, and those that many share
    return any(file.resolve().is_relative_to(place.resolve()) for place in blobs)


class _Copy:
    """One commit of a repository and its copy in the cache."""

    def __init__(self, *, hub: ModuleType, id: ModelId, text: str, revision: str, offline: bool) -> None:
        """revision  as the library resolved it; it holds the commit"""
        commit = revision.resolved
        if not COMMIT.fullmatch(commit):
            raise CheckpointError(f"{text}: the Hub calls its commit {commit!r}; 40 hexadecimal digits were wanted.")
        self.hub, self.id, self.text, self.revision, self.offline = hub, id, text, revision, offline
        self.folder = cache_folder() / f"models--{id.owner}--{id.name}" / "snapshots" / commit
        self.sizes = self._listed()  # name → bytes, of the repository's top folder; None where no list is to be had
        if self.sizes is None and not offline:
            self._list()

    def _listed(self) -> dict[str, int] | None:
        try:
            files = self.hub.get_cached_repo_tree(self.id.repo, revision=self.folder.name)
        except self.hub.errors.CachedRepoTreeNotFoundError:
            return None
        return {file.path: file.size for file in files if "/" not in file.path and "\\" not in file.path}

    def _list(self) -> None:
        """Fetches the list of files, which brings the first of them along."""
        errors = self.hub.errors
        try:
            _download(self.hub, self.id, self.revision, FIRST, {})
        except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
            if isinstance(error, errors.HfHubHTTPError) or not self.folder.is_dir():
                raise
            return  # no network: what other tools have put into the cache may be whole
        self.sizes = self._listed()

    def names(self) -> set[str]:
        """Of the repository where its list is known, else of what lies in the cache."""
        if self.sizes is not None:
            return set(self.sizes)
        return set(os.listdir(self.folder)) if self.folder.is_dir() else set()

    def present(self, patterns: Iterable[str]) -> list[str]:
        return sorted(name for name in self.names() if any(fnmatchcase(name, pattern) for pattern in patterns))

    def bring(self, names: Iterable[str]) -> None:
        """Downloads what is missing of `names`; CheckpointError where that cannot be."""
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing and (self.offline or self.sizes is None):
            raise CheckpointError(_not_cached(self.text, _some(missing)))
        if missing:
            _download(self.hub, self.id, self.revision, missing, self.sizes)

    def wanted(self) -> list[str]:
        """The files that lumen reads: of an adapter its own, else config, text and the weights that the index names."""
        names = self.names()
        if ADAPTER_CONFIG in names:
            weights = [ADAPTER_WEIGHTS]
        elif CONFIG not in names and self.sizes is not None:
            raise CheckpointError(
                f"{self.text}: holds neither {CONFIG} nor {ADAPTER_CONFIG}, so it is no model that lumen reads. "
                f"It holds {_some(names)}."
            )
        elif INDEX in names:
            weights = _shards(self.text, self.folder / INDEX)
            if MODEL_WEIGHTS in names and MODEL_WEIGHTS not in weights:
                raise CheckpointError(
                    f"{self.text}: holds two checkpoints, {MODEL_WEIGHTS} and the shards of {INDEX}. Download the "
                    "repository, remove one, and name the folder."
                )
        else:
            weights = [MODEL_WEIGHTS]
        missing = sorted(set(weights) - names)
        if missing and self.sizes is not None:
            raise CheckpointError(_without_weights(self.text, missing, names))
        own = ADAPTER_CONFIG if ADAPTER_CONFIG in names else CONFIG
        return [own, *self.present(TEXT), *weights]


def _shards(text: str, index: Path) -> list[str]:
    """The shards that an index names, each a plain name: it is as foreign as the repository."""
    try:
        shard_of = msgspec.json.decode(index.read_bytes(), type=dict[str, msgspec.Raw]).get("weight_map", b"{}")
        shards = sorted(set(msgspec.json.decode(shard_of, type=dict[str, str]).values()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{text}: {INDEX} is no index of safetensors: {error}.") from None
    for shard in shards:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", shard, re.ASCII):
            raise CheckpointError(
                f"{text}: {INDEX} names {shard!r}, which is no plain name of a .safetensors file, and is not fetched. "
                "Do not trust this checkpoint."
            )
    return shards


def _without_weights(text: str, missing: Sequence[str], names: set[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        return (
            f"{text}: its weights are pickles ({_some(pickles)}), which can run any program when they are opened, and "
            f"are refused. Wanted: {_some(missing)}. Many such repositories have a converted copy among their pull "
            f"requests; name it as {text.partition('@')[0]}@refs/pr/NUMBER. Else convert it with transformers' "
            "save_pretrained where no harm can be done, and name that folder."
        )
    ggufs = any(name.endswith(".gguf") for name in names)
    advice = " A GGUF file is an export; name the model that it was made from." if ggufs else ""
    return f"{text}: {_some(missing)} was wanted, the repository lacks it. It holds {_some(names)}.{advice}"


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    shown = ", ".join(name if name.isprintable() else repr(name) for name in listed[:6]) or "nothing"
    return shown + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def _download(hub: ModuleType, id: ModelId, revision: str, names: Sequence[str], sizes: dict[str, int]) -> None:
    """Fetches files of one commit into the cache, several at a time; `sizes` is known for all but the first few."""
    cache, size_bytes = cache_folder(), sum(sizes.get(name, 0) for name in names)
    room = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    if size_bytes > (free := shutil.disk_usage(room).free):
        raise LumenError(
            f"{id.repo}: {size_bytes:,} bytes are to be downloaded, {free:,} are free in {room}. Free some space, or "
            "set HF_HOME to a folder on another disk."
        )
    told = Console(stderr=True, highlight=False, soft_wrap=True)
    if sizes:
        told.print(f"{id.repo}: downloading {len(names)} files, {size_bytes / 1e6:,.1f} MB", markup=False)
    words = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*words, TimeRemainingColumn(), console=told, disable=not (sizes and told.is_terminal)) as progress:
        task = progress.add_task(id.name, total=size_bytes)

        class Bar(hub.utils.tqdm):
            """Hands to our bar what the library counts; shows nothing itself."""

            def __init__(self, *args: object, **options: object) -> None:
                self.counts_bytes = options.get("name") == "huggingface_hub.snapshot_download"
                super().__init__(*args, **options | {"disable": True})

            def update(self, n: float | None = 1) -> None:
                if self.counts_bytes:
                    progress.advance(task, n or 0)

        patterns = [glob.escape(name) for name in names]
        folder = hub.snapshot_download(id.repo, revision=revision, allow_patterns=patterns, tqdm_class=Bar)
    if sizes:
        told.print(f"{id.repo}: in {folder}", markup=False)


# Up


def check_push(text: str) -> None:
    """Refuses now what `push` would refuse after the work: ConfigError or LumenError, before anything is sent."""
    id, hub = parse_id(text), _library()
    if id.revision:
        raise ConfigError(f"{text}: wanted owner/name to push to, without a revision.")
    if hub.is_offline_mode():
        raise ConfigError(f"{text}: HF_HUB_OFFLINE=1 forbids the network that a push wants. Unset it.")
    if not hub.get_token():
        raise LumenError(f"{text}: a push wants a token that may write. Log in by `hf auth login`, or set HF_TOKEN.")


def push(folder: Path, text: str, *, private: bool, message: str, replaces: Sequence[str] = ()) -> str:
    """Uploads the files of a folder to a repository, which is made if it is not there; returns its address.

    private   make it private; a repository that is there and public is refused then, since its visibility stays
    replaces  patterns of files that the repository is rid of in the same step, where the folder has none of that name
    """
    check_push(text)
    id, hub = parse_id(text), _library()
    with _explained(hub, id, text, verb="written"):
        api = hub.HfApi()
        address = api.create_repo(id.repo, private=private or None, exist_ok=True)
        if private and not api.model_info(id.repo).private:
            raise ConfigError(f"{text}: is there already and public, and --private was asked. Nothing was uploaded.")
        api.upload_folder(
            repo_id=id.repo, folder_path=folder, commit_message=message, delete_patterns=list(replaces) or None
        )
    return str(address)


def reach() -> str:
    """Asks the Hub whether it is there; returns its address, LumenError if it does not answer."""
    hub = _library()
    if hub.is_offline_mode():
        raise LumenError("HF_HUB_OFFLINE=1 forbids it")
    try:
        hub.HfApi().repo_exists("lumen/reach")  # any answer will do, and 404 is one
    except (hub.errors.HTTPError, OSError) as error:
        raise LumenError(f"{hub.constants.ENDPOINT} does not answer ({_first_line(error)})") from None
    return hub.constants.ENDPOINT


def has_token() -> bool:
    """Whether the Hub's tools have a token here. The token itself is nobody's business."""
    return bool(_library().get_token())


# The library, and what its errors mean


def _library() -> ModuleType:
    """huggingface_hub, imported when it is first needed."""
    try:
        import huggingface_hub
        import huggingface_hub.utils
        from huggingface_hub import constants, errors  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"A model of the Hub wants the package huggingface_hub ({error}). Install it: "
            f"{sys.executable} -m pip install 'huggingface_hub>=1.31,<3'. Or name a local folder."
        ) from None
    return huggingface_hub


@contextmanager
def _explained(hub: ModuleType, id: ModelId, text: str, verb: str = "read") -> Iterator[None]:
    """Inside the `with`, what the library raises becomes a message for the person who named `text`."""
    errors = hub.errors
    page = f"{hub.constants.ENDPOINT}/{id.repo}"
    login = "Log in by `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError:
        has = "the token found here has no access" if hub.get_token() else "no token was found here"
        raise LumenError(f"{text}: is gated, and {has}. Accept its licence on {page}, then: {login}.") from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{_not_a_folder(text)}, and {page} is no model that you may see. {login} if it is private."
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(
            f"{text}: {id.repo} has no revision {id.revision!r}. Its branches and tags: {page}."
        ) from None
    except errors.RevisionResolutionError as error:
        if error.__cause__ is None:
            raise CheckpointError(_not_cached(text, f"revision {id.revision or 'main'}")) from None
        raise LumenError(_unreachable(hub, text, error.__cause__)) from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise LumenError(f"{text}: may not be {verb}: {_first_line(error)} {login}.") from None
        raise LumenError(f"{text}: {page} cannot be {verb}: {_first_line(error)} Try again later.") from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.XetDownloadError) as error:
        raise LumenError(_unreachable(hub, text, error)) from None
    except errors.HFValidationError as error:
        raise ConfigError(f"{text}: {_first_line(error)}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LumenError(
                f"{text}: the disk of {cache_folder()} is full. Free some space and start again: what has arrived "
                "stays. Or set HF_HOME to a folder on another disk."
            ) from None
        raise LumenError(f"{text}: cannot be {verb}: {error}.") from None


def _not_a_folder(text: str) -> str:
    """The other reading of an id: a path, misspelt."""
    folder = Path(text).parent
    near = closest(Path(text).name, [entry.name for entry in folder.iterdir()]) if folder.is_dir() else ""
    where = f"{Path.cwd()} or beside the run file{near and '.' + near.rstrip('?') + '?'}"
    return f"{text}: as a path, there is nothing of this name in {where}; as an id of the Hub"


def _not_cached(text: str, what: str) -> str:
    return (
        f"{text}: is to be read offline, but the cache {cache_folder()} lacks {what}. "
        "Go online once (model.offline=false, HF_HUB_OFFLINE unset), or name a local folder."
    )


def _unreachable(hub: ModuleType, text: str, error: BaseException) -> str:
    return (
        f"{_not_a_folder(text)}, {hub.constants.ENDPOINT} does not answer "
        f"({_first_line(error.__cause__ or error)}), and the cache {cache_folder()} has no whole copy. "
        "Is there a network? Files that have arrived whole stay, and starting again fetches the rest."
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
