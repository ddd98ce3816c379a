"""What the report reads of evaluations."""

from pathlib import Path

import pytest

from lctw_megatron.evaluation.buckets import bucket_starts
from lctw_megatron.report import measures
from lctw_megatron.report.groups import Group
from lctw_megatron.report.runs import RunRecord


@pytest.mark.parametrize(("length", "begin"), [(32768, 16384), (10000, 6144), (100000, 65536)])
def test_what_the_second_half_is_called_begins_where_its_bins_do(length: int, begin: int) -> None:
    bins = bucket_starts(length).tolist()
    evaluation = {"settings": {"sequence_length": length}, "position": {"bins": bins}}
    group = Group("a", (RunRecord("a", Path("a"), None, [], evaluation, None, None),))
    limit, chosen = measures.long_context_bins(group)
    assert limit == begin and [bins[at] >= length / 2 for at in chosen] == [True] * len(chosen)
