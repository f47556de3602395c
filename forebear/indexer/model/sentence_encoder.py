"""Un-tuned sentence embeddings, the baseline of Pez21: mean over tokens of the last layer, pairs encoded together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from forebear.errors import ModelError, NonFiniteError
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.batch_size import batch_tokens_on
from forebear.indexer.model.device.copies import Fetched, one_late
from forebear.indexer.model.device.memory import moved, run_batches
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.encoding import Encoded, Texts, distinct, plan_batches
from forebear.indexer.model.loading import check_finite_weights, load_tokenizer, resolve_model_name, weights_sha256
from forebear.indexer.model.network.batches import pad_batch, tokenize
from forebear.indexer.model.network.pretrained import load_pretrained
from forebear.indexer.model.network.probe import padding_matters
from forebear.indexer.model.network.tokenizer import input_limit, tokenizer_sha256

LONGEST = 512  # word pieces of a text: indexes hold embeddings of texts that were cut here


@dataclass(frozen=True)
class SentenceEncoder:
    """A transformers encoder used as it is.

    Attributes:
        name: Folder or hub name.
        model: The network, in ``eval()`` mode.
        tokenizer: The network's tokenizer.
        max_length: Longest input in word pieces.
        sha256: Digest of weights and tokenizer.
        equal_lengths: Whether embeddings depend on padding, so that only rows of one length share a batch.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    max_length: int
    sha256: str
    equal_lengths: bool

    def encode(self, texts: Sequence[Sequence[str]]) -> list[dict[str, list[int]]]:
        """Word pieces of rows of one or two texts, one list a text column."""
        return tokenize(self.tokenizer, texts, self.max_length)

    def embed(
        self,
        texts: Texts,
        *,
        batch_tokens: int | None = None,
        on_rows: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Embeddings of rows of one or two texts, ``(n, s)`` float32, not normalised.

        Rows of the same word pieces are run once and get equal numbers.

        Raises:
            NotEnoughMemoryError: Not even one row fits in memory.
            NonFiniteError: An embedding is NaN or infinite.
        """
        encoded = texts if isinstance(texts, Encoded) else Encoded(self.encode(texts))
        rows = encoded.rows
        device = next(self.model.parameters()).device
        out = np.empty((len(rows), int(self.model.config.hidden_size)), np.float32)  # type: ignore[union-attr, arg-type]
        first, kinds = distinct(encoded.digests)
        lengths = [len(rows[i]["input_ids"]) for i in first]

        def run(batch: list[int]) -> Fetched:
            inputs = pad_batch(self.tokenizer, [rows[i] for i in first[batch]], device)
            with torch.no_grad(), repeatable(device):
                states = self.model(**inputs).last_hidden_state
                mask = inputs["attention_mask"][:, :, None].to(states.dtype)
                return Fetched((states * mask).sum(dim=1) / mask.sum(dim=1))

        plan = plan_batches(
            lengths, batch_tokens or batch_tokens_on(device, self.model, out.shape[1]), equal_lengths=self.equal_lengths
        )
        batches = run_batches(plan, run, lengths=lengths, device=device, name=lambda i: f"row {first[i]}")
        for batch, (embeddings,) in one_late(batches):
            out[first[batch]] = embeddings
            if on_rows is not None:
                on_rows(len(batch))
        out = np.asarray(out[first[kinds]])
        if on_rows is not None and len(first) < len(rows):
            on_rows(len(rows) - len(first))
        if not np.isfinite(out).all():
            raise NonFiniteError(f"{self.name}: a sentence embedding is NaN or infinite. Check the sentence model.")
        return out


def load_sentence_encoder(name: str, *, device: str = "auto") -> SentenceEncoder:
    """Load an encoder from a folder or hub name (``minilm``: the packaged all-MiniLM-L6-v2)."""
    from transformers import AutoModel

    path = resolve_model_name(name)
    model, info = load_pretrained(AutoModel, path, output_loading_info=True, dtype=torch.float32)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # mean pooling needs none
    if missing:
        raise ModelError(
            f"{path} stores no weights for {missing[0]}: its embeddings would be random. Give another model."
        )
    where = pick_device(device)
    model = model.eval()
    check_finite_weights(model, path)
    tokenizer = load_tokenizer(path, model)
    digest = hashlib.sha256(
        (weights_sha256(model, leave_out=("pooler.",)) + tokenizer_sha256(tokenizer)).encode()
    ).hexdigest()
    limit = min(input_limit(model, tokenizer, None, path), LONGEST)

    def states(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = model(**batch).last_hidden_state
        return output

    equal_lengths = padding_matters(states, tokenizer, limit, next(model.parameters()).device, path)
    return SentenceEncoder(path, moved(model, where, path), tokenizer, limit, digest, equal_lengths)
