"""A tiny convolutional classifier, no transformer: for layers that are convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput


class CnnConfig(transformers.PreTrainedConfig):
    model_type = "tiny-cnn"

    def __init__(self, vocab_size: int = 50, hidden_size: int = 10, **kwargs: Any) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)


class CnnForSequenceClassification(transformers.PreTrainedModel):
    config_class = CnnConfig
    base_model_prefix = "cnn"

    def __init__(self, config: CnnConfig) -> None:
        super().__init__(config)
        h = config.hidden_size
        self.cnn = nn.Module()
        self.cnn.words = nn.Embedding(config.vocab_size, h)
        self.cnn.layers = nn.ModuleList(
            [
                nn.Conv1d(h, 7, 4, padding="same", dilation=2),
                nn.Conv1d(7, 9, 3, padding=2, stride=2),
                nn.Conv1d(9, 9, 3, padding=1, bias=False),
                nn.Conv1d(9, 6, 1),
            ]
        )
        self.classifier = nn.Linear(6, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.cnn.words

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SequenceClassifierOutput:
        mask = attention_mask[:, None, :].to(self.dtype)
        x = self.cnn.words(input_ids).transpose(1, 2)
        for layer in self.cnn.layers:
            x = torch.tanh(layer(x * mask))
            if x.shape[2] != mask.shape[2]:  # positions that see a word, a stride apart
                mask = nn.functional.conv1d(mask, torch.ones(1, 1, 3), padding=2, stride=2).clamp(max=1)
        return SequenceClassifierOutput(logits=self.classifier((x * mask).sum(dim=2)))


transformers.AutoConfig.register(CnnConfig.model_type, CnnConfig)
transformers.AutoModelForSequenceClassification.register(CnnConfig, CnnForSequenceClassification)


def make_tiny_cnn(folder: Path, tokenizer_of: Path, n_classes: int = 3) -> Path:
    """Save one with the tokenizer of another model."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_of)
    config = CnnConfig(vocab_size=len(tokenizer), num_hidden_layers=4, num_labels=n_classes)
    model = CnnForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
