"""forebear: which training rows, and which words in them, made a text classifier predict this?

The same in five lines as on the command line:

    >>> from forebear import Index, Retriever
    >>> index = Index.open("runs/demo/index")
    >>> retriever = Retriever(index)
    >>> answers = retriever.retrieve([("The cat sat .", "A cat sat .")], methods=["gc", "if"], top=5)
    >>> answers.to_pandas()

An index of one's own is built by ``Index.build(model, rows, out)``; ``explain`` says why one prediction was made,
``audits`` and ``evaluations`` are what ``forebear audit`` and ``forebear evaluate`` measure, as functions.

Names are loaded when first used, so that ``import forebear`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__: str

if TYPE_CHECKING:
    from forebear.errors import (
        CorruptIndexError,
        DataError,
        ForebearError,
        InputError,
        InUseError,
        MismatchError,
        MissingStoreError,
        ModelError,
        NonFiniteError,
        NotEnoughMemoryError,
        OutputExistsError,
        StorageError,
    )
    from forebear.evaluation.python import audits, evaluations, worklists
    from forebear.evaluation.python.explaining import explain, saliency
    from forebear.evaluation.python.flipping import flip
    from forebear.indexer.building.build import build_index, fit_index
    from forebear.indexer.building.change import append_rows, rebuild_ann, retire_rows
    from forebear.indexer.building.options import BuildOptions
    from forebear.indexer.building.sharing.parts import build_part, commit_parts
    from forebear.indexer.building.verify import verify_index
    from forebear.indexer.index import Index
    from forebear.indexer.rows.opening import open_rows, rows_from_texts
    from forebear.indexer.rows.row_source import RowSource
    from forebear.indexer.training.callback import ForebearCallback
    from forebear.indexer.training.fine_tuning import train
    from forebear.indexer.training.model_choice import choose_model
    from forebear.indexer.training.options import TrainOptions
    from forebear.retriever.answers.show import show
    from forebear.retriever.question.methods import METHODS, Method
    from forebear.retriever.question.spec import QuerySpec
    from forebear.retriever.retriever import JointRetriever, Retriever

_HOMES = {  # the module that defines each public name; the imports above say the same to type checkers
    "forebear.errors": (
        "CorruptIndexError",
        "DataError",
        "ForebearError",
        "InUseError",
        "InputError",
        "MismatchError",
        "MissingStoreError",
        "ModelError",
        "NonFiniteError",
        "NotEnoughMemoryError",
        "OutputExistsError",
        "StorageError",
    ),
    "forebear.indexer.building.build": ("build_index", "fit_index"),
    "forebear.indexer.building.sharing.parts": ("build_part", "commit_parts"),
    "forebear.indexer.building.change": ("append_rows", "rebuild_ann", "retire_rows"),
    "forebear.indexer.rows.opening": ("open_rows", "rows_from_texts"),
    "forebear.indexer.rows.row_source": ("RowSource",),
    "forebear.indexer.index": ("Index",),
    "forebear.indexer.building.options": ("BuildOptions",),
    "forebear.indexer.training.model_choice": ("choose_model",),
    "forebear.indexer.training.callback": ("ForebearCallback",),
    "forebear.indexer.training.fine_tuning": ("train",),
    "forebear.indexer.training.options": ("TrainOptions",),
    "forebear.indexer.building.verify": ("verify_index",),
    "forebear.retriever.question.methods": ("METHODS", "Method"),
    "forebear.retriever.question.spec": ("QuerySpec",),
    "forebear.retriever.retriever": ("JointRetriever", "Retriever"),
    "forebear.retriever.answers.show": ("show",),
    "forebear.evaluation.python": ("audits", "evaluations", "worklists"),
    "forebear.evaluation.python.explaining": ("explain", "saliency"),
    "forebear.evaluation.python.flipping": ("flip",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "BuildOptions",
    "CorruptIndexError",
    "DataError",
    "ForebearCallback",
    "ForebearError",
    "InUseError",
    "Index",
    "InputError",
    "JointRetriever",
    "Method",
    "MismatchError",
    "MissingStoreError",
    "ModelError",
    "NonFiniteError",
    "NotEnoughMemoryError",
    "OutputExistsError",
    "QuerySpec",
    "Retriever",
    "RowSource",
    "StorageError",
    "TrainOptions",
    "append_rows",
    "audits",
    "build_index",
    "build_part",
    "choose_model",
    "commit_parts",
    "evaluations",
    "explain",
    "fit_index",
    "flip",
    "open_rows",
    "rebuild_ann",
    "retire_rows",
    "rows_from_texts",
    "saliency",
    "show",
    "train",
    "verify_index",
    "worklists",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("forebear")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'forebear' has no attribute {name!r}")
    home = importlib.import_module(_HOME_OF[name])
    return getattr(home, name) if hasattr(home, name) else importlib.import_module(f"{home.__name__}.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)
