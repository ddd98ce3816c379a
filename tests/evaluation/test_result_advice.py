"""What stands in the way of an evaluation is to be removed: evaluating again meets it again."""

import pytest

from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.recall_result import read_recall
from lctw_megatron.evaluation.result_file import read_evaluation


@pytest.mark.parametrize("read, again", [(read_evaluation, "evaluate"), (read_recall, "measure")])
@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": "another"}'])
def test_a_damaged_result_is_to_be_removed_first(tmp_path, read, again, text):
    path = tmp_path / "result.json"
    assert read(path) is None
    path.write_text(text)
    with pytest.raises(
        InputError, match=rf"result.json: .*; remove it and {again} .*or name another --output$"
    ):
        read(path)
