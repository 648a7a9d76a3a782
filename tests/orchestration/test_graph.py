"""The asset graph as a golden file: any change to what exists is seen in review.

`python -m tests.orchestration.test_graph` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill_assets.definitions import defs

GOLDEN = Path(__file__).parents[1] / "golden" / "asset_graph.json"


def graph() -> dict[str, Any]:
    """Assets with what they depend on and how they run, checks, jobs, sensors and schedules, by name."""
    resolved = defs.resolve_asset_graph()
    assets = {}
    for node in resolved.asset_nodes:
        assets[node.key.to_user_string()] = {
            "deps": sorted(key.to_user_string() for key in node.parent_keys),
            "group": node.group_name,
            "partitioned": node.is_partitioned,
            "pools": sorted(node.pools or ()),
            "kinds": sorted(node.kinds),
            "owners": sorted(node.owners),
            "automatic": node.automation_condition is not None,
            "described": bool(node.description),
        }
    repository = defs.get_repository_def()
    return {
        "assets": dict(sorted(assets.items())),
        "checks": sorted(f"{key.asset_key.to_user_string()}:{key.name}" for key in resolved.asset_check_keys),
        "jobs": sorted(job.name for job in repository.get_all_jobs() if not job.name.startswith("__")),
        "sensors": sorted(sensor.name for sensor in repository.sensor_defs),
        "schedules": sorted(schedule.name for schedule in repository.schedule_defs),
    }


def test_the_graph_is_the_reviewed_one() -> None:
    assert graph() == json.loads(GOLDEN.read_text(encoding="utf-8"))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(graph(), indent=2) + "\n", encoding="utf-8")
