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
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from lctw_megatron.atomic import atomic_file
from lctw_megatron.cli import run_command
from lctw_megatron.errors import InputError

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
    if options.characters is not None and options.characters < 1:
        parser.error(f"--characters {options.characters}: must be at least 1")
    if options.output.is_dir():
        raise InputError(f"{options.output}: is a folder; name a file for --output")
    if options.held_out is not None:
        return trained(options.inputs, options.held_out, options.output)
    read = code if options.kind == "code" else prose
    found = [document for path in options.inputs for document in read(path)]
    if not found:
        raise InputError(f"no document of {SHORTEST:,} to {LONGEST:,} characters in the inputs")
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
    known = {text for _, text in documents(held_out)}
    lines = [document for path in inputs for document in documents(path)]
    kept = [line for line, text in lines if text not in known]
    if len(kept) == len(lines):
        raise InputError(f"{held_out}: no document of the inputs is held out; is it of them?")
    if not kept:
        raise InputError(f"{held_out}: holds all documents of the inputs; none is left to train on")
    with atomic_file(output) as file:
        file.writelines(kept)
    print(f"{output}: {len(kept)} of {len(lines)} documents")
    return 0


def documents(path: Path) -> list[tuple[bytes, str]]:
    """The lines of a jsonl file, each with its text."""
    found = []
    for number, line in enumerate(content(path).splitlines(keepends=True), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise InputError(f'{path}: line {number} is no JSON object with a "text"')
        found.append((line, value["text"]))
    return found


def content(path: Path) -> bytes:
    """What is in a file, .gz unpacked."""
    try:
        packed = path.read_bytes()
        return gzip.decompress(packed) if path.suffix == ".gz" else packed
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or "is no complete gzip file; get it anew"
        raise InputError(f"{path}: {why}") from None


def code(tarball: Path) -> list[tuple[str, str]]:
    """The C sources of each directory, joined in the order of their names."""
    directories: dict[str, dict[str, str]] = {}
    try:
        for path, text in sources(tarball):
            if not is_table(text):
                folder, _, name = path.rpartition("/")
                directories.setdefault(folder, {})[name] = text
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
        why = getattr(error, "strerror", None) or "is no complete tar file; get it anew"
        raise InputError(f"{tarball}: {why}") from None
    joined = [
        (folder, "\n".join(f"// {folder}/{name}\n{files[name]}" for name in sorted(files)))
        for folder, files in sorted(directories.items())
    ]
    return [(name, text) for name, text in joined if SHORTEST <= len(text) <= LONGEST]


def sources(tarball: Path) -> Iterator[tuple[str, str]]:
    """Path and text of each C source."""
    with tarfile.open(tarball) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith((".c", ".h")):
                stream = tar.extractfile(member)
                yield member.name, stream.read().decode("utf-8", "replace") if stream else ""


def is_table(text: str) -> bool:
    """Whether most lines hold a number: registers and firmware, of which nothing can be learnt."""
    lines = [line for line in text.splitlines() if line.strip()]
    return 2 * sum(bool(_NUMBER.search(line)) for line in lines) > len(lines)


def prose(folder: Path) -> list[tuple[str, str]]:
    """The texts of a folder in the order of their names, joined until a document is long enough;
    a shorter rest is added to the last."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; prose takes folders of .txt, .md or .html files")
    joined: list[str] = []
    rest = ""
    for path in sorted(folder.rglob("*"), key=in_order):
        rest += "".join(f"{text.strip()}\n\n" for text in texts(path))
        if len(rest) >= SHORTEST:
            joined.append(rest)
            rest = ""
    if joined:
        joined[-1] += rest
    names = [f"{folder.name}-{number}" for number in range(len(joined))]
    kept = zip(names, joined, strict=True)
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
    text = content(path).decode("utf-8", "replace")
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


def evenly(found: list[tuple[str, str]], characters: int | None) -> list[tuple[str, str]]:
    """``found``, or as many of them as hold about ``characters``, spread over the list."""
    total = sum(len(text) for _, text in found)
    if characters is None or characters >= total:
        return found
    number = max(1, round(len(found) * characters / total))
    return [found[len(found) * place // number] for place in range(number)]


if __name__ == "__main__":
    run_command(main)
