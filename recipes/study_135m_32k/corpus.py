"""Long documents for the study, from what any Debian mirror has, or from your own folders.

    corpus.py code TARBALL... --output code.jsonl      one document a directory of C sources
    corpus.py prose FOLDER... --output prose.jsonl     the files of a folder, joined in their order
    corpus.py trained code.jsonl --held-out documents-validation.jsonl --output code-trained.jsonl
                                                       the lines that were not held out of training

Only documents of 110,000 to 1,500,000 characters are kept: from about 32k tokens on. With
--characters N, documents evenly spaced over all of them are taken until N are reached. The same
inputs give the same bytes.
"""

import argparse
import gzip
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from lctw_megatron.atomic import atomic_file

SHORTEST, LONGEST = 110_000, 1_500_000
"""Characters of a document."""
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|[0-9]{2,}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["code", "prose", "trained"])
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT")
    parser.add_argument("--held-out", type=Path, metavar="FILE.jsonl", help="for trained")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--characters", type=int, metavar="N", help="of all documents together")
    options = parser.parse_args(arguments)
    if (options.kind == "trained") != (options.held_out is not None):
        parser.error("--held-out goes with trained")
    if options.kind == "trained" and options.characters is not None:
        parser.error("--characters goes with code and prose")
    read = code if options.kind == "code" else prose
    try:
        if options.held_out is not None:
            return trained(options.inputs, options.held_out, options.output)
        found = [document for path in options.inputs for document in read(path)]
    except (OSError, tarfile.TarError) as error:
        return refuse(str(error))
    if not found:
        return refuse(f"no document of {SHORTEST:,} to {LONGEST:,} characters in the inputs")
    chosen = evenly(found, options.characters)
    with atomic_file(options.output) as file:
        for name, text in chosen:
            line = json.dumps({"source": name, "text": text}, ensure_ascii=False)
            file.write(f"{line}\n".encode())
    size = sum(len(text) for _, text in chosen)
    print(f"{options.output}: {len(chosen)} of {len(found)} documents, {size:,} characters")
    return 0


def trained(inputs: list[Path], held_out: Path, output: Path) -> int:
    """Copy the lines of ``inputs`` whose text is none of ``held_out``."""
    with open(held_out, "rb") as file:
        known = {json.loads(line)["text"] for line in file}
    lines = [line for path in inputs for line in path.read_bytes().splitlines(keepends=True)]
    kept = [line for line in lines if json.loads(line)["text"] not in known]
    if len(kept) == len(lines):
        return refuse(f"{held_out}: no document of the inputs is held out; is it of this corpus?")
    with atomic_file(output) as file:
        file.writelines(kept)
    print(f"{output}: {len(kept)} of {len(lines)} documents")
    return 0


def refuse(line: str) -> int:
    print(f"corpus.py: {line}", file=sys.stderr)
    return 1


def code(tarball: Path) -> list[tuple[str, str]]:
    """The C sources of each directory, joined in the order of their names."""
    directories: dict[str, dict[str, str]] = {}
    with tarfile.open(tarball) as tar:
        for member in tar:
            if not member.isfile() or not member.name.endswith((".c", ".h")):
                continue
            stream = tar.extractfile(member)
            text = stream.read().decode("utf-8", "replace") if stream else ""
            if not is_table(text):
                folder, _, name = member.name.rpartition("/")
                directories.setdefault(folder, {})[name] = text
    joined = [
        (folder, "\n".join(f"// {folder}/{name}\n{files[name]}" for name in sorted(files)))
        for folder, files in sorted(directories.items())
    ]
    return [(name, text) for name, text in joined if SHORTEST <= len(text) <= LONGEST]


def is_table(text: str) -> bool:
    """Whether most lines hold a number: registers and firmware, of which nothing can be learnt."""
    lines = [line for line in text.splitlines() if line.strip()]
    return 2 * sum(bool(_NUMBER.search(line)) for line in lines) > len(lines)


def prose(folder: Path) -> list[tuple[str, str]]:
    """The texts of a folder in the order of their names, joined until a document is long enough;
    a shorter rest is added to the last."""
    documents: list[str] = []
    rest = ""
    for path in sorted(folder.rglob("*"), key=in_order):
        rest += "".join(f"{text.strip()}\n\n" for text in texts(path))
        if len(rest) >= SHORTEST:
            documents.append(rest)
            rest = ""
    if documents:
        documents[-1] += rest
    names = [f"{folder.name}-{number}" for number in range(len(documents))]
    kept = zip(names, documents, strict=True)
    return [(name, text) for name, text in kept if SHORTEST <= len(text) <= LONGEST]


def in_order(path: Path) -> list[tuple[int, str]]:
    """chapter_2 before chapter_10."""
    return [
        (int(part), "") if part.isdigit() else (-1, part)
        for part in re.split(r"([0-9]+)", str(path))
    ]


def texts(path: Path) -> Iterator[str]:
    """What a person reads in a .txt, .md or .html file, plain or .gz; other files have nothing."""
    name = path.name.removesuffix(".gz")
    if not path.is_file() or not name.endswith((".txt", ".md", ".html")):
        return
    content = path.read_bytes()
    text = (gzip.decompress(content) if name != path.name else content).decode("utf-8", "replace")
    if not name.endswith(".html"):
        yield text
        return
    page = Page()
    page.feed(text)
    yield re.sub(r"\n\s*\n\s*", "\n\n", "".join(page.parts))


class Page(HTMLParser):
    """The text of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag == "body":  # the end of the head may be left out
            self._hidden = 0
        self._hidden += tag in ("script", "style", "head")
        if tag in ("p", "div", "li", "h1", "h2", "h3", "h4", "tr", "pre", "br"):
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in ("script", "style", "head")))

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def evenly(documents: list[tuple[str, str]], characters: int | None) -> list[tuple[str, str]]:
    """``documents``, or as many of them as hold about ``characters``, spread over the list."""
    total = sum(len(text) for _, text in documents)
    if characters is None or characters >= total:
        return documents
    number = max(1, round(len(documents) * characters / total))
    return [documents[len(documents) * place // number] for place in range(number)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
