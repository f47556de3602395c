"""The indexes that are served, by name: opened once, and opened anew when they have changed on disk.

An append, a retirement or a refit ends by putting a new manifest in the place of the old one, in one step. So the
manifest alone is looked at: where its file is another one, the index is opened again. Whoever holds the index as it was
goes on with it: its files are mapped, and stay readable though they are removed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from forebear.errors import ForebearError, InputError
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.storage.files import local_folder
from forebear.indexer.storage.layout import MANIFEST_NAME
from forebear.indexer.storage.manifest import Manifest
from forebear.retriever.answers.coverage import available_methods
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Of a batch of test rows on the CPU, padding included. Few texts are computed together here, so that in large batches
# most word pieces would be padding.
QUERY_TOKENS = 512
Stamp = tuple[int, int, int] | None


class Opened:
    """An index as it was at one moment, open, with its models.

    Attributes:
        name: Under which it is served.
        index: The index.
        retriever: Over it; one thread at a time may ask it.
        digest: Digest of its manifest.
        methods: Names of the methods that it can answer.
    """

    def __init__(self, name: str, index: Index, retriever: Retriever) -> None:
        self.name = name
        self.index = index
        self.retriever = retriever
        self.digest = index.manifest.digest()
        self.methods = available_methods(index)
        self._facts: dict[QuerySpec, dict[str, Any]] = {}

    def facts(self, question: Question) -> dict[str, Any]:
        """What answers say of themselves, with the index's name in place of its folder."""
        found = self._facts.get(question.spec)
        if found is None:
            if len(self._facts) >= 64:
                self._facts.clear()
            found = self._facts[question.spec] = self.retriever.facts(question) | {"index": self.name}
        return found

    def unnamed(self, message: str) -> str:
        """A message with the index's name in place of its folder."""
        return message.replace(str(self.index.folder), self.name)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What ``/v1/indexes`` says of it."""
        manifest = self.index.manifest
        return {
            "name": self.name,
            "digest": self.digest,
            "rows": {"live": manifest.n_live, "retired": manifest.n_retired},
            "text_columns": list(manifest.spec.text_columns),
            "columns": dict(manifest.columns),
            "label_names": list(manifest.spec.label_names),
            "scopes": list(manifest.spec.scopes),
            "methods": list(self.methods),
        }


class ServedIndex:
    """One index that is served.

    Attributes:
        name: Under which it is asked.
        current: As it is now, as far as :meth:`refresh` has looked.
        problem: Why what is on disk now cannot be opened, so that ``current`` is older; None: it is what is there.
    """

    def __init__(self, name: str, folder: Path, *, model: str | None = None, device: str = "auto") -> None:
        """Open the index, and load its model.

        Raises:
            ForebearError: It cannot be opened, or its model is not where it was or not what was indexed.
        """
        self.name = name
        self.problem: str | None = None
        self._folder = folder
        self._model = model
        self._device = device
        self._stamp = stamp_of(folder)
        self.current = self._open(None)
        self._warm()

    def _open(self, before: Opened | None) -> Opened:
        """Open what is on disk; what is as it was ``before`` is neither loaded nor hashed again."""
        index = Index.open(self._folder).at(self._model)
        if before is not None:
            index.trust(before.index)
        model: Classifier | str | None = self._model
        if before is not None and same_model(before.index.manifest, index.manifest):
            model = before.retriever.classifier()
        retriever = Retriever(index, model=model, device=self._device)
        retriever.models.query_tokens = QUERY_TOKENS
        return Opened(self.name, index, retriever)

    def _warm(self) -> None:
        """Ask the index once: the model is loaded, and what most questions read is mapped."""
        opened = self.current
        texts = [["a"] for _ in opened.index.manifest.spec.text_columns]
        opened.retriever.answer_block(0, texts, None, QuerySpec(top=1))

    def refresh(self) -> Opened:
        """The index as it is on disk now; as it was before, where that cannot be opened."""
        stamp = stamp_of(self._folder)
        if stamp == self._stamp:
            return self.current
        try:
            opened = self._open(self.current)
        except (ForebearError, OSError) as error:  # in the middle of a change, removed or damaged: looked at again
            self.problem = " ".join(str(error).replace(str(self._folder), self.name).split())
            return self.current
        self._stamp, self.problem = stamp, None
        if opened.digest != self.current.digest:
            self.current = opened
        return self.current


class ServedIndexes(Mapping[str, ServedIndex]):
    """The indexes that are served, by name."""

    def __init__(self, served: Sequence[ServedIndex]) -> None:
        self._served = {one.name: one for one in served}

    def __getitem__(self, name: str) -> ServedIndex:
        return self._served[name]

    def __iter__(self) -> Any:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    def named(self, name: str | None) -> ServedIndex:
        """The index of a request; None: the only one.

        Raises:
            InputError: There is none of that name, or several and none is named.
        """
        if name is None:
            if len(self) > 1:
                raise InputError(f"index: expected one of those that are served, {', '.join(self)}.")
            return next(iter(self.values()))
        if name not in self:
            raise InputError(f"index {name!r} is not served; expected {' or '.join(self)}.")
        return self[name]


def names_of(given: Sequence[str]) -> dict[str, Path]:
    """Folders by the names under which they are served: ``NAME=FOLDER``, or ``FOLDER`` under its own name.

    One that is fetched, such as ``hf://user/name``, is served as ``name``; it is not looked for anew.

    Raises:
        InputError: A name that cannot stand in a request, or two of one name; or a published index is not there.
    """
    folders: dict[str, Path] = {}
    for one in given:
        before, _, after = one.partition("=")
        named = bool(after) and _NAME.fullmatch(before) is not None
        place = after if named else one
        folder = local_folder(place)
        name = before if named else Path(place.partition("@")[0] if "://" in place else folder).resolve().name
        if not _NAME.fullmatch(name):
            raise InputError(f"{one}: {name!r} is no name for a served index. Give one, as in NAME={one}.")
        if name in folders:
            raise InputError(f"two indexes are called {name}. Give each a name of its own, as in NAME={one}.")
        folders[name] = folder
    return folders


def stamp_of(folder: Path) -> Stamp:
    """What tells one manifest file from the next; None where there is none."""
    try:
        found = (folder / MANIFEST_NAME).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def same_model(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests are of one model, read in one way."""

    def model(manifest: Manifest) -> tuple[object, ...]:
        spec = manifest.spec
        return manifest.checkpoints[-1], spec.tokenizer_sha256, spec.precision, spec.max_length

    return model(one) == model(other)
