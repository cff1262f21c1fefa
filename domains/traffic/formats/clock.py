"""The clock of a file without time stamps: what the user says of it, else what its publication says, which is
known by the numbers of steps and sensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from domains.traffic.series import check_clock, infer_interval, regular_clock
from zoo.errors import ConfigError, DataError

# Published series that carry no time stamps: (steps, sensors) -> first row, minutes, weekdays only.
PUBLISHED = {
    (34272, 207): ("2012-03-01", 5, False),  # METR-LA
    (2016, 207): ("2012-03-01", 5, False),  # Los-loop, its first week
    (52116, 325): ("2017-01-01", 5, False),  # PEMS-BAY
    (12672, 228): ("2012-05-01", 5, True),  # PeMSD7(M)
    (26208, 358): ("2018-09-01", 5, False),  # PEMS03
    (16992, 307): ("2018-01-01", 5, False),  # PEMS04
    (28224, 883): ("2017-05-01", 5, False),  # PEMS07
    (17856, 170): ("2016-07-01", 5, False),  # PEMS08
    (2976, 156): ("2015-01-01", 15, False),  # SZ-taxi
    (4368, 266): ("2016-04-01", 30, False),  # NYCTaxi
    (4368, 250): ("2016-04-01", 30, False),  # CHBike
}


@dataclass(frozen=True)
class Clock:
    """Makes time stamps for a file that has none, from what the user or the publication says."""

    path: Path
    start: str | None = None
    interval_minutes: int | None = None
    weekdays_only: bool | None = None

    def invent(self, steps: int, sensors: int) -> tuple[np.ndarray, int]:
        """Time stamps and interval of a series of this size."""
        start, interval, weekdays_only = PUBLISHED.get((steps, sensors), (None, None, False))
        start, interval = self.start or start, self.interval_minutes or interval
        if start is None or interval is None:
            raise DataError(
                f"{self.path} ({steps} steps, {sensors} sensors) has no time stamps: "
                "set data.start=YYYY-MM-DD and data.interval_minutes=5 (or what it is)."
            )
        check_clock(np.array([], dtype="datetime64[s]"), interval, self.path)
        weekdays_only = weekdays_only if self.weekdays_only is None else self.weekdays_only
        return regular_clock(self.first_row(start), steps, interval, weekdays_only), interval

    def first_row(self, start: str) -> np.datetime64:
        """The date and time that `start` writes."""
        try:
            return np.datetime64(str(start), "s")
        except ValueError:
            raise ConfigError(
                f"data.start={start!r} is no date; write YYYY-MM-DD or YYYY-MM-DDTHH:MM."
            ) from None

    def interval_of(self, timestamps: np.ndarray) -> int:
        """The interval of the file, which the user's must agree with."""
        return self.interval_minutes or infer_interval(timestamps, self.path)
