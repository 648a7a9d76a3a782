"""What each asset of a home would make now: settings translated into the domain's values.

A `Pipeline` is a snapshot: distill.yaml and the shard files are looked at once. Every tick, run
and command makes a new one, so an edit is seen at once. Nothing here knows Dagster. What needs torch, which
takes seconds to import, is imported where it is made: to know that all is current takes none.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_assets.capture_catalog.choosing import require_predicate
from distill_assets.capture_catalog.refresh import CatalogEntry, CatalogReport, catalog_identity, read_meta
from distill_assets.capture_catalog.refresh import refresh_catalog as build_catalog
from distill_assets.dataset_shards.discover import Discovery, Shard, discover_shards, place_of_shard
from distill_assets.dataset_shards.sample import sample_texts
from distill_assets.foundation.errors import (
    CaptureError,
    CaptureOutOfReach,
    PinnedCapture,
    SettingsError,
    StaleInputs,
    TrainingError,
)
from distill_assets.foundation.files import write_json
from distill_assets.foundation.home import Home
from distill_assets.foundation.model_folders import ModelFolder, resolve_model
from distill_assets.foundation.progress import ProgressListener, ignore_progress
from distill_assets.orchestration import compatibility
from distill_assets.student_model.origin import require_layers
from distill_assets.teacher_capture.identity import CaptureSpec, capture_spec
from distill_assets.teacher_capture.importing import ImportReport, import_jsonl
from distill_assets.teacher_capture.plan import CapturePlan, State, capture_states, plan_capture
from distill_assets.teacher_capture.store import Capture, CaptureStore
from distill_assets.tokenizer_compatibility.compare import TokenizerReport, require_compatible

if TYPE_CHECKING:
    from distill_assets.teacher_capture.capture import CaptureReport


class Pipeline:
    """The capture side of a home; `students.StudentSide` continues it."""

    def __init__(self, home: Home, rehash: bool = False) -> None:
        self.home = home
        self.settings = home.settings()
        self.store = CaptureStore(home.captures)
        self.hashes = home.hashes(rehash)
        self._asked_for: str | None = None

    @cached_property
    def spec(self) -> CaptureSpec:
        """The capture identity and what it is made of; no weights are loaded."""
        spec = capture_spec(self.home, self.settings, self.hashes)
        self.hashes.save()
        return spec

    @cached_property
    def discovery(self) -> Discovery:
        return self._discover()

    def _discover(self, only: str | None = None) -> Discovery:
        discovery = discover_shards(self.home.root, self.settings.data, self.hashes, only)
        self.hashes.save()
        return discovery

    @cached_property
    def shards(self) -> dict[str, Shard]:
        """Usable shards by key."""
        return {shard.key: shard for shard in self.discovery.shards}

    @cached_property
    def student_folder(self) -> ModelFolder | None:
        """The folder of `student.model`; None for a student made from layers or a configuration."""
        origin = self.settings.student
        if not origin.model:
            return None
        return resolve_model(origin.model, origin.revision, self.home.root, called="student.model")

    # tokenizers ------------------------------------------------------------------------------

    @cached_property
    def tokenizer_identity(self) -> str:
        identity = compatibility.identity(self.settings, self.spec, self.student_folder, self.hashes)
        self.hashes.save()
        return identity

    def tokenizer_report(self) -> TokenizerReport:
        return compatibility.report(
            self.tokenizer_identity,
            self.settings,
            self.spec,
            self.student_folder,
            lambda: sample_texts(self.discovery.shards),
        )

    @property
    def tokenizer_verdict(self) -> compatibility.WrittenVerdict | None:
        """What tokenizer_report.json says of this very pair; None when it is of another, or not there."""
        written = compatibility.written_verdict(self.home.tokenizer_report)
        return written if written and written.identity == self.tokenizer_identity else None

    def check_tokenizers(self) -> TokenizerReport:
        """Reach the verdict and write tokenizer_report.json, whatever it is."""
        report = self.tokenizer_report()
        write_json(self.home.tokenizer_report, {"identity": self.tokenizer_identity, **report.to_json()})
        return report

    def require_possible_student(self) -> None:
        """SettingsError for a student made of layers the teacher does not have, or one whose rows no condition
        chooses.
        """
        if layers := self.settings.student.from_teacher_layers:
            require_layers(self.spec.teacher, layers)
        if where := self.settings.training.where:
            require_predicate(where)

    def require_any_shard(self) -> None:
        """StaleInputs when there is no shard file at all."""
        if not self.discovery.shards and not self.discovery.problems:
            where = f"data.shards ({self.settings.data.shards}) in {self.home.root}"
            raise StaleInputs(f"there are no shards: nothing matches {where}; put a file there, or mend the pattern")

    def require_roles(self) -> None:
        """TrainingError unless some shards are trained on and some are held out."""
        roles = {shard.role for shard in self.discovery.shards}
        if "train" not in roles:
            raise TrainingError("there are no training shards: every shard matches data.heldout or data.validation")
        if "heldout" not in roles:
            raise TrainingError(
                "there is no held-out shard to measure a student on; add one whose name matches data.heldout "
                "(heldout.jsonl by default), or name an existing shard there"
            )

    def require_validation(self) -> None:
        """SettingsError for a training that is to be judged by validation rows where no shard has any. Which shards
        there are is not known while a file cannot be used.
        """
        needs, data = self.settings.training.needs_validation, self.settings.data
        roles = {shard.role for shard in self.discovery.shards}
        if needs and roles and "validation" not in roles and not self.discovery.problems:
            raise SettingsError(
                f"training.{needs} needs validation rows, and no shard matches data.validation "
                f"({', '.join(data.validation)}); add one, or mend the pattern"
            )

    def require_usable_pair(self) -> None:
        """The guard in front of capture and training, whichever way they are started: a student that can
        be made, and tokenizers that agree. The verdict is reached here, whatever was written down.
        """
        self.require_possible_student()
        require_compatible(self.tokenizer_report())

    # captures --------------------------------------------------------------------------------

    def shard(self, key: str) -> Shard:
        """The shard with this key; CaptureError when there is none, or its file cannot be used.

        The first one that is asked for is looked for alone: to capture one of thousands the others need no look.
        """
        if "discovery" in self.__dict__ or self._asked_for not in (None, key):
            shards, problems = self.shards, self.discovery.problems
        else:
            self._asked_for = key
            alone = self._discover(only=key)
            shards, problems = {shard.key: shard for shard in alone.shards}, alone.problems
        if key in shards:
            return shards[key]
        for problem in problems:
            if problem.key == key:
                raise CaptureError(problem.message)
        raise CaptureError(f"shard {key}: no file for it in {self.home.root}; put it back, or forget the partition")

    def capture(
        self,
        key: str,
        *,
        device: str,
        batch_tokens: int | None,
        force: bool,
        on_progress: ProgressListener = ignore_progress,
    ) -> CaptureReport:
        """Make one shard's capture current. The tokenizer guard comes before the teacher."""
        from distill_assets.teacher_capture.capture import capture_shard

        self.require_usable_pair()
        return capture_shard(
            self.spec,
            self.shard(key),
            self.store,
            device=device,
            batch_tokens=batch_tokens,
            force=force,
            on_progress=on_progress,
        )

    def capture_of(self, shard: Shard) -> Capture:
        """The current capture of a shard; StaleInputs when there is none."""
        if found := self.store.current(self.spec, shard):
            return found
        raise StaleInputs(f"shard {shard.key} has no current capture; `distill run` captures it")

    def capture_id_of(self, shard: Shard) -> str:
        """The identity a current capture of this shard has: its own where it was imported, and that can be read, else
        the home's.
        """
        with suppress(PinnedCapture, CaptureOutOfReach):
            if pinned := self.store.pinned(self.spec, shard):
                return pinned.capture_id
        return self.spec.capture_id

    def import_jsonl(
        self, source: Path, key: str, *, shifted: bool, replace: bool, on_progress: ProgressListener = ignore_progress
    ) -> ImportReport:
        """Make another engine's log-probabilities the shard `key` and its pinned capture."""
        shard_file = place_of_shard(self.home.root, self.settings.data, key)
        with self.home.in_use.shared():
            return import_jsonl(
                source,
                key,
                self.spec,
                self.store,
                shard_file,
                shifted=shifted,
                replace=replace,
                on_progress=on_progress,
            )

    @cached_property
    def entries(self) -> tuple[CatalogEntry, ...]:
        """Current captures of the shards on disk. A damaged file is not a capture; the plan reports it."""
        found = []
        for shard in self.discovery.shards:
            try:
                found.append(CatalogEntry(self.capture_of(shard), shard.role))
            except (StaleInputs, CaptureError):
                continue
        return tuple(found)

    def forget_captures(self) -> None:
        """Look at the store anew: captures were made."""
        for name in ("entries", "uncaptured", "catalog_identity"):
            self.__dict__.pop(name, None)

    @cached_property
    def uncaptured(self) -> tuple[str, ...]:
        """Shards on disk without a current capture, and those that cannot be used."""
        have = {entry.capture.shard for entry in self.entries}
        keys = [shard.key for shard in self.discovery.shards] + [problem.key for problem in self.discovery.problems]
        return tuple(sorted(set(keys) - have))

    def plan(self) -> CapturePlan:
        """What a run would capture, and why. An impossible student is refused before the teacher is paid for."""
        self.require_possible_student()
        self.require_validation()
        catalogued = read_meta(self.home.catalog)
        return plan_capture(self.spec, self.discovery, self.store, catalogued[1] if catalogued else ())

    def capture_states(self, keys: Sequence[str]) -> list[State]:
        """The states of those of these shards whose files can be used."""
        return capture_states(self.spec, [self.shards[key] for key in keys if key in self.shards], self.store)

    # catalog ---------------------------------------------------------------------------------

    @cached_property
    def catalog_identity(self) -> str:
        return catalog_identity(self.home.root, self.entries)

    @property
    def catalog_is_current(self) -> bool:
        meta = read_meta(self.home.catalog)
        return meta is not None and meta[0] == self.catalog_identity

    def refresh_catalog(self, without: Collection[Path] = ()) -> CatalogReport:
        return build_catalog(self.home.catalog, self.store, self.entries, self.home.students, without)

    def catalog_summary(self) -> dict[str, Any]:
        """Sums and position-weighted means over current captures, or {} when there are none."""
        captures = [entry.capture for entry in self.entries]
        positions = sum(c.stats.supervised_tokens for c in captures)
        if not positions:
            return {}
        return {
            "shards": len(captures),
            "examples": sum(c.stats.rows for c in captures),
            "tokens": sum(c.stats.tokens for c in captures),
            "supervised_tokens": positions,
            "bytes": sum(c.bytes for c in captures),
            "bytes_per_token": sum(c.bytes for c in captures) / positions,
            "mean_kept_ids": sum(c.stats.kept_ids for c in captures) / positions,
            "mean_kept_mass": sum(c.stats.mean_kept_mass * c.stats.supervised_tokens for c in captures) / positions,
        }
