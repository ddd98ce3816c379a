"""Recall samples: exact lengths, places, and answers that follow from the text alone."""

import json
import re
import shutil
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from lctw_megatron.data.batch import IGNORE
from lctw_megatron.data.token_dataset import TokenWriter
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation import evaluate_recall
from lctw_megatron.evaluation.evaluate_recall import RecallSettings
from lctw_megatron.evaluation.recall_samples import SampleMaker, depths_of, samples_of
from lctw_megatron.evaluation.recall_tasks import TASKS
from tests.evaluation.tiny_run import make_data
from tests.tokenizer_files import VOCAB_SIZE, real_text

LENGTHS = (900, 1301)
DEPTHS = (0.0, 0.5, 1.0)
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
STATED = r"access number of the (\w+ \w+) is (\d{7})\."


@pytest.fixture(scope="module", params=["huggingface", "joins newlines", "sentencepiece"])
def maker(request, hf_folder, sentencepiece_model, tmp_path_factory):
    path = sentencepiece_model if request.param == "sentencepiece" else hf_folder
    if request.param == "joins newlines":  # as Llama 3 does with punctuation and newlines
        path = shutil.copytree(hf_folder, tmp_path_factory.mktemp("tokenizer"), dirs_exist_ok=True)
        source = json.loads((path / "tokenizer.json").read_text())
        split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated"}
        steps = [{**split, "invert": False}, {**source["pre_tokenizer"], "use_regex": False}]
        source["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        newline = [[".", "\u010a"], [")", "\u010a"]]
        vocabulary, merges = source["model"]["vocab"], source["model"]["merges"]
        for pair in newline:
            if pair not in merges:
                merges.insert(0, pair)
                vocabulary.setdefault("".join(pair), len(vocabulary))
        (path / "tokenizer.json").write_text(json.dumps(source))
    return SampleMaker(load_tokenizer(path), None, seed=3, vocab_size=VOCAB_SIZE + 2)


def solve(task: str, text: str) -> list[str]:
    """The answers, from the text before them: a reader's way, not the maker's."""
    body, _, question = text.partition(" Question:")
    if task in ("one_key", "multi_key", "multi_query"):
        numbers = dict(re.findall(STATED, body))
        return [
            numbers[key] for key in re.findall(r"Answer: The access number of the (\w+ \w+)", text)
        ]
    if task == "multi_value":
        return re.findall(r"One access number of the \w+ \w+ is (\d{7})\.", body)
    if task == "variables":
        values: dict[str, str] = {}
        for name, source in re.findall(r"Let the value of (\w+) be ([^.]+)\.", body):
            values[name] = values[source.split()[-1]] if source.startswith("the") else source
        found = re.search(r"is the value of (\w+)\?", question)
        return [values[found.group(1)]]
    if task == "json":
        pairs = json.loads(re.search(r"\{.*\}", body).group())
        return [str(pairs[re.search(r'number of "([\w-]+)" in', question).group(1)])]
    if task == "frequent_words":
        words = re.findall(r"\w+", body.partition("words:")[2])[:-1]
        ranked = Counter(words).most_common(4)
        assert all(a[1] > b[1] for a, b in pairwise(ranked))  # no doubt about the order
        return [word for word, _ in ranked[:3]]
    constants: dict[str, int] = {}
    lines = [line for line in text.splitlines() if re.match(r"[A-Z_]+ = \d+$", line)]
    exec("\n".join(lines), {}, constants)
    return [str(constants[re.search(r"assert (\w+) ==", text).group(1)])]


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_of_exact_length_and_their_answers_follow_from_the_text(task, maker):
    tokenizer = maker._tokenizer
    known = tokenizer.identity
    for length in LENGTHS:
        for sample in samples_of(maker, [task], length, DEPTHS, 2):
            assert sample.ids.shape == (length + 1,)
            assert (sample.ids[0] == known.bos_id) and known.bos_id not in sample.ids[1:]
            found = [tokenizer.decode(sample.ids[places]).strip() for places in sample.answers]
            assert found == sample.answer_texts == solve(task, maker.text(sample))
            assert sample.answers[-1][-1] == length
            whole = sample.whole()
            assert whole.tokens.shape == whole.labels.shape == (length,)
            targets = np.flatnonzero(whole.labels != IGNORE)
            assert targets.tolist() == (np.concatenate(sample.answers) - 1).tolist()
            assert whole.labels[targets].tolist() == sample.ids[targets + 1].tolist()


@pytest.mark.parametrize("task", TASKS)
def test_the_question_has_the_ids_that_transformers_gives_the_whole_text(task, maker, tmp_path):
    maker._tokenizer.save_hf(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    sample = maker(task, LENGTHS[0], 0.5, 0)
    ids = theirs(maker.text(sample)).input_ids
    assert ids[-sample.tail :] == sample.ids[-sample.tail :].tolist()


def test_the_same_seed_gives_the_same_samples_and_a_number_is_one_story_everywhere(maker):
    tokenizer = maker._tokenizer
    again = SampleMaker(tokenizer, None, seed=3, vocab_size=VOCAB_SIZE + 2)
    other = SampleMaker(tokenizer, None, seed=4, vocab_size=VOCAB_SIZE + 2)
    for task in TASKS:
        sample = maker(task, LENGTHS[0], 0.5, 1)
        assert sample.digest == again(task, LENGTHS[0], 0.5, 1).digest
        assert sample.digest != other(task, LENGTHS[0], 0.5, 1).digest
        assert sample.digest != maker(task, LENGTHS[0], 0.5, 2).digest
        for length, depth in ((LENGTHS[1], 0.5), (LENGTHS[0], 0.0)):
            assert maker(task, length, depth, 1).answer_texts == sample.answer_texts


@pytest.mark.parametrize("task", [task for task in TASKS if task != "frequent_words"])
def test_depth_is_where_the_first_needed_fact_stands(task, maker):
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        sample = maker(task, 2000, depth, 0)
        text = maker.text(sample)
        value = sample.answer_texts[0]
        if task == "multi_query":  # asked in another order than they stand
            value = min(sample.answer_texts, key=text.index)
        end = re.search(r" Question:|assert", text).start()
        assert abs(text.index(value) / end - depth) < 0.2, (depth, text.index(value) / end)
    assert depths_of("frequent_words", (0.0, 1.0)) == [None]


def test_a_short_context_is_the_last_tokens_after_bos(maker):
    sample = maker("one_key", LENGTHS[0], 0.1, 0)
    short = sample.short(200, maker.bos_id)
    assert short.tokens[0] == maker.bos_id
    assert short.tokens[1:].tolist() == sample.ids[-200:-1].tolist()
    assert short.labels[short.labels != IGNORE].tolist() == sample.ids[sample.answers[0]].tolist()
    assert sample.answer_texts[0] not in maker._tokenizer.decode(short.tokens[:-10])
    assert sample.short(sample.tail, None).tokens[0] == sample.ids[-sample.tail - 1]
    with pytest.raises(InputError, match="question and answers of task one_key alone take"):
        sample.short(sample.tail - 1, None)


def test_text_files_and_token_datasets_are_haystacks(hf_folder, tmp_path):
    tokenizer = load_tokenizer(hf_folder)
    (tmp_path / "text.txt").write_text(real_text())
    prefix = str(tmp_path / "data")
    with TokenWriter(prefix, tokenizer.identity) as writer:
        for document in tokenizer.encode_documents([real_text(), "too short", real_text()[9000:]]):
            writer.add(document)
    for haystack in (str(tmp_path / "text.txt"), prefix):
        maker = SampleMaker(tokenizer, haystack, seed=0, vocab_size=VOCAB_SIZE)
        for task in ("one_key", "code"):
            texts = []
            for number in range(3):
                sample = maker(task, 1200, 0.5, number)
                assert len(sample.ids) == 1201
                assert {0, 1}.isdisjoint(sample.ids[1:].tolist())  # BOS and EOS
                texts.append(maker.text(sample))
                assert solve(task, texts[-1]) == sample.answer_texts
                if task == "one_key":  # between two sentences or lines
                    assert re.search(r"[.!?\n] The access|\d{7}\.\n", texts[-1])
            assert any(line and line in real_text() for line in texts[0].splitlines()[1:6])
            assert texts[0][:100] != texts[1][:100]


def test_of_a_haystack_only_the_bos_and_eos_that_it_has_are_left_out(hf_folder, tmp_path):
    tokenizer = load_tokenizer(hf_folder)
    bare = tokenizer.identity.model_copy(update={"add_bos": False, "add_eos": False})
    (ids,) = tokenizer.encode_batch([real_text()])
    with TokenWriter(str(tmp_path / "data"), bare) as writer:
        writer.add(ids)
    maker = SampleMaker(tokenizer, str(tmp_path / "data"), seed=0, vocab_size=VOCAB_SIZE)
    assert maker.haystack._lengths.tolist() == [len(ids)]


def test_a_mark_of_byte_order_is_no_text(hf_folder, tmp_path):
    tokenizer, made = load_tokenizer(hf_folder), []
    for mark in (b"", b"\xef\xbb\xbf"):  # as Windows puts before a text
        (tmp_path / "text.txt").write_bytes(mark + real_text()[:3000].encode())
        maker = SampleMaker(tokenizer, str(tmp_path / "text.txt"), seed=0, vocab_size=VOCAB_SIZE)
        made.append(maker("one_key", 900, 0.0, 0).digest)
    assert made[0] == made[1]


def test_what_does_not_fit_is_one_line(hf_folder, sentencepiece_model, tmp_path):
    tokenizer = load_tokenizer(hf_folder)

    def refused(message: str, haystack: object = None, length: int = 900, **changes) -> None:
        settings = {"tokenizer": tokenizer, "vocab_size": VOCAB_SIZE, "task": "one_key", **changes}
        task = settings.pop("task")
        with pytest.raises(InputError, match=message) as error:
            path = None if haystack is None else str(haystack)
            SampleMaker(haystack=path, seed=0, **settings)(task, length, 0.5, 0)
        assert "\n" not in str(error.value) and len(str(error.value)) < 450

    for task in TASKS:
        refused(
            rf"a length of 30 tokens: a sample of task {task} needs \d+ tokens",
            length=30,
            task=task,
        )
    refused("--haystack .*nowhere: neither a text file nor a token dataset", tmp_path / "nowhere")
    (tmp_path / "short.txt").write_text("A short text. " * 20)
    refused(
        r"short.txt: its longest document has \d+ tokens, but a sample takes \d+",
        tmp_path / "short.txt",
    )
    (tmp_path / "empty.txt").write_text("")
    refused("empty.txt: its longest document has 0 tokens", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    refused("latin.txt: not a text file in UTF-8", tmp_path / "latin.txt")
    refused("is a folder, not a text file", tmp_path)
    # A token that the model lacks, in a text that most samples do not reach.
    (tmp_path / "long.txt").write_text(real_text())
    ids = tokenizer.encode_documents([real_text()])[0]
    lacks = rf"holds token id {ids.max()}, but the checkpoint has a vocabulary of {ids.max()} "
    refused(f"long.txt: {lacks}", tmp_path / "long.txt", vocab_size=int(ids.max()))
    with TokenWriter(str(tmp_path / "long"), tokenizer.identity) as writer:
        writer.add(ids)
    refused(f"long: {lacks}", tmp_path / "long", vocab_size=int(ids.max()))
    train, _ = make_data(tmp_path)
    refused("tokenised with .* but the checkpoint's tokenizer is", train)
    refused("token 4.. of a sample is beyond the model's vocabulary of 400", vocab_size=400)
    # Its vocabulary has the letters of its corpus only, no digits.
    lacking = load_tokenizer(tmp_path / "spm.model")
    refused("comes back from its tokens as", tokenizer=lacking, vocab_size=1000)


def test_every_sample_is_checked_before_one_is_measured(hf_folder, tmp_path):
    """They differ by some tokens: what the first can do another may not."""
    tokenizer = load_tokenizer(hf_folder)
    maker = SampleMaker(tokenizer, None, seed=0, vocab_size=VOCAB_SIZE)
    needs = []
    for number in range(20):
        with pytest.raises(InputError, match=r"needs (\d+) tokens") as error:
            maker("one_key", 5, 0.5, number)
        needs.append(int(re.search(r"needs (\d+)", str(error.value))[1]))
    first, most = needs[0], max(needs)
    assert first < most
    maker.check("one_key", most, 20)
    maker.check("one_key", first, 1)
    with pytest.raises(InputError, match=rf"a length of {first} tokens"):
        maker.check("one_key", first, 20)
    tails = [maker("one_key", most, 0.5, number).tail for number in range(20)]
    maker.check("one_key", most, 20, max(tails))
    with pytest.raises(InputError, match=f"--window {max(tails) - 1}: the question"):
        maker.check("one_key", most, 20, max(tails) - 1)
    text = tmp_path / "text.txt"
    text.write_text("word " * 2000)
    (ids,) = tokenizer.encode_batch([text.read_text()])
    hidden = SampleMaker(tokenizer, str(text), seed=0, vocab_size=VOCAB_SIZE)
    longest = len(ids) + first - 1  # so many tokens of the text the first sample takes
    hidden.check("one_key", longest, 1)
    with pytest.raises(InputError, match="its longest document has"):
        hidden.check("one_key", longest, 20)


def test_without_bos_a_line_says_so_and_no_sample_begins_with_one(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder, tmp_path / "bare")
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(values | {"post_processor": None}))
    tokenizer = load_tokenizer(folder)
    maker = SampleMaker(tokenizer, None, 0, VOCAB_SIZE)
    assert maker.bos_id is None
    sample = maker("one_key", 600, 0.5, 0)
    bos = load_tokenizer(hf_folder).identity.bos_id
    assert len(sample.ids) == 601 and bos not in sample.ids
    assert sample.short(256, maker.bos_id).tokens[0] == sample.ids[-257]
    model = SimpleNamespace(max_position_embeddings=4096, rope_scaling=None)
    manifest = SimpleNamespace(model=model)
    (line,) = evaluate_recall._notes(RecallSettings(["one_key"], [600]), manifest, maker)
    assert line.startswith("the tokenizer puts no BOS before a text")


def test_what_is_named_twice_is_measured_once():
    settings = RecallSettings(["json", "one_key", "json"], (600, 600))
    assert (settings.tasks, settings.lengths) == (["json", "one_key"], [600])
