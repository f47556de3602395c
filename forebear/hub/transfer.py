"""Indexes to a model hub and back, by ``huggingface_hub``."""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forebear.errors import InputError
from forebear.hub.remote import sentence_of
from forebear.indexer.storage.layout import EFFECTS_NAME, MANIFEST_NAME
from forebear.indexer.storage.manifest import read_manifest

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from forebear.indexer.index import Index
    from forebear.indexer.storage.choices import PushKeywords

_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@(?!.*\.\.)([\w./-]+))?")

_HINT = "Check the network, and `hf auth login`."


@dataclass(frozen=True)
class HubName:
    """A repository of the hub.

    Attributes:
        repository: ``user/name``.
        revision: A branch, tag or commit; None: the main branch.
    """

    repository: str
    revision: str | None = None

    @classmethod
    def of(cls, address: str) -> HubName:
        """Read ``hf://user/name`` or ``hf://user/name@revision``.

        Raises:
            InputError: It is not of this form.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise InputError(f"{address}: expected hf://user/name or hf://user/name@revision.")
        return cls(*match.groups())

    def __str__(self) -> str:
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")


def fetch(address: str) -> Path:
    """The folder of a published index in the hub's cache, into which what is missing there is downloaded.

    Only the manifest's files and what is known of effects are downloaded; the former are hashed at their first use, as
    those of any index.

    Raises:
        InputError: There is no such repository, revision or index, no access to it, or no way to the hub.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    name = HubName.of(address)
    with _hub_errors(name):
        path = Path(hf_hub_download(name.repository, MANIFEST_NAME, revision=name.revision))
        commit = path.parent.name  # the cache keeps one folder a commit: all files are of the manifest's
        patterns = [glob.escape(file) for file in (MANIFEST_NAME, EFFECTS_NAME, *read_manifest(path.parent).files)]
        return Path(snapshot_download(name.repository, revision=commit, allow_patterns=patterns))


def push(index: Index, address: str, **choices: Unpack[PushKeywords]) -> str:
    """Publish an index in one commit, which replaces an index that was published there before.

    Args:
        index: The index.
        address: ``hf://user/name``, perhaps with ``@branch``. A repository that does not exist is made.
        **choices: As :meth:`Index.push_to_hub`. ``token`` is by default that of the last ``hf auth login``, or of the
            environment variable ``HF_TOKEN``.

    Returns:
        The address of the commit.

    Raises:
        InputError: No access, no way to the hub, or what ``write_published`` refuses.
    """
    from huggingface_hub import HfApi

    from forebear.hub.published import write_published

    name = HubName.of(address)
    api = HfApi(token=choices.get("token"), library_name="forebear")
    beside = index.folder.resolve().parent  # where files need no copy
    with tempfile.TemporaryDirectory(
        prefix="forebear-push-", dir=beside if os.access(beside, os.W_OK) else None
    ) as scratch:
        folder = Path(scratch) / "index"
        manifest = write_published(
            index, folder, with_texts=choices.get("with_texts", False), model=choices.get("model")
        )
        with _hub_errors(name):
            api.create_repo(name.repository, private=choices.get("private", False), exist_ok=True)
            if name.revision is not None:
                api.create_branch(name.repository, branch=name.revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=name.repository,
                folder_path=folder,
                revision=name.revision,
                commit_message=choices.get("message") or f"Index {manifest.digest()[:16]}",
                delete_patterns=["*"],
            )
    return str(commit.commit_url)


@contextmanager
def _hub_errors(name: HubName) -> Iterator[None]:
    """What the hub's client raises, as one line."""
    from huggingface_hub import errors

    hint = f"(revision {name.revision})" if name.revision else "(main)"
    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(f"{name}: its owner grants access. Ask for it on its page, then `hf auth login`.") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: the hub has no such repository, or you may not see it. Check the name; `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name}: no such revision {hint}. Give a branch, tag or commit that is there.") from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{name}: not in the cache, and the hub cannot be reached. Check the network; HF_HUB_OFFLINE=1 forbids it."
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        if MANIFEST_NAME not in str(error):
            raise InputError(f"{name}: {sentence_of(error)} {_HINT}") from error
        raise InputError(
            f"{name} holds no index {hint}: no {MANIFEST_NAME} in it. `forebear push` puts one there."
        ) from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.HFValidationError, OSError) as error:
        raise InputError(f"{name}: {sentence_of(error)} {_HINT}") from error
