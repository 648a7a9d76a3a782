"""distill_assets: offline knowledge distillation of language models as orchestrated data assets.

The pipeline in five lines, one a folder of this package:

    dataset_shards            shard files become rows of token ids with a loss mask,
    tokenizer_compatibility   teacher and student are proven to mean the same thing by an id,
    teacher_capture           the teacher sees every row once and its top-k log-probabilities are kept,
    capture_catalog           DuckDB knows every capture, example and student,
    student_model             a student learns from the record; student_evaluation says how well.

`orchestration` makes each of them a Dagster asset; `definitions` is the only wiring.
"""
