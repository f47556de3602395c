"""A build loads every checkpoint once, with at most two in memory; fingerprints of the others are read from files."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import KINDS, labels, sentences

from forebear.errors import MismatchError, NonFiniteError
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.index import Index
from forebear.indexer.model.loading import load_classifier, stored_fingerprint
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.training.model_choice import choose_model

CHOICES = BuildOptions(
    scopes=("head", "all"), sketch_dim=8, sketch_bits=64, white_bits=64, calibration_queries=6, shard_rows=8
)


def rows() -> RowSource:
    return rows_from_texts(sentences(20, seed=3), labels(20, seed=4))


def as_pickled(folder: str, out: Path) -> Path:
    """A copy of a checkpoint as older versions of transformers saved it, which only loading reads."""
    copy = Path(shutil.copytree(folder, out))
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    return copy


def altered(folder: str, out: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a checkpoint with other tensors."""
    copy = Path(shutil.copytree(folder, out))
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


class Loads:
    """How often each folder's network was loaded, and how many networks were in memory afterwards at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loader: Any = None) -> None:
        loader = loader or transformers.AutoModelForSequenceClassification
        self.counts: Counter[str] = Counter()
        self.most = 0
        self._networks: list[weakref.ref[Any]] = []
        load = loader.from_pretrained

        def counted(name: str, *args: Any, **kwargs: Any) -> Any:
            found = load(name, *args, **kwargs)
            self.counts[str(name)] += 1
            self._networks.append(weakref.ref(found[0] if isinstance(found, tuple) else found))
            gc.collect()
            self.most = max(self.most, sum(network() is not None for network in self._networks))
            return found

        monkeypatch.setattr(loader, "from_pretrained", counted)


def test_every_checkpoint_is_loaded_once(
    tiny_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [tiny_model("bert", 2, seed) for seed in range(4)]
    loads = Loads(monkeypatch)
    build_index(rows(), tmp_path / "index", choose_model(None, models).checkpoints, CHOICES)
    assert loads.counts == dict.fromkeys(models, 1)
    assert loads.most == 2


def test_a_sentence_encoder_is_loaded_once(
    tiny_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny_model("bert", 2, 9)
    loads = Loads(monkeypatch, transformers.AutoModel)
    options = BuildOptions(stores=("features", "sbert"), sentence_model=encoder)
    build_index(rows(), tmp_path / "index", choose_model(None, [tiny_model("bert", 2, 0)]).checkpoints, options)
    assert loads.counts == {encoder: 1}


def test_two_that_only_loading_can_tell_are_loaded_once(
    tiny_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [str(as_pickled(tiny_model("bert", 2, seed), tmp_path / f"m{seed}")) for seed in range(3)]
    loads = Loads(monkeypatch)
    build_index(rows(), tmp_path / "index", choose_model(None, models[1:]).checkpoints, CHOICES)
    assert loads.counts == dict.fromkeys(models[1:], 1)
    build_index(rows(), tmp_path / "third", choose_model(None, models).checkpoints, CHOICES)
    assert loads.counts == {models[0]: 1, models[1]: 3, models[2]: 2}  # the one in the middle twice
    assert loads.most == 2


def test_the_same_index_either_way(tiny_model: Callable[..., str], tmp_path: Path) -> None:
    models = [tiny_model("bert", 2, seed) for seed in range(3)]
    pickled = [str(as_pickled(model, tmp_path / f"m{i}")) for i, model in enumerate(models)]
    for name, paths in (("stored", models), ("loaded", pickled)):
        build_index(rows(), tmp_path / name, choose_model(None, paths).checkpoints, CHOICES)
    stored, loaded = (Index.open(tmp_path / name).manifest for name in ("stored", "loaded"))
    assert stored.spec == loaded.spec
    assert stored.files == loaded.files


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_fingerprint_is_that_of_the_loaded_classifier(kind: str, tiny_model: Callable[..., str]) -> None:
    like, other = (tiny_model(kind, 2, seed) for seed in (0, 1))
    found, wanted = stored_fingerprint(other, load_classifier(like)), load_classifier(other)
    assert found is not None
    for name in ("feature_dim", "label_names", "sha256", "tokenizer_sha256"):
        assert getattr(found, name) == getattr(wanted, name)


def test_a_fingerprint_is_that_of_the_type_that_is_run(tiny_model: Callable[..., str], tmp_path: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: value.half() for key, value in tensors.items()})

    like = tiny_model("bert", 2, 0)
    half = str(altered(tiny_model("bert", 2, 1), tmp_path / "half", halve))
    found = stored_fingerprint(half, load_classifier(like))
    assert found is not None
    assert found.sha256 == load_classifier(half).sha256


def test_another_network_has_no_stored_fingerprint(tiny_model: Callable[..., str], tmp_path: Path) -> None:
    like = load_classifier(tiny_model("bert", 2, 0))
    without = altered(tiny_model("bert", 2, 1), tmp_path / "m", lambda tensors: tensors.pop("classifier.bias"))
    for other in (tiny_model("roberta", 2, 0), tiny_model("bert", 3, 0), str(without)):
        assert stored_fingerprint(other, like) is None
    damaged = Path(shutil.copytree(tiny_model("bert", 2, 1), tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"no header")
    assert stored_fingerprint(str(damaged), like) is None


def test_what_is_wrong_with_an_earlier_checkpoint_is_said_before_the_pass(
    tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    last = tiny_model("bert", 2, 0)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["bert.pooler.dense.weight"][0, 0] = float("nan")

    broken = altered(tiny_model("bert", 2, 1), tmp_path / "broken", spoil)
    with pytest.raises(NonFiniteError, match=r"bert\.pooler\.dense\.weight"):
        build_index(rows(), tmp_path / "i", choose_model(None, [str(broken), last]).checkpoints, CHOICES)
    named = Path(shutil.copytree(tiny_model("bert", 2, 1), tmp_path / "named"))
    config = transformers.AutoConfig.from_pretrained(named)
    config.id2label = {0: "good", 1: "bad"}
    config.save_pretrained(named)
    with pytest.raises(MismatchError, match=r"labels \['good', 'bad'\]"):
        build_index(rows(), tmp_path / "i", choose_model(None, [str(named), last]).checkpoints, CHOICES)
    assert not (tmp_path / "i").exists()
