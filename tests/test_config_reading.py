"""Reading a configuration: YAML, overrides, errors fit for people, and the way back."""

import sys

import pytest
import yaml

from tmkd_ray.config_reading import apply_override, dump_config, parse_yaml, read_config
from tmkd_ray.errors import ConfigError, UserError


@pytest.fixture
def write(tmp_path):
    """Write a configuration file and return its path."""

    def write(content):
        path = tmp_path / "experiment.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(path, *overrides):
    """The text of the ConfigError, which every text for people must be fit to be."""
    with pytest.raises(ConfigError) as raised:
        read_config(path, overrides)
    text = str(raised.value)
    for foreign in (
        "pydantic",
        "https://",
        "Value error",
        "Assertion failed",
        "Input should",
        "<class",
        "<unicode string>",
        "None",
        "True",
        "False",
        "ConfigError",
        "Traceback",
        "Config instance",
        "object at 0x",
    ):
        assert foreign not in text, f"{foreign!r} in: {text}"
    return text


# Numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("+2e3", 2e3),
        ("-1.5e-3", -1.5e-3),
        ("1.e2", 100.0),
        (".5e1", 5.0),
        ("1e+2", 100.0),
        ("0.1", 0.1),
        ("20", 20),
        ("-7", -7),
    ],
)
def test_numbers(text, value):
    parsed = parse_yaml(f"rate: {text}", "a test")["rate"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "text", ["3e", "e3", "3e-4x", "'3e-4'", '"20"', "1.2.3", "3e4.5", "v1e5", "1e5-a", ".e3", "--3e4"]
)
def test_what_only_looks_like_a_number_stays_text(text):
    assert parse_yaml(f"rate: {text}", "a test") == {"rate": text.strip("'\"")}


def test_a_number_with_an_exponent_in_file_and_override(write):
    path = write("dataset: digits\ntraining: {learning_rate: 3e-4}")
    assert read_config(path).training.learning_rate == 3e-4
    assert read_config(path, ["training.learning_rate=5e-4"]).training.learning_rate == 5e-4
    assert read_config(path, ["training.epochs=1e2"]).training.epochs == 100


# Files


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "nowhere.yaml"
    assert refusal(path) == f"--config: there is no file {path}"


def test_a_folder(tmp_path):
    assert refusal(tmp_path) == f"--config: cannot read {tmp_path}: Is a directory"


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing but a comment\n", "---\n", "null"])
def test_an_empty_file_is_an_empty_configuration(write, content):
    path = write(content)
    assert refusal(path) == (f"1 error in the configuration from {path}:\n  dataset: required, but not given")
    assert read_config(path, ["dataset=digits"]) == read_config(None, ["dataset=digits"])


@pytest.mark.parametrize(
    ("content", "found"),
    [("[dataset, digits]", "a list"), ("- dataset: digits", "a list"), ("digits", '"digits"'), ("7", "7")],
)
def test_a_file_that_is_no_mapping(write, content, found):
    path = write(content)
    assert refusal(path) == f"{path}: expected a mapping of sections at the top, not {found}"


@pytest.mark.parametrize("content", ["dataset: digits\nname: Käse".encode("latin-1"), b"\n\xff\xfe\x00"])
def test_a_file_that_is_not_utf8(write, content):
    path = write(content)
    assert refusal(path) == f"--config: {path} is not UTF-8 text: line 2. Save it as UTF-8"


def test_utf8_with_a_byte_order_mark_whatever_the_locale(write, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    config = read_config(write(b"\xef\xbb\xbfdataset: digits\noutput: K\xc3\xa4se"))
    assert config.output == "Käse"


@pytest.mark.parametrize(
    ("content", "line", "column", "problem"),
    [
        ("dataset: digits\ntraining: {epochs: 3\n", 3, 1, "expected ',' or '}'"),
        ("dataset: digits\n\tname: x", 2, 1, "cannot start any token"),
        ("dataset: digits\n  name: x", 2, 7, "mapping values are not allowed here"),
        ("name: 'x\n", 2, 1, "unexpected end of stream"),
        ("dataset: *nowhere", 1, 10, "undefined alias"),
        ("a: 1\n---\nb: 2", 2, 1, "another document"),
        ("? [a]\n: 3", 1, 3, "unhashable key"),
        ("dataset: digits\nname: a\x07b", 2, 8, "a character that YAML does not allow"),
        ("dataset: digits\nname: 2024-99-99", 2, 7, "'2024-99-99' cannot be read as timestamp; for text write"),
        ("name: !!int x", 1, 7, "'x' cannot be read as int"),
        ("name: !!bool x", 1, 7, "'x' cannot be read as bool"),
        ("name: !!timestamp x", 1, 7, "'x' cannot be read as timestamp"),
        ("name: " + 5000 * "1", 1, 7, "cannot be read as int"),
    ],
)
def test_yaml_errors_name_line_and_column(write, content, line, column, problem):
    path = write(content)
    text = refusal(path)
    assert text.startswith(f"{path} is not valid YAML: line {line}, column {column}: ")
    assert problem in text


@pytest.mark.parametrize(
    ("content", "line", "column", "key"),
    [
        ("dataset: digits\nname: a\nname: b", 3, 1, "name"),
        ("dataset: digits\ntraining:\n  epochs: 3\n  seed: 1\n  epochs: 3", 5, 3, "epochs"),
        ("methods: {a: kd, b: kd, a: tmkd}", 1, 25, "a"),
        ("methods: {a: kd, 'a': tmkd}", 1, 18, "a"),
        ("seeds:\n- {x: {y: 1, y: 2}}", 2, 14, "y"),
    ],
)
def test_a_key_given_twice_is_refused(write, content, line, column, key):
    path = write(content)
    assert refusal(path) == (
        f"{path} is not valid YAML: line {line}, column {column}: the key '{key}' is given twice"
    )


def test_anchors_and_merged_keys_are_no_duplicates(write):
    config = read_config(
        write(
            "dataset: digits\n"
            "teacher:\n"
            "  visual:\n"
            "    fit: &fit {epochs: 3, seed: 5}\n"
            "  text:\n"
            "    fit: {<<: *fit, epochs: 4}\n"
            "training: {<<: *fit, learning_rate: 0.5}\n"
        )
    )
    assert (config.teacher.visual.fit.epochs, config.teacher.visual.fit.seed) == (3, 5)
    assert config.teacher.text is not None
    assert (config.teacher.text.fit.epochs, config.teacher.text.fit.seed) == (4, 5)
    assert (config.training.epochs, config.training.learning_rate) == (3, 0.5)


def test_merging_what_merges_itself_is_no_duplicate(write):
    config = read_config(
        write(
            "dataset: digits\n"
            "teacher: {visual: {fit: &b {<<: &a {epochs: 3}, epochs: 7}}}\n"
            "training: {<<: *b, seed: 3}\n"
        )
    )
    assert (config.teacher.visual.fit.epochs, config.training.epochs, config.training.seed) == (7, 7, 3)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [touch {}]",
        "!!python/object/new:os.system [touch {}]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
        "!include {}",
    ],
)
def test_yaml_tags_run_nothing(write, tmp_path, tag):
    witness = tmp_path / "witness"
    path = write(f"dataset: digits\nname: {tag.format(witness)}")
    shown = tag.split(" ")[0]
    assert refusal(path) == (
        f"{path} is not valid YAML: line 2, column 7: the tag {shown} is not allowed: "
        "a configuration holds plain values only"
    )
    assert refusal(None, "dataset=digits", f"name={tag.format(witness)}").startswith(
        f"override 'name={tag.format(witness)}' is not valid YAML: line 1, column 1: the tag {shown}"
    )
    assert not witness.exists()


def test_what_is_nested_without_end_is_refused(write):
    path = write("dataset: " + 5 * sys.getrecursionlimit() * "[")
    assert refusal(path) == f"{path}: nested too deeply to be a configuration"


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("dataset: &a {name: digits, mean: *a}", "dataset.mean"),
        ("dataset: digits\ntraining: &a {epochs: *a}", "training.epochs"),
        ("dataset: digits\nmethods: &a {b: *a}", "methods.b.b"),
        ("dataset: digits\nviews: &a [*a]", "views"),
        ("dataset: digits\nviews: &a {edge: *a}", "views.edge.edge"),
        ("dataset: digits\nteacher: &a {text: *a}", "teacher.text.text"),
        ("dataset: digits\ndistiller: &a {strategy: *a}", "distiller.strategy.strategy"),
    ],
)
def test_a_section_that_contains_itself_is_refused(write, content, where):
    assert f"\n  {where}: " in refusal(write(content))


def test_aliases_of_aliases_do_not_blow_up(write):
    lines = ["a0: &a0 [ha, ha]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    text = refusal(write("\n".join([*lines, "dataset: digits", "seeds: *a59"])))
    assert len(text) < 20_000
    assert "seeds.0: expected a whole number (given: a list)" in text


# Overrides


def test_overrides_of_scalars_lists_mappings_and_null(write):
    path = write(
        "dataset: {name: digits, limit: 100}\nseeds: [1]\ndistiller: kd\ntraining: {epochs: 5, seed: 4}"
    )
    config = read_config(
        path,
        [
            "training.epochs=7",
            "training.nesterov=true",
            "training.precision=bfloat16",
            "seeds=[2, 3]",
            "dataset.limit=null",
            "teacher.visual.fit={epochs: 9, batch_size: 32}",
            "teacher.visual.mean=[0.1, 0.2, 0.3]",
            "knowledge.path=",
            "output=/some/where=else",
            "teacher.text=null",
        ],
    )
    assert (config.training.epochs, config.training.seed, config.training.nesterov) == (7, 4, True)
    assert config.training.precision == "bfloat16"
    assert config.seeds == (2, 3)
    assert config.dataset.limit is None
    assert (config.teacher.visual.fit.epochs, config.teacher.visual.fit.batch_size) == (9, 32)
    assert config.teacher.visual.mean == (0.1, 0.2, 0.3)
    assert config.knowledge.path is None
    assert config.output == "/some/where=else"
    assert config.teacher.text is None


def test_the_last_override_wins(write):
    path = write("dataset: digits")
    assert read_config(path, ["training.epochs=3", "training.epochs=4"]).training.epochs == 4
    # A whole section takes the place of what came before; what comes after is set in it.
    config = read_config(path, ["training.seed=3", "training={epochs: 5}", "training.batch_size=32"])
    assert (config.training.seed, config.training.epochs, config.training.batch_size) == (0, 5, 32)


def test_overrides_go_into_sections_written_short(write):
    path = write("dataset: digits\nviews: [edge, original]\ndistiller: kd\nmethods: {a: alone, b: kd}")
    config = read_config(
        path,
        [
            "dataset.limit=50",
            "views.edge.strength=0.4",
            "distiller.strategy=dkd",
            "distiller.strategy.temperature=2",
            "methods.a.ce_weight=2",
            "methods.b.strategy.temperature=5",
            "methods.c.name=tmkd",
        ],
    )
    assert (config.dataset.name, config.dataset.limit) == ("digits", 50)
    assert list(config.views) == ["edge", "original"]
    assert config.views["edge"].model_dump()["strength"] == 0.4
    assert (config.distiller.name, config.distiller.strategy.name) == ("kd", "dkd")
    assert config.distiller.strategy.model_dump()["temperature"] == 2
    assert (config.methods["a"].name, config.methods["a"].ce_weight) == ("alone", 2)
    assert (config.methods["b"].name, config.methods["b"].strategy.model_dump()["temperature"]) == ("kd", 5)
    assert config.methods["c"].name == "tmkd"


@pytest.mark.parametrize(
    ("content", "override", "expected"),
    [
        ("", "views.edge.strength=0.4", ["original", "edge", "high_frequency"]),
        ("views: null", "views.edge.strength=0.4", ["original", "edge", "high_frequency"]),
        ("views: edge", "views.edge.strength=0.4", ["edge"]),
        ("views: [original]", "views.edge.strength=0.4", ["original", "edge"]),
        ("views: {edge: {mode: map}}", "views.edge.strength=0.4", ["edge"]),
        ("", "views.high_frequency=null", ["original", "edge"]),
        ("views: [edge, original]", "views.edge=null", ["original"]),
        ("views: [edge, original]", "views=[high_frequency]", ["high_frequency"]),
    ],
)
def test_overrides_of_views(write, content, override, expected):
    config = read_config(write(f"dataset: digits\n{content}"), [override])
    assert list(config.views) == expected
    if "strength" in override:
        assert config.views["edge"].model_dump()["strength"] == 0.4
    if "map" in content:
        assert config.views["edge"].model_dump()["mode"] == "map"


def test_an_override_in_a_section_with_an_alias_changes_that_section_only(write):
    path = write("dataset: digits\nteacher: {visual: {fit: &fit {epochs: 3}}}\ntraining: *fit")
    config = read_config(path, ["training.epochs=9"])
    assert (config.training.epochs, config.teacher.visual.fit.epochs) == (9, 3)


@pytest.mark.parametrize(
    "override", ["training.epochs", "", "=3", "training..epochs=3", ".epochs=3", "training.=3", " =3"]
)
def test_overrides_without_path_or_equals_sign(override):
    assert refusal(None, "dataset=digits", override) == (
        f"override {override!r}: expected dotted.path=value, for example training.epochs=20; "
        "a file goes after --config"
    )


@pytest.mark.parametrize(
    ("content", "override", "expected"),
    [
        ("training: {epochs: 3}", "training.epochs.x=1", "training.epochs is 3, which has no keys"),
        ("name: x", "name.y.z=1", 'name is "x", which has no keys'),
        ("seeds: [1, 2]", "seeds.0=3", "seeds is a list, which has no keys"),
        ("student: resnet8", "student.model=resnet20", 'student is "resnet8", which has no keys'),
        ("methods: kd", "methods.a.kd_weight=1", 'methods is "kd", which has no keys'),
        ("views: [edge, 3]", "views.edge.strength=1", "views is a list, which has no keys"),
        ("views: [edge, edge]", "views.edge.strength=1", "views: given twice: edge"),
        ("training: {nesterov: true}", "training.nesterov.x=1", "training.nesterov is true, which has no keys"),
    ],
)
def test_an_override_through_what_has_no_keys(write, content, override, expected):
    assert refusal(write(f"dataset: digits\n{content}"), override) == f"override {override!r}: {expected}"


def test_an_override_that_is_not_yaml():
    assert refusal(None, "dataset=digits", "seeds=[1, 2") == (
        "override 'seeds=[1, 2' is not valid YAML: line 1, column 6: while parsing a flow sequence: "
        "expected ',' or ']', but got '<stream end>'"
    )
    assert "the key 'a' is given twice" in refusal(None, "dataset=digits", "methods={a: kd, a: tmkd}")


def test_unknown_keys_of_overrides_come_with_the_nearest():
    assert refusal(
        None, "dataset=digits", "trainng.epochs=3", "methods.a.kd_wight=1", "teacher.txt.model=x"
    ) == (
        "3 errors in the configuration from the command line (no --config is given):\n"
        "  teacher.txt: unknown key; did you mean 'text'?\n"
        "  methods.a.kd_wight: unknown key; did you mean 'kd_weight'?\n"
        "  trainng: unknown key; did you mean 'training'?"
    )


def test_nothing_given_at_all():
    assert refusal(None) == (
        "1 error in the configuration from the command line (no --config is given):\n"
        "  dataset: required, but not given"
    )


def test_apply_override_makes_the_sections_it_needs():
    tree = {}
    apply_override(tree, "a.b.c=[1, x]")
    apply_override(tree, "a.b.d=3e-4")
    apply_override(tree, " a.e = true ")
    assert tree == {"a": {"b": {"c": [1, "x"], "d": 3e-4}, "e": True}}


def test_a_config_error_is_a_user_error():
    assert issubclass(ConfigError, UserError)


# Text for people


EVERY_MISTAKE = """\
3: 4
null: 4
name: 7
output: [x]
dataset: {name: digits, imagesize: 3, limit: true, mean: 3, std: [0, 1, 1], image_size: "32"}
augmentation: {recipe: cfar, flip: maybe}
views: {edge: {strength: 9, prompts: [3]}, hue: {}, original: 7}
teacher: {visual: {model: 3, mean: [1, 2], checkpoint: 2024-01-01}, text: {fit: {epochs: 0}, model: {}}}
knowledge: {dtype: int16, visual: {num_gpus: -1}, views: null}
student: resnet8
distiller: {strategy: {name: dkd, temperature: -1, x: 1}, views: edge, clip_temperature: .nan}
training: {epochs: null, milestones: [x], optimizer: adam, learning_rate: .inf, seed: -1}
methods: {a: 3, b: {weighting: best, kd_wieght: 1}, c/d: kd, 5: kd}
seeds: [0, 0.5]
cluster: {num_cpus: 0}
"""


EVERY_PATH = """
3 null name output dataset.imagesize dataset.limit dataset.mean dataset.std dataset.image_size
augmentation.recipe augmentation.flip views.edge.strength views.edge.prompts.0 views.hue views.original
teacher.visual.model teacher.visual.mean teacher.visual.checkpoint teacher.text.fit.epochs teacher.text.model
knowledge.dtype knowledge.visual.num_gpus knowledge.views student distiller.strategy.temperature
distiller.strategy.x distiller.views distiller.clip_temperature training.epochs training.milestones
training.optimizer training.learning_rate training.seed methods.a methods.b.weighting methods.b.kd_wieght
methods.c/d methods.5 seeds.1 cluster.num_cpus
"""


def test_every_line_is_fit_for_people(write):
    header, *lines = refusal(write(EVERY_MISTAKE)).splitlines()
    paths = [line.strip().split(": ")[0] for line in lines]
    assert header.startswith(f"{len(lines)} errors in the configuration from ")
    assert all(line.startswith("  ") and ": " in line for line in lines)
    assert len(set(paths)) == len(paths)
    assert set(paths) >= set(EVERY_PATH.split())


# The way back


@pytest.mark.parametrize(
    "name",
    ["x", "3e5", "12e-5", "1e3", "1.5", "007", "null", "true", "on", "0x1F", "1_000", "2024-01-01", "e3"],
)
def test_text_that_looks_like_something_else_survives(name):
    config = read_config(None, ["dataset=digits", f"name='{name}'", f"methods={{'{name}': kd}}"])
    assert config.name == name
    assert parse_yaml(dump_config(config), "a test")["name"] == name
    assert list(parse_yaml(dump_config(config), "a test")["methods"]) == [name]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["dataset={name: parquet, path: 'C:\\data # not a comment', limit: 7, class_names: 'ä: b'}"],
        ["views={edge: {strength: 0.3, prompts: ['- {}', 'a: {}', '# {} é', '{}\n']}, original: {}}"],
        ["teacher.text=null", "distiller={name: kd, strategy: {name: dkd, temperature: 1e-5}}"],
        ["methods={b: {strategy: feature_mse}, a: alone}", "seeds=[5, 0, 4294967295]"],
        ["distiller.fusion_temperature=.inf", "training.learning_rate=1e-20", "training.weight_decay=1e22"],
        ["teacher.visual={mean: [0.1, 0.2, 0.30000000000000004], checkpoint: null}"],
        ["output='" + "long " * 60 + "'"],
    ],
)
def test_the_dump_reads_back_equal(write, overrides):
    config = read_config(None, ["dataset=digits", *overrides])
    again = read_config(write(dump_config(config)))
    assert again == config
    assert list(again.methods) == list(config.methods)
    assert list(again.views) == list(config.views)
    assert dump_config(again) == dump_config(config)


def test_the_dump_is_whole_and_plain_yaml():
    config = read_config(None, ["dataset=digits"])
    tree = yaml.safe_load(dump_config(config))
    assert tree == config.model_dump(mode="json")
    assert tree["training"]["epochs"] == config.training.epochs
    assert list(tree) == list(type(config).model_fields)
