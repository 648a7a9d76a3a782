"""Tables and views of `catalog.duckdb`.

`captures` are the current ones, `capture_history` those superseded or removed whose files are
still kept; `examples` and `example_history` have one row an example of each. `student_examples` joins
students and the examples they learnt from, for both directions of the question. `positions` and
`kept_ids` are views over the Parquet itself: nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEMA_VERSION = 6

TABLES = """
CREATE TABLE catalog_meta (schema_version INTEGER, home VARCHAR, identity VARCHAR);
CREATE TABLE capture_files (
    number INTEGER, shard VARCHAR, role VARCHAR, capture_id VARCHAR, version VARCHAR, current BOOLEAN, path VARCHAR,
    examples INTEGER, tokens BIGINT, supervised_tokens BIGINT, kept_ids BIGINT,
    bytes BIGINT, bytes_per_token DOUBLE,
    mean_entropy DOUBLE, mean_kept_mass DOUBLE, mean_kept_ids DOUBLE, teacher_perplexity DOUBLE,
    truncated_rows INTEGER, bad_rows INTEGER, rows_without_target INTEGER,
    rows_captured INTEGER, rows_reused INTEGER, tokens_captured BIGINT, seconds DOUBLE, tokens_per_second DOUBLE,
    teacher VARCHAR, teacher_revision VARCHAR, dtype VARCHAR, targets VARCHAR, derived_from VARCHAR[],
    created TIMESTAMPTZ, sha256 VARCHAR
);
CREATE TABLE capture_examples (
    capture INTEGER, row INTEGER, key VARCHAR, id VARCHAR,
    tokens INTEGER, supervised_tokens INTEGER, weight FLOAT, truncated BOOLEAN,
    mean_entropy FLOAT, mean_kept_mass FLOAT, teacher_perplexity DOUBLE, top1_is_gold FLOAT
);
-- Where keys are, by the number that their first digits are. Sorted, so that few blocks of ten million are read for
-- one; what came since lies in `new_keys` until it is worth sorting all anew. Entries of captures that left stay as
-- long, so both only say where to look. An index of DuckDB's own would double the file that every refresh copies.
CREATE TABLE sorted_keys (start UINTEGER, capture INTEGER, row INTEGER);
CREATE TABLE new_keys (start UINTEGER, capture INTEGER, row INTEGER);
CREATE TABLE students (
    student_id VARCHAR, kind VARCHAR, folder VARCHAR, created TIMESTAMPTZ
);
CREATE TABLE student_captures (
    student_id VARCHAR, shard VARCHAR, version VARCHAR, capture_id VARCHAR, examples INTEGER, chosen BIT
);
CREATE VIEW captures AS SELECT * EXCLUDE (number, current) FROM capture_files WHERE current;
CREATE VIEW capture_history AS SELECT * EXCLUDE (number, current) FROM capture_files WHERE NOT current;
CREATE VIEW examples AS
SELECT c.shard, c.role, e.* EXCLUDE (capture), c.capture_id, c.version, c.created
FROM capture_examples AS e JOIN capture_files AS c ON e.capture = c.number WHERE c.current;
CREATE VIEW example_history AS
SELECT c.shard, e.* EXCLUDE (capture), c.capture_id, c.version, c.created
FROM capture_examples AS e JOIN capture_files AS c ON e.capture = c.number WHERE NOT c.current;
CREATE VIEW student_examples AS
SELECT s.student_id, s.kind, c.shard, e.row, e.key, e.id, c.current, c.capture_id, c.version
FROM students AS s
JOIN student_captures AS l USING (student_id)
JOIN capture_files AS c ON (c.shard, c.capture_id, c.version) = (l.shard, l.capture_id, l.version)
JOIN capture_examples AS e ON e.capture = c.number
WHERE CASE WHEN l.chosen IS NULL THEN true WHEN e.row < bit_length(l.chosen) THEN get_bit(l.chosen, e.row) = 1 END;

-- Membership is asked of each column alone: only so DuckDB leaves out what cannot hold the row, and a place that is
-- listed twice is found once.
CREATE MACRO example(wanted) AS TABLE
WITH places AS (
    SELECT capture, row FROM (FROM sorted_keys UNION ALL FROM new_keys)
    WHERE start = try_cast('0x' || wanted[:8] AS UINTEGER)
)
SELECT c.shard, c.role, c.current, e.* EXCLUDE (capture), c.capture_id, c.version, c.created
FROM capture_examples AS e JOIN capture_files AS c ON e.capture = c.number
WHERE e.key = wanted AND e.capture IN (SELECT capture FROM places) AND e.row IN (SELECT row FROM places);
"""

_KEYS = "SELECT ('0x' || key[:8])::UINTEGER AS start, capture, row FROM capture_examples"
SORT_KEYS = f"""
DELETE FROM new_keys;
CREATE OR REPLACE TABLE sorted_keys AS {_KEYS} ORDER BY start;
"""
ADD_KEYS = f"INSERT INTO new_keys {_KEYS} WHERE capture IN (SELECT unnest($captures))"

_POSITIONS_FROM_FILES = """
CREATE OR REPLACE VIEW positions AS
WITH unnested AS ({parts})
SELECT c.shard, u.row, u.key, u.position, u.input_ids[u.position + 2] AS gold_id, u.support_ids, u.support_logprobs,
       u.weights, u.tail_logprob, u.tail_sample_ids, u.gold_logprob, u.entropy
FROM unnested AS u JOIN captures AS c USING (path);
"""

# Files that have the same columns. What their targets have not is null.
_POSITIONS_OF_LIKE_FILES = """
    SELECT path, row, key, input_ids, position, support_ids, {logprobs} AS support_logprobs,
           weights, tail_logprob, tail_sample_ids, gold_logprob, entropy
    FROM (
        SELECT f.filename AS path, f.row, f.key, f.input_ids,
               unnest(f.positions) AS position, unnest(f.support_ids) AS support_ids,
               unnest(f.{column}) AS support, unnest({weights}) AS weights,
               unnest(f.tail_logprob) AS tail_logprob, unnest({tail_sample_ids}) AS tail_sample_ids,
               unnest(f.gold_logprob) AS gold_logprob, unnest(f.entropy) AS entropy
        FROM read_parquet([{paths}], filename = true, hive_partitioning = false) AS f
    )
"""

_POSITIONS_OF_NOTHING = """
CREATE OR REPLACE VIEW positions AS
SELECT NULL::VARCHAR AS shard, NULL::INTEGER AS row, NULL::VARCHAR AS key, NULL::INTEGER AS position,
       NULL::INTEGER AS gold_id, NULL::INTEGER[] AS support_ids, NULL::DOUBLE[] AS support_logprobs,
       NULL::FLOAT[] AS weights, NULL::FLOAT AS tail_logprob, NULL::INTEGER[] AS tail_sample_ids,
       NULL::FLOAT AS gold_logprob, NULL::FLOAT AS entropy
WHERE false;
"""

KEPT_IDS = """
CREATE OR REPLACE VIEW kept_ids AS
SELECT shard, row, position, unnest(range(1, len(support_ids) + 1)) AS rank,
       unnest(support_ids) AS id, unnest(support_logprobs) AS logprob, unnest(weights) AS weight
FROM positions;
"""

# Per precision: the support column, and log-probabilities from one position's `support`.
_SUPPORT = {
    "compact": {"column": "support_q", "logprobs": "list_transform(support, lambda q: q / -16.0)"},
    "exact": {"column": "support_logprobs", "logprobs": "support"},
}

# What a capture's examples are like, computed from its Parquet file. Support and tail are made a
# distribution by dividing by their sum (rounding makes it 1.02 or so). Where an entropy or gold
# log-probability is not known, neither is their mean.
_EXAMPLES_OF_FILE = """
INSERT INTO capture_examples
WITH rows AS (
    SELECT row, key, id, input_ids, weight, truncated, positions, support_ids, tail_logprob, gold_logprob, entropy,
           {column} AS support
    FROM read_parquet($path, hive_partitioning = false) AS f
), position_mass AS (
    SELECT row, list_sum(list_transform({logprobs}, lambda x: exp(x))) AS head, coalesce(exp(tail), 0) AS tail
    FROM (SELECT row, unnest(support) AS support, unnest(tail_logprob) AS tail FROM rows)
), kept AS (
    SELECT row, avg(head / (head + tail)) AS mean_kept_mass FROM position_mass GROUP BY row
), hits AS (
    SELECT row, avg((ids[1] = input_ids[position + 2])::DOUBLE) AS top1_is_gold
    FROM (SELECT row, input_ids, unnest(positions) AS position, unnest(support_ids) AS ids FROM rows)
    GROUP BY row
)
SELECT $number, row, key, id, len(input_ids), len(positions), weight, truncated,
       CASE WHEN list_count(entropy) = len(entropy) THEN list_avg(entropy) END, mean_kept_mass,
       CASE WHEN list_count(gold_logprob) = len(gold_logprob) THEN exp(-list_avg(gold_logprob)) END,
       top1_is_gold
FROM rows JOIN kept USING (row) JOIN hits USING (row)
ORDER BY row
"""


def quoted(path: str) -> str:
    """A string literal: DDL takes no parameters, and a shard's name may hold a quote."""
    return "'" + path.replace("'", "''") + "'"


def positions_view(files: Mapping[str, Mapping[str, Any]]) -> str:
    """DDL of the `positions` view over capture files, by path, with their target settings."""
    if not files:
        return _POSITIONS_OF_NOTHING
    alike: dict[tuple[str, bool, bool], list[str]] = {}
    for path, targets in sorted(files.items()):
        columns = (targets["precision"], targets["kind"] != "top_k", bool(targets.get("tail_samples")))
        alike.setdefault(columns, []).append(quoted(path))
    parts = [
        _POSITIONS_OF_LIKE_FILES.format(
            **_SUPPORT[precision],
            weights="f.weights" if has_weights else "NULL::FLOAT[][]",
            tail_sample_ids="f.tail_sample_ids" if has_samples else "NULL::INTEGER[][]",
            paths=", ".join(paths),
        )
        for (precision, has_weights, has_samples), paths in sorted(alike.items())
    ]
    return _POSITIONS_FROM_FILES.format(parts="UNION ALL".join(parts))


def examples_of_file(precision: str) -> str:
    """INSERT of one capture file's examples; parameters path, number."""
    return _EXAMPLES_OF_FILE.format(**_SUPPORT[precision])
