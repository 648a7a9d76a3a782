from __future__ import annotations

from pathlib import Path

import pytest

from distill_assets.foundation.errors import SettingsError
from distill_assets.foundation.settings import Settings, StudentSettings, TargetSettings, load_settings

SMALLEST = "teacher: {model: a}\nstudent: {model: b}\n"


def refusal(tmp_path: Path, text: str) -> str:
    """What load_settings says about `text`, the file's path replaced by F."""
    file = tmp_path / "distill.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load_settings(file)
    return str(caught.value).replace(str(file), "F")


def test_the_smallest_file_has_defaults(tmp_path: Path) -> None:
    file = tmp_path / "distill.yaml"
    file.write_text(SMALLEST, encoding="utf-8")
    settings = load_settings(file)
    assert settings.teacher.model == "a"
    assert settings.targets.k == 64
    assert settings.data.heldout == ["heldout*"]
    assert settings.control is True


def test_an_unknown_key_is_named_with_its_line_and_what_is_allowed(tmp_path: Path) -> None:
    said = refusal(tmp_path, SMALLEST + "targets:\n  k: 8\n  top: 9\n")
    assert said.startswith("F line 5: targets.top is not a setting; allowed here: kind, k, min_probability")


def test_an_unknown_section_lists_the_sections(tmp_path: Path) -> None:
    said = refusal(tmp_path, SMALLEST + "trainer: {}\n")
    assert said.startswith("F line 3: trainer is not a setting; allowed here: teacher, student, tokenizer, data")


@pytest.mark.parametrize(
    ("line", "key", "reason"),
    [
        ("targets: {k: '8'}", "targets.k", "valid integer (given: '8')"),
        ("targets: {k: true}", "targets.k", "valid integer (given: True)"),
        ("targets: {k: 0}", "targets.k", "greater than or equal to 1 (given: 0)"),
        ("targets: {kind: best}", "targets.kind", "(given: 'best')"),
        ("targets: {min_probability: 1.0}", "targets.min_probability", "less than 1 (given: 1.0)"),
        (
            "training: {learning_rate: 1.0e+38}",
            "training.learning_rate",
            f"less than or equal to {10**30} (given: 1e+38)",
        ),
        ("training: {learning_rate: .nan}", "training.learning_rate", "finite number (given: nan)"),
        ("training: {where: ''}", "training.where", "at least 1 character (given: '')"),
        ("training: {mixture: {a*: -1}}", "training.mixture.a*", "greater than or equal to 0 (given: -1)"),
        ("training: {mixture: {a*: .inf}}", "training.mixture.a*", "finite number (given: inf)"),
        ("control: 1", "control", "valid boolean (given: 1)"),
        ("data: {shards: ../elsewhere/*}", "data.shards", "inside the home, such as shards/*.jsonl"),
        ("automation: {schedule: whenever}", "automation.schedule", "month and weekday, such as 0 2 * * *"),
        ("automation: {schedule: ''}", "automation.schedule", "at least 1 character (given: '')"),
    ],
)
def test_a_wrong_value_is_named_with_line_key_and_what_was_given(
    tmp_path: Path, line: str, key: str, reason: str
) -> None:
    said = refusal(tmp_path, SMALLEST + "# a comment\n" + line + "\n")
    assert said.startswith(f"F line 4: {key}: ")
    assert said.endswith(reason)


def test_a_wrong_item_of_a_list_has_its_own_line(tmp_path: Path) -> None:
    said = refusal(tmp_path, "teacher: {model: a}\nstudent:\n  from_teacher_layers:\n    - 0\n    - -1\n")
    assert said.startswith("F line 5: student.from_teacher_layers.1: ")


def test_an_exponent_without_a_dot_is_explained(tmp_path: Path) -> None:
    said = refusal(tmp_path, SMALLEST + "training: {learning_rate: 2e-4}\n")
    expected = "F line 3: training.learning_rate: YAML reads 2e-4 as text; write a number with a dot, such as 2.0e-4"
    assert said == expected


@pytest.mark.parametrize("value", ["shards", "", "[a]"])
def test_a_section_that_is_no_mapping_lists_its_keys(tmp_path: Path, value: str) -> None:
    said = refusal(tmp_path, SMALLEST + f"data: {value}\n")
    assert said.startswith("F line 3: data must be a mapping (given: ")
    assert "allowed here: shards, heldout, validation" in said


def test_missing_keys_are_named_at_their_section(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path, "student: {model: b}\nteacher: {dtype: float32}\n")
        == "F line 2: teacher.model is missing; add it"
    )
    assert refusal(tmp_path, "student: {model: b}\n") == "F line 1: teacher is missing; add it"


@pytest.mark.parametrize(
    ("student", "reason"),
    [
        ("{}", "exactly one of model, from_teacher_layers, config (given: none)"),
        ("{model: b, from_teacher_layers: [0]}", "(given: model, from_teacher_layers)"),
        ("{from_teacher_layers: [2, 1]}", "must be strictly increasing"),
        ("{from_teacher_layers: [0], revision: main}", "revision belongs to model; remove it"),
        ("{config: {hidden_size: 8}}", "config needs a model_type, such as llama"),
    ],
)
def test_a_student_has_exactly_one_origin(tmp_path: Path, student: str, reason: str) -> None:
    said = refusal(tmp_path, f"teacher: {{model: a}}\nstudent: {student}\n")
    assert said.startswith("F line 2: student: ")
    assert said.endswith(reason)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, SMALLEST + "training:\n  epochs: 1\n  seed: 0\n  epochs: 2\n")
    assert said == "F line 6: epochs is given twice; keep one"


def test_a_key_that_is_a_list_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, SMALLEST + "? [a, b]\n: c\n") == "F line 3: a key must be one word"


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    said = refusal(tmp_path, SMALLEST + "data:\n\tshards: x\n")
    assert said.startswith("F line 4: not valid YAML (")


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text) == "F: must be a mapping with at least teacher and student"


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "distill.yaml"
    file.write_bytes(b"teacher: {model: \xff}\n")
    with pytest.raises(SettingsError, match="not UTF-8 \\(byte 17\\)"):
        load_settings(file)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist; `distill init"):
        load_settings(tmp_path / "distill.yaml")


def test_at_most_three_problems_are_told_one_a_line(tmp_path: Path) -> None:
    said = refusal(tmp_path, SMALLEST + "a: 1\nb: 2\nc: 3\nd: 4\n")
    assert [line.split(" is not")[0] for line in said.splitlines()] == ["F line 3: a", "F line 4: b", "F line 5: c"]


@pytest.mark.parametrize(
    ("targets", "key", "own", "kind"),
    [
        ("kind: sampled\n  k: 8", "k", "top_k", "sampled"),
        ("kind: threshold\n  min_probability: 0.0", "min_probability", "top_k", "threshold"),
        ("kind: sampled\n  tail_samples: 0", "tail_samples", "top_k", "sampled"),
        ("k: 8\n  samples: 50", "samples", "sampled", "top_k"),
        ("kind: sampled\n  tau: 0.02", "tau", "threshold", "sampled"),
    ],
)
def test_a_target_setting_of_another_kind_is_refused_even_at_its_default(
    tmp_path: Path, targets: str, key: str, own: str, kind: str
) -> None:
    said = refusal(tmp_path, f"{SMALLEST}targets:\n  {targets}\n")
    assert said == f"F line 5: targets.{key}: belongs to kind {own}, and kind is {kind}; remove it"


def test_a_wrong_kind_is_the_only_complaint(tmp_path: Path) -> None:
    said = refusal(tmp_path, SMALLEST + "targets: {kind: best, tau: 0.1}\n")
    assert said.startswith("F line 3: targets.kind: ") and "\n" not in said


@pytest.mark.parametrize("line", ["samples: 0", "tau: 1.0", "tau: 0.0", "tail_samples: -1"])
def test_impossible_draws_are_refused(tmp_path: Path, line: str) -> None:
    kind = {"samples": "sampled", "tau": "threshold", "tail_samples": "top_k"}[line.split(":")[0]]
    assert f"targets.{line.split(':')[0]}: input should be" in refusal(
        tmp_path, f"{SMALLEST}targets: {{kind: {kind}, {line}}}\n"
    )


def test_targets_are_told_apart_by_what_belongs_to_their_kind() -> None:
    assert TargetSettings(k=8).identity == {
        "kind": "top_k", "k": 8, "min_probability": 0.0, "precision": "compact",
    }  # fmt: skip
    assert TargetSettings(k=8, tail_samples=2).identity["tail_samples"] == 2
    assert TargetSettings(kind="sampled").identity == {"kind": "sampled", "samples": 50, "precision": "compact"}
    assert TargetSettings(kind="threshold").identity == {"kind": "threshold", "tau": 0.02, "precision": "compact"}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            "targets: {kind: sampled}\ntraining: {objective: jsd}",
            "training: objective jsd needs top_k targets, and targets.kind is sampled",
        ),
        (
            "targets: {kind: threshold}\ntraining: {temperature: 2.0}",
            "training: temperature needs top_k targets, and targets.kind is threshold; remove it",
        ),
        (
            "targets: {tail_samples: 2}\ntraining: {objective: renormalized}",
            "training: tail samples belong to objective forward_kl, and objective is renormalized; "
            "set tail_sample_weight: 0.0",
        ),
        (
            "targets: {}\ntraining: {objective: reverse_kl, temperature: 2.0}",
            "training.temperature: belongs to objective forward_kl, and objective is reverse_kl; remove it",
        ),
        (
            "targets: {}\ntraining: {objective: kl}",
            "training.objective: input should be 'forward_kl', 'reverse_kl', 'jsd' or 'renormalized' (given: 'kl')",
        ),
    ],
)
def test_a_loss_that_the_targets_do_not_allow_is_refused(tmp_path: Path, lines: str, said: str) -> None:
    assert refusal(tmp_path, SMALLEST + lines + "\n") == f"F line 4: {said}"


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (
            "{early_stopping: 3}",
            "training: early_stopping needs validation rows; name shards for them in data.validation, or remove it",
        ),
        (
            "{validate_every: 3}",
            "training: validate_every needs validation rows; name shards for them in data.validation, or remove it",
        ),
        (
            "{lora: {rnk: 3}}",
            "training.lora.rnk is not a setting; allowed here: rank, alpha, targets, dropout",
        ),
        (
            "{lora: 16}",
            "training.lora must be a mapping (given: 16); allowed here: rank, alpha, targets, dropout",
        ),
        ("{lora: {dropout: 1.0}}", "training.lora.dropout: input should be less than 1 (given: 1.0)"),
        ("{lora: {targets: q_proj}}", "training.lora.targets: input should be a valid list (given: 'q_proj')"),
    ],
)
def test_adapters_and_early_stopping_say_what_they_need(tmp_path: Path, training: str, said: str) -> None:
    assert refusal(tmp_path, f"{SMALLEST}data: {{heldout: []}}\ntraining: {training}\n") == f"F line 4: {said}"
    if training.startswith("{lora"):
        return
    file = tmp_path / "distill.yaml"
    file.write_text(f"{SMALLEST}data: {{validation: [v]}}\ntraining: {training}\n", encoding="utf-8")
    assert load_settings(file).training.needs_validation in training


@pytest.mark.parametrize(
    "lines",
    [
        "training: {objective: reverse_kl}",
        "training: {objective: forward_kl, temperature: 2.0}",
        "targets: {tail_samples: 2}\ntraining: {objective: jsd, tail_sample_weight: 0.0}",
    ],
)
def test_a_loss_that_the_targets_allow_is_taken(tmp_path: Path, lines: str) -> None:
    file = tmp_path / "distill.yaml"
    file.write_text(SMALLEST + lines + "\n", encoding="utf-8")
    assert load_settings(file).training != Settings.model_fields["training"].default


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "a/b", "revision": "v1"}, "a/b at v1"),
        ({"from_teacher_layers": [0, 4, 8]}, "layers 0, 4, 8 of the teacher"),
        ({"config": {"model_type": "llama", "hidden_size": 64}}, "random weights of a llama with hidden_size 64"),
        ({"config": {"model_type": "gpt2"}}, "random weights of a gpt2"),
    ],
)
def test_where_a_student_starts_is_said_in_words(given: dict[str, object], said: str) -> None:
    assert StudentSettings.model_validate(given).in_words() == said
