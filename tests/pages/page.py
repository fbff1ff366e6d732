# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""A page of the repo, as Markdown is parsed: its code and commands in the order written, its links and its tables."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token


FOLDERS = (".ci", ".github", "benchmarks", "conversion", "corpus", "docs", "examples", "tests")
LINKS = ("link_open", "image")
COMMANDS = ("python", "make", "pip", "torchrun", "accelerate launch")


@dataclass(frozen=True)
class Step:
    """`language` is `"python"`, a whole block, or `"bash"`, one command of a block or of the text."""

    language: str
    code: str


class Page:
    def __init__(self, path: Path):
        self.path = path
        self.text = path.read_text()
        # The front matter of a model card is no Markdown.
        body = re.sub(r"\A---\n.*?\n---\n", "", self.text, flags=re.DOTALL)
        self.lines = body.splitlines()
        self.tokens = MarkdownIt("commonmark").enable("table").parse(body)

    @cached_property
    def steps(self) -> list[Step]:
        steps = []
        for token in self.tokens:
            if token.type == "fence" and token.info == "python":
                steps.append(Step("python", token.content))
            elif token.type == "fence" and token.info == "bash":
                lines = re.sub(r"\\\n\s*", "", token.content).splitlines()
                commands = [re.sub(r"\s+# .*", "", line).strip() for line in lines]
                steps += [Step("bash", command) for command in commands if command]
            for part in token.children or []:
                if part.type == "code_inline" and re.match(rf"({'|'.join(COMMANDS)}) ", part.content):
                    steps.append(Step("bash", part.content))
        return steps

    @property
    def code_tokens(self) -> list[Token]:
        return [token for token in self.tokens if token.type in ("fence", "code_block")]

    @property
    def links(self) -> list[str]:
        """Targets of links and pictures."""
        inline = [part for token in self.tokens for part in token.children or []]
        return [str(part.attrs.get("href", part.attrs.get("src"))) for part in inline if part.type in LINKS]

    @property
    def paths(self) -> list[str]:
        """Of files and folders of the repo, where the text names them as code."""
        inline = [part.content for token in self.tokens for part in token.children or [] if part.type == "code_inline"]
        return [text for text in inline if re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./-]*", text)]

    @property
    def anchors(self) -> set[str]:
        """Of its headings, as GitHub and the Hub make them."""
        titles = [
            following.content
            for token, following in zip(self.tokens, self.tokens[1:], strict=False)
            if token.type == "heading_open"
        ]
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    @property
    def tables(self) -> list[list[str]]:
        """The source lines of each."""
        return [
            self.lines[token.map[0] : token.map[1]] for token in self.tokens if token.type == "table_open" and token.map
        ]
