"""Options of `serve` and `train` from configuration files and environment variables."""

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from gpt import cli, settings
from gpt.checkpoint import save_config
from serving import cli as serving_cli
from serving.cli import Serve
from training import cli as training_cli
from training.config import TrainingConfig, model_options
from training.presets import PRESETS

SAMPLES = {
    "dtype": "int8",
    "optimizer": "sgd",
    "precision": "float32",
    "compile": "off",
    "track": "wandb",
    "activation": "tanh",
    "step_decays": 0,  # excludes cosine_decay
    "gradient_accumulation_steps": 1,  # excludes stateful
}
"""Values of options that take no arbitrary one."""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("TINYGPT_CACHE", "TINYGPT_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def parse(monkeypatch):
    """Return the parsed command of a command line, which is not run."""

    def parse(module, *arguments):
        parsed = []

        def keep(prog, description, commands, arguments, defaults=None, note=""):
            with cli.reported_errors(prog, note):
                parsed.append(cli._parse(prog, description, commands, arguments, defaults))

        with monkeypatch.context() as patch:
            patch.setattr(cli, "main", keep)
            module.main("tinygpt", [str(argument) for argument in arguments])
        return parsed[0]

    return parse


@pytest.fixture
def parse_train(parse, monkeypatch):
    """Return the config and the directory with which `train` would start."""

    def parse_train(*arguments):
        started = []
        monkeypatch.setattr("training.launch.start_run", lambda *each: started.append(each))
        parse(training_cli, "train", *arguments)()
        return started[0]

    return parse_train


@pytest.fixture
def error(capsys):
    """Return the only line on standard error of a command that ends with code 2."""

    def error(main, *arguments):
        with pytest.raises(SystemExit) as stop:
            main("tinygpt", [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
        return err.removeprefix("tinygpt: ").rstrip()

    return error


def fields(instance):
    """Yield name, type and default of each field that is an option, nested ones too."""
    names = settings.option_names(instance)
    hints = settings.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value)
        elif field.name == "init_from" or field.name.replace("_", "-") in names:
            yield field.name, hints[field.name], value


def another(name, annotation, default):
    """A value of that type which is not the default."""
    if name in SAMPLES:
        return SAMPLES[name]
    if annotation is bool:
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2 + 0.125
    kind = str(annotation)
    if "tuple[int" in kind:
        return [3, 1]
    if "tuple" in kind:
        return ["one", "two words"]
    if "int" in kind or "float" in kind:
        return 3
    return "some text"


def to_toml(value):
    return json.dumps(value)  # numbers, booleans, strings and arrays are written alike


def same(value, expected):
    if isinstance(expected, list):
        return value == tuple(expected)
    return str(value) == expected if isinstance(value, Path) else value == expected


def value_of(instance, name):
    """The value of a field of a dataclass or of those in its fields."""
    if hasattr(instance, name):
        return getattr(instance, name)
    values = [getattr(instance, field.name) for field in dataclasses.fields(instance)]
    return next(getattr(each, name) for each in values if hasattr(each, name))


DEPLOYMENT = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text("utf-8")
SERVE = {name: another(name, hint, value) for name, hint, value in fields(Serve())}


def test_every_option_of_serve_is_walked():
    own = {field.name for field in dataclasses.fields(Serve)} - {"config", "limits", "timeouts"}
    assert own < SERVE.keys()
    assert {"max_body_bytes", "shutdown_timeout"} < SERVE.keys()


@pytest.mark.parametrize("write", [str, lambda name: name.replace("_", "-")], ids=["_", "-"])
def test_every_option_of_serve_from_a_file(write, parse):
    lines = [f"{write(name)} = {to_toml(value)}" for name, value in SERVE.items()]
    Path("serve.toml").write_text("\n".join(lines))
    serve = parse(serving_cli, "serve", "--config", "serve.toml")
    for name, value in SERVE.items():
        assert same(value_of(serve, name), value), name


def test_every_option_of_serve_from_the_environment(parse, monkeypatch):
    for name, value in SERVE.items():
        text = "one 'two words'" if isinstance(value, list) else str(value)
        monkeypatch.setenv(f"TINYGPT_{name.upper()}", text)
    serve = parse(serving_cli, "serve")
    for name, value in SERVE.items():
        assert same(value_of(serve, name), value), name


@pytest.mark.parametrize("preset", ["gpt-nano", "lstm", "curve-mlp", "grain-experts", "word2vec"])
def test_every_option_of_train_from_a_file(preset, parse_train):
    start = PRESETS[preset]
    values = {
        **{name: another(name, hint, value) for name, hint, value in fields(start)},
        **{name: another(name, hint, v) for name, hint, v in fields(model_options(start)())},
    }
    del values["init_from"]  # replaces the preset: see below
    if preset == "gpt-nano":
        assert {field.name for field in dataclasses.fields(TrainingConfig)} - values.keys() == {
            *("preset", "model", "model_args", "init_from")
        }
    lines = [f"{name} = {to_toml(value)}" for name, value in values.items()]
    Path("train.toml").write_text("\n".join([f'preset = "{preset}"', 'run = "mine"', *lines]))
    config, directory = parse_train("--config=train.toml")
    found = dataclasses.asdict(config) | config.model_args
    for name, value in values.items():
        assert same(found[name], value), name
    assert (config.preset, config.model) == (start.preset, start.model)
    assert directory == Path("runs/mine")


def test_options_of_the_model_in_a_table_of_their_own(parse_train):
    Path("a.toml").write_text("steps = 7\n[model]\nwidth = 64\nkv-heads = 1\n")
    config, directory = parse_train("--config", "a.toml", "--width", "96")
    assert (config.steps, config.model_args["width"], config.model_args["kv_heads"]) == (7, 96, 1)
    assert directory is None


def test_a_list_of_one_needs_no_brackets(parse):
    Path("serve.toml").write_text('run = "a run"\n')
    assert parse(serving_cli, "serve", "--config", "serve.toml").run == ("a run",)


def test_flags_win_over_the_environment_which_wins_over_the_file(parse, monkeypatch):
    Path("serve.toml").write_text(
        'run = ["a"]\nport = 1\nmax_queue = 1\nmax_num_seqs = 1\nallowed_origins = ["one"]\n'
        "no_compile = true\ndeterministic = true\nmax_model_len = 5\n[limits]\nmax_tokens = 1\n"
    )
    monkeypatch.setenv("TINYGPT_CONFIG", "serve.toml")
    monkeypatch.setenv("TINYGPT_PORT", "2")
    monkeypatch.setenv("TINYGPT_MAX_QUEUE", "2")
    monkeypatch.setenv("TINYGPT_DETERMINISTIC", "0")
    monkeypatch.setenv("TINYGPT_MAX_MODEL_LEN", "None")
    flags = ["b", "--port", "3", "--no-compile", "--allowed-origins", "two", "--max_tokens", "3"]
    serve = parse(serving_cli, "serve", *flags)
    assert (serve.run, serve.port, serve.max_queue, serve.max_num_seqs) == (("b",), 3, 2, 1)
    assert (serve.allowed_origins, serve.limits.max_tokens) == (("two",), 3)
    assert (serve.no_compile, serve.deterministic, serve.max_model_len) == (True, False, None)
    assert parse(serving_cli, "serve", "--no-no-compile").no_compile is False


@pytest.mark.parametrize("flag", ["--fsdp", "--no-fsdp"])
@pytest.mark.parametrize("value", ["true", "false"])
def test_flags_win_whatever_the_file_says(flag, value, parse_train):
    Path("a.toml").write_text(f"fsdp = {value}\n")
    assert parse_train("--config", "a.toml", flag)[0].fsdp is (flag == "--fsdp")


def test_flags_mend_what_the_file_alone_would_contradict(parse_train):
    Path("a.toml").write_text("batch_size = 9\ngradient_accumulation_steps = 2\n")
    config, _ = parse_train("--config", "a.toml", "--gradient-accumulation-steps", "3")
    assert (config.batch_size, config.gradient_accumulation_steps) == (9, 3)


def test_learning_rates_follow_the_sizes_in_a_file_as_those_that_are_typed(parse_train):
    Path("a.toml").write_text("batch_size = 64\nwidth = 64\nvector_lr = 0.5\n")
    typed, _ = parse_train("--batch-size", "64", "--width", "64", "--vector-lr", "0.5")
    assert parse_train("--config", "a.toml")[0] == typed
    assert typed.learning_rate != TrainingConfig().learning_rate


def write_run(directory, config):
    directory.mkdir(parents=True)
    content = {"format": 2, "config": dataclasses.asdict(config)}
    (directory / "run.json").write_text(json.dumps(content))
    return directory / "run.json"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_run_json_of_a_run_gives_its_own_options(name, parse_train):
    config, _ = parse_train(name, "--seed", "5", "--batch-size", "480", "--beta1", "0.5")
    file = write_run(Path("runs", "first"), config)
    as_json = json.loads(file.read_text())["config"]
    again, directory = parse_train("--config", file)
    assert json.loads(json.dumps(dataclasses.asdict(again))) == as_json
    assert directory is None
    changed, _ = parse_train("--config", file, "--steps", "77", "--run", "second")
    assert changed == dataclasses.replace(again, steps=77)


def test_plan_takes_the_files_of_train(parse, capsys):
    Path("a.toml").write_text('preset = "gpt-nano"\nrun = "mine"\nwidth = 96\nsteps = 9\n')
    parse(training_cli, "plan", "--config", "a.toml", "--json")()
    from_file = json.loads(capsys.readouterr().out)
    parse(training_cli, "plan", "gpt-nano", "--width", "96", "--steps", "9", "--json")()
    assert from_file == json.loads(capsys.readouterr().out)


def test_train_begins_with_the_run_that_a_file_names(parse_train):
    config, _ = parse_train("lstm", "--width", "48", "--context-length", "32")
    run = write_run(Path("runs/parent"), config).parent
    save_config(run, "lstm", {**config.model_args, "vocab_size": 300, "context_length": 32})
    Path("a.toml").write_text('from = "parent"\nsteps = 9\n')
    from_file, _ = parse_train("--config", "a.toml")
    assert from_file == parse_train("--from", "parent", "--steps", "9")[0]
    assert (from_file.init_from, from_file.model) == ("parent", "lstm")
    assert from_file.model_args["width"] == 48
    Path("a.toml").write_text('from = "absent"\n')
    assert parse_train("--config", "a.toml", "--from", "parent")[0].init_from == "parent"


def test_a_file_names_a_run_to_begin_with_that_is_not_there(error):
    Path("a.toml").write_text('from = "absent"\n')
    assert "runs/absent: no such run directory" in error(
        training_cli.main, "train", "--config=a.toml"
    )
    message = error(training_cli.main, "train", "gpt-nano", "--config", "a.toml")
    assert message.startswith("leave out the preset gpt-nano: --from has the model of its run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepz = 1", "a.toml: no option is named 'stepz' (did you mean steps?); --help"),
        ("[model]\nwidht = 1", "a.toml: no option is named '[model] widht' (did you"),
        ("[modle]\nwidth = 1", "a.toml: no option is named 'modle'; --help"),
        ("config = 'b.toml'", "a.toml: no option is named 'config'"),
        ("num_gpus = 2", "a.toml: no option is named 'num_gpus'"),
        ("steps = '5'", "a.toml: steps = '5': Input should be a valid integer"),
        ("steps = true", "a.toml: steps = 'True': Input should be a valid integer"),
        ("steps = 2.5", "a.toml: steps = '2.5': Input should be a valid integer"),
        ("optimizer = 'adam'", "a.toml: optimizer = 'adam': Input should be 'muon', 'adamw' or"),
        ("data = 1979-05-27", "a.toml: data = '1979-05-27': Object of type date is not JSON"),
        ("preset = 3", "a.toml: preset = '3': Input should be a valid string"),
        ("preset = 'gtp-nano'", "no preset is named 'gtp-nano' (did you mean gpt-nano"),
        ("steps = 1\nsteps = 2", "a.toml: not valid TOML: "),
        ("seed = 1\n[model]\nseed = 2", "a.toml: seed is there twice; [model] seed is the second"),
        (
            "grad_clip = 1\ngrad-clip = 2",
            "a.toml: grad_clip is there twice; grad-clip is the second",
        ),
        ("steps", "a.toml: not valid TOML: "),
        (
            "steps = 0",
            "--steps must be at least 1, not 0; --help explains (options also come from a.t",
        ),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_it(content, message, error):
    Path("a.toml").write_text(content)
    assert error(training_cli.main, "train", "--config", "a.toml").startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "many"}, "runs/x/run.json: steps = 'many': Input should be a valid integer"),
        ({"stepz": 5}, "runs/x/run.json: no option is named 'stepz' (did you mean steps?)"),
        ({"model": "gtp"}, "no model is named 'gtp' (did you mean gpt?"),
        ({"model": None}, "runs/x/run.json: model = 'None': Input should be a valid string"),
        ({"model_args": {"widht": 3}}, "runs/x/run.json: no option is named 'widht'"),
        ({"model_args": 3}, "runs/x/run.json: it has no options of a run"),
        (
            {"data": ""},
            "runs/x/run.json: the run was imported, not trained; continue it with --from",
        ),
    ],
)
def test_a_mistake_in_a_run_json_is_one_line_that_names_it(change, message, error):
    file = write_run(Path("runs/x"), TrainingConfig())
    content = json.loads(file.read_text())
    content["config"] |= change
    file.write_text(json.dumps(content))
    assert error(training_cli.main, "train", "--config", file).startswith(message)


def test_files_that_cannot_be_used(error):
    file = write_run(Path("runs/x"), TrainingConfig())
    run = training_cli.main, "train"
    assert error(*run, "--config", "no.toml").startswith("--config no.toml: no such file; expected")
    assert error(*run, "--config", "no.json") == "no.json: No such file or directory"
    assert error(*run, "--config").startswith("--config .: no such file")
    assert error(*run, "gpt-nano", "--config", file).startswith("leave out the preset gpt-nano: ")
    assert error(*run, "--from", "x", "--config", file).startswith("leave out --from: ")
    assert error(*run, "--resume", "--config", file).startswith("leave out --config: --resume ")
    Path("bad.toml").write_bytes(b"data = '\xff'\n")
    assert error(*run, "--config", "bad.toml").startswith("bad.toml: not valid TOML: 'utf-8'")
    Path("serve.toml").write_text("prot = 1\n")
    message = error(serving_cli.main, "serve", "--config", "serve.toml")
    assert message.startswith("serve.toml: no option is named 'prot' (did you mean port")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PORT", "80a", "TINYGPT_PORT = '80a': Input should be a valid integer"),
        ("PORT", "tcp://10.0.0.1:80", "Kubernetes sets it for a service named tinygpt: see docs/"),
        (
            "PORT",
            "-1",
            "--port must be between 0 and 65535, not -1 (options also come from TINYGPT_",
        ),
        (
            "NO_COMPILE",
            "perhaps",
            "TINYGPT_NO_COMPILE = 'perhaps': Input should be a valid boolean",
        ),
        ("DTYPE", "int4", "TINYGPT_DTYPE = 'int4': Input should be 'float32'"),
        (
            "ALLOWED_ORIGINS",
            "http://a 'b",
            'TINYGPT_ALLOWED_ORIGINS = "http://a \'b": No closing quotation',
        ),
        ("CONFIG", "no.toml", "--config no.toml: no such file"),
        ("API_KEY", "", "--api-key must be printable ASCII without spaces, and not empty"),
    ],
)
def test_a_mistake_in_the_environment_is_one_line_that_names_it(
    name, value, message, error, monkeypatch, tmp_path
):
    monkeypatch.setenv(f"TINYGPT_{name}", value)
    text = error(serving_cli.main, "serve", "--watch", str(tmp_path))
    assert message in text
    assert ("Kubernetes" in text) == value.startswith("tcp:")


def test_a_variable_of_no_option_is_named_in_one_warning(parse, monkeypatch, capsys):
    for name in ("PROT", "SERVICE_HOST", "CACHE"):
        monkeypatch.setenv(f"TINYGPT_{name}", "x")
    assert parse(serving_cli, "serve").port == 8000
    assert re.fullmatch(
        r"tinygpt: warning: no option is set by TINYGPT_PROT \(did you mean PORT.*\), "
        r"TINYGPT_SERVICE_HOST.*\n",
        capsys.readouterr().err,
    )
    parse(serving_cli, "sample")
    assert capsys.readouterr().err == ""


def test_help_shows_the_values_of_the_environment_but_no_key(monkeypatch, capsys):
    monkeypatch.setenv("TINYGPT_PORT", "4321")
    monkeypatch.setenv("TINYGPT_API_KEY", "sesame")
    monkeypatch.setattr(sys, "argv", ["tinygpt"])
    with pytest.raises(SystemExit):
        serving_cli.main("tinygpt", ["serve", "--help"])
    text = " ".join(re.sub("[│]", " ", capsys.readouterr().out).split())
    assert "(default: 4321)" in text
    assert "Environment variables such as TINYGPT_PORT win over it" in text
    assert "sesame" not in text


def test_the_files_of_the_docs(parse, parse_train):
    train, serve = re.findall(r"^```toml\n(.*?)^```", DEPLOYMENT, re.MULTILINE | re.DOTALL)
    Path("train.toml").write_text(train)
    Path("serve.toml").write_text(serve)
    config, directory = parse_train("--config", "train.toml")
    assert (config.preset, config.steps, config.model_args["heads"]) == ("gpt-nano", 1000, 4)
    assert directory == Path("runs/wide")
    command = parse(serving_cli, "serve", "--config", "serve.toml")
    assert command.run == ("wide", "runs/ci")
    assert (command.port, command.max_num_seqs, command.limits.max_tokens) == (8080, 32, 1000)


def test_the_variables_of_the_docs(parse, monkeypatch):
    rows = re.findall(r"^\| `([^`]+)` \| `(TINYGPT_\w+)=([^`]+)`", DEPLOYMENT, re.MULTILINE)
    assert len(rows) == 4
    Path("serve.toml").write_text("max-queue = 7\n")
    for typed, name, value in rows:
        arguments = shlex.split(typed.removeprefix("tinygpt serve "))
        with monkeypatch.context() as patch:
            patch.setenv(name, shlex.split(f"x={value}")[0][2:])
            from_environment = parse(serving_cli, "serve")
        expected = parse(serving_cli, "serve", *arguments)
        assert dataclasses.replace(from_environment, config=expected.config) == expected
        assert from_environment != Serve()
