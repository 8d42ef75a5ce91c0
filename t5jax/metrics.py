"""Metrics of generated text: functions `fn(targets, predictions) -> {name: percent}`.

A target is one text, or a list of all acceptable texts (references); a prediction is one text. All
scores are between 0 and 100. A SeqIO task takes these functions as its `metric_fns`.

Sources: BLEU by sacreBLEU (arXiv:1804.08771), ROUGE by rouge-score (aclanthology.org/W04-1013),
answer normalization and F1 of SQuAD (arXiv:1606.05250). The settings are those of the T5 paper
(arXiv:1910.10683), so that scores can be compared with its tables.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence

Target = str | Sequence[str]
MetricFn = Callable[[Sequence[Target], Sequence[str]], dict[str, float]]

COPY_INPUT = "copy the input"
MOST_FREQUENT = "most frequent target"


def exact_match(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of predictions that are identical to a reference.

    Args:
      targets: N texts, or N lists of references.
      predictions: N texts.
    Returns:
      {"exact_match": percent}.
    Raises:
      ValueError: if N is 0 or the lengths differ, as for every metric here.
    """
    references = _references(targets, predictions)
    hits = [text in refs for refs, text in zip(references, predictions, strict=True)]
    return {"exact_match": _percent(hits)}


def accuracy(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Returns {"accuracy": percent} of correctly predicted labels, ignoring surrounding spaces.

    A prediction that is not a label counts as wrong.
    """
    references = _references(targets, predictions)
    hits = [
        text.strip() in {ref.strip() for ref in refs}
        for refs, text in zip(references, predictions, strict=True)
    ]
    return {"accuracy": _percent(hits)}


def token_f1(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Returns {"token_f1": percent}, the mean F1 of words shared with the best reference.

    Texts are normalized as for SQuAD: lower case, without punctuation and English articles. Two
    texts without any words left match (F1 1), as in SQuAD 2.0.
    """
    references = _references(targets, predictions)
    scores = [
        max(_word_f1(ref, text) for ref in refs)
        for refs, text in zip(references, predictions, strict=True)
    ]
    return {"token_f1": _percent(scores)}


def squad(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Returns {"em": percent, "f1": percent}, the two scores of SQuAD.

    em is the percentage of predictions that equal a reference after SQuAD's normalization (lower
    case, no punctuation, no English articles, single spaces); f1 is `token_f1`.
    """
    references = _references(targets, predictions)
    hits = [
        _normalise(text) in {_normalise(ref) for ref in refs}
        for refs, text in zip(references, predictions, strict=True)
    ]
    return {"em": _percent(hits), "f1": token_f1(targets, predictions)["token_f1"]}


def bleu(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Returns {"bleu": score}, sacreBLEU's corpus BLEU, from 0 to 100.

    Cased, international tokenization, exponential smoothing, as in the T5 paper. Most other papers
    use tokenization 13a, whose scores may differ by a few tenths. If all predictions are shorter
    than four words, the score is 0, since there are no 4-grams; see `char_bleu`.
    """
    return {"bleu": _corpus_bleu(targets, predictions, tokenize="intl")}


def char_bleu(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Returns {"char_bleu": score}, BLEU on characters, from 0 to 100: for very short answers."""
    return {"char_bleu": _corpus_bleu(targets, predictions, tokenize="char")}


def _corpus_bleu(targets: Sequence[Target], predictions: Sequence[str], tokenize: str) -> float:
    from sacrebleu.metrics.bleu import BLEU

    references = _references(targets, predictions)
    # sacreBLEU expects one list per reference, each as long as the corpus, padded with None.
    most = max(len(refs) for refs in references)
    padded = [[*refs, *[None] * (most - len(refs))] for refs in references]
    # force: no warning about text that looks tokenized.
    scorer = BLEU(tokenize=tokenize, smooth_method="exp", force=True)
    columns = [list(column) for column in zip(*padded, strict=True)]
    score = scorer.corpus_score(list(predictions), columns).score
    return min(float(score), 100.0)  # The product of precisions rounds above 100.


def rouge(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the mean F1 of 1-grams, 2-grams, and longest common subsequences of sentences.

    Each score is that of the best reference. Sentences for rougeLsum are the lines of a text; a
    text of one line is split after ".", "!" and "?". Words are not stemmed. ASCII text is tokenized
    as by rouge-score; letters of other alphabets, which it drops, are kept. Text without spaces
    (Chinese, Japanese, Thai) has to be segmented into words beforehand. A text of one word has no
    2-grams, so its rouge2 is 0.

    Returns:
      {"rouge1": percent, "rouge2": percent, "rougeLsum": percent}.
    """
    from rouge_score import rouge_scorer

    references = _references(targets, predictions)
    names = ("rouge1", "rouge2", "rougeLsum")
    scorer = rouge_scorer.RougeScorer(names, tokenizer=_RougeWords())
    scores = [
        scorer.score_multi([_split_sentences(ref) for ref in refs], _split_sentences(text))
        for refs, text in zip(references, predictions, strict=True)
    ]
    return {name: _percent([score[name].fmeasure for score in scores]) for name in names}


def compute(
    targets: Sequence[Target], predictions: Sequence[str], metric_fns: Sequence[MetricFn]
) -> dict[str, float]:
    """Returns the scores of several metrics as one dict.

    Raises:
      ValueError: if two of them return the same name.
    """
    scores: dict[str, float] = {}
    for fn in metric_fns:
        for name, value in fn(targets, predictions).items():
            if name in scores:
                raise ValueError(
                    f"two metrics return a score named {name}; the names have to differ within a "
                    "task: remove one of them"
                )
            scores[name] = float(value)
    return scores


def baselines(
    sources: Sequence[str],
    targets: Sequence[Target],
    train_targets: Sequence[Target],
    metric_fns: Sequence[MetricFn],
) -> dict[str, dict[str, float]]:
    """Returns the scores of two trivial predictors, to compare those of a model with.

    Args:
      sources: N inputs as the model reads them.
      targets: N texts or lists of references.
      train_targets: targets whose most frequent text is predicted (the first of several): those of
        the training split, or `targets` itself, which favours the baseline.
      metric_fns: metrics.
    Returns:
      {"copy the input": {metric: score}, "most frequent target": {metric: score}}.
    Raises:
      ValueError: if a list is empty or the lengths of sources and targets differ.
    """
    references = _references(train_targets, [""] * len(train_targets))
    counts = collections.Counter(ref for refs in references for ref in refs)
    frequent, _ = counts.most_common(1)[0]
    return {
        COPY_INPUT: compute(targets, sources, metric_fns),
        MOST_FREQUENT: compute(targets, [frequent] * len(targets), metric_fns),
    }


# --- Checks and means ---------------------------------------------------------------------------


def _references(targets: Sequence[Target], predictions: Sequence[str]) -> list[Sequence[str]]:
    """Checks targets and predictions; returns every target as a list of references."""
    if len(targets) != len(predictions):
        raise ValueError(
            f"{len(targets)} targets for {len(predictions)} predictions; a metric needs one "
            "target, or one list of references, for each prediction"
        )
    if not len(targets):
        raise ValueError(
            "no examples to score: targets and predictions are empty; expected at least one "
            "(is the split empty, or every example filtered out?)"
        )
    references = [[t] if isinstance(t, str) else t for t in targets]
    for i, refs in enumerate(references):
        if not isinstance(refs, (list, tuple)) or not all(isinstance(ref, str) for ref in refs):
            raise ValueError(
                f"target {i} is {refs!r}; expected a text or a list of texts (a task's "
                "postprocess_fn must return text for this metric)"
            )
        if not refs:
            raise ValueError(f"target {i} is an empty list; expected at least one reference")
        if not isinstance(predictions[i], str):
            raise ValueError(
                f"prediction {i} is {predictions[i]!r}; expected a text (a task's postprocess_fn "
                "must return text for this metric)"
            )
    return references


def _percent(shares: Sequence[float]) -> float:
    return 100.0 * sum(shares) / len(shares)


# --- Words --------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_LETTERS_AND_DIGITS = re.compile(r"[^\W_]+")


def _normalise(text: str) -> str:
    """Normalizes as SQuAD does. Punctuation is removed first: "a.b" becomes the word "ab"."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _word_f1(reference: str, text: str) -> float:
    reference_words, words = _normalise(reference).split(), _normalise(text).split()
    if not reference_words or not words:
        return float(reference_words == words)
    shared = sum((collections.Counter(reference_words) & collections.Counter(words)).values())
    # 2PR / (P + R) with P = shared / |words| and R = shared / |reference_words|.
    return 2 * shared / (len(reference_words) + len(words))


class _RougeWords:
    """A tokenizer for rouge-score: sequences of letters and digits, in lower case."""

    def tokenize(self, text: str) -> list[str]:
        return _LETTERS_AND_DIGITS.findall(text.lower())


def _split_sentences(text: str) -> str:
    return text if "\n" in text.strip() else _SENTENCE_END.sub("\n", text)
