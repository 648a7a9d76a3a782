"""What is known of a tokenizer is found out once, and again when anything about it changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distill_assets.foundation.errors import CaptureError, ModelError
from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.tokenizers import TokenIds
from distill_assets.tokenizer_compatibility import facts
from distill_assets.tokenizer_compatibility.facts import TokenizerFacts, tokenizer_facts
from distill_assets.tokenizer_compatibility.fingerprint import tokenizer_fingerprint
from tests import tiny
from tests.bench import Bench

IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.tokenizer_compatibility.facts import tokenizer_facts

hashes = HashCache(Path(sys.argv[2]))
print(tokenizer_facts(ModelFolder("x", Path(sys.argv[1]), None), hashes).fingerprint, "transformers" in sys.modules)
hashes.save()
"""


@pytest.fixture
def folder(tmp_path: Path, teacher_folder: Path) -> ModelFolder:
    return ModelFolder("copy", shutil.copytree(teacher_folder, tmp_path / "copy"), None)


def known(folder: ModelFolder, cache: Path, rehash: bool = False) -> TokenizerFacts:
    hashes = HashCache(cache, rehash)
    found = tokenizer_facts(folder, hashes)
    hashes.save()
    return found


def change_template(folder: ModelFolder) -> str:
    """Another chat template, and the fingerprint it gives."""
    (folder.path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder.path))


def test_facts_are_those_of_the_tokenizer_as_loaded(folder: ModelFolder, tmp_path: Path) -> None:
    found = known(folder, tmp_path / "hashes.json")
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    assert (found.fingerprint, found.ids) == (tokenizer_fingerprint(tokenizer), TokenIds.of(tokenizer))
    assert known(folder, tmp_path / "hashes.json") == found


def test_a_second_process_loads_no_tokenizer(folder: ModelFolder, tmp_path: Path) -> None:
    def ask() -> list[str]:
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(folder.path), str(tmp_path / "hashes.json")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    first, second = ask(), ask()
    assert (first[1], second[1]) == ("True", "False") and first[0] == second[0]
    change_template(folder)
    assert ask()[1] == "True"


def test_a_changed_file_is_looked_at_again(folder: ModelFolder, tmp_path: Path) -> None:
    before = known(folder, tmp_path / "hashes.json")
    changed = change_template(folder)
    assert known(folder, tmp_path / "hashes.json").fingerprint == changed != before.fingerprint
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder.path / name).unlink()
    with pytest.raises(ModelError, match="no tokenizer in"):
        known(folder, tmp_path / "hashes.json")


@pytest.mark.parametrize("library", ["transformers", "tokenizers", "mistral-common"])
def test_another_version_of_a_library_looks_again(
    folder: ModelFolder, tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hashes.json"
    right = known(folder, cache)
    told = json.loads(cache.read_text())
    [name] = [name for name in told if name.startswith("tokenizer ")]
    told[name][1]["fingerprint"] = "wrong"
    cache.write_text(json.dumps(told))
    assert known(folder, cache).fingerprint == "wrong"  # nothing changed: what is remembered is believed
    assert known(folder, tmp_path / "copy.json") == right  # another cache knows nothing
    version = facts.version
    monkeypatch.setattr(facts, "version", lambda name: "99" if name == library else version(name))
    assert known(folder, cache) == right


def test_rehash_believes_nothing(folder: ModelFolder, tmp_path: Path) -> None:
    cache = tmp_path / "hashes.json"
    right = known(folder, cache)
    cache.write_text(cache.read_text().replace(right.fingerprint, "wrong"))
    assert known(folder, cache, rehash=True) == right == known(folder, cache)


def test_a_tokenizer_replaced_under_way_encodes_nothing(tmp_path: Path, folder: ModelFolder) -> None:
    bench = Bench(tiny.make_home(tmp_path / "home", folder.path, shards=1))
    spec = bench.spec
    change_template(folder)
    with pytest.raises(CaptureError, match=r"the tokenizer in .* is not the one that was looked at; run again$"):
        _ = spec.encoder
    _ = bench.spec.encoder


def test_a_template_in_a_folder_of_its_own_counts(folder: ModelFolder, tmp_path: Path) -> None:
    """transformers reads additional_chat_templates/, and an edit there changes no date of the folder above."""
    templates = folder.path / "additional_chat_templates"
    templates.mkdir()
    (templates / "default.jinja").write_text("a{{ messages }}")
    before = known(folder, tmp_path / "hashes.json")
    (templates / "default.jinja").write_text("b{{ messages }}")
    after = known(folder, tmp_path / "hashes.json")
    assert after.fingerprint == tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder.path)) != before.fingerprint


@pytest.mark.parametrize(
    "wrong", ["abc", None, 5, {}, [], {"fingerprint": 5, "n_real": "x", "unused": 3}, {"fingerprint": "a", "n_real": 1}]
)
def test_a_cache_with_something_else_in_it_is_not_believed(folder: ModelFolder, tmp_path: Path, wrong: object) -> None:
    cache = tmp_path / "hashes.json"
    right = known(folder, cache)
    told = json.loads(cache.read_text())
    [name] = [name for name in told if name.startswith("tokenizer ")]
    cache.write_text(json.dumps({**told, name: [told[name][0], wrong]}))
    assert known(folder, cache) == right == known(folder, cache)


def test_a_fact_that_is_wrong_files_no_capture_under_it(tmp_path: Path, folder: ModelFolder) -> None:
    bench = Bench(tiny.make_home(tmp_path / "home", folder.path, shards=1))
    hashes = bench.home.hashes()
    right = tokenizer_facts(folder, hashes).fingerprint
    hashes.save()
    cache = bench.home.root / ".cache" / "hashes.json"
    cache.write_text(cache.read_text().replace(right, "f" * 16))
    with pytest.raises(CaptureError, match="run again with --rehash"):
        _ = bench.spec.encoder
