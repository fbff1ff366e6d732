# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""A corpus divided among jobs that know nothing of each other: each has its part of the input and its own output."""

import hashlib
import json
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from corpus.inputs import Corpus, is_manifest
from corpus.output import SETTINGS, Output
from corpus.rows import IdSet


# Of a shard, once all of its images have rows.
COMPLETE = ".complete"

# For what others were made with: on an object store each takes a while, and all are begun alike.
SHARDS_LOOKED_AT = 16


def name_of(index: int, count: int) -> str:
    """As Hive names a partition, so that readers of all shards give a column `shard`."""
    return f"shard={index}-of-{count}"


def shard_of(name: str, count: int) -> int:
    """The same for a name wherever and whenever it is asked for, whatever other names there are."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % count


def shards_in(output: Output) -> dict[str, tuple[int, int]]:
    """Index and count of each shard that was begun, by its name."""
    output.fs.invalidate_cache()
    if not output.fs.exists(output.path):
        return {}
    names = (name.rstrip("/").rsplit("/", 1)[-1] for name in output.fs.ls(output.path, detail=False))
    matches = (re.fullmatch(r"shard=(\d+)-of-(\d+)", name) for name in names)
    return {match[0]: (int(match[1]), int(match[2])) for match in matches if match}


def output_of(location: str, count: int | None, index: int | None) -> Output:
    """
    Where a run writes.

    Raises:
        ValueError: the numbers make no sense, or the output is divided otherwise.
    """
    whole = Output(location)
    counts = {of for _, of in shards_in(whole).values()}
    if count is None and index is None:
        if counts:
            raise ValueError(f"`--output` {whole.shown} is divided into shards: give --num-shards {min(counts)}.")
        return whole
    if count is None or index is None or not 0 <= index < count:
        raise ValueError(
            f"`--num-shards` and `--shard-index` are given together, the index from 0 to below the number, got {count} "
            f"and {index}."
        )
    if counts - {count}:
        raise ValueError(
            f"`--output` {whole.shown} is divided into {min(counts - {count})} shards, got --num-shards {count}: give "
            "the same, or another output."
        )
    if any(whole.fs.exists(f"{whole.path}/{name}") for name in (SETTINGS, "_settings.json")):
        raise ValueError(f"`--output` {whole.shown} was begun without shards: give no --num-shards, or another output.")
    return Output(f"{location.rstrip('/')}/{name_of(index, count)}")


def manifests_of(corpus: Corpus) -> frozenset[str]:
    return frozenset(filter(is_manifest, corpus.stamps)) if corpus.kind == "parquet" else frozenset()


def keep_shard(corpus: Corpus, count: int, index: int) -> None:
    """
    Leaves of a corpus the files of one shard: images by their ids, archives and Parquet files each as a whole, and all
    manifests, of which it leaves the rows by their ids.
    """
    manifests = manifests_of(corpus)
    names = manifests | {name for name in corpus.stamps if shard_of(name, count) == index}
    corpus.parts = [part for part in corpus.parts if part.name in names]
    corpus.skipped = [item for item in corpus.skipped if shard_of(item[0], count) == index]
    corpus.stamps = {name: stamp for name, stamp in corpus.stamps.items() if name in names}
    corpus.rows = {name: rows for name, rows in corpus.rows.items() if name in names}
    corpus.digests = {name: digests for name, digests in corpus.digests.items() if name in names}
    if corpus.ids is not None:
        for name in manifests:
            corpus.digests[name] = b"".join(
                digest for digest in IdSet.split(corpus.digests[name]) if shard_of_digest(digest, count) == index
            )
        corpus.ids = IdSet(digests=b"".join(corpus.digests.values()))
        corpus.total = len(corpus.ids)
    elif corpus.kind == "image":
        corpus.total = len(corpus.parts)
    elif corpus.total is not None:
        others = Others(IdSet(), None, manifests, count, index)
        of_manifests = (f"{name}#{row}" for name in manifests for row in range(corpus.rows[name]))
        corpus.total = sum(rows for name, rows in corpus.rows.items() if name not in manifests)
        corpus.total += sum(id_ not in others for id_ in of_manifests)


def shard_of_digest(digest: bytes, count: int) -> int:
    return shard_of(digest.decode(), count)


@dataclass(frozen=True)
class Others:
    """
    The ids that readers of a shard pass over: those that are done, and those of rows of manifests that are of other
    shards. `ids` are those of the shard, where a column holds them.
    """

    done: Container[str]
    ids: IdSet | None
    manifests: frozenset[str]
    count: int
    index: int

    def __contains__(self, id_: object) -> bool:
        text = str(id_)
        if self.ids is not None:
            is_other = text not in self.ids
        else:
            is_of_manifest = text.rpartition("#")[0] in self.manifests
            is_other = is_of_manifest and shard_of_digest(IdSet.digest(text), self.count) != self.index
        return is_other or text in self.done


def passed_over(corpus: Corpus, done: IdSet, count: int | None, index: int | None) -> Container[str]:
    """What is not to be read of the files of a run: what is done, and in a shard the rows of others."""
    manifests = manifests_of(corpus)
    if count is None or index is None or not manifests:
        return done
    return Others(done, corpus.ids, manifests, count, index)


def recorded_shard(location: str) -> tuple[Output, dict[str, Any]] | None:
    """The first of some shards that has rows, with what they were made with."""
    for name in sorted(shards_in(Output(location)))[:SHARDS_LOOKED_AT]:
        shard = Output(f"{location.rstrip('/')}/{name}")
        if shard.files() and (record := shard.record()) is not None:
            return shard, record
    return None


def rows_and_errors(output: Output) -> tuple[int, int]:
    """
    As the metadata of the files tell, without reading rows.

    Raises:
        ValueError: a file cannot be read, or is none of this command's.
    """
    rows = errors = 0
    for file in output.files():
        with output.parquet(file) as parquet:
            column = parquet.schema_arrow.get_field_index("error")
            if column < 0:
                raise output.foreign(file)
            for group in (parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)):
                rows += group.num_rows
                errors += group.num_rows - group.column(column).statistics.null_count
    return rows, errors


def mark_complete(output: Output) -> None:
    rows, errors = rows_and_errors(output)
    output.write_bytes(COMPLETE, json.dumps({"rows": rows, "errors": errors}).encode())


def unmark(output: Output) -> None:
    if output.fs.exists(f"{output.path}/{COMPLETE}"):
        output.fs.rm_file(f"{output.path}/{COMPLETE}")


def marker_of(output: Output) -> object:
    """What the marker says, or None where there is none that can be read."""
    try:
        return json.loads(output.content_of(COMPLETE))
    # What is nested too deep ends in RecursionError.
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def state_of(output: Output) -> tuple[str, str]:
    """Complete where the rows are those that the marker tells of, else begun; and what is there."""
    try:
        rows, errors = rows_and_errors(output)
    except ValueError as error:
        return "begun", str(error)
    is_complete = marker_of(output) == {"rows": rows, "errors": errors}
    return "complete" if is_complete else "begun", f"{rows:,} rows, {errors:,} errors"


def status_lines(location: str) -> list[str]:
    """
    Which shards of an output are complete, begun or missing, and the rows and errors of each.

    Raises:
        ValueError: it has no shards, or of several divisions.
    """
    whole = Output(location)
    begun = shards_in(whole)
    counts = {count for _, count in begun.values()}
    if len(counts) != 1:
        found = f"those of {sorted(counts)}" if counts else "none"
        raise ValueError(
            f"`--status` is for an output of `--num-shards N`, one N for all, got {found} in {whole.shown}."
        )
    count = counts.pop()
    lines, states = [], []
    for name in (name_of(index, count) for index in range(count)):
        if name not in begun:
            states.append("missing")
            lines.append(f"{name}  missing")
            continue
        output = Output(f"{location.rstrip('/')}/{name}")
        state, found = state_of(output)
        states.append(state)
        lines.append(f"{name}  {state}  {found}")
    summary = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "begun", "missing"))
    return [f"{count} shards of {whole.shown}: {summary}.", *lines]
