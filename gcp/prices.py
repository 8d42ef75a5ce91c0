"""What a slice costs in an hour, from a file of prices that has a date."""

import dataclasses
import datetime
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcp.settings import Settings
from gcp.slices import Slice

FILE = Path(__file__).with_name("prices.toml")
_OLD = datetime.timedelta(days=180)


@dataclasses.dataclass(frozen=True)
class Prices:
    """Prices per chip and hour, by generation and region."""

    path: Path
    date: datetime.date
    table: Mapping[str, Mapping[str, Any]]

    def per_chip(self, generation: str, zone: str, provisioning: str) -> tuple[float, str] | None:
        """Returns dollars per chip and hour, and what they are; None if they are unknown."""
        table = self.table.get(generation, {})
        if provisioning == "spot" and (price := _of_region(table.get("spot", {}), zone)):
            return price, "spot"
        if price := _of_region(table, zone):
            return price, "at most, as on demand" if provisioning != "on-demand" else "on demand"
        return None

    def per_hour(self, slice_: Slice, zone: str, provisioning: str) -> float | None:
        """Returns dollars per hour; None if they are unknown."""
        found = self.per_chip(slice_.generation.name, zone, provisioning)
        return found and found[0] * slice_.chips

    def estimate(self, s: Settings) -> str:
        """Returns a sentence on what the slice of a run costs.

        Raises:
          ValueError: if that is unknown, or more than the run allows.
        """
        found = self.per_chip(s.slice.generation.name, s.zone, s.provisioning)
        if found is None:
            raise ValueError(
                f"{self.path} has no price of {s.slice.generation.name} in {s.region}; look it up "
                "at https://cloud.google.com/tpu/pricing and add it there, or give --prices FILE"
            )
        price, kind = found
        chips = s.slice.chips * s.slices
        total, what = price * chips, f"{s.slices} x {s.slice}" if s.slices > 1 else str(s.slice)
        if s.max_dollars_per_hour is not None and total > s.max_dollars_per_hour:
            raise ValueError(
                f"{what} costs ${total:,.2f} an hour ({kind}), and max_dollars_per_hour is "
                f"{s.max_dollars_per_hour:g}; take a smaller slice or raise it"
            )
        return (
            f"{what}: {chips} x ${price:.2f} = ${total:,.2f} an hour, "
            f"${24 * total:,.2f} a day ({kind}; prices of {self.date}, {self.path.name}"
            f"{self._age()}); disks and the bucket are extra"
        )

    def _age(self) -> str:
        old = datetime.date.today() - self.date > _OLD
        return ", which is old: compare them" if old else ""


def _of_region(table: Mapping[str, Any], zone: str) -> float | None:
    fitting = [name for name in table if name != "spot" and (zone + "-").startswith(f"{name}-")]
    return float(table[max(fitting, key=len)]) if fitting else None


def load(path: Path = FILE) -> Prices:
    """Returns the prices of a file.

    Raises:
      ValueError: if it cannot be read, or has no date or a price that is none.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--prices {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--prices {path} is no TOML: {error}") from None
    date = found.pop("date", None)
    if type(date) is not datetime.date:  # Not of a day with an hour.
        raise ValueError(f"--prices {path}: date is {date!r}; expected a day, as date = 2026-01-31")
    for name, table in found.items():
        for part, prices in ((name, table), (f"{name}.spot", _spot(table))):
            if not isinstance(prices, dict):
                raise ValueError(
                    f"--prices {path}: {part} is {prices!r}; expected prices by region, such as "
                    f"{part}.us = 1.20"
                )
            for region, price in prices.items():
                if region != "spot" and not _is_price(price):
                    raise ValueError(
                        f"--prices {path}: {part}.{region} is {price!r}; expected dollars"
                    )
    return Prices(path, date, found)


def _spot(table: Any) -> Any:
    return table.get("spot", {}) if isinstance(table, dict) else {}


def _is_price(price: Any) -> bool:
    is_number = isinstance(price, int | float) and not isinstance(price, bool)
    return is_number and 0 < price < math.inf
