"""What no machine can take is refused by the schema, in one line."""

import random
from contextlib import suppress

import pytest
from pydantic import ValidationError

from lctw_megatron.config.load import load_recipe, parse_override, resolve_run
from lctw_megatron.config.schema import ClusterConfig
from lctw_megatron.config.yaml_text import parse_yaml
from lctw_megatron.errors import InputError

RECIPE = """\
name: tiny
output_dir: out
data: {train: data/x}
model: {num_layers: 1, hidden_size: 8, ffn_hidden_size: 8, num_attention_heads: 2}
training: {steps: 1}
cluster: {}
prepare: {inputs: [x], output_prefix: p}
"""

LAUGHS = "b0: &b0 [x, x]\n" + "".join(f"b{i + 1}: &b{i + 1} [*b{i}, *b{i}]\n" for i in range(25))
"""Two to the 26th values, as aliases."""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    "field, value",
    [
        ("training.adam_beta1", "1"),
        ("training.adam_beta2", "-0.1"),
        ("training.adam_eps", "-1e-8"),
        ("training.adam_eps", "0"),  # 0 / 0 for a token's row before its first gradient
        ("training.lr", "1e300"),
        ("training.weight_decay", "1e39"),
        ("training.steps", str(2**62)),
        ("training.distributed_timeout_minutes", str(2**31)),
        ("training.warmup_steps", str(2**40)),
        ("model.init_method_std", "-1"),
        ("model.layernorm_epsilon", "-1"),
        ("model.kv_channels", "3"),
        ("model.hidden_size", str(2**62)),
        ("model.vocab_size", str(2**62)),
        ("model.rope_scaling", "{factor: 0}"),
        ("data.sequence_length", str(2**62)),
        ("layout.tensor", str(2**40)),
        ("cluster.signal_seconds", str(2**31)),
        ("cluster.nodes", str(2**40)),
        ("seed", "-1"),
        ("seed", str(2**64)),
    ],
)
def test_a_number_beyond_its_limits_is_refused_by_name(recipe, field, value):
    with pytest.raises(InputError, match=rf"{field.rpartition('.')[2]}\b.* expected") as error:
        resolve_run(load_recipe(recipe, [f"{field}={value}"]))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "override",
    ['output_dir=""', 'start=""', 'cluster.time_limit=""', 'prepare.inputs=[a, ""]'],
)
def test_nothing_is_no_name_and_no_path(recipe, override):
    """As of a shell variable that is not set: a run in /main, or from random weights."""
    field = override.partition("=")[0]
    with pytest.raises(InputError, match=f"{field} is .*, expected a text that is not empty"):
        load_recipe(recipe, [override])


@pytest.mark.parametrize("field", ["output_dir", "prepare.output_prefix"])
def test_what_only_a_shell_would_put_in_names_no_folder_to_write_to(recipe, field):
    """Else a folder of the name ~ or $SCRATCH is made in the current one."""
    for path in ("~", "~/runs", "~me/runs", "$SCRATCH/runs", "/scratch/${USER}/runs"):
        with pytest.raises(
            InputError, match=rf"{field} is .*, expected a path written out, .*[~$]"
        ):
            load_recipe(recipe, [f"{field}='{path}'"])
    for path in ("./~/runs", "a~/b", "cost 1$", "$1", "läufe/mein versuch.v1"):
        load_recipe(recipe, [f"{field}='{path}'"])


def test_a_field_of_a_list_is_looked_for_among_its_own(recipe):
    with pytest.raises(InputError, match="data.train.0.wieght: no such field; did you mean weight"):
        resolve_run(load_recipe(recipe, ["data.train=[{prefix: x, wieght: 2}]"]))


def test_what_is_merged_may_override_what_it_merged_itself():
    text = "a: {b: &b {<<: {steps: 9, lr: 1}, steps: 3}}\nc: {<<: *b, lr: 2}\n"
    assert parse_yaml(text, "r")["c"] == {"steps": 3, "lr": 2}
    with pytest.raises(InputError, match="line 2: steps was already given on line 1"):
        parse_yaml("a: {b: &b {steps: 1,\n steps: 3}}\nc: {<<: *b, lr: 2}\n", "r")


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("5", 300), ("4:59", 299), ("00:10:00", 600), ("1-0", 86400), ("1-00:01", 86460),
        ("2-03:04:05", 183845), ("UNLIMITED", None),
    ],
)  # fmt: skip
def test_a_signal_comes_after_the_start_of_a_job(limit, seconds):
    """Else every job is asked to leave as it starts, and is requeued, for ever."""
    values = {"time_limit": limit}
    most = min(seconds or 2**31, 65535)
    if seconds is None or seconds > most:
        ClusterConfig.model_validate(values | {"signal_seconds": most})
        return
    ClusterConfig.model_validate(values | {"signal_seconds": most - 1})
    with pytest.raises(ValidationError, match=f"less than time_limit {limit}"):
        ClusterConfig.model_validate(values | {"signal_seconds": most})
    if seconds <= 300:  # the default
        with pytest.raises(ValidationError, match=f"less than time_limit {limit}"):
            ClusterConfig.model_validate(values)


@pytest.mark.parametrize("limit", ["soon", "1:2:3:4", "-5", "1-", "12h", "1_0"])
def test_a_time_limit_that_sbatch_does_not_take_is_refused_by_name(recipe, limit):
    with pytest.raises(InputError, match="cluster.time_limit is .* such as 24:00:00"):
        load_recipe(recipe, [f"cluster.time_limit='{limit}'"])


def test_a_head_of_odd_width_is_refused(recipe):
    with pytest.raises(InputError, match="even width of a head"):
        resolve_run(load_recipe(recipe, ["model.hidden_size=6"]))


@pytest.mark.parametrize("bad", ["\\n", "\\0", "\\e", "\\r", "\\x85", "\\u2028"])
@pytest.mark.parametrize(
    "line",
    [
        'name: "a{}b"',
        'output_dir: "a{}b"',
        'start: "./a{}b"',
        'data: {{train: "a{}b"}}',
        'data: {{train: data/x, index_cache: "a{}b"}}',
        'cluster: {{environment: {{"A{}B": x}}}}',
        'cluster: {{environment: {{A: "x{}y"}}}}',
        'cluster: {{account: "x{}y"}}',
        'cluster: {{sbatch: ["x{}y"]}}',
        'prepare: {{inputs: ["a{}b"], output_prefix: p}}',
    ],
)
def test_a_control_character_never_reaches_a_batch_script(recipe, line, bad):
    key = line.partition(":")[0]
    kept = [each for each in RECIPE.splitlines() if not each.startswith(f"{key}:")]
    recipe.write_text("\n".join([*kept, line.format(bad)]))
    with pytest.raises(InputError, match="expected text without control characters"):
        resolve_run(load_recipe(recipe))


def test_a_control_character_in_a_file_name_or_an_override_is_refused(tmp_path):
    path = tmp_path / "a\nrm b.yaml"
    path.write_text(RECIPE)
    with pytest.raises(InputError, match="file name is .* expected text without control"):
        load_recipe(path)
    for text in ("name=a\nb", "name=\udc80"):
        with pytest.raises(InputError, match="--set is .* expected text without control"):
            parse_override(text)


def test_setup_and_note_may_have_several_lines(recipe):
    recipe.write_text(
        RECIPE.replace("cluster: {}", 'cluster: {setup: ["if x\\n\\tthen y\\nfi"]}')
        + 'evaluation: {data: x, note: "one\\ntwo"}\n'
    )
    assert load_recipe(recipe).cluster.setup == ["if x\n\tthen y\nfi"]


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 100_000,
        "a: " + "{a: " * 100_000,
        "a: " + "[" * 40 + "]" * 40,
        "a: !!int abc",
        "a: !!float abc",
        "a: !!bool abc",
        "a: !!timestamp abc",
        "a: !!binary 7",
        "a: !!python/object/apply:os.system [x]",
        "a: " + "7" * 5000,
        "a: &a [*a]",
        LAUGHS,
        "a: \ud800",
        "a: " + "x" * (1 << 21),
        "? {a: b}\n: c",
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_yaml_that_no_recipe_is_gives_one_line(text):
    with pytest.raises(InputError, match=r"^here: ?") as error:
        parse_yaml(text, "here")
    assert len(str(error.value)) < 500


def test_a_damaged_recipe_is_an_input_error_or_harmless(recipe):
    for seed in range(300):
        draw = random.Random(seed)
        content = bytearray(RECIPE.encode())
        at = draw.randrange(len(content))
        if draw.random() < 0.2:
            del content[at:]
        for _ in range(draw.randrange(4)):
            at = draw.randrange(max(len(content), 1))
            content[at : at + 1] = draw.choice(
                [b"", b"\x00", b"{", b"!!", b"&a", b"9" * 30, b"\xff"]
            )
        print(f"seed {seed}: {bytes(content)!r}")  # pytest shows it of what fails
        recipe.write_bytes(content)
        with suppress(InputError):
            resolve_run(load_recipe(recipe))
