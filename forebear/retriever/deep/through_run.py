"""``magic``: the derivative of a test row's loss with respect to the weight of every training row, through the run.

The score is minus the derivative: what the loss would rise by, in nats and to first order, if the row were left out of
the training (Ilyas and Engstrom 2025). Nothing of the index is compared but its rows, which must be those of the run;
the run is repeated to the last bit, or refused. Every row is scored.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from forebear.errors import InputError, MismatchError
from forebear.indexer.model.encoding import Texts, encoded_rows
from forebear.indexer.training.replay.derivative import loss_slopes, row_derivatives
from forebear.indexer.training.replay.opening import RecordedRun, check_repeatable, open_trajectory, threads_of
from forebear.indexer.training.replay.trajectory import Trajectory
from forebear.indexer.training.run import RUN_NAME
from forebear.progress import tell_note
from forebear.retriever.effects.smoothness import read_smoothness
from forebear.retriever.question.batch import Batch
from forebear.retriever.question.methods import Method
from forebear.retriever.question.models import Models
from forebear.retriever.question.recall import PROVEN, with_note
from forebear.retriever.question.searcher import Searcher
from forebear.retriever.question.spec import Question
from forebear.retriever.ranking import Ends, Ranking, rank
from forebear.retriever.scores import Scores
from forebear.wording import caller_of

ADJOINT_BYTES = 2 << 30  # of the questions that are taken back through the run together, at least one
COST = "about five trainings for one question, two for each further one"


class RunSearcher(Searcher):
    """Scores every training row by the derivative through the training run."""

    @override
    def search(self, question: Question, batch: Batch) -> dict[str, Ends]:
        scores = self._scores(batch.texts, batch.targets, np.arange(len(batch)))
        return self._ends(question, scores)

    @override
    def score(self, question: Question, batch: Batch, rows: np.ndarray) -> Scores:
        scores = self._scores(batch.texts, batch.targets, np.arange(len(batch)))
        return Scores({method.name: scores[:, rows] for method in question.methods})

    def search_sums(self, question: Question, texts: Texts, targets: np.ndarray, groups: np.ndarray) -> dict[str, Ends]:
        """:meth:`search` of the summed loss of each group of test rows, at the cost of one test row a group.

        Args:
            question: A question with only methods that this searcher answers for.
            texts: Test rows, one list a text column.
            targets: Whose loss is explained, of each row.
            groups: Number of each row's group, from 0, ``(q,)``.
        """
        return self._ends(question, self._scores(texts, targets, groups))

    @override
    @staticmethod
    def facts(question: Question, method: Method) -> dict[str, Any]:
        facts = {"unit": "nats, to first order, if the row is left out of the run", "cost": COST}
        found = question.index.run
        kept = None if found is None else read_smoothness(found[0])
        return with_note(PROVEN) | facts | ({} if kept is None else {"metasmoothness": str(kept)})

    def _ends(self, question: Question, scores: np.ndarray) -> dict[str, Ends]:
        live = self.index.live
        n_scored = np.full(len(scores), len(live))
        first, last = (
            Ranking(*rank(scores[:, live], live, question.top, largest=largest), True, n_scored)
            for largest in (True, False)
        )
        return {method.name: (first, last) for method in question.methods}

    def _scores(self, texts: Texts, targets: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Scores of all rows of the index, ``(groups, n)`` float64."""
        recorded = recorded_run(self.models)
        n_questions, n_steps = int(groups.max(initial=-1)) + 1, recorded.checkpoint.step
        tell_note("magic", f"{recorded.folder} is repeated ({n_steps:,} steps) and differentiated: {COST}.")
        with threads_of(recorded.run):
            begin = time.perf_counter()
            trajectory: Trajectory = self.models.keep("trajectory", lambda: open_trajectory(recorded))
            opened = time.perf_counter()
            rows = encoded_rows(trajectory.classifier, texts)
            n_bytes = 3 * sum(p.numel() * p.element_size() for p in trajectory.parameters)
            together = max(1, ADJOINT_BYTES // n_bytes)
            found = np.empty((n_questions, len(recorded.labels)))
            for start in range(0, len(found), together):
                of_part = np.flatnonzero((groups >= start) & (groups < start + together))
                part = [rows[i] for i in of_part.tolist()]
                slopes = loss_slopes(trajectory, part, targets[of_part], groups[of_part] - start)
                found[start : start + together] = -row_derivatives(trajectory, slopes)
        tell_note(
            "magic",
            f"repeated to the last bit in {opened - begin:.0f} s, differentiated for {n_questions:,} question(s) in "
            f"{time.perf_counter() - opened:.0f} s. How far first order reaches in this run: "
            f"{_reach(recorded.folder)}.",
        )
        return found + 0.0  # no -0.0


def _reach(folder: Path) -> str:
    """The metasmoothness of the run in a folder, where it is kept; else what measures it."""
    if (kept := read_smoothness(folder)) is not None:
        return f"metasmoothness {kept}"
    return caller_of("forebear evaluate metasmoothness --keep", "evaluations.metasmoothness(keep=True)")


def recorded_run(models: Models) -> RecordedRun:
    """The run that an index's last checkpoint comes from, if its rows are those of the index.

    Raises:
        InputError: There is no run, or it cannot be repeated.
        MismatchError: The index holds other rows, or labels, than the run was trained on.
    """
    index, manifest = models.index, models.index.manifest
    found = index.run
    if found is None:
        raise InputError(
            f"magic differentiates the training run, and {index.checkpoint_paths[-1]} lies in no run of forebear train "
            f"(no {RUN_NAME}). Give the run's folder by --model, or train by forebear train and index again."
        )
    folder, run, checkpoint = found
    check_repeatable(folder, run)
    _check_rows(models, folder, run.data_sha256)
    if run.label_names != manifest.spec.label_names or run.label_mode != manifest.spec.label_mode:
        raise MismatchError(
            f"{index.folder} holds the labels {', '.join(manifest.spec.label_names)}, and {folder} was trained on "
            f"{', '.join(run.label_names)}. Index the run with its own labels."
        )
    numbers = np.arange(manifest.n_rows)
    return RecordedRun(
        folder=Path(folder),
        run=run,
        checkpoint=checkpoint,
        checkpoint_sha256=manifest.checkpoints[-1].sha256,
        tokenizer_sha256=manifest.spec.tokenizer_sha256,
        texts=index.text_lists(numbers),
        labels=index.targets(numbers),
    )


def _check_rows(models: Models, folder: Path, data_sha256: str) -> None:
    """Refuse an index whose rows are not, one by one and in this order, those of the run."""
    manifest, name = models.index.manifest, models.index.folder
    first, *appended = manifest.segments
    if first.rows_sha256 != data_sha256:
        raise MismatchError(
            f"{name} holds other rows (sha256 {first.rows_sha256[:12]}) than {folder} was trained on (sha256 "
            f"{data_sha256[:12]}), so that its rows have no place in the run. Index the rows of the run."
        )
    if appended:
        n_rows = sum(segment.n_rows for segment in appended)
        raise MismatchError(
            f"{name} has {n_rows:,} rows that were appended after the run, which have no place in it. Index the rows "
            "of the run alone, or train again on all."
        )
