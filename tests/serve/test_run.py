"""Where a server listens, what it is called, and what it is told on the command line."""

import json
import socket

import pytest

from tinymodal.cli import main, parser
from tinymodal.core.errors import RecipeError
from tinymodal.serve.asking import OF_MADE, Asking, asking_of
from tinymodal.serve.gate import is_loopback
from tinymodal.serve.limits import Limits
from tinymodal.serve.run import check_address, key_of, listening, name_of
from tinymodal.verbs.serve import limits_of


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "myhost", "127.0.0.1.example.org"])
def test_other_computers_are_let_in_with_a_key_or_when_told_so(host):
    with pytest.raises(RecipeError, match="--api-key"):
        check_address(host, None, False)
    check_address(host, "key", False)
    check_address(host, None, True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_this_computer_needs_no_key(host):
    assert is_loopback(host)
    check_address(host, None, False)


def test_the_command_refuses_before_anything_is_loaded(capsys):
    assert main(["serve", "no-such-model", "--host", "0.0.0.0"]) == 1
    assert "--api-key" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "no-such-model", "--port", str(taken.getsockname()[1])]) == 1
    assert "choose another --port" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="listened"):
        listening("127.0.0.1", 70_000)


def test_a_key_is_a_variable_or_itself(monkeypatch):
    monkeypatch.setenv("MY_KEY", "of the shell".replace(" ", "-"))
    assert key_of("MY_KEY") == "of-the-shell"
    assert key_of("sk-direct") == "sk-direct"
    assert key_of(None) is None
    monkeypatch.setenv("MY_KEY", "  ")
    for wrong in ("MY_KEY", "two words", "", "\u00e4"):
        with pytest.raises(RecipeError, match="--api-key"):
            key_of(wrong)


def test_a_model_is_called_as_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo" / "model").mkdir(parents=True)
    assert [name_of(name) for name in ("runs/demo/model", "runs/demo", "runs/demo/model/")] == ["demo"] * 3
    assert (name_of("starter"), name_of("org/model")) == ("starter", "org/model")


def test_every_limit_is_an_option_and_what_is_given_counts():
    args = parser().parse_args(
        [
            "serve",
            "--max-pictures",
            "3",
            "--max-audio-s",
            "7.5",
            "--image-hosts",
            "a.org,b.org",
            "--rows",
            "2",
        ]
    )
    limits = limits_of(args)
    assert limits == Limits(pictures=3, audio_s=7.5, image_hosts=("a.org", "b.org"), rows=2)
    for wrong, told in (
        (["--rows", "0"], "rows must be above 0"),
        (["--max-request-s", "nan"], "request_s must be above 0"),
        (["--sound-formats", "wav,doc"], "'doc' is not one of"),
        (["--image-hosts", "http://a.org"], "is no host"),
    ):
        with pytest.raises(RecipeError, match=told):
            limits_of(parser().parse_args(["serve", *wrong]))


def test_a_model_is_asked_as_its_recipe_did(tmp_path):
    def run(name: str, data: str) -> str:
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "recipe.toml").write_text(f'[[stages]]\nname = "a"\ndata = [{data}]\n')
        return str(tmp_path / name / "model")

    assert asking_of("starter") == asking_of(run("made", '{ made = "omni" }')) == OF_MADE
    assert asking_of(run("read", '{ path = "a.jsonl", format = "asr" }')) == Asking()
    assert asking_of(run("seen", '{ made = "scenes" }')) == asking_of("org/model") == Asking()


def test_the_schema_names_every_path_and_what_it_reads(server):
    schema = json.loads(server.send("GET", "/openapi.json")[2])
    read = {
        path: set(route["post"]["requestBody"]["content"])
        for path, route in schema["paths"].items()
        if "post" in route
    }
    assert read == {
        "/v1/chat/completions": {"application/json"},
        "/v1/audio/speech": {"application/json"},
        "/v1/audio/transcriptions": {"multipart/form-data"},
    }
    assert {"/v1/models", "/v1/models/{model}", "/health", "/metrics"} <= set(schema["paths"])
    text = json.dumps(schema)
    missing = [
        name
        for name in {word.split('"')[0] for word in text.split("#/components/schemas/")[1:]}
        if name not in schema["components"]["schemas"]
    ]
    assert missing == []
