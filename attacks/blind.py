"""Classifiers that see the text only, never a model: whatever they find, membership did not put there.

Four kinds, because one alone misses what another finds: TF-IDF with naive Bayes, token counts with a small forest,
surface features with logistic regression, and a greedy choice of telling n-grams.  Text comes as token ids, so that no
private text leaves the score tables.  AUC is taken in each of five folds and averaged (fold models have scales of their
own); records of one group stay in one fold.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from attacks.statistics import Influence, Interval, auc_influence, logit_interval
from attacks.tables import TableError

FOLDS = 5
GREEDY_PICKS = 30


class TooFew(ValueError):
    """There are too few records, or too few groups, for every fold to hold both classes."""


class Features(NamedTuple):
    """What the classifiers see of d documents: token counts [d, U], 1- to 3-gram counts [d, G], surface [d, F]."""

    tokens: sparse.csr_array
    ngrams: sparse.csr_array
    surface: np.ndarray


def features(text: pd.DataFrame, token_counts: np.ndarray | None) -> Features:
    """Features of a text table (columns prompt_ids, response_ids, f_*).

    token_counts [V]: how often each token occurs in the public role, for the mean log-frequency; without it there is
    no such feature.
    n-grams of a single document are left out: they cannot link a test record to a training record.
    """
    documents = [np.concatenate(pair) for pair in zip(text["prompt_ids"], text["response_ids"], strict=True)]
    lengths = np.array([len(d) for d in documents])
    owner = np.repeat(np.arange(len(documents)), lengths)
    ids = np.concatenate(documents).astype(np.int64)
    base, gram, grams = ids.max() + 1, ids, []
    for n in (1, 2, 3):
        if n > 1:  # append the n-th token to the (n-1)-grams before it
            gram = np.unique(gram[:-1], return_inverse=True)[1] * base + ids[n - 1 :]
        inside = owner[: len(gram)] == owner[n - 1 :]
        grams.append(_counts(gram[inside], owner[: len(gram)][inside], len(documents)))
    columns = [text[[c for c in text if c.startswith("f_")]].to_numpy(float)]
    if token_counts is not None:
        if len(token_counts) < base:
            raise TableError(
                f"text/token_counts.npz counts {len(token_counts)} ids, the text tables have id {base - 1}"
            )
        smoothed = token_counts + 1
        frequency = np.log(smoothed / smoothed.sum())
        columns.append(np.bincount(owner, frequency[ids], len(documents)) / np.maximum(lengths, 1))
    columns += [text[name].map(len).to_numpy() for name in ("prompt_ids", "response_ids")]
    surface = np.column_stack(columns)
    return Features(grams[0], sparse.hstack(grams, format="csr"), surface)


def _counts(gram: np.ndarray, owner: np.ndarray, documents: int) -> sparse.csr_array:
    kinds, column = np.unique(gram, return_inverse=True)
    counts = sparse.csr_array((np.ones(len(gram)), (owner, column)), shape=(documents, len(kinds)))
    return counts[:, np.bincount(counts.indices, minlength=len(kinds)) > 1]


# --- classifiers: training rows and their labels in, scores of the test rows out -------------------------------------


def naive_bayes(seen: Features, train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    """TF-IDF of 1- to 3-grams, multinomial naive Bayes."""
    model = make_pipeline(TfidfTransformer(), MultinomialNB()).fit(seen.ngrams[train], labels)
    return np.diff(model.predict_log_proba(seen.ngrams[test]))[:, 0]


def forest(seen: Features, train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    """Counts of tokens in at least 5 % of the training documents, 100 trees of depth 2 with 5 or more per leaf."""
    used = np.bincount(seen.tokens[train].indices, minlength=seen.tokens.shape[1]) >= 0.05 * len(train)
    if not used.any():
        return np.zeros(len(test))
    model = RandomForestClassifier(100, max_depth=2, min_samples_leaf=5, random_state=seed)
    frequent = seen.tokens[:, used].toarray()
    return model.fit(frequent[train], labels).predict_proba(frequent[test])[:, 1]


def logistic(seen: Features, train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    """Logistic regression on lengths, digits, capitals, punctuation, lines and mean token frequency."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(seen.surface[train], labels)
    return model.decision_function(seen.surface[test])


def greedy(seen: Features, train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    """n-grams picked one by one, each for the documents of its class less those of the other that no pick covers yet.

    Score: picks for members found in the document, less picks for non-members.
    """
    present = seen.ngrams[train].astype(bool).astype(np.float64)
    by_gram, test_rows, scores = present.tocsc(), seen.ngrams[test], np.zeros(len(test))
    for sign in (1, -1):
        open_documents, picks = sign * (2.0 * labels - 1), []
        for _ in range(GREEDY_PICKS):
            gain = by_gram.T @ open_documents
            best = int(np.argmax(gain))
            if gain[best] <= 1:
                break
            picks.append(best)
            open_documents[by_gram.indices[by_gram.indptr[best] : by_gram.indptr[best + 1]]] = 0
        if picks:
            scores += sign * np.asarray((test_rows[:, picks] > 0).sum(axis=1)).ravel()
    return scores


CLASSIFIERS: dict[str, Callable] = {
    "naive_bayes": naive_bayes,
    "forest": forest,
    "logistic": logistic,
    "greedy": greedy,
}


def blind_aucs(
    text: pd.DataFrame, member: np.ndarray, token_counts: np.ndarray | None, seed: int
) -> dict[str, Influence]:
    """Fold-averaged AUC of every classifier, with influences in the order of the members and non-members in `text`.

    text: one row per evaluated record (group, prompt_ids, response_ids, f_*).  member: bool [d].
    token_counts: see `features`.
    Raises TooFew where a fold would lack a class.
    """
    m, n, groups = member.sum(), (~member).sum(), text["group"].nunique()
    if min(m, n, groups) < FOLDS:
        raise TooFew(f"{m} members and {n} non-members in {groups} groups: too few for {FOLDS} folds")
    seen = features(text, token_counts)
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    splits = list(folds.split(member, member, text["group"].to_numpy(str)))
    if any(len(np.unique(member[test])) < 2 or len(np.unique(member[train])) < 2 for train, test in splits):
        raise TooFew(f"too few groups: a fold of {FOLDS} has members or non-members only")
    return {
        name: _averaged(
            member, splits, [classify(seen, train, member[train].astype(int), test, seed) for train, test in splits]
        )
        for name, classify in CLASSIFIERS.items()
    }


def blind_interval(auc: Influence, level: float) -> Interval:
    """Interval of a fold-averaged AUC.

    The folds are not independent: any two records count twice, one training and the other tested and the other way
    round, so that without anything to find the variance is up to twice that within the folds.
    """
    se = float(np.sqrt(2 * auc.variance()))
    return logit_interval(auc.value, se, *auc.sizes, level, auc.df)


def _averaged(member: np.ndarray, splits: list, scores: list[np.ndarray]) -> Influence:
    """Mean AUC over folds; the spread of its influences is the spread within the folds."""
    influences, values = np.zeros(len(member)), []
    for (_, test), fold in zip(splits, scores, strict=True):
        inside = member[test]
        one = auc_influence(fold[inside], fold[~inside])
        values.append(one.value)
        for rows, part in ((test[inside], one.members), (test[~inside], one.nonmembers)):
            total = np.sum(member == member[rows[0]])  # of this class, over all folds
            influences[rows] = (part - one.value) * total / (len(part) * len(splits))
    return Influence(float(np.mean(values)), influences[member], influences[~member])
