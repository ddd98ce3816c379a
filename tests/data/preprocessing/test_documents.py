import contextlib
import dataclasses
import json
import random
import re

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lctw_megatron.config.schema import MOST_DOCUMENT_BYTES
from lctw_megatron.data.preprocessing.corpus import Slice, find_files, plan_shards
from lctw_megatron.data.preprocessing.documents import read_documents
from lctw_megatron.errors import InputError
from tests.data.corpus_files import compress, texts, write_corpus

TEXTS = [*texts(7), "", 'one \\ "two"\n\n']


def slices(path, cuts=()):
    """The file as one slice, or cut at these bytes or row groups."""
    (file,) = find_files([str(path)], "/nowhere/out")
    bounds = [0, *sorted(cuts), file.size]
    return [Slice(file, a, b, b - a) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


def read(parts, scratch, skip_bad=False, field="text", most_bytes=MOST_DOCUMENT_BYTES):
    return [
        document.text
        for part in parts
        for document in read_documents(part, field, skip_bad, str(scratch), most_bytes)
    ]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
def test_every_kind_gives_its_documents(tmp_path, kind, compression):
    expected = TEXTS if kind != "txt" else ["".join(TEXTS)]
    path = write_corpus(tmp_path / f"a.{kind}{compression}", expected)
    if kind == "parquet" and not compression:
        parts = [dataclasses.replace(slices(path)[0], begin=0, end=3)]
    else:
        parts = slices(path)
    assert read(parts, tmp_path) == expected


def test_parquet_row_groups_give_their_rows(tmp_path):
    (whole,) = slices(write_corpus(tmp_path / "a.parquet", TEXTS, "body"))
    groups = [dataclasses.replace(whole, begin=group, end=group + 1) for group in range(3)]
    assert read(groups, tmp_path, field="body") == TEXTS
    assert read(groups[1:2], tmp_path, field="body") == TEXTS[3:6]


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=10),
    cuts=st.lists(st.integers(1, 300), max_size=6),
    final_newline=st.booleans(),
    blank_lines=st.booleans(),
)
def test_slices_of_a_file_hold_every_line_once(
    tmp_path_factory, lengths, cuts, final_newline, blank_lines
):
    folder = tmp_path_factory.mktemp("x")
    expected = [str(number) * length for number, length in enumerate(lengths)]
    lines = [json.dumps({"text": text}) for text in expected]
    content = ("\n\n \n" if blank_lines else "\n").join(lines) + "\n" * final_newline
    (folder / "a.jsonl").write_text(content)
    inside = {cut for cut in cuts if cut < len(content)}
    assert read(slices(folder / "a.jsonl", inside), folder) == expected


def test_position_grows_to_the_weight(tmp_path):
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        part = slices(write_corpus(tmp_path / name, TEXTS))[0]
        if name == "c.parquet":
            part = dataclasses.replace(part, end=3)
        found = read_documents(part, "text", False, str(tmp_path), MOST_DOCUMENT_BYTES)
        positions = [document.position for document in found]
        assert positions == sorted(positions)
        assert positions[0] > 0 and positions[-1] == part.weight


def test_concatenated_compressed_files_are_read_to_the_end(tmp_path):
    for ending in ("jsonl.gz", "jsonl.zst"):
        once = write_corpus(tmp_path / f"a.{ending}", TEXTS).read_bytes()
        (tmp_path / f"a.{ending}").write_bytes(once + once)
        assert read(slices(tmp_path / f"a.{ending}"), tmp_path) == TEXTS * 2


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "txt.zst", "parquet.gz"])
@pytest.mark.parametrize("left", [0.3, 0.95])
def test_a_truncated_compressed_file_is_refused(tmp_path, ending, left):
    many = texts(2000) if not ending.startswith("txt") else ["".join(texts(2000))]
    path = write_corpus(tmp_path / f"a.{ending}", many)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(InputError, match=rf"a\.{ending}: damaged or truncated (gzip|zstd) file"):
        read(slices(path), tmp_path, skip_bad=True)


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst"])
def test_what_is_not_compressed_is_refused(tmp_path, ending):
    (tmp_path / f"a.{ending}").write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match=r"damaged or truncated"):
        read(slices(tmp_path / f"a.{ending}"), tmp_path)


BROKEN_LINES = {
    b'{"text": "x"': "not valid JSON",
    b"[": "not valid JSON",
    b'"text"': "a JSON object was expected, found str",
    b'{"body": "x", "id": 3}': r"no field 'text' \(fields: body, id\); name it with --text-field",
    b'{"text": 7}': "field 'text' is int, a string was expected",
    b'{"text": null}': "field 'text' is NoneType",
    b'{"text": "x", "id": 3, "text": "y"}': "field 'text' is there twice, one text was expected",
    b'{"text": "\xff"}': "not valid UTF-8 \\(byte 10 of the line\\)",
    b'{"text": "\\ud800"}': "can't encode character",
    b"[" * 100_000: "not valid JSON",
}


@pytest.mark.parametrize("broken", BROKEN_LINES, ids=lambda line: line[:20].decode("latin1"))
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_a_broken_line_is_named_or_counted(tmp_path, ending, broken):
    good = b'{"text": "good"}\n'
    path = tmp_path / f"a.{ending}"
    path.write_bytes(compress(good + b"\n" + good + broken + b"\n" + good, ending))
    with pytest.raises(InputError, match=rf"a\.{ending} line 4: .*{BROKEN_LINES[broken]}"):
        read(slices(path), tmp_path)
    assert read(slices(path), tmp_path, skip_bad=True) == ["good", "good", None, "good"]


NO_LINES = {
    "an array": (
        json.dumps([{"text": "good"}] * 9),
        "a JSON object .* found list; ",
        "'.[]'",
    ),
    "an indented array": (json.dumps([{"text": "good"}] * 9, indent=1), "not valid JSON", "'.[]'"),
    "an array of lines": ('[{"text": "good"},\n{"text": "good"}]', "not valid JSON", "'.[]'"),
    "an indented object": (json.dumps({"text": "good"}, indent=1), "not valid JSON", "."),
}


@pytest.mark.parametrize("before", ["", "\ufeff", "\n "])
@pytest.mark.parametrize("ending", ["json", "json.gz"])
@pytest.mark.parametrize("case", NO_LINES)
def test_json_that_is_no_jsonl_is_said_to_be_so(tmp_path, case, ending, before):
    text, found, values = NO_LINES[case]
    path = tmp_path / f"a.{ending}"
    path.write_bytes(compress((before + text).encode(), ending))
    parts = slices(path, [12] if ending == "json" and "\n" in text else [])
    for part in parts:  # whichever a worker takes first
        with pytest.raises(InputError) as caught:
            read([part], tmp_path)
        assert re.search(found, str(caught.value)) or part.begin
        assert str(caught.value).endswith(
            f"not jsonl, one JSON object a line; make it so: jq -c {values} FILE > FILE.jsonl"
        )


def test_another_field_may_be_there_twice(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "a", "id": {"text": "b", "text": "c"}}')
    assert read(slices(tmp_path / "a.jsonl"), tmp_path) == ["a"]


def test_one_line_of_many_is_to_be_mended(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n[1]\n')
    with pytest.raises(InputError, match="line 2: .* found list; mend it, or pass --skip-bad"):
        read(slices(tmp_path / "a.jsonl"), tmp_path)


@pytest.mark.parametrize("cut", range(1, 70))
def test_the_line_number_is_that_of_the_file_in_any_slice(tmp_path, cut):
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + good + b"{\n" + good + good)
    with pytest.raises(InputError, match=r"a\.jsonl line 4: not valid JSON"):
        read(slices(tmp_path / "a.jsonl", [cut]), tmp_path)


def test_a_broken_text_or_row_is_named_or_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"a\.txt: not valid UTF-8 \(byte 3\)"):
        read(slices(tmp_path / "a.txt"), tmp_path)
    assert read(slices(tmp_path / "a.txt"), tmp_path, skip_bad=True) == [None]
    path = write_corpus(tmp_path / "a.parquet", ["a", "b", "c", "d", None, "f"])
    second_group = [dataclasses.replace(slices(path)[0], begin=1, end=2)]
    with pytest.raises(InputError, match=r"a\.parquet row 5: no text in column 'text'"):
        read(second_group, tmp_path)
    assert read(second_group, tmp_path, skip_bad=True) == ["d", None, "f"]


def test_a_damaged_parquet_page_is_named(tmp_path):
    path = write_corpus(tmp_path / "a.parquet", ["some longer text " * 50] * 6)
    part = slices(path)[0]
    content = bytearray(path.read_bytes())
    content[20:40] = b"\xff" * 20  # inside the first page
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet: not a parquet file, or damaged"):
        read([dataclasses.replace(part, end=1)], tmp_path)


def test_parquet_columns_are_checked(tmp_path):
    path = write_corpus(tmp_path / "a.parquet", ["a"], "body")
    part = dataclasses.replace(slices(path)[0], end=1)
    with pytest.raises(InputError, match=r"no column 'text' \(columns: body\); .*--text-field"):
        read([part], tmp_path)
    path = write_corpus(tmp_path / "b.parquet", [1, 2])  # type: ignore[list-item]
    part = dataclasses.replace(slices(path)[0], end=1)
    with pytest.raises(InputError, match="column 'text' holds int64, strings were expected"):
        read([part], tmp_path)


def parquet_part(path):
    return [part for shard in plan_shards(find_files([str(path)], "/o")) for part in shard]


def strings(*cells):
    """A column of strings whose bytes are as given, valid or not."""
    return pyarrow.array(cells, pyarrow.binary()).view(pyarrow.string())


@pytest.mark.parametrize("ending", ["parquet", "parquet.zst"])
def test_a_cell_that_is_not_utf8_costs_its_row_only(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    buffer = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": range(4), "text": strings(b"a", b"b\xff", None, b"d")})
    parquet.write_table(table, buffer)
    path.write_bytes(compress(buffer.getvalue().to_pybytes(), ending))
    with pytest.raises(InputError, match=rf"a\.{ending} row 2: not valid UTF-8 \(byte 1 of"):
        read(parquet_part(path), tmp_path)
    assert read(parquet_part(path), tmp_path, skip_bad=True) == ["a", None, None, "d"]


def test_columns_of_one_name_are_refused_unless_they_are_others(tmp_path):
    path = tmp_path / "a.parquet"
    columns = [strings(b"a"), strings(b"b"), strings(b"c")]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["text", "id", "text"]), path)
    with pytest.raises(InputError, match=r"a\.parquet: 2 columns 'text' \(columns: text, id, text"):
        read(parquet_part(path), tmp_path)
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["id", "text", "id"]), path)
    assert read(parquet_part(path), tmp_path) == ["b"]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["text.a", "text", "text.b"]), path)
    assert read(parquet_part(path), tmp_path) == ["b"]


def test_large_strings_categories_and_views_are_strings_too(tmp_path):
    kinds = [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
    kinds += [pyarrow.string_view()] if hasattr(pyarrow, "string_view") else []
    for kind in kinds:
        column = pyarrow.array(["a", "b", "a"]).cast(kind)
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        assert read(parquet_part(tmp_path / "a.parquet"), tmp_path) == ["a", "b", "a"]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.gz", "parquet"])
def test_a_document_above_the_limit_is_named_or_counted(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    long = ["good", "x" * 100, "good"] if "txt" not in ending else ["x" * 100]
    write_corpus(path, long)
    parts = parquet_part(path) if ending == "parquet" else slices(path)
    with pytest.raises(InputError, match="longer than 90 bytes, .* --max-document-bytes"):
        read(parts, tmp_path, most_bytes=90)
    expected = ["good", None, "good"] if "txt" not in ending else [None]
    assert read(parts, tmp_path, skip_bad=True, most_bytes=90) == expected
    assert None not in read(parts, tmp_path, most_bytes=200)


@pytest.mark.parametrize("cut", [50, 140, 160, 230])
def test_slices_that_begin_in_a_line_above_the_limit_hold_every_line_once(tmp_path, cut):
    path = write_corpus(tmp_path / "a.jsonl", ["one", "x" * 200, "three"])
    found = read(slices(path, [cut]), tmp_path, skip_bad=True, most_bytes=60)
    assert found == ["one", None, "three"]


def test_a_window_too_large_is_not_called_damage(tmp_path, monkeypatch):
    class Stream:
        def read(self, size):
            raise OSError("ZSTD decompress failed: Frame requires too much memory for decoding")

    monkeypatch.setattr(pyarrow, "CompressedInputStream", lambda raw, codec: Stream())
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"a\.jsonl\.zst: compressed with a window larger .*--long=31"
    ):
        read(slices(tmp_path / "a.jsonl.zst"), tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_byte_of_parquet_is_an_input_error_or_text(tmp_path, seed):
    path = write_corpus(tmp_path / "a.parquet", ["some text " * 5] * 7)
    content = bytearray(path.read_bytes())
    draw = random.Random(seed)
    for _ in range(draw.choice([1, 4])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        shards = plan_shards(find_files([str(path)], "/o"))
        read([part for shard in shards for part in shard], tmp_path, skip_bad=True)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx")
    assert read(slices(tmp_path / "a.jsonl") + slices(tmp_path / "a.txt"), tmp_path) == ["x", "x"]


def test_a_package_is_its_modules_in_order(tmp_path):
    for name, content in {
        "b.py": b"b = 2\n",
        "a.py": b"a = 1\n",
        "c.py": b"\xff",
        "d.txt": b"d",
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "__init__.py").touch()
    (file,) = find_files([str(tmp_path / "b.py").replace("b.py", "d.txt")], "/o")
    package = dataclasses.replace(file, path=str(tmp_path), kind="package", size=13)
    assert read([Slice(package, 0, 13, 13)], tmp_path) == ["a = 1\n\nb = 2\n"]
