"""The directory of shards while `llm prepare_data` makes it: new files wait in a hidden folder until all are there."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm.atomic import STAGING, sync_directory
from llm.data.manifest import MANIFEST_NAME, read_manifest
from llm.data.spool import EXCLUDED_NAME, JOURNAL_NAME, read_journal
from llm.data.tokenizer import TOKENIZER_FILES
from llm.display import Display
from llm.errors import UserError
from llm.locks import locked


@contextmanager
def staging_folder(out_dir: Path) -> Iterator[Path]:
    """Yields a folder in `out_dir` and locks both. The folder is empty or holds what an interrupted run left.

    After an error the folder is kept if it holds a journal; otherwise it is removed, with `out_dir` if that is new.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir}: is a file; --out_dir names a directory")
    new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    staging = out_dir / STAGING
    try:
        with locked(out_dir, "another prepare_data is writing here"):
            try:
                # Without a journal, nothing in the folder can be continued.
                if read_journal(staging) is None:
                    shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(exist_ok=True)
                yield staging
            except OSError as error:
                if error.filename is None:  # raised by a write, such as to a full disk
                    error.filename = str(out_dir)
                raise
            finally:
                if not (staging / JOURNAL_NAME).exists():
                    shutil.rmtree(staging, ignore_errors=True)
    finally:
        if new and not any(out_dir.iterdir()):
            out_dir.rmdir()


def publish(staging: Path, out_dir: Path, display: Display) -> None:
    """Replaces the old files by the new ones; there is no manifest until the last step.

    May be called again after an interruption: each new file is then in one of the two folders.
    """
    manifest = read_manifest(staging)
    # The manifest in `staging` is moved last, so after an interruption it still lists the new files.
    new = {shard.file for part in manifest.shards.values() for shard in part}
    new |= set(manifest.tokenizer.get("files", ["tokenizer.model"]))
    new |= {EXCLUDED_NAME} if "exclude" in manifest.packing else set()
    old = out_dir / MANIFEST_NAME
    if old.exists():
        display.line(f"{out_dir}: replaces the shards that were made from other input or settings")
        old.unlink()
        # Synced before a shard is replaced: the old manifest must not come back after a crash with new shards.
        sync_directory(out_dir)
    for path in out_dir.iterdir():
        is_shard = re.fullmatch(r"(train|val)-\d{5,}\.bin", path.name)
        # A new file that is no longer in `staging` was moved by an earlier, interrupted call: it must stay.
        if is_shard and (path.name not in new or (staging / path.name).exists()):
            path.unlink()
        # Of another tokenizer, or other settings, than that of the new shards.
        if path.name in (*TOKENIZER_FILES, EXCLUDED_NAME) and path.name not in new:
            path.unlink()
    for name in sorted(new):
        if (staging / name).exists():
            # A rename in one file system, because `staging` is a folder of `out_dir`.
            os.replace(staging / name, out_dir / name)
    # The shards are durable before the manifest that names them appears.
    sync_directory(out_dir)
    os.replace(staging / MANIFEST_NAME, out_dir / MANIFEST_NAME)
    sync_directory(out_dir)
