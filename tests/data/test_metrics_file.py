from lctw_megatron.data.metrics_file import read_metrics


def test_a_damaged_file_costs_its_broken_lines_only(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 0, "a": 1.5, "speed/machine": "CPU"}\n'
        b'{"step": 1, "a": \xff}\n'
        b'{"step": 2, "a": 2.5}\n'
        b'{"step": 2, "a": 3.5}\n'
        b'{"step": "3"}\n[4]\n{"step": 4, "a": "x"}\n{"step": 4, "a": ' + b"9" * 400 + b"}\n"
        b'{"step": 5}\n{"step": 6, "a"'
    )
    assert read_metrics(path) == [
        {"step": 0, "a": 1.5, "speed/machine": "CPU"},
        {"step": 2, "a": 3.5},
        {"step": 5},
    ]
    assert (
        "7 lines left out, broken or written twice: 2, 3, 5, 6, 7, 8, 10" in capsys.readouterr().out
    )


def test_a_whole_file_is_read_without_a_word(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a": NaN}\n{"step": 1}\n')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert capsys.readouterr().out == ""
