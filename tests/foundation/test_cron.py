from __future__ import annotations

import pytest
from dagster import ScheduleDefinition

from distill_assets.foundation.cron import is_cron

TAKEN = (
    "0 2 * * *", " 0  2 * * * ", "00 02 * * *", "@daily", "@Midnight", "0,30 8-18/2 * jan-jun mon,WED", "*/15 * * * *",
    "5/10 22-2 * * fri-mon", "0 0 l * *", "0 0 1,L * 7", "0 0 ? * l5", "0 0 * * 5#2", "0 0 * * sun#1", "0 0 31 1,2 *",
)  # fmt: skip
REFUSED = (
    "whenever", "", "* * * *", "0 0 * * * *", "60 * * * *", "0 24 * * *", "0 0 0 * *", "0 0 32 * *", "0 2 * 0 *",
    "0 2 * 13 *", "0 2 * * 8", "0 2 * * monday", "a * * * *", "1,,2 * * * *", "-1 * * * *", "*/0 * * * *",
    "1-5/0 * * * *", "0 0 30 feb *", "0 0 31 2 *", "@reboot", "@every 5m", "H H * * *", "0 0 * * 5#6",
)  # fmt: skip


def is_taken_by_dagster(expression: str) -> bool:
    try:
        ScheduleDefinition(job_name="job", cron_schedule=expression)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("expression", [*TAKEN, *REFUSED])
def test_it_is_one_where_dagster_takes_it(expression: str) -> None:
    assert is_cron(expression) is is_taken_by_dagster(expression) is (expression in TAKEN)
