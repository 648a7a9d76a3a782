"""The README's code for other engines, run on answers of their documented shape, and imported by the README's command.

The engine is our tiny teacher behind the interface of vLLM, SGLang and OpenAI's client: what comes in must be what
the teacher itself would have been captured with.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from distill_assets.cli import app
from distill_assets.foundation.errors import ModelError, StaleInputs
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.sparse_targets import SparseTargets
from distill_assets.teacher_capture.store import read_rows
from distill_assets.tokenizer_compatibility.sides import TokenizerSide
from distill_assets.tokenizer_compatibility.token_bytes import ids_by_bytes
from tests import tiny
from tests.bench import Bench, edit
from tests.tokenizer_compatibility.families import changed

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def recipe(section: str) -> tuple[str, list[str]]:
    """The Python code of a section of the README, and the words of the `distill import` that follows it first."""
    _, after = README.split(f"### {section}")
    return re.findall(r"```python\n(.*?)```", after, re.DOTALL)[0], command("import", after)


def command(name: str, text: str = README) -> list[str]:
    """The words of the first `distill name ...` with arguments in a text."""
    return shlex.split(re.findall(rf"`distill ({name} \S*\.jsonl [^`]*)`", text)[0])


def distill(home: Path, *words: str) -> None:
    app(args=[*words, "--home", str(home)], standalone_mode=False)


class TinyEngine:
    """What the tiny teacher says: log-probabilities [T, V] of one text."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self._model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def likeliest(self, ids: list[int], k: int) -> list[list[tuple[float, int]]]:
        """The k likeliest of each position but the last, which tells of no token that is there."""
        values, found = self.logprobs(ids)[:-1].topk(k)
        return [list(zip(v, i, strict=True)) for v, i in zip(values.tolist(), found.tolist(), strict=True)]


def vllm(engine: TinyEngine) -> ModuleType:
    """A position has its k likeliest ids in any order, and the token that came."""

    class LLM:
        def __init__(self, model: str, **options: object) -> None:
            assert options == {"max_logprobs": 64, "logprobs_mode": "raw_logprobs", "enable_prefix_caching": False}

        def generate(self, prompts: list[dict[str, list[int]]], params: SimpleNamespace) -> list[SimpleNamespace]:
            return [SimpleNamespace(prompt_logprobs=self._of(p["prompt_token_ids"], params)) for p in prompts]

        def _of(self, ids: list[int], params: SimpleNamespace) -> list[dict[int, SimpleNamespace] | None]:
            entries: list[dict[int, SimpleNamespace] | None] = [None]
            all_TV = engine.logprobs(ids)
            for t, likeliest in enumerate(engine.likeliest(ids, params.prompt_logprobs)):
                found = {ids[t + 1]: float(all_TV[t, ids[t + 1]])} | {i: value for value, i in likeliest}
                entries.append({i: SimpleNamespace(logprob=value) for i, value in found.items()})
            return entries

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    return module


def sglang(engine: TinyEngine) -> ModuleType:
    class Engine:
        def __init__(self, model_path: str) -> None: ...

        def generate(self, input_ids: list[int], top_logprobs_num: int, **options: Any) -> dict[str, Any]:
            assert options["return_logprob"] is True and options["logprob_start_len"] == 0
            entries = [[[v, i, None] for v, i in entry] for entry in engine.likeliest(input_ids, top_logprobs_num)]
            return {"text": "", "meta_info": {"input_top_logprobs": [None, *entries]}}

    module = ModuleType("sglang")
    module.Engine = Engine  # type: ignore[attr-defined]
    return module


def kept(targets: SparseTargets, k: int) -> list[list[int]]:
    return [targets.support_ids_N[start : start + k].tolist() for start in targets.offsets_P1[:-1]]


@pytest.mark.parametrize(("section", "engine"), [("vLLM", vllm), ("SGLang", sglang)])
def test_what_an_engine_scores_comes_in_as_if_it_were_captured(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, section: str, engine: Any
) -> None:
    bench = Bench(tiny.make_home(tmp_path / "home", teacher_folder, targets={"k": 64, "precision": "exact"}, shards=1))
    shard = bench.home.root / "shards" / "train-a.jsonl"
    (bench.home.root / "shards" / "s0.jsonl").rename(shard)
    native = read_rows(capture_shard(bench.spec, bench.shards["train-a"], bench.store, device="cpu").capture.path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, section.lower(), engine(TinyEngine(teacher_folder)))
    distill(bench.home.root, *command("export"))
    code, _ = recipe(section)
    exec(compile(code, section, "exec"), {"__name__": "__main__"})
    distill(bench.home.root, *recipe("vLLM")[1])

    [path] = (bench.home.captures / "imported").glob("train-a@*.parquet")
    rows = read_rows(path)
    assert [row.key for row in rows] == [row.key for row in native]
    for row, ours in zip(rows, native, strict=True):
        assert kept(row.targets, 8) == kept(ours.targets, 8)
        first_P = row.targets.offsets_P1[:-1]
        assert row.targets.support_logprobs_N[first_P] == pytest.approx(
            ours.targets.support_logprobs_N[ours.targets.offsets_P1[:-1]], abs=1e-4
        )
        if section == "vLLM":
            assert np.isfinite(row.targets.gold_logprob_P).all()


def openai(engine: TinyEngine, side: TokenizerSide, asked: list[list[int]]) -> ModuleType:
    """Answers of six tokens, each the likeliest that is no special one; bytes are null for special ones."""

    def token(i: int, logprob: float, **more: object) -> SimpleNamespace:
        special = i in side.added
        content = side.bytes_of(i)
        said = content.decode("utf-8", "replace")
        return SimpleNamespace(token=said, bytes=None if special else list(content), logprob=logprob, **more)

    def create(messages: list[dict[str, str]], top_logprobs: int, **options: object) -> SimpleNamespace:
        assert options["logprobs"] is True and options["temperature"] == 1.0
        rendered = side.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = side.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        content = []
        for _ in range(6):
            values, found = engine.logprobs(ids)[-1].topk(top_logprobs)
            top = [token(i, value) for value, i in zip(values.tolist(), found.tolist(), strict=True)]
            came = next(n for n, i in enumerate(found.tolist()) if i not in side.added)
            content.append(token(int(found[came]), float(values[came]), top_logprobs=top))
            ids = [*ids, int(found[came])]
        asked.append(ids)
        return SimpleNamespace(choices=[SimpleNamespace(logprobs=SimpleNamespace(content=content))])

    module = ModuleType("openai")
    completions = SimpleNamespace(create=create)
    module.OpenAI = lambda: SimpleNamespace(chat=SimpleNamespace(completions=completions))  # type: ignore[attr-defined]
    return module


def test_answers_of_an_api_become_rows_of_their_completions(
    tmp_path: Path, teacher_folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(
        tiny.make_home(
            tmp_path / "home", teacher_folder, targets={"precision": "exact"}, shards=0, data={"max_length": 128}
        )
    )
    asked: list[list[int]] = []
    engine, side = TinyEngine(teacher_folder), TokenizerSide("api", tokenizer, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "openai", openai(engine, side, asked))
    tiny.write_jsonl(
        Path("prompts.jsonl"),
        [{"messages": [{"role": "user", "content": f"{text} {i}"}]} for i, text in enumerate(tiny.TEXT)],
    )
    code, words = recipe("An API")
    exec(compile(code.replace("big/teacher", str(teacher_folder)), "API", "exec"), {"__name__": "__main__"})
    distill(bench.home.root, *words)

    rows = {tuple(row.input_ids.tolist()): row for row in read_rows(next(bench.home.captures.rglob("*.parquet")))}
    assert rows.keys() == {tuple(ids) for ids in asked}
    for ids in asked:
        targets = rows[tuple(ids)].targets
        assert targets.positions_P.tolist() == list(range(len(ids) - 7, len(ids) - 1))
        all_TV = engine.logprobs(ids)
        for p, t in enumerate(targets.positions_P):
            part = slice(targets.offsets_P1[p], targets.offsets_P1[p + 1])
            support = targets.support_ids_N[part]
            assert set(support) <= set(all_TV[t].topk(20).indices.tolist()) and len(support) >= 18
            assert targets.support_logprobs_N[part] == pytest.approx(all_TV[t, support.tolist()].numpy(), abs=1e-4)
            assert math.exp(targets.tail_logprob_P[p]) == pytest.approx(
                1 - float(all_TV[t, support.tolist()].exp().sum()), abs=1e-2
            )


def test_without_a_shard_there_is_nothing_to_encode(home: Path, tmp_path: Path) -> None:
    edit(home, data={"shards": "nowhere/*"})
    with pytest.raises(StaleInputs, match=r"no shard to encode; .*data\.shards"):
        distill(home, "export", str(tmp_path / "rows.jsonl"), "--encoded")
    assert not (tmp_path / "rows.jsonl").exists()


def test_bytes_name_one_id_or_none(tokenizer: PreTrainedTokenizerFast) -> None:
    found = ids_by_bytes(tokenizer)
    assert all(TokenizerSide("", tokenizer, None).bytes_of(i) == said for said, i in found.items())
    assert found[b"<|eos|>"] == tokenizer.eos_token_id
    [cat] = tokenizer(" cat", add_special_tokens=False)["input_ids"][:1]
    assert cat in found.values() and len(found) == len(tokenizer)
    twice = tiny.train_tokenizer()
    twice.add_tokens([twice.decode([cat]), "\ufffd"])
    assert found.items() - ids_by_bytes(twice).items() == {(twice.decode([cat]).encode(), cat)}
    assert ids_by_bytes(twice).keys() <= found.keys()
    with pytest.raises(ModelError, match="not a byte-level tokenizer"):
        ids_by_bytes(changed("unigram"))
