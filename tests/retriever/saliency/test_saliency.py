"""Saliency maps against plain autograd over ``inputs_embeds``, one row at a time, and against finite differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from places import HAS_MINILM, NO_MINILM
from tiny import KINDS, labels, make_tiny_model, sentences
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from forebear.errors import InputError, ModelError, NonFiniteError
from forebear.indexer.model import encoding as module
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.loading import make_classifier, resolve_model_name
from forebear.indexer.model.network.pretrained import load_pretrained
from forebear.retriever.saliency.maps import FORMS, saliency

TIMES, SUMMED = FORMS
N = 11
SINGLE = [[*sentences(N - 1, seed=11), ""]]
PAIRS = [SINGLE[0], [*sentences(N - 1, seed=12, low=1, high=40), "a film"]]  # some beyond the limit of 40 pieces
TARGETS = np.array(labels(N, 3))
HARD = ["Don't say it's unbelievably GOOD", "  Café, naïve \n\n 😀  ", "good good dull good", "", "xyzzy 漢字 dull"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saliency")


@pytest.fixture(scope="module", params=KINDS)
def path(request, folder):
    """Folder of a tiny model of each architecture."""
    return make_tiny_model(folder / request.param, request.param, n_classes=3)


def load(path, dtype: torch.dtype = torch.float64) -> Classifier:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)
    return make_classifier(model, transformers.AutoTokenizer.from_pretrained(path), name=str(path), device=CPU)


def make_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """BERT's rules ("##": lower case, continuations) or RoBERTa's ("Ġ"; "Ġ+" counts spaces in), few pieces known."""
    pad, unk, cls, sep = special = (
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if kind == "##" else ("<pad>", "<unk>", "<s>", "</s>")
    )
    if kind == "##":
        words = ["un", "##bel", "##iev", "##ably", "good", "dull", "don", "t", "'", "say", "it", "s", "caf", "##e", ","]
        backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*special, *words])}, unk_token=unk))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.post_processor = processors.BertProcessing((sep, 3), (cls, 2))
    else:
        merges = [("Ġ", "g"), ("o", "o"), ("Ġg", "oo"), ("d", "u"), ("l", "l")]
        words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
        backend = Tokenizer(models.BPE({w: i for i, w in enumerate([*special, *words])}, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.post_processor = processors.RobertaProcessing(
            (sep, 3), (cls, 2), trim_offsets=kind == "Ġ", add_prefix_space=False
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, unk_token=unk, cls_token=cls, sep_token=sep
    )


def with_tokenizer(folder, pieces: str) -> Classifier:
    """A tiny random model in float64 that has embeddings for such a tokenizer's vocabulary."""
    tokenizer, kind = make_tokenizer(pieces), "bert" if pieces == "##" else "roberta"
    config = transformers.AutoConfig.from_pretrained(make_tiny_model(folder / f"{kind}-shape", kind, n_classes=3))
    config.vocab_size = len(tokenizer)
    torch.manual_seed(4)
    model = transformers.AutoModelForSequenceClassification.from_config(config).double()
    return make_classifier(model, tokenizer, name=kind, device=CPU)


def run(classifier: Classifier, row, form: str, change=lambda e: e) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one row, and e ``(1, t, e)``, a leaf, changed before the model goes on.

    e is what the form differentiates at: the word embeddings, or what enters the first layer.
    """
    limit, model = classifier.max_length, classifier.model
    inputs = dict(classifier.tokenizer(*([t] for t in row), return_tensors="pt", truncation=True, max_length=limit))
    leaf: list[torch.Tensor] = []

    def grow(values: torch.Tensor) -> torch.Tensor:
        leaf.append(values.detach().requires_grad_(True))
        return change(leaf[0])

    if form == TIMES:
        e = grow(model.get_input_embeddings()(inputs.pop("input_ids")))
        return model(inputs_embeds=e, **inputs).logits, leaf[0]
    base = getattr(model, model.base_model_prefix)
    first = (base.transformer if hasattr(base, "transformer") else base.encoder).layer[0]
    hook = first.register_forward_pre_hook(lambda _module, args: (grow(args[0]), *args[1:]))
    try:
        return model(**inputs).logits, leaf[0]
    finally:
        hook.remove()


def by_autograd(classifier: Classifier, texts, targets, form: str) -> list[np.ndarray]:
    """Both forms as docs/methods.md writes them."""
    found = []
    for row, target in zip(zip(*texts, strict=True), targets, strict=True):
        logits, e = run(classifier, row, form)
        if form == TIMES:
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([int(target)]))
            s = -torch.einsum("bte,bte->t", torch.autograd.grad(loss, e)[0], e.detach())
            s = s / s.abs().sum()
        else:
            s = torch.autograd.grad(logits.softmax(dim=1)[0, int(target)], e)[0][0].sum(dim=1)
        found.append(s.double().numpy())
    return found


def values_of(maps) -> list[np.ndarray]:
    return [m.values for m in maps]


def words_of(maps) -> list[list[str]]:
    return [[w.text for w in m.words] for m in maps]


def worst(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """Largest max|difference| / max|value| of a row."""
    assert [len(f) for f in found] == [len(t) for t in truth]
    assert all(np.isfinite(f).all() and np.abs(t).max() > 0 for f, t in zip(found, truth, strict=True))
    return max(float(np.abs(f - t).max() / np.abs(t).max()) for f, t in zip(found, truth, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("texts", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_both_forms_are_those_of_autograd_whatever_the_batches(path, texts, form):
    """Truncated rows and an empty text among them."""
    double = load(path)
    truth = by_autograd(double, texts, TARGETS, form)
    # The terms of a sum nearly cancel; plain autograd in fp32 is as far off.
    for classifier, limit in ((double, 1e-10), (load(path, torch.float32), 1e-5 if form == TIMES else 5e-4)):
        for batch_tokens in (1, 90, 4096):
            found = saliency(classifier, texts, TARGETS, form=form, batch_tokens=batch_tokens)
            assert worst(values_of(found), truth) <= limit


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_finite_differences(path, form):
    """Of log S_y along e_t, and of S_y along a vector of ones, one position at a time."""
    classifier, row, target, step = load(path), ("a bad film is", "the actor"), 2, 1e-4

    @torch.no_grad()
    def moved(t: int, by: float) -> float:
        def change(e: torch.Tensor) -> torch.Tensor:
            there = e.detach().clone()
            there[0, t] += by * (e[0, t] if form == TIMES else 1.0)
            return there

        p = run(classifier, row, form, change)[0].log_softmax(dim=1)[0, target]
        return float(p if form == TIMES else p.exp())

    n_pieces = run(classifier, row, form)[1].shape[1]
    truth = np.array([(moved(t, step) - moved(t, -step)) / (2 * step) for t in range(n_pieces)])
    truth = truth / np.abs(truth).sum() if form == TIMES else truth
    (found,) = saliency(classifier, [[text] for text in row], [target], form=form)
    assert worst([found.values], [truth]) <= 1e-5


def test_at_the_word_embeddings_sums_over_dimensions_would_be_zero(path):
    """The LayerNorm after them does not see a constant added to every dimension: hence the encoder's input."""
    classifier = load(path)
    for text, target in zip(SINGLE[0][:3], TARGETS, strict=False):
        logits, e = run(classifier, (text,), TIMES)
        (at_words,) = torch.autograd.grad(logits.softmax(dim=1)[0, int(target)], e)
        assert float(at_words.sum(dim=2).abs().max()) < 1e-12 * float(at_words.abs().max())


def test_a_row_sums_to_one_and_its_words_are_its_text(path):
    """Start and end tokens count in the norm but are no words; here every word is one piece."""
    classifier = load(path, torch.float32)
    maps = saliency(classifier, PAIRS, TARGETS)
    assert any(len(m.pieces) == classifier.max_length for m in maps)
    for i, found in enumerate(maps):
        assert np.abs(found.values).sum() == pytest.approx(1.0, abs=1e-12)
        ends = (classifier.tokenizer.cls_token, classifier.tokenizer.sep_token)
        assert found.special.tolist() == [piece in ends for piece in found.pieces]
        assert [w.value for w in found.words] == found.values[~found.special].tolist()
        assert all(PAIRS[w.column][i][w.start : w.end] == w.text for w in found.words)
        for column in (0, 1):
            words, said = [w.text for w in found.words if w.column == column], PAIRS[column][i].split()
            assert words == (said[: len(words)] if len(found.pieces) == classifier.max_length else said)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pieces", ["##", "Ġ", "Ġ+"])
def test_words_sum_their_pieces(folder, pieces, form):
    """Whichever way the tokenizer counts spaces; white space is no word, repeated words keep their own values."""
    classifier, targets = with_tokenizer(folder, pieces), np.arange(len(HARD)) % 3
    maps = saliency(classifier, [HARD], targets, form=form)
    assert worst(values_of(maps), by_autograd(classifier, [HARD], targets, form)) <= 1e-10
    good, again = maps[2].words[:2]
    assert (good.start, good.end, again.start, again.end) == (0, 4, 5, 9)
    assert good.value != again.value
    if pieces == "##":
        first, last = ["Don", "'", "t", "say", "it", "'", "s", "unbelievably", "GOOD"], ["xyzzy", "漢", "字", "dull"]
        assert maps[0].pieces[8:12] == ("un", "##bel", "##iev", "##ably")
        assert maps[0].words[7].value == pytest.approx(maps[0].values[8:12].sum(), rel=1e-12)
        assert maps[4].pieces[1] == "[UNK]"
    else:
        first, last = ["Don", "'t", "say", "it", "'s", "unbelievably", "GOOD"], ["xyzzy", "漢字", "dull"]
        assert maps[2].pieces[1:7] == ("g", "oo", "d", "Ġgoo", "d", "Ġ")
        assert again.value == pytest.approx(maps[2].values[4:6].sum(), rel=1e-12)
    assert words_of(maps) == [first, ["Café", ",", "naïve", "😀"], ["good", "good", "dull", "good"], [], last]
    for i, found in enumerate(maps):
        assert all(HARD[i][w.start : w.end] == w.text for w in found.words)
        if i != 1:  # its white space is in pieces of its own
            assert sum(w.value for w in found.words) == pytest.approx(found.values[~found.special].sum(), rel=1e-9)


def test_cut_words_keep_what_is_left_and_special_tokens_in_the_text_are_words(folder):
    classifier = with_tokenizer(folder, "##")
    (cut,) = saliency(replace(classifier, max_length=5), [["good unbelievably dull"]], [0])
    assert cut.pieces == ("[CLS]", "good", "un", "##bel", "[SEP]")
    assert [(w.text, w.start, w.end) for w in cut.words] == [("good", 0, 4), ("unbel", 5, 10)]
    said = [["good [PAD] [SEP] dull"]]
    (found,) = saliency(classifier, said, [1])
    assert words_of([found]) == [["good", "[PAD]", "[SEP]", "dull"]]
    assert found.special.tolist() == [True, False, False, False, False, True]
    assert worst([found.values], by_autograd(classifier, said, [1], TIMES)) <= 1e-10


def test_rows_too_confident_for_fp32_keep_their_saliency_and_rows_without_gradient_are_zero(folder):
    """Of two classes the loss' gradient is a multiple of the margin's, however small; p_y is 1 to 40 digits."""
    model = make_tiny_model(folder / "confident", "bert")
    single, double = load(model, torch.float32), load(model)
    (logits,), e = run(double, ("a bad film",), TIMES)
    s = (torch.autograd.grad(logits.max() - logits.min(), e)[0] * e.detach()).sum(dim=2)[0]
    with torch.no_grad():
        single.head.weight.mul_(300 / float((logits.max() - logits.min()).detach()))
        truth, target = (s / s.abs().sum()).numpy(), [int(logits.argmax())]
        assert worst(values_of(saliency(single, [["a bad film"]], target)), [truth]) <= 1e-5
        single.head.weight.zero_()
    for form in FORMS:
        assert not any(m.values.any() for m in saliency(single, SINGLE, TARGETS % 2, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_of_nan_is_refused_by_row(folder, form):
    """Features and logits are fine; only the way back is broken, for the one row of six pieces."""
    classifier = load(make_tiny_model(folder / "nan", "bert"))

    def spoil(_module, _args, output):
        if output.shape[1] == 6:
            output.register_hook(lambda g: g * float("nan"))

    classifier.model.bert.encoder.layer[0].output.dense.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match="gradient of row 1 is NaN"):
        saliency(classifier, [["a", "a bad dull film", "the"]], [0, 0, 0], form=form, batch_tokens=1)


def test_what_cannot_be_answered_is_refused(folder, monkeypatch):
    classifier = load(make_tiny_model(folder / "refused", "bert"))
    assert saliency(classifier, [[]], []) == []
    with pytest.raises(InputError, match=r"form 'gradient' is not known. Give gradient-x-input or summed-gradient\."):
        saliency(classifier, [["a"]], [0], form="gradient")
    for targets in ([-1], [2], [0.5]):
        with pytest.raises(InputError, match="class ids, 0 to 1"):
            saliency(classifier, [["a"]], targets)
    for texts in ([["a"]], [["a", "b"], ["a"]]):
        with pytest.raises(InputError, match="Give one each"):
            saliency(classifier, texts, [0, 1])
    with pytest.raises(ModelError, match="CanineTokenizer does not say"):
        saliency(replace(classifier, tokenizer=transformers.CanineTokenizer()), [["a"]], [0])
    monkeypatch.setattr(module, "encode", lambda *_: [{"input_ids": [2, 1, 3]}])
    with pytest.raises(ModelError, match="other word pieces"):
        saliency(classifier, [["a"]], [0])


@pytest.mark.skipif(not HAS_MINILM, reason=NO_MINILM)
def test_words_of_the_packaged_minilm():
    torch.manual_seed(0)  # of the head
    name = resolve_model_name("minilm")
    model = load_pretrained(transformers.AutoModelForSequenceClassification, name, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    classifier = make_classifier(model, tokenizer, name="minilm", device=CPU)
    texts = [["I don't like Tokenization of naïve cafés 🤗!", "Good."], ["", "An antidisestablishmentarian's view"]]
    maps = saliency(classifier, texts, [0, 1])
    assert worst(values_of(maps), by_autograd(classifier, texts, [0, 1], TIMES)) <= 1e-10
    said = ["I", "don", "'", "t", "like", "Tokenization", "of", "naïve", "cafés", "🤗", "!"]
    assert words_of(maps) == [said, ["Good", ".", "An", "antidisestablishmentarian", "'", "s", "view"]]
    at = [i for i, piece in enumerate(maps[1].pieces) if piece == "anti" or piece.startswith("##")]
    assert len(at) > 2
    assert maps[1].words[3].value == pytest.approx(maps[1].values[at].sum(), rel=1e-12)
