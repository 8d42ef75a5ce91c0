"""Metrics of generated text.

Sources: BLEU and chrF by sacreBLEU (arXiv:1804.08771, aclanthology.org/W15-3049), ROUGE by
rouge-score (aclanthology.org/W04-1013), answer normalization and F1 of SQuAD (arXiv:1606.05250).
The settings are those of the T5 paper (arXiv:1910.10683), so that scores can be compared with its
tables.
"""

import collections
import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5jax.metrics.statistics import Means, Sums, statistic
from t5jax.metrics.targets import canonical, text_references, value_references


@statistic
def exact_match(targets: Sequence[Any], predictions: Sequence[Any]) -> Means:
    """Returns the percentage of predictions that are identical to a reference.

    Args:
      targets: N texts, numbers or lists of tags, or N lists of references.
      predictions: N texts, numbers or lists of tags.
    Returns:
      {"exact_match": percent}.
    Raises:
      ValueError: if N is 0, the lengths differ, or targets and predictions are not of the kinds
        that the metric needs, as for every metric here.
    """
    references, values = value_references(targets, predictions)
    hits = [value in refs for refs, value in zip(references, values, strict=True)]
    return Means(exact_match=hits)


@statistic
def token_f1(targets: Sequence[Any], predictions: Sequence[str]) -> Means:
    """Returns {"token_f1": percent}, the mean F1 of words shared with the best reference.

    Texts are normalized as for SQuAD: lower case, without ASCII punctuation and English articles.
    Two texts without any words left match (F1 1), as in SQuAD 2.0.
    """
    return Means(token_f1=_word_f1s(text_references(targets, predictions), predictions))


@statistic
def squad(targets: Sequence[Any], predictions: Sequence[str]) -> Means:
    """Returns {"em": percent, "f1": percent}, the two scores of SQuAD.

    em is the percentage of predictions that equal a reference after SQuAD's normalization (lower
    case, no punctuation, no English articles, single spaces); f1 is `token_f1`.
    """
    references = text_references(targets, predictions)
    hits = [
        _normalize(text) in {_normalize(ref) for ref in refs}
        for refs, text in zip(references, predictions, strict=True)
    ]
    return Means(em=hits, f1=_word_f1s(references, predictions))


@statistic
def bleu(targets: Sequence[Any], predictions: Sequence[str]) -> Sums:
    """Returns {"bleu": score}, sacreBLEU's corpus BLEU, from 0 to 100.

    Cased, international tokenization, exponential smoothing, as in the T5 paper. Most other papers
    use tokenization 13a, whose scores may differ by a few tenths. If all predictions are shorter
    than four words, the score is 0, since there are no 4-grams; see `char_bleu`.
    """
    return _corpus_bleu("bleu", targets, predictions, tokenize="intl")


@statistic
def char_bleu(targets: Sequence[Any], predictions: Sequence[str]) -> Sums:
    """Returns {"char_bleu": score}, BLEU on characters, from 0 to 100: for very short answers."""
    return _corpus_bleu("char_bleu", targets, predictions, tokenize="char")


@statistic
def chrf(targets: Sequence[Any], predictions: Sequence[str], *, word_order: int = 0) -> Sums:
    """Returns {"chrf": score}, sacreBLEU's corpus chrF2 of character 6-grams, from 0 to 100.

    Args:
      word_order: 2 adds word bigrams: chrF++, as `functools.partial(chrf, word_order=2)`.
    """
    from sacrebleu.metrics.chrf import CHRF

    return _corpus_score("chrf", CHRF(word_order=word_order), targets, predictions)


def _corpus_bleu(
    name: str, targets: Sequence[Any], predictions: Sequence[str], tokenize: str
) -> Sums:
    from sacrebleu.metrics.bleu import BLEU

    # force: no warning about text that looks tokenized.
    scorer = BLEU(tokenize=tokenize, smooth_method="exp", force=True)
    return _corpus_score(name, scorer, targets, predictions)


def _corpus_score(
    name: str, scorer: Any, targets: Sequence[Any], predictions: Sequence[str]
) -> Sums:
    references = text_references(targets, predictions)
    # sacreBLEU expects one list per reference, each as long as the corpus, padded with None.
    most = max(len(refs) for refs in references)
    padded = [[*refs, *[None] * (most - len(refs))] for refs in references]
    columns = [list(column) for column in zip(*padded, strict=True)]
    # The counts of each text and the score of their sums, of which `corpus_score` consists.
    counts = scorer._extract_corpus_statistics(list(predictions), columns)

    def finish(sums: np.ndarray) -> dict[str, float]:
        score = scorer._compute_score_from_stats([int(n) for n in sums]).score
        return {name: min(float(score), 100.0)}  # The product of precisions rounds above 100.

    return Sums(counts, finish)


@statistic
def rouge(targets: Sequence[Any], predictions: Sequence[str]) -> Means:
    """Returns the mean F1 of 1-grams, 2-grams, and longest common subsequences of sentences.

    Each score is that of the best reference. Sentences for rougeLsum are the lines of a text; a
    text of one line is split after ".", "!" and "?". Words are not stemmed. ASCII text is tokenized
    as by rouge-score; of other alphabets, which it drops, words are the sequences of letters, marks
    and numbers. Text without spaces (Chinese, Japanese, Thai) has to be segmented into words
    beforehand. A text of one word has no 2-grams, so its rouge2 is 0.

    Returns:
      {"rouge1": percent, "rouge2": percent, "rougeLsum": percent}.
    """
    from rouge_score import rouge_scorer

    references = text_references(targets, predictions)
    names = ("rouge1", "rouge2", "rougeLsum")
    scorer = rouge_scorer.RougeScorer(names, tokenizer=_RougeWords())
    scores = [
        scorer.score_multi([_split_sentences(ref) for ref in refs], _split_sentences(text))
        for refs, text in zip(references, predictions, strict=True)
    ]
    return Means(**{name: [score[name].fmeasure for score in scores] for name in names})


# --- Words --------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def _normalize(text: str) -> str:
    """Normalizes as SQuAD does. Punctuation is removed first: "a.b" becomes the word "ab"."""
    text = canonical(text.lower()).translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _word_f1s(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> list[float]:
    return [
        max(_word_f1(ref, text) for ref in refs)
        for refs, text in zip(references, predictions, strict=True)
    ]


def _word_f1(reference: str, text: str) -> float:
    reference_words, words = _normalize(reference).split(), _normalize(text).split()
    if not reference_words or not words:
        return float(reference_words == words)
    shared = sum((collections.Counter(reference_words) & collections.Counter(words)).values())
    # 2PR / (P + R) with P = shared / |words| and R = shared / |reference_words|.
    return 2 * shared / (len(reference_words) + len(words))


class _RougeWords:
    """A tokenizer for rouge-score: sequences of letters, marks and numbers, in lower case.

    Marks are what the vowel signs of Indic scripts are, for instance. Invisible joiners neither end
    a word nor distinguish it.
    """

    def tokenize(self, text: str) -> list[str]:
        marked = canonical(text.lower()).translate(_WORD_CHARACTERS)
        # An emoji leaves its mark behind, which alone is no word.
        return [word for word in marked.split() if any(map(str.isalnum, word))]


class _WordCharacters(dict[int, int | None]):
    """For `str.translate`: keeps what words consist of, and replaces everything else by a space."""

    def __missing__(self, code: int) -> int | None:
        category = unicodedata.category(chr(code))
        if category == "Cf" and code != _ZERO_WIDTH_SPACE:
            kept = None
        else:
            kept = code if category[0] in "LMN" else ord(" ")
        self[code] = kept
        return kept


_ZERO_WIDTH_SPACE = 0x200B  # Separates words, unlike the other characters of its category.
_WORD_CHARACTERS = _WordCharacters()


def _split_sentences(text: str) -> str:
    return text if "\n" in text.strip() else _SENTENCE_END.sub("\n", text)
