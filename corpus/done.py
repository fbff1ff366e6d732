# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What of an input is done in an output, by ids, and which of its files have changed since."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from conversion.messages import printable, say
from corpus.inputs import Corpus
from corpus.output import Output
from corpus.rows import IdSet


@dataclass
class Done:
    """
    `ids` of the input that are done; `retried` the files of the rows that are to be done again, by their ids. `failed`
    rows hold an error, `elsewhere` are of no image of the input. `changed` are the files of the input that differ from
    those the rows were made of; `stamps` are the sizes and times of those.
    """

    ids: IdSet = field(default_factory=IdSet)
    retried: dict[str, str] = field(default_factory=dict)
    elsewhere: int = 0
    failed: int = 0
    changed: set[str] = field(default_factory=set)
    stamps: dict[str, str] = field(default_factory=dict)


def done_of(output: Output, corpus: Corpus, retry_errors: bool, redo_changed: bool) -> Done:
    """
    Reads all ids of the output, and notes the sizes and times of files that have no rows yet.

    Raises:
        ValueError: the output has two rows of an image, or a file that is none of its own.
    """
    done = Done()
    recorded = output.stamps()
    known = recorded or {}
    done.changed = {name for name, stamp in corpus.stamps.items() if known.get(name, stamp) != stamp}
    redone = done.changed if redo_changed else set()
    redone_ids = IdSet(digests=b"".join(corpus.digests[name] for name in redone)) if corpus.ids is not None else IdSet()
    with_rows: set[str] = set()

    def ids() -> Iterator[str]:
        for file, id_, error in output.rows():
            name = corpus.file_of(id_)
            if name is not None:
                with_rows.add(name)
            if name in redone or id_ in redone_ids:
                done.retried[id_] = file
            elif not corpus.holds(id_):
                done.elsewhere += 1
            else:
                done.failed += error is not None
                if error is not None and retry_errors:
                    done.retried[id_] = file
                else:
                    yield id_

    done.ids = IdSet(ids())
    if done.ids.has_duplicates():
        raise ValueError(twice_line(output, done.ids.duplicates()))
    if corpus.ids is not None:
        with_rows = {name for name in corpus.digests if name in known}
    if recorded is None and with_rows:
        say("This output has no record of sizes and times: whether files of the input changed since cannot be told.")
    # A file without rows is read as it is now. Those of other inputs stay known.
    done.changed &= with_rows
    done.stamps = {**known, **corpus.stamps, **{name: known[name] for name in done.changed}}
    if done.stamps != recorded:
        output.write_stamps(done.stamps)
    return done


def twice_line(output: Output, ids: IdSet) -> str:
    of_ids = ((id_, file) for file, id_, _ in output.rows() if id_ in ids)
    first, file = next(of_ids)
    files = dict.fromkeys([file, *(file for id_, file in of_ids if id_ == first)])
    return (
        f"`--output` {output.shown} holds {len(ids):,} images twice, such as {printable(first)} in "
        f"{' and '.join(files)}: delete one of these files, and run again, which does what only it held."
    )


def changed_line(done: Done, redo_changed: bool) -> str:
    first = printable(min(done.changed))
    step = "their rows are done again" if redo_changed else "--redo-changed does their rows again"
    return f"{len(done.changed):,} files of the input changed since their rows were made, such as {first}; {step}."


def note_redone(output: Output, corpus: Corpus, done: Done, is_complete: bool) -> None:
    """
    After the rows were done again: what is left is of images that are in their files no more, and goes, unless an
    archive could not be read to its end.
    """
    gone = {id_: file for id_, file in done.retried.items() if corpus.file_of(id_) not in output.failed}
    if is_complete and gone:
        output.remove(gone)
        say(f"{len(gone):,} rows of images that are no longer in their files were removed.")
        for id_ in gone:
            del done.retried[id_]
    if corpus.ids is not None:
        redone = set() if done.retried else done.changed
    else:
        redone = done.changed - {corpus.file_of(id_) for id_ in done.retried}
    if redone:
        output.write_stamps({**done.stamps, **{name: corpus.stamps[name] for name in redone}})
