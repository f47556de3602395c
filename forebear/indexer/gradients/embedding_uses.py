"""Where differentiation starts: at a layer's input, or at the word embeddings, whose gradients may be wanted, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from forebear.errors import ModelError
from forebear.indexer.gradients.factors import EmbeddingFactors, wide
from forebear.indexer.model.device.copies import send
from forebear.indexer.model.scopes import Block

SCALE_TOLERANCE = 1e-4  # of a scaled embedding's largest number


def input_ids(tokenizer: Any, rows: Sequence[dict[str, list[int]]], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token ids of a batch, ``(b, t)``; -1 at padding, and where a text holds the padding token."""
    ids = batch["input_ids"]
    lengths = send(torch.tensor([len(row["input_ids"]) for row in rows]), ids.device)
    dropped = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
    if tokenizer.pad_token_id is not None:
        dropped |= ids == tokenizer.pad_token_id
    return ids.masked_fill(dropped, -1)


class EmbeddingUses:
    """Embeddings of a batch and their gradients, over all uses of the word embeddings in a pass."""

    def __init__(
        self,
        block: Block,
        model_name: str,
        tokenizer: Any,
        rows: Sequence[dict[str, list[int]]],
        batch: dict[str, torch.Tensor],
    ) -> None:
        """No use yet.

        Args:
            block: The word embeddings, or what enters the encoder.
            model_name: Name of the model, for messages.
            tokenizer: The model's tokenizer.
            rows: Encoded rows, ``b`` of them.
            batch: The rows as the model gets them.
        """
        self.name, self._model_name, self._padding = block.name, model_name, tokenizer.pad_token_id
        self._ids, self._input_ids = input_ids(tokenizer, rows, batch), batch["input_ids"]
        self._uses: list[EmbeddingFactors] = []

    def note(self, values: torch.Tensor, words: nn.Embedding | None, looked_up: torch.Tensor | None) -> None:
        """Take a use.

        Args:
            values: What the graph grows from, ``(b, t, e)``.
            words: The embeddings, where ``values`` are their output.
            looked_up: The ids whose embeddings they are.

        Raises:
            ModelError: It cannot be told which word piece an embedding belongs to.
        """
        if values.shape[:-1] != (looked_up if looked_up is not None else self._ids).shape:
            raise ModelError(
                f"{self._model_name}: {self.name} has {tuple(values.shape)} for {tuple(self._ids.shape)} word pieces, "
                "so words cannot be told apart. Leave the words store out."
            )
        ids, pieces = self._places(looked_up)
        scale = 1.0 if words is None or looked_up is None else self._scale(values, words, looked_up)
        number = len(self._uses)
        embeddings = wide(values.detach()) / scale
        self._uses.append(EmbeddingFactors(embeddings, torch.zeros_like(embeddings), ids, pieces))

        def arrived(delta: torch.Tensor) -> None:
            self._uses[number] = EmbeddingFactors(embeddings, wide(delta.detach()) * scale, ids, pieces)

        values.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _places(self, looked_up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of a use and the pieces they stand for: those of the row, or of a decoder, where each is one later."""
        n_pieces = self._ids.shape[1]
        pieces = torch.arange(n_pieces, device=self._ids.device).expand_as(self._ids)
        if looked_up is None:
            return self._ids, pieces.masked_fill(self._ids < 0, -1)
        kept = self._ids >= 0
        is_of_rows = looked_up is self._input_ids  # then a GPU's host need not wait for the answer
        if is_of_rows or (looked_up.shape[1] >= n_pieces and bool((looked_up[:, :n_pieces] == self._ids)[kept].all())):
            shift = 0
        elif looked_up.shape[1] == n_pieces and bool((looked_up[:, 1:] == self._ids[:, :-1])[kept[:, :-1]].all()):
            shift = 1  # a decoder begins with a token of its own
        else:
            raise ModelError(
                f"{self._model_name}: {self.name} looks up other word pieces than the row's, so words cannot be told "
                "apart. Leave the words store out."
            )
        known = torch.full_like(looked_up, -1)
        known[:, shift : shift + n_pieces] = pieces.masked_fill(~kept, -1)[:, : looked_up.shape[1] - shift]
        ids = looked_up.masked_fill(known < 0, -1)
        if shift and int(looked_up[0, 0]) != self._padding:  # its first token is no piece, and has a gradient
            ids[:, 0] = looked_up[:, 0]
        return ids, known

    def _scale(self, values: torch.Tensor, words: nn.Embedding, looked_up: torch.Tensor) -> float:
        """By what the module multiplies its embeddings (Gemma, mBART): values = scale * E.

        Raises:
            ModelError: The output is no multiple of the embeddings.
        """
        is_torchs = type(words) is nn.Embedding and "forward" not in vars(words)
        if is_torchs and len(words._forward_hooks) == 1:  # the hook is ours
            return 1.0
        plain = nn.functional.embedding(looked_up, words.weight.detach()).to(values.dtype)
        size = float((plain.double() ** 2).sum())
        scale = float((values.detach().double() * plain.double()).sum()) / size if size else 1.0
        apart = (values.detach() - scale * plain).abs().max()
        if not (scale and apart <= SCALE_TOLERANCE * values.detach().abs().max()):
            raise ModelError(
                f"{self._model_name}: {type(words).__name__} {self.name} gives more than a multiple of its embeddings, "
                "so there are no word gradients. Leave the words store out."
            )
        return 1.0 if abs(scale - 1.0) < SCALE_TOLERANCE else scale

    def factors(self) -> EmbeddingFactors:
        """Embeddings and gradients of all uses, side by side.

        Raises:
            ModelError: There was no use.
        """
        if not self._uses:
            raise ModelError(
                f"{self._model_name}: {self.name} is not used in a pass, so there are no word gradients. Leave the "
                "words store out."
            )
        return EmbeddingFactors.of_uses(self._uses)


class Root:
    """Where differentiation starts: at the output of the word embeddings, or at the input of a layer."""

    def __init__(self, modules: Sequence[nn.Module], *, is_embedding: bool) -> None:
        self._modules, self._is_embedding = modules, is_embedding

    @contextmanager
    def grown(self, embedding: EmbeddingUses | None) -> Iterator[None]:
        """Let gradients flow from here on: nothing below is differentiated.

        Args:
            embedding: Takes what is here and its gradients; None: not wanted.
        """

        def grow(
            values: torch.Tensor, words: nn.Embedding | None = None, ids: torch.Tensor | None = None
        ) -> torch.Tensor:
            values = values.detach().requires_grad_(True)
            if embedding is not None:
                embedding.note(values, words, ids)
            return values.clone()  # some models change it in place (CTRL)

        def after(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return grow(output, module, args[0])

        def before(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            if args:
                return (grow(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": grow(kwargs["hidden_states"])}

        with ExitStack() as hooks:
            for module in self._modules:
                if self._is_embedding:
                    handle = module.register_forward_hook(after)
                else:
                    handle = module.register_forward_pre_hook(before, with_kwargs=True)
                hooks.callback(handle.remove)
            yield
