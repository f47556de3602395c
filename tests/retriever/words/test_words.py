"""Methods by words against slow loops, captum and hand-made tf-idf: scores, contributions, both ends, pruning.

The oracles run plain transformers models in float64, one unpadded row at a time, and share no code with the package.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from conftest import error
from tiny import KINDS, WORDS, labels, make_tiny_model, sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from words_oracle import (
    ALL,
    ETAS,
    GRADIENTS,
    MODES,
    NAMES,
    TOLERANCE,
    World,
    ask,
    assert_ends,
    build,
    ends_of,
    gradients,
    ids_of,
    inputs_of,
    load,
    make_world,
    predicted,
    totals,
    truth_of,
)

from forebear import InputError, QuerySpec, Retriever
from forebear.indexer.rows.opening import rows_from_texts
from forebear.retriever.words import candidates
from forebear.retriever.words import scores as scores_module
from forebear.retriever.words import search as module
from forebear.retriever.words.vocabulary import frequent_tokens, token_texts

CAPTUM_ROWS, CAPTUM_QUERIES = 12, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module", params=[f"{kind}-{how}" for kind in KINDS for how in ("single", "pairs")])
def world(request, folder) -> World:
    kind, how = request.param.split("-")
    return make_world(folder, kind, how == "pairs", "fp16")


@pytest.fixture(scope="module")
def bert(folder) -> World:
    return make_world(folder, "bert", False, "fp16")


# --- the oracles ---


# --- scores ---


class Logits(nn.Module):
    """captum calls models as model(*batch[:-1])."""

    def __init__(self, path: str, keys: list[str]) -> None:
        super().__init__()
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64).eval()
        self.keys = keys

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.keys, args, strict=True))).logits


def captum_scores(world: World) -> np.ndarray:
    """TracInCP over the word embeddings, for the last queries and rows."""
    from captum.influence import TracInCP
    from torch.utils.data import DataLoader

    path, queries = world.models[-1], world.queries[-CAPTUM_QUERIES:]
    keys = list(inputs_of(path, queries[0]))

    def batches(texts, wanted) -> DataLoader:
        rows = zip(map(inputs_of, [path] * len(texts), texts), torch.tensor(wanted)[:, None], strict=True)
        return DataLoader([(*(x[key] for key in keys), y) for x, y in rows], batch_size=None, shuffle=False)

    def restore(model: nn.Module, checkpoint: str) -> float:
        model.model.load_state_dict(load(checkpoint)[0].state_dict())
        return ETAS[world.models.index(checkpoint)]

    wrapped = Logits(path, keys)
    (layer,) = [k for k, found in wrapped.named_modules() if found is wrapped.model.get_input_embeddings()]
    rows = batches(world.texts[-CAPTUM_ROWS:], world.labels[-CAPTUM_ROWS:])
    loss = nn.CrossEntropyLoss(reduction="none")
    tracin = TracInCP(wrapped, rows, list(world.models), restore, layers=[layer], loss_fn=loss)
    return tracin.influence(batches(queries, [predicted(path, text) for text in queries])).numpy()


@pytest.mark.slow
def test_tracin_we_equals_captum_and_the_gradients_of_the_embedding_matrix(world):
    found = world.retriever.scores(world.queries, "tracin-we")
    wanted = np.zeros_like(found)
    for path, eta in zip(world.models, ETAS, strict=True):
        rows = [gradients(path, *row)[1].ravel() for row in zip(world.texts, world.labels, strict=True)]
        asked = [gradients(path, text, predicted(world.models[-1], text))[1].ravel() for text in world.queries]
        wanted += eta * np.array(asked) @ np.array(rows).T
    assert error(found, wanted) <= TOLERANCE
    assert error(found[-CAPTUM_QUERIES:, -CAPTUM_ROWS:], captum_scores(world)) <= TOLERANCE
    np.testing.assert_array_equal(world.retriever.scores(world.queries, "tracin-layer:embedding"), found)


@pytest.mark.slow
@pytest.mark.parametrize("normalise", [False, True], ids=["", "normalised"])
def test_scores_rankings_and_contributions_equal_a_slow_loop(world, normalise):
    n = len(world.texts)
    whole = ask(world.retriever, world.queries, top=n, exact="full", normalise=normalise)
    few = ask(world.retriever, world.queries, top=3, normalise=normalise)
    for method in ALL:
        truth = truth_of(world, method, normalise=normalise)
        scores = totals(truth)
        if normalise:
            assert error(world.retriever.scores(world.queries, method, normalise=True), scores) <= TOLERANCE
        assert_ends(whole, scores, method, n)
        assert_ends(few, scores, method, 3)
        for q, row in enumerate(truth):
            for result in ends_of(few, q, method)[0]:
                found = dict(zip(result["word_ids"], result["contributions"], strict=True))
                assert found == pytest.approx(row[result["row"]], rel=0, abs=TOLERANCE * np.abs(scores[q]).max())


@pytest.mark.parametrize("exact", MODES)
def test_contributions_sum_to_the_score_and_name_their_words(bert, exact):
    tokenizer = load(bert.models[-1])[1]
    for normalise, others in ((False, ["gc", "tracin"]), (True, [])):
        rows = ask(bert.retriever, bert.queries, [*ALL, *others], top=9, exact=exact, normalise=normalise)
        largest = {method: max(abs(r["score"]) for r in rows if r["method"] == method) for method in ALL}
        for row in rows:
            if row["method"] in others:
                assert [row[name] for name in ("word_ids", "words", "contributions")] == [None] * 3
                continue
            assert abs(sum(row["contributions"]) - row["score"]) <= 1e-9 * largest[row["method"]]
            assert row["words"] == tokenizer.convert_ids_to_tokens(row["word_ids"])
            assert len(set(row["word_ids"])) == len(row["word_ids"])
            assert (np.diff(np.abs(row["contributions"])) <= 0).all()
            assert row["exact"] == (exact != "none" or row["method"] == "tracin-tfidf")


@pytest.mark.parametrize("target", ["gold", "LABEL_1"])
def test_gold_and_named_labels_are_the_queries_targets(bert, target):
    gold = labels(len(bert.queries), 3, seed=4)
    source = rows_from_texts(bert.queries, gold, label_names=NAMES)
    targets = gold if target == "gold" else [1] * len(gold)
    found = ask(bert.retriever, source, top=4, target=target)
    assert {r["query"]: r["target"] for r in found} == {q: NAMES[y] for q, y in enumerate(targets)}
    for method in ALL:
        assert_ends(found, totals(truth_of(bert, method, targets=targets)), method, 4)


@pytest.mark.slow
def test_answers_do_not_depend_on_the_other_queries_and_methods(bert, monkeypatch):
    whole = ask(bert.retriever, bert.queries, top=5)
    scale = {method: max(abs(r["score"]) for r in whole if r["method"] == method) for method in ALL}
    monkeypatch.setattr(module, "FULL_ROWS", 7)
    monkeypatch.setattr(module, "RERANK_ROWS", 9)
    by_query = [r | {"query": q} for q, text in enumerate(bert.queries) for r in ask(bert.retriever, [text], top=5)]
    by_method = [r for method in ALL for r in ask(bert.retriever, bert.queries, [method], top=5)]
    by_method.sort(key=lambda r: (r["query"], ALL.index(r["method"])))
    for other in (by_query, by_method, ask(bert.retriever, bert.queries, top=5, exact="full")):
        for one, same in zip(other, whole, strict=True):
            assert all(one[name] == same[name] for name in ("query", "method", "side", "rank", "row"))
            assert abs(one["score"] - same["score"]) <= 1e-6 * scale[one["method"]]


# --- ends of rankings ---


@pytest.fixture(scope="module")
def plain(folder) -> World:
    """One checkpoint; "green" is in rows 4, 9 and 11 alone, and rows 3, 13 and 19 are the same."""
    paths = (str(make_tiny_model(folder / "plain", "bert", 2)),)
    texts, gold = [text.replace("green", "blue") for text in sentences(20, seed=5)], labels(20)
    texts[13], texts[19], gold[13], gold[19] = texts[3], texts[3], gold[3], gold[3]
    texts = [text + " green" * (n in (4, 9, 11)) for n, text in enumerate(texts)]
    return World(paths, texts, gold, ["green"], build(folder / "few", paths, texts, gold))


def test_one_pass_over_the_rows_asked_for_serves_all_word_methods(plain, monkeypatch):
    retriever = plain.retriever
    spec = QuerySpec(methods=("tracin-we", "tracin-we-topk", "tracin-tfidf", "gd"))
    whole = retriever.score_block([["a film", "the plot"]], None, spec)
    read = []
    words_of = module.WordSearcher._words_of
    monkeypatch.setattr(
        module.WordSearcher, "_words_of", lambda self, rows, tops: read.append(rows) or words_of(self, rows, tops)
    )
    some = retriever.index.live[1::3]
    found = retriever.score_block([["a film", "the plot"]], None, spec, rows=some)
    assert [rows.tolist() for rows in read] == [some.tolist()]
    for name, scores in found.items():
        at = np.searchsorted(retriever.index.live, some)
        np.testing.assert_allclose(scores, whole[name][:, at], rtol=1e-5, atol=1e-12, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("exact", MODES)
@pytest.mark.parametrize("normalise", [False, True], ids=["", "normalised"])
def test_rows_that_share_no_word_fill_up_in_order_at_score_0(plain, exact, normalise):
    for method in ("tracin-we-nocommon", "tracin-tfidf"):
        scores = totals(truth_of(plain, method, normalise=normalise))
        assert np.flatnonzero(scores[0]).tolist() == [4, 9, 11]
        for top in (1, 2, 5, 20, 100):
            found = ask(plain.retriever, plain.queries, [method], top=top, exact=exact, normalise=normalise)
            assert_ends(found, scores, method, top, tolerance=1e-3 if exact == "none" else TOLERANCE)
            idle = [r for r in found if r["row"] not in (4, 9, 11)]
            assert all(r["score"] == 0 and r["words"] == r["contributions"] == [] for r in idle)


@pytest.mark.parametrize("exact", ["rerank", "full"])
@pytest.mark.parametrize("normalise", [False, True], ids=["", "normalised"])
def test_equal_rows_are_ranked_by_number(plain, exact, normalise):
    found = ask(plain.retriever, [plain.texts[3]], top=20, exact=exact, normalise=normalise)
    for method in ALL:
        for side in ends_of(found, 0, method):
            first = min(r["rank"] for r in side if r["row"] in (3, 13, 19))
            assert [r["row"] for r in side[first - 1 : first + 2]] == [3, 13, 19]


@pytest.mark.parametrize("exact", MODES)
@pytest.mark.parametrize("normalise", [False, True], ids=["", "normalised"])
@pytest.mark.parametrize("text", ["xyzzy", "", "the was"])
def test_a_query_without_a_shared_word_ranks_all_rows_at_0(plain, text, normalise, exact):
    found = ask(plain.retriever, [text], ["tracin-we-nocommon"], top=3, exact=exact, normalise=normalise)
    assert [(r["row"], r["score"], r["words"]) for r in found] == [(n, 0.0, []) for n in range(3)] * 2


def test_a_query_of_unknown_words_or_none_shares_start_and_end_alone(plain):
    for text in ("xyzzy", ""):
        asked = World(plain.models, plain.texts, plain.labels, [text], plain.retriever)
        found = ask(plain.retriever, [text], ALL[:3], top=20)
        assert {word for r in found for word in r["words"]} == {"[CLS]", "[SEP]"}
        for method in ALL[:3]:
            assert_ends(found, totals(truth_of(asked, method)), method, 20)


@pytest.mark.slow
def test_padding_in_the_text_and_words_beyond_the_limit_take_no_part(world):
    path, tokenizer = world.models[-1], load(world.models[-1])[1]
    assert ids_of(path, world.queries[-1]).count(tokenizer.pad_token_id) == 2
    assert len(ids_of(path, world.queries[3])) == 40
    for row in ask(world.retriever, world.queries, top=len(world.texts), exact="none"):
        assert set(row["word_ids"]) <= set(ids_of(path, world.queries[row["query"]])) - {tokenizer.pad_token_id}


@pytest.fixture(scope="module")
def confident(folder) -> Retriever:
    """A model that gives every label a probability of 1 - 1e-22."""
    path = make_tiny_model(folder / "confident")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.classifier.weight.mul_(0.1)
        model.classifier.bias.copy_(torch.tensor([50.0, 0.0]))
    model.save_pretrained(path)
    return build(folder / "sure", (str(path),), sentences(20, seed=5), [0] * 20)


@pytest.mark.parametrize("exact", MODES)
@pytest.mark.parametrize("normalise", [False, True], ids=["", "normalised"])
def test_gradients_whose_products_are_below_float32_are_ranked(confident, exact, normalise):
    scores = confident.scores(["a good film"], "tracin-we", normalise=normalise)
    assert (scores != 0).all()
    found = ask(confident, ["a good film"], ["tracin-we"], top=5, exact=exact, normalise=normalise)
    assert_ends(found, scores, "tracin-we", 5, tolerance=1e-3)


# --- pruning ---


@pytest.fixture(scope="module", params=["fp16", "int8"])
def tail(request, folder) -> World:
    """800 rows of Zipf words under a model sure of some rows and not of others."""
    paths = (str(make_tiny_model(folder / f"tail-{request.param}", "bert", 2, 1, 20.0)),)
    rng, p = np.random.default_rng(8), 1 / np.arange(len(WORDS), 0, -1) ** 1.2
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 9), p=p / p.sum())) for _ in range(800)]
    choices = {"shard_rows": 300, "batch_tokens": 4096, "words_precision": request.param}
    retriever = build(folder / f"zipf-{request.param}", paths, texts, labels(800), **choices)
    return World(paths, texts, labels(800), ["good green film story", "warm doctor", "red red blue"], retriever)


@pytest.mark.slow
@pytest.mark.parametrize("exact", ["none", "rerank"])
@pytest.mark.parametrize("normalise", [False, True], ids=["", "normalised"])
def test_pruning_reads_fewer_rows_and_changes_no_answer(tail, exact, normalise, monkeypatch):
    monkeypatch.setattr(candidates, "FIRST_ROWS", 4)
    n_read, read = [], candidates.CandidateSearch._most

    def counted(self, active, rows, share):
        n_read.append(len(active) * len(rows))
        return read(self, active, rows, share)

    monkeypatch.setattr(candidates.CandidateSearch, "_most", counted)
    for top, share in ((1, 0.7 if normalise else 0.3), (5, 0.95 if normalise else 0.5), (50, 1.0), (800, 1.0)):
        found, totals_read, queries = [], [], tail.queries[: 1 if top > 5 else None]
        for prune in (True, False):
            monkeypatch.setattr(tail.retriever.searcher("words"), "prune", prune)
            n_read.clear()
            found.append(ask(tail.retriever, queries, GRADIENTS, top=top, exact=exact, normalise=normalise))
            totals_read.append(sum(n_read))
        assert found[0] == found[1]
        assert 0 < totals_read[0] <= share * totals_read[1]


@pytest.mark.parametrize("normalise", [False, True], ids=["", "normalised"])
def test_what_pruning_finds_is_the_ranking_of_all_rows(tail, normalise, monkeypatch):
    monkeypatch.setattr(candidates, "FIRST_ROWS", 4)
    found, full = (
        ask(tail.retriever, tail.queries, GRADIENTS, top=7, normalise=normalise, exact=exact)
        for exact in ("rerank", "full")
    )
    assert [r["row"] for r in found] == [r["row"] for r in full]
    np.testing.assert_allclose([r["score"] for r in found], [r["score"] for r in full], rtol=1e-4)


@pytest.mark.parametrize("normalise", [False, True], ids=["", "normalised"])
def test_blocks_of_any_size_give_the_same_answer(tail, normalise, monkeypatch):
    asked = (tail.retriever, tail.queries, GRADIENTS)
    whole = ask(*asked, top=7, normalise=normalise, exact="none")
    monkeypatch.setattr(module, "BLOCK_QUERIES", 2)
    monkeypatch.setattr(module, "RERANK_ROWS", 9)
    monkeypatch.setattr(candidates, "_ENTRIES", 50)
    monkeypatch.setattr(candidates, "_VECTOR_BYTES", 64 * 3)  # three vectors of 16 numbers
    monkeypatch.setattr(scores_module, "_PRODUCT_BYTES", 256 * 3)
    assert ask(*asked, top=7, normalise=normalise, exact="none") == whole


# --- byte-level pieces ---


@pytest.fixture(scope="module")
def byte_level(folder) -> World:
    """RoBERTa's kind of pieces: with a space before them or without, some parts of a character."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "f"), ("i", "l"), ("Ġf", "il"), ("Ġfil", "m"), ("Ġ", ",")]
    special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    pieces = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    path = str(make_tiny_model(folder / "bytes", "roberta", 3))
    config = transformers.RobertaConfig.from_pretrained(path, vocab_size=len(pieces))
    torch.manual_seed(3)
    transformers.RobertaForSequenceClassification(config).save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(path)
    texts = ["the film , 漢", "a film", "the plot, a film", "漢字 film", "", "film film the", "naïve . the 字"]
    gold, queries = labels(len(texts), 3), ["the film , 漢", "naïve the film"]
    return World((path,), texts, gold, queries, build(folder / "b", (path,), texts, gold))


def test_byte_level_pieces_are_words_of_their_own(byte_level):
    methods = ["tracin-we", "tracin-we-topk", "tracin-tfidf"]
    found = ask(byte_level.retriever, byte_level.queries, methods, top=7)
    for method in methods:
        assert_ends(found, totals(truth_of(byte_level, method)), method, 7)
    words = {r["row"]: set(r["words"]) for r in ends_of(found, 0, "tracin-we")[0]}
    assert words[0] == {"<s>", "</s>", "the", " film", " ,", " ", "æ", "¼", "¢"}
    assert words[5] == {"<s>", "</s>", " film"}  # its "film" and " the" are others


def test_stop_words_and_punctuation_with_a_space_or_without_are_left_out(byte_level):
    tokenizer = load(byte_level.models[0])[1]
    left_out = set(tokenizer.convert_ids_to_tokens(frequent_tokens(tokenizer).tolist()))
    assert {"the", "Ġthe", ",", "Ġ,", ".", "a"} <= left_out
    assert not {"Ġfilm", "Ġ", "<s>", "</s>", "<unk>", "f"} & left_out


def test_continuations_of_words_are_no_stop_words():
    pieces = ["[UNK]", "The", "a", "##a", "##the", ",", "##,", "film", "’", "é", "5"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert [pieces[i] for i in frequent_tokens(tokenizer)] == ["The", "a", ",", "##,", "’"]


def test_bytes_of_a_character_are_no_punctuation(byte_level):
    """漢 is three bytes; the last is written as the piece "¢"."""
    tokenizer = load(byte_level.models[0])[1]
    ids = tokenizer("漢", add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, ids) == ["æ", "¼", "¢"]
    assert not set(ids) & set(frequent_tokens(tokenizer).tolist())


def test_normalise_is_refused_for_other_methods(bert):
    for methods in (["gc"], ["tracin-we", "gc"]):
        with pytest.raises(InputError, match="normalise=True is of methods by words, not of gc"):
            bert.retriever.retrieve(bert.queries, methods=methods, normalise=True)
