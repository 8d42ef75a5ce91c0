"""Cleaning: named processing steps of a source, each of which counts the rows it drops.

    source.clean(
        normalize_unicode(),
        collapse_whitespace(),
        drop_missing("question", "answer"),
        length_between("answer", low=1, high=200, unit="words"),
        drop_duplicates("question"),
    )

Every step takes the names of the fields that it applies to, by default all fields of a row. Steps
that change texts also change those in lists and dicts within a field, but no numbers; they drop
nothing. Steps that drop rows also accept paths of nested fields ("answers.text.0"). The name of a
step is its call. No TensorFlow.
"""

import functools
import hashlib
import json
import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from t5jax.data.sources.source import Row, RowStep, get_field, no_field

# --- Steps that change texts --------------------------------------------------------------------


def normalize_unicode(*fields: str, form: str = "NFKC") -> RowStep:
    """Returns a step that applies a Unicode normalization form.

        normalize_unicode("question")   # "ﬁve ㎏" becomes "five kg"

    Args:
      fields: the names of the fields; none for all.
      form: "NFC" only composes accents; "NFKC", which T5's SentencePiece models also use, replaces
        ligatures, full-width letters and the like as well; "NFD" and "NFKD" decompose.
    Raises:
      ValueError: if the form is unknown; when rows are read, if a row does not have a field.
    """
    forms = ("NFC", "NFKC", "NFD", "NFKD")
    if form not in forms:
        raise ValueError(f"normalize_unicode: form is {form!r}; expected one of {', '.join(forms)}")
    change: Callable[[str], str] = functools.partial(unicodedata.normalize, form)  # type: ignore
    return _changing(_call("normalize_unicode", fields, form=form), fields, lambda: change)


def lower(*fields: str) -> RowStep:
    """Returns a step that lower-cases texts.

    lower("answer")   # "Paris" becomes "paris"

    Raises:
      ValueError: when rows are read, if a row does not have a field.
    """
    return _changing(_call("lower", fields), fields, lambda: str.lower)


def collapse_whitespace(*fields: str) -> RowStep:
    """Returns a step that replaces runs of white space by one space and strips both ends.

    collapse_whitespace("text")   # " two\\n lines " becomes "two lines"

    Raises:
      ValueError: when rows are read, if a row does not have a field.
    """
    name = _call("collapse_whitespace", fields)
    return _changing(name, fields, lambda: lambda text: " ".join(text.split()))


def remove_control_characters(*fields: str) -> RowStep:
    """Returns a step that removes control characters and normalizes line breaks to "\\n".

        remove_control_characters("text")   # "a\\x00b\\r\\n" becomes "ab\\n"

    Removes control characters except tab and "\\n", unpaired surrogates, noncharacters, byte order
    marks and zero-width spaces. Joiners and direction marks are kept, since emoji, Persian, Arabic
    and Hebrew need them.

    Raises:
      ValueError: when rows are read, if a row does not have a field.
    """

    def start() -> Callable[[str], str]:
        table = _Table(_is_text)
        return lambda text: text.replace("\r\n", "\n").replace("\r", "\n").translate(table)

    return _changing(_call("remove_control_characters", fields), fields, start)


def remove_special_characters(*fields: str, keep: str = ".,;:!?'\"()-") -> RowStep:
    """Returns a step that keeps only letters, accents, digits, white space and some punctuation.

        remove_special_characters("text")   # "caf\\u00e9 @ 5 €, ok?" becomes "café  5 , ok?"

    Letters and digits of all scripts are kept. Use `collapse_whitespace` afterwards to close gaps.

    Args:
      fields: the names of the fields; none for all.
      keep: the other characters to keep.
    Raises:
      ValueError: when rows are read, if a row does not have a field.
    """

    def start() -> Callable[[str], str]:
        table = _Table(lambda c: unicodedata.category(c)[0] in "LMN" or c.isspace() or c in keep)
        return lambda text: text.translate(table)

    return _changing(_call("remove_special_characters", fields, keep=keep), fields, start)


class _Table(dict[int, int | None]):
    """A table for `str.translate`, filled on demand."""

    def __init__(self, keep: Callable[[str], bool]):
        super().__init__()
        self._keep = keep

    def __missing__(self, code: int) -> int | None:
        self[code] = code if self._keep(chr(code)) else None
        return self[code]


def _is_text(character: str) -> bool:
    if character in "\t\n":
        return True
    if character in "\ufeff\u200b" or unicodedata.category(character) in ("Cc", "Cs"):
        return False
    code = ord(character)
    return not (0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE)  # Unicode's noncharacters.


# --- Steps that drop rows -----------------------------------------------------------------------


def drop_missing(*fields: str) -> RowStep:
    """Returns a step that drops rows in which a field is missing or empty.

        drop_missing("question", "answer")   # drops {"question": "Why?", "answer": " "}

    That is a field that is absent, None, NaN, blank text, or a list or dict of only these.
    """

    def is_whole(row: Row) -> bool:
        try:
            return not any(map(_says_nothing, _values(row, fields)))
        except ValueError:  # There is no such field.
            return False

    return _dropping(_call("drop_missing", fields), lambda: is_whole)


def drop_duplicates(*fields: str) -> RowStep:
    """Returns a step that keeps only the first of several rows of a split with equal fields.

        drop_duplicates("question")   # drops {"question": "Why?", ...} where one was before

    It stores a hash of 16 bytes per row. To also drop rows that only differ in case or white space,
    normalize these first.

    Raises:
      ValueError: when rows are read, if a row does not have a field.
    """

    def start() -> Callable[[Row], bool]:
        seen: set[bytes] = set()

        def is_new(row: Row) -> bool:
            key = json.dumps(_values(row, fields), sort_keys=True, default=repr).encode()
            digest = hashlib.blake2b(key, digest_size=16).digest()
            if digest in seen:
                return False
            seen.add(digest)
            return True

        return is_new

    return _dropping(_call("drop_duplicates", fields), start)


def drop_near_duplicates(
    *fields: str, threshold: float = 0.8, shingle: int = 5, num_perm: int = 128
) -> RowStep:
    """Returns a step that drops rows that are similar to an earlier one, by MinHash.

        drop_near_duplicates("text")   # drops "A cat sat on the mat!" after "a cat sat on the mat"

    The similarity of two rows is the Jaccard index of their sets of character n-grams, after
    lower-casing and collapsing white space. It is estimated from `num_perm` hashes with an error of
    about 1 / sqrt(num_perm). The step stores about 8 bytes × num_perm per row, and compares only
    likely candidates, which it finds with datasketch's locality-sensitive hashing. The result is
    deterministic.

    Source: Broder 1997, "On the resemblance and containment of documents"; for language models, Lee
    et al. 2022 (arXiv:2107.06499), who use n-grams of words, which not all scripts separate.

    Args:
      fields: the names of the fields; none for all.
      threshold: the least similarity of duplicates, in (0, 1).
      shingle: characters per n-gram.
      num_perm: hashes per row.
    Raises:
      ValueError: if a value is out of range; when rows are read, if a row does not have a field.
    """
    if not 0 < threshold < 1:
        raise ValueError(
            f"drop_near_duplicates: threshold is {threshold}; expected a share between 0 and 1 "
            "(drop_duplicates drops what is equal)"
        )
    if shingle < 1 or num_perm < 16:
        raise ValueError(
            f"drop_near_duplicates: shingle is {shingle} and num_perm {num_perm}; expected at "
            "least 1 and 16"
        )

    def start() -> Callable[[Row], bool]:
        from datasketch import LeanMinHash, MinHash, MinHashLSH

        empty = MinHash(num_perm=num_perm)
        index = MinHashLSH(threshold=threshold, num_perm=num_perm)
        kept: list[Any] = []

        def is_new(row: Row) -> bool:
            text = " ".join(" ".join(_texts(_values(row, fields))).lower().split())
            runs = {text[i : i + shingle] for i in range(max(len(text) - shingle, 0) + 1)}
            minhash = empty.copy()
            minhash.update_batch([run.encode(errors="surrogatepass") for run in sorted(runs)])
            # The index finds candidates, the hashes decide.
            if any(minhash.jaccard(kept[i]) >= threshold for i in index.query(minhash)):
                return False
            index.insert(len(kept), minhash)
            kept.append(LeanMinHash(minhash))
            return True

        return is_new

    settings = {"threshold": threshold, "shingle": shingle, "num_perm": num_perm}
    return _dropping(_call("drop_near_duplicates", fields, **settings), start)


def length_between(
    *fields: str, low: float = 0, high: float = math.inf, unit: str = "characters"
) -> RowStep:
    """Returns a step that keeps rows in which the length of each field is in [low, high].

        length_between("question", low=3, high=100, unit="words")

    Args:
      fields: the names of the fields; none for all. The lengths of texts in a list are added.
      low: the minimum length.
      high: the maximum length.
      unit: "characters", or "words" separated by white space.
    Raises:
      ValueError: if the bounds exclude nothing or everything, or the unit is unknown; when rows are
        read, if a row does not have a field.
    """
    bounds = _bounds("length_between", low, high)
    length = _length_in("length_between", unit)

    def fits(row: Row) -> bool:
        return all(low <= length(value) <= high for value in _values(row, fields))

    return _dropping(_call("length_between", fields, **bounds, unit=unit), lambda: fits)


def ratio_between(
    numerator: str,
    denominator: str,
    *,
    low: float = 0,
    high: float = math.inf,
    unit: str = "characters",
) -> RowStep:
    """Returns a step that keeps rows in which the ratio of two fields' lengths is in [low, high].

        ratio_between("german", "english", low=0.5, high=2)   # drops bad translations

    Args:
      numerator: the name of the field whose length is divided.
      denominator: the name of the other field. A row in which it is empty is dropped.
      low: the minimum ratio.
      high: the maximum ratio.
      unit: "characters", or "words" separated by white space.
    Raises:
      ValueError: as for `length_between`.
    """
    bounds = _bounds("ratio_between", low, high)
    length = _length_in("ratio_between", unit)

    def fits(row: Row) -> bool:
        over, under = (length(get_field(row, field)) for field in (numerator, denominator))
        return under > 0 and low <= over / under <= high

    name = _call("ratio_between", (numerator, denominator), **bounds, unit=unit)
    return _dropping(name, lambda: fits)


# --- Shared by the steps ------------------------------------------------------------------------


def _call(function: str, fields: tuple[str, ...], **options: Any) -> str:
    """Returns the name of a step: its call."""
    for field in fields:
        if not isinstance(field, str):
            raise ValueError(
                f"{function}: {field!r:.60} is not the name of a field; expected texts, such as "
                f'{function}("question", "answer")'
            )
    return f"{function}({', '.join([*fields, *(f'{k}={v!r}' for k, v in options.items())])})"


def _changing(
    name: str, fields: tuple[str, ...], start: Callable[[], Callable[[str], str]]
) -> RowStep:
    """Returns a step that changes texts by the function that `start()` returns."""

    def begin() -> Callable[[Row], Row | None]:
        function = start()

        def change(row: Row) -> Row:
            for field in fields:
                if field not in row:
                    raise ValueError(f"{name}: {no_field(field, row)}")
            return {**row} | {key: _map_texts(function, row[key]) for key in fields or row}

        return change

    return RowStep(name, begin)


def _dropping(name: str, start: Callable[[], Callable[[Row], bool]]) -> RowStep:
    """Returns a step that keeps the rows for which the function that `start()` returns is true."""

    def begin() -> Callable[[Row], Row | None]:
        keeps = start()
        return lambda row: row if keeps(row) else None

    return RowStep(name, begin)


def _values(row: Row, fields: tuple[str, ...]) -> list[Any]:
    """Returns the values of fields, or of all."""
    return [get_field(row, field) for field in fields] if fields else list(row.values())


def _map_texts(function: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_texts(function, item) for item in value]
    return value


def _texts(value: Any) -> Iterator[str]:
    """Yields the texts in a value; numbers are converted to text."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif value is not None:
        yield str(value)


def _says_nothing(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(map(_says_nothing, value))
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _bounds(step: str, low: float, high: float) -> dict[str, float]:
    """Checks the bounds; returns those that are not trivial."""
    bounds = {"low": low} if low > 0 else {}
    bounds |= {"high": high} if high < math.inf else {}
    if not bounds or not low <= high:
        raise ValueError(
            f"{step}: low is {low} and high is {high}, which keep "
            f"{'no row' if bounds else 'every row'}; set low, high or both, low <= high"
        )
    return bounds


def _length_in(step: str, unit: str) -> Callable[[Any], int]:
    sizes = {"characters": len, "words": lambda text: len(text.split())}
    if unit not in sizes:
        raise ValueError(f"{step}: unit is {unit!r}; expected {' or '.join(sizes)}")
    size = sizes[unit]
    return lambda value: sum(map(size, _texts(value)))
