"""When the next task of a series is due."""

import calendar
from datetime import date, timedelta


def next_due_date(due_date: date, recurring: str, anchor_day: int) -> date | None:
    """Return the day after *due_date* in a series, or None after the last day of the calendar.

    *anchor_day* is the intended day of the month: a month without it takes its last day.
    """
    if recurring == "monthly":
        return _in_next_month(due_date, anchor_day)
    try:
        return due_date + timedelta(days=7 if recurring == "weekly" else 1)
    except OverflowError:
        return None


def _in_next_month(due_date: date, day: int) -> date | None:
    year, month = (due_date.year + 1, 1) if due_date.month == 12 else (due_date.year, due_date.month + 1)
    if year > date.max.year:
        return None
    return date(year, month, min(day, calendar.monthrange(year, month)[1]))
