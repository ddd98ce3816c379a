"""Options beyond what their fields in a recipe may be: one line, whichever command has them."""

import pytest

from lctw_megatron.commands import evaluate_model, inspect_data, launch, preprocess, score, train
from lctw_megatron.errors import InputError

CORPUS = ("--input", "x", "--output-prefix", "p")
MODEL = ("--checkpoint", "x")
WINDOWS = ("--data", "x", "--window", "4", "--stride", "2")


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (preprocess.main, (*CORPUS, "--tokenizer", "a\nb"), "tokenizer is 'a.nb', expected text"),
        (preprocess.main, (*CORPUS, "--tokenizer", "t", "--workers", str(2**31)), "workers is"),
        (preprocess.main, (*CORPUS, "--train-sentencepiece", str(2**31)), "train_sentencepiece is"),
        (score.main, (*MODEL, *WINDOWS, "--tensor", str(2**31)), "tensor is 2147483648, expected"),
        (evaluate_model.main, ("losses", *MODEL, "--data", "x", "--pipeline", str(2**31)), "less"),
        (evaluate_model.main, ("recall", *MODEL, "--lengths", str(2**25)), "lengths.0 is 33554432"),
    ],
)
def test_a_value_that_no_field_takes_is_named(main, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        main(list(arguments))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (inspect_data.main, ("x", "--document", "1", "--sequence-length", str(2**25)), "16777216"),
        (evaluate_model.main, ("losses", *MODEL, "--data", "x", "--near", str(2**62)), "positive"),
    ],
)
def test_a_number_that_no_memory_holds_is_refused(main, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(list(arguments))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("main", [train.main, launch.main])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_number_of_ranks_is_positive(main, value, capsys):
    with pytest.raises(SystemExit) as left:
        main(["quickstart", "--dry-run", "--ranks", value])
    assert left.value.code == 2
    assert f"--ranks: invalid positive integer value: '{value}'" in capsys.readouterr().err
