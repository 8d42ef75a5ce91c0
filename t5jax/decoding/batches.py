"""Sequences in padded batches of few shapes."""

from collections.abc import Iterator, Sequence


def padded_batches(
    ids: Sequence[Sequence[int]], batch_size: int, parts: int
) -> Iterator[tuple[Sequence[Sequence[int]], int, int]]:
    """Yields the sequences in batches, each with the number of rows and the length to pad it to.

    To compile few shapes, all batches have the same number of rows, and lengths are powers of two,
    at least 16.

    Args:
      ids: the token ids of each sequence.
      batch_size: the maximum number of rows.
      parts: the number of devices that share the rows, which are rounded up to a multiple.
    """
    rows = num_rows(len(ids), batch_size, parts)
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        yield chunk, rows, power_of_two(max(map(len, chunk)), least=16)


def num_rows(num_sequences: int, batch_size: int, parts: int) -> int:
    """Returns the number of rows of every batch; arguments as for `padded_batches`."""
    rows = min(batch_size, power_of_two(num_sequences))
    return -(-rows // parts) * parts


def power_of_two(n: int, least: int = 1) -> int:
    """Returns the smallest power of two that is at least n."""
    return max(least, 1 << (n - 1).bit_length())
