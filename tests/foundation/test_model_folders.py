from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_assets.foundation.errors import ModelError
from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.model_folders import ModelFolder, resolve_model


@pytest.fixture
def copy(tmp_path: Path, teacher_folder: Path) -> ModelFolder:
    """A copy of the tiny teacher that a test may damage."""
    return resolve_model(str(shutil.copytree(teacher_folder, tmp_path / "copy")), None, tmp_path)


def fingerprint(folder: Path) -> str:
    model = resolve_model(str(folder), None, folder)
    return model.fingerprint(HashCache(folder / "no-cache.json"))


def test_a_folder_is_found_relative_to_the_root(teacher_folder: Path) -> None:
    found = resolve_model(teacher_folder.name, None, teacher_folder.parent)
    assert found == ModelFolder(teacher_folder.name, teacher_folder.resolve(), None)


@pytest.mark.parametrize("name", ["models/absent/deep", "./absent", "absent", "/absent/model", "-x/y"])
def test_a_missing_folder_that_is_no_hub_id_says_where_was_looked(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"no folder at .*{Path(name).name}; give an existing folder or a hub id"):
        resolve_model(name, None, tmp_path)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "nobody/no..model"])
def test_a_hub_id_that_cannot_be_fetched_says_why(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"model {name}: no folder at {tmp_path}.*could not be fetched from the hub"):
        resolve_model(name, None, tmp_path)


def test_weights_with_an_adapter_on_top_are_refused(copy: ModelFolder) -> None:
    """transformers would load it too, and nothing of it is in the fingerprint."""
    (copy.path / "adapter_config.json").write_text("{}")
    for ask in (copy.weight_files, copy.stamp, lambda: fingerprint(copy.path)):
        with pytest.raises(ModelError, match=r"adapter_config\.json.*merge the adapter"):
            ask()


def test_a_copied_folder_has_the_same_fingerprint(copy: ModelFolder, teacher_folder: Path) -> None:
    assert fingerprint(copy.path) == fingerprint(teacher_folder)


def test_who_saved_a_model_does_not_matter_and_what_it_computes_does(copy: ModelFolder, teacher_folder: Path) -> None:
    config = copy.config()
    file = copy.path / "config.json"
    file.write_text(json.dumps({**config, "transformers_version": "4.0.0", "_name_or_path": "/elsewhere"}))
    assert fingerprint(copy.path) == fingerprint(teacher_folder)
    file.write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert fingerprint(copy.path) != fingerprint(teacher_folder)


def test_one_changed_weight_is_another_model(copy: ModelFolder, teacher_folder: Path) -> None:
    file = copy.path / "model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[-1]
    weights[name].view(-1)[0] += torch.finfo(weights[name].dtype).eps * 4
    save_file(weights, file, metadata={"format": "pt"})
    assert fingerprint(copy.path) != fingerprint(teacher_folder)


def test_a_folder_without_safetensors_is_refused(copy: ModelFolder) -> None:
    (copy.path / "model.safetensors").rename(copy.path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors in .*other weight formats can run code"):
        copy.weight_files()


def test_a_missing_part_of_sharded_weights_is_named(copy: ModelFolder) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy.path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing in"):
        copy.weight_files()


@pytest.mark.parametrize("text", ["{half", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}'])
def test_a_damaged_index_is_named(copy: ModelFolder, text: str) -> None:
    (copy.path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json in .* cannot be read"):
        copy.weight_files()


def test_a_missing_or_damaged_config_is_named(copy: ModelFolder) -> None:
    file = copy.path / "config.json"
    for text, said in [("{half", "cannot be read"), ("[1]", "is not a mapping"), ("\x00", "cannot be read")]:
        file.write_text(text)
        with pytest.raises(ModelError, match=rf"config\.json in .* {said}"):
            copy.config()
    file.unlink()
    with pytest.raises(ModelError, match=r"no config\.json in .*name a transformers model folder"):
        copy.config()


def test_a_folder_without_a_tokenizer_is_refused(copy: ModelFolder) -> None:
    assert copy.tokenizer_stamp() == copy.tokenizer_stamp()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy.path / name).unlink()
    with pytest.raises(ModelError, match=r"no tokenizer in .*save one there"):
        copy.tokenizer_stamp()


RESOLVED_TWICE = """
import shutil, sys
from pathlib import Path
from distill_assets.foundation.errors import ModelError
from distill_assets.foundation.model_folders import resolve_model

cache = Path(sys.argv[1])
refs = cache / "refs" / "main"
print(resolve_model("owner/name", None, cache).revision)
refs.write_text("b" * 40)  # the branch moved on: asked again only after a while
print(resolve_model("owner/name", None, cache).revision)
print(resolve_model("owner/name", "b" * 40, cache).revision)
shutil.rmtree(cache / "snapshots" / ("a" * 40))
print(resolve_model("owner/name", None, cache).revision)
"""


UNREACHABLE = """
import sys
from pathlib import Path
from distill_assets.foundation.errors import ModelError
from distill_assets.foundation.model_folders import resolve_model

here = Path(sys.argv[1])
for _ in range(2):
    print(resolve_model("owner/name", None, here).revision)
try:
    resolve_model("owner/name", "other-branch", here)
except ModelError as error:
    print(error)
"""


def test_a_hub_that_gives_no_answer_is_said_and_the_cache_used(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--owner--name"
    (cache / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (cache / "snapshots" / ("a" * 40) / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        answer = subprocess.run(
            [sys.executable, "-c", UNREACHABLE, str(tmp_path)],
            env={
                **os.environ,
                "HF_HOME": str(tmp_path),
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": nowhere,
                "NO_PROXY": "*",
            },
            capture_output=True,
            text=True,
            check=True,
        )
    first, second, refusal = answer.stdout.splitlines()
    assert first == second == "a" * 40
    assert answer.stderr.count("the hub gave no answer") == 1  # asked once
    assert f"using cached commit {'a' * 40}" in answer.stderr
    assert "could not be fetched from the hub (" in refusal and "refused" in refusal


def test_a_hub_id_is_answered_from_the_cache_with_its_commit(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--owner--name"
    for commit in ("a" * 40, "b" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    answer = subprocess.run(
        [sys.executable, "-c", RESOLVED_TWICE, str(cache)],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split() == ["a" * 40, "a" * 40, "b" * 40, "b" * 40]
