"""Settings: what a file and the environment may say, and how an operator is told that they may not."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError
from sqlalchemy import make_url

from registry.core.decision import Limits
from registry.errors import BadSettings
from registry.settings import Settings, differing, load_settings
from registry.store.store import Store

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables of whoever runs the tests, and a current directory of our own."""
    for name in os.environ:
        if name.startswith("GREENPROMPT_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path: Path):
    """A function that writes a configuration file and returns its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads(path: Path) -> None:
    """Each file in configs/ is one that the registry starts with."""
    assert load_settings(path).http.port


@pytest.mark.parametrize("text", ["", "\n", "# only a remark\n", "---\n"])
def test_empty_file_means_defaults(write, text: str) -> None:
    """A file that says nothing is a good one, and as good as none."""
    assert load_settings(write(text)) == Settings()


def test_values_of_the_file_are_taken(write) -> None:
    """What the file says is what is set; what it leaves out has its default."""
    settings = load_settings(write("http: {port: 8001}\nleases: {idle_s: 5}\nmodels: {huggingface: false}\n"))
    assert (settings.http.port, settings.http.host) == (8001, "127.0.0.1")
    assert (settings.leases.idle_s, settings.leases.max_s) == (5, 3600)
    assert not settings.models.huggingface


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("http: {prot: 1}", "http.prot"),
        ("htpp: {port: 1}", "htpp"),
        ("1: 2", "1"),
        ("_env_file: x", "_env_file"),
        ("http: {port: many}", "http.port"),
        ("http: {port: 0}", "http.port"),
        ("http: {port: 65536}", "http.port"),
        ("http: 8000", "http"),
        ("http: {port: 1, port: 2}", "port occurs twice, in line 1"),
        ("energy: {grid: {zone: NO}}", "NO can be read in two ways: write true or false, or put it in quotes"),
        ("http: {public_url: head.example:8000}", "http.public_url: needs a scheme and a host"),
        ("http: {public_url: 'http://'}", "http.public_url"),
        ("http: {host: '::1'}", "http: host can't be an IPv6 address with HAProxy"),
        ("http: {public_url: 'http://x/?a=b'}", "must have no query and no fragment"),
        ("http: {public_url: 'http://head:99999'}", "http.public_url: Port out of range"),
        ("http: {public_url: 'http://head:x'}", "http.public_url: Port could not be cast"),
        ("http: {public_url: 'http://head:0'}", "http.public_url: port 0"),
        ("http: {public_url: ' http://head:8000'}", "http.public_url: contains a space"),
        ("http: {public_url: 'http://u:p@head:8000'}", "http.public_url: must have no user name"),
        ("http: {host: ''}", "http.host: is empty"),
        ("state_dir: ''", "state_dir: is empty"),
        ("cache_dir: ' '", "cache_dir: is empty"),
        ("database_url: ''", "database_url: is empty"),
        ("ray: {address: ''}", "ray.address: is empty"),
        ("models: {cache_dir: ''}", "models.cache_dir: is empty"),
        ("models: {local_roots: [a, '']}", "models.local_roots.1: is empty"),
        ('state_dir: "a\\0b"', "state_dir: a path can't contain a NUL character"),
        ("leases: {max_s: 0}", "leases.max_s"),
        ("leases: {max_s: .inf}", "leases.max_s"),
        ("leases: {idle_s: .nan}", "leases.idle_s"),
        ("models: {huggingface: maybe}", "models.huggingface"),
        ("models: {allow_remote_code: [acme/trusted]}", "write acme/trusted@<commit> with all 40 digits"),
        ("models: {allow_remote_code: [acme/trusted@main]}", "'main' is no commit"),
        ("models: {allow_remote_code: [acme/trusted@refs/pr/7]}", "'refs/pr/7' is no commit"),
        ("models: {allow_remote_code: [acme/trusted@0123abc]}", "'0123abc' is no commit"),
        (f"models: {{allow_remote_code: [acme/trusted@{'A' * 40}]}}", "is no commit"),
        ("models: {allow_remote_code: [./llms/own]}", "write the absolute path of its folder"),
        ("models: {allow_remote_code: [~nobody-has-this-name/x]}", "there is no such home directory"),
        ("models: {allowed_media_domains: ['*.example.com']}", "'*.example.com' is no host"),
        ("models: {allowed_media_domains: ['https://example.com']}", "is no host"),
        ("models: {allowed_media_domains: ['example.com:80']}", "is no host"),
        ("models: {allowed_media_domains: [Example.com]}", "in small letters"),
        ("models: {media_max_mib: 0}", "models.media_max_mib"),
        ("models: {cache_max_gib: 10}", "cache_max_gib needs cache_dir"),
        ("models: {cache_dir: x, cache_max_gib: 0}", "models.cache_max_gib"),
        ("wrappers: {preload: [os.path]}", "wrappers.preload"),
        ("wrappers: {run_as: ../llm}", "wrappers.run_as"),
        ("wrappers: {fence_s: 17.9}", "wrappers.fence_s must be at least 18"),
        ("watch: {period_s: 10}", "wrappers.fence_s must be at least 45"),
        ("queue: {deploy_attempts: 0}", "queue.deploy_attempts"),
        ("deploy: [{llm: {modeltyp: x, model: y, uses_chat_template: true}}]", "deploy.0.llm.args"),
        ("energy: {functional_unit: joke}", "energy.functional_unit"),
        ("energy: {pue: 0.9}", "energy.pue"),
        ("energy: {grid: {}}", "energy.grid"),
        ("energy: {grid: {zone: DEU, gco2eq_per_kwh: 3}}", "energy.grid"),
        ("energy: {grid: {gco2eq_per_kwh: 3}}", "energy.grid"),
        ("state_dir: ~nobody-has-this-name/x", "state_dir: ~nobody-has-this-name"),
        ("models: {local_roots: [~nobody-has-this-name]}", "models.local_roots: ~nobody-has-this-name"),
    ],
)
def test_unusable_fields_are_named(write, text: str, named: str) -> None:
    """A field that is not known or can't be used is an error that names the file and the field."""
    path = write(text)
    with pytest.raises(BadSettings) as caught:
        load_settings(path)
    assert caught.value.source == str(path)
    assert named in caught.value.problem


def test_code_is_allowed_by_commit_or_folder(write) -> None:
    """An entry is a model with its commit, or a folder whose path becomes absolute."""
    pinned = f"acme/trusted@{'0123456789' * 4}"
    settings = load_settings(write(f"models: {{allow_remote_code: [{pinned}, gpt2@{'a' * 40}, /llms/../llms/own/]}}"))
    assert settings.models.allow_remote_code == (pinned, f"gpt2@{'a' * 40}", "/llms/own")
    assert settings.models.allowed_media_domains == ()


@pytest.mark.parametrize("text", ["[]", "0", "false", "just words", "- a\n- b\n"])
def test_file_must_be_a_mapping(write, text: str) -> None:
    """A file that holds something else than sections is not taken for an empty one."""
    with pytest.raises(BadSettings, match="mapping of sections"):
        load_settings(write(text))


@pytest.mark.parametrize("text", ["a: b: c", "\tx", "a: [", "\0", b"\xff\xfe\x00", "a: !!python/object:os.system x"])
def test_what_is_not_yaml_is_said(write, text: str | bytes) -> None:
    """A file that is not YAML, or wants to be more than data, is an error that says so on one line."""
    with pytest.raises(BadSettings, match=r"is not YAML: .") as caught:
        load_settings(write(text))
    assert "\n" not in str(caught.value)


def test_broken_yaml_does_not_show_the_line(write) -> None:
    """The error for a broken line doesn't repeat it: it may be the one with the database's password."""
    with pytest.raises(BadSettings, match="in line 2") as caught:
        load_settings(write("http: {}\ndatabase_url: postgresql://u:s3cret@host: x\n"))
    assert "s3cret" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A configuration that is not there is an error with its path and the system's reason."""
    with pytest.raises(BadSettings, match=r"nowhere\.yaml: can't be read \(No such file"):
        load_settings(tmp_path / "nowhere.yaml")
    with pytest.raises(BadSettings, match="Is a directory"):
        load_settings(tmp_path)


def test_a_current_directory_that_is_gone_is_said(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths mean nothing then: one line says so, whatever the configuration has."""
    path = write("{state_dir: /a, cache_dir: /b}")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(BadSettings, match=r"current directory: can't be used \(No such file or directory\): change to"):
        load_settings(path)


def test_all_problems_are_named(write) -> None:
    """Several errors are told on one line, each with its field and in our words; of very many the first eight."""
    path = write("http: {port: 0, hots: a}\nleases: {max_s: 0}\nenergy: {grid: {zone: DE}}\n")
    with pytest.raises(BadSettings) as caught:
        load_settings(path)
    problems = caught.value.problem.split("; ")
    assert [problem.partition(":")[0] for problem in problems] == [
        "http.port",
        "http.hots",
        "did you mean host?",
        "leases.max_s",
        "energy.grid",
        "did you mean DEU?",
    ]
    assert "http.hots: there is no such field" in problems
    with pytest.raises(BadSettings, match=r"a7: there is no such field \(and 3 more\)"):
        load_settings(write("http: {" + ", ".join(f"a{n}: 1" for n in range(11)) + "}\n"))


def test_all_unknown_sections_are_named(write) -> None:
    """Two sections that there are not are both named."""
    with pytest.raises(BadSettings, match=r"htpp: .*; lease: ") as caught:
        load_settings(write("htpp: {}\nlease: {}\n"))
    assert "\n" not in str(caught.value)


def test_overrides_go_into_sections(write) -> None:
    """What the command line says replaces single fields of the file's sections and leaves the others."""
    path = write("ray: {dashboard_port: 9000}\nstate_dir: a\n")
    settings = load_settings(path, ray={"address": "auto"}, state_dir="b", http={"port": 1})
    assert (settings.ray.address, settings.ray.dashboard_port) == ("auto", 9000)
    assert settings.state_dir.name == "b"
    assert settings.http.port == 1


# --- environment -------------------------------------------------------------------------------------------


def test_environment_goes_before_the_file(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable overrides one field of a section; the section's others stay as the file says."""
    monkeypatch.setenv("GREENPROMPT_HTTP__PORT", "8123")
    monkeypatch.setenv("GREENPROMPT_STATE_DIR", "elsewhere")
    monkeypatch.setenv("GREENPROMPT_MODELS__LOCAL_ROOTS", '["models"]')
    settings = load_settings(write("http: {port: 1, host: 0.0.0.0}\naccess: {keys: true}\nstate_dir: here\n"))
    assert (settings.http.port, settings.http.host) == (8123, "0.0.0.0")
    assert settings.state_dir.name == "elsewhere"
    assert [root.name for root in settings.models.local_roots] == ["models"]


def test_environment_goes_before_the_command_line(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable also wins over what the caller gives."""
    monkeypatch.setenv("GREENPROMPT_RAY__ADDRESS", "here:1")
    assert load_settings(write(""), ray={"address": "auto"}).ray.address == "here:1"


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("GREENPROMPT_HTTP__PORT", "many", "http.port"),
        ("GREENPROMPT_HTTP__PROT", "1", "http.prot"),
        ("GREENPROMPT_HTPP__PORT", "1", "GREENPROMPT_HTPP__PORT"),
        ("GREENPROMPT_HTTP__PORT", "many", "GREENPROMPT_HTTP__PORT"),
        ("GREENPROMPT_STATEDIR", "x", "did you mean GREENPROMPT_STATE_DIR?"),
        ("GREENPROMPT_HTTP_PORT", "1", "did you mean GREENPROMPT_HTTP__PORT?"),
        ("greenprompt_http_port", "1", "did you mean GREENPROMPT_HTTP__PORT?"),
        ("GREENPROMPT_NONSENSE", "1", "there is no section 'nonsense'"),
        ("GREENPROMPT_STATE_DIR", "", "GREENPROMPT_STATE_DIR"),
        ("GREENPROMPT_DATABASE_URL", " ", "is empty; unset it, or give it a value"),
        ("GREENPROMPT_HTTP", "no json", "given as JSON: "),
        ("GREENPROMPT_MODELS__LOCAL_ROOTS", "no json", "given as JSON: "),
        ("GREENPROMPT_MODELS__LOCAL_ROOTS", '[""]', "GREENPROMPT_MODELS__LOCAL_ROOTS: models.local_roots.0: is empty"),
        ("GREENPROMPT_HTTP", '{"host": ""}', "GREENPROMPT_HTTP: http.host: is empty"),
        ("GREENPROMPT_STATE_DIR", "~nobody-has-this-name", "GREENPROMPT_STATE_DIR: state_dir: ~nobody"),
    ],
)
def test_unusable_variables_are_named(
    write, monkeypatch: pytest.MonkeyPatch, name: str, value: str, named: str
) -> None:
    """A variable that can't be used, or that names no section, is an error that names what is wrong."""
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings) as caught:
        load_settings(write(""))
    assert named in str(caught.value)


def test_all_typos_in_variables_are_named(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typos of every kind are told at once, each with the name of its variable and the one that was meant."""
    typos = {
        "GREENPROMPT_HTPP__PORT": "did you mean GREENPROMPT_HTTP__PORT?",
        "GREENPROMPT_HTTP__PROT": "there is no field 'http.prot'; did you mean GREENPROMPT_HTTP__PORT?",
        "GREENPROMPT_ENERGY__GRID__ZON": "did you mean GREENPROMPT_ENERGY__GRID__ZONE?",
        "GREENPROMPT_STATE_DIR__X": "there is no field 'state_dir.x'",
        "GREENPROMPT_STATEDIR": "did you mean GREENPROMPT_STATE_DIR?",
        "GREENPROMPT_LEASES__MAX_S": "is empty",
        "GREENPROMPT_HTTP": "given as JSON: the key 'port' occurs twice",
    }
    for name in typos:
        monkeypatch.setenv(name, {"GREENPROMPT_LEASES__MAX_S": " "}.get(name, '{"port": 1, "port": 2}'))
    with pytest.raises(BadSettings) as caught:
        load_settings(write(""))
    for name, told in typos.items():
        assert f"{name}: " in str(caught.value)
        assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unusable_values_name_all_their_variables(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two values that can't be used are told with a variable each; of what a section says, its variables beside it."""
    monkeypatch.setenv("GREENPROMPT_HTTP__PORT", "many")
    monkeypatch.setenv("GREENPROMPT_LEASES__MAX_S", "long")
    with pytest.raises(BadSettings, match=r"^GREENPROMPT_HTTP__PORT: .*; GREENPROMPT_LEASES__MAX_S: leases\.max_s: "):
        load_settings(write(""))
    monkeypatch.setenv("GREENPROMPT_HTTP__PORT", "1")
    monkeypatch.setenv("GREENPROMPT_LEASES__MAX_S", "1")
    monkeypatch.setenv("GREENPROMPT_HTTP__HOST", "::1")
    with pytest.raises(BadSettings, match=r"yaml and GREENPROMPT_HTTP__.*GREENPROMPT_HTTP__HOST.*: http: host can't"):
        load_settings(write(""))


def fields(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """The names of the variables of all fields of the settings, and of all sections."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}".upper()
        for kind in get_args(field.annotation) or (field.annotation,):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and get_origin(field.annotation) is not dict:
                yield from fields(kind, f"{prefix}{name}__")


def refusal(path: Path) -> str | None:
    """What is said of a configuration that is refused."""
    try:
        load_settings(path)
    except BadSettings as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", list(fields(Settings, "GREENPROMPT_")))
def test_every_variable_is_taken_or_named(write, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What is no JSON, or has a key twice, is refused by one line with the variable's name, or is a plain text."""
    path = write("access: {insecure: true}")  # any text is a host
    for value in ("no json {", '{"a": 1, "a": 2}', "[" * 100_000):
        monkeypatch.setenv(name, value)
        told = refusal(path)
        if told is None:
            section = load_settings(path)
            *names, last = name.removeprefix("GREENPROMPT_").lower().split("__")
            for each in names:
                section = getattr(section, each)
            assert isinstance(getattr(section, last), str | Path | None)
        else:
            assert name in told
            assert "\n" not in told


def test_other_variables_of_ours_are_no_settings(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """GREENPROMPT_URL tells the command line where a registry is; it does not disturb the settings."""
    monkeypatch.setenv("GREENPROMPT_URL", "http://x")
    assert load_settings(write("")) == Settings()


def test_database_of_a_folder_with_any_name(tmp_path: Path) -> None:
    """A % or a ? in state_dir is part of the path: the database lies there, and nowhere else."""
    folder = tmp_path / "100%25 ?mode=memory #1"
    settings = Settings(state_dir=folder)
    assert make_url(settings.store_url).database == str(folder / "registry.db")
    assert make_url(settings.store_url).query == {}
    Store.open(settings.store_url).close()
    assert (folder / "registry.db").exists()


@pytest.mark.parametrize(("host", "url"), [("::1", "http://[::1]:8000"), ("127.0.0.1", "http://127.0.0.1:8000")])
def test_base_url_of_a_host(host: str, url: str) -> None:
    """An IPv6 address stands in brackets."""
    assert Settings.model_validate({"http": {"host": host, "haproxy": False}}).base_url == url


# --- the object --------------------------------------------------------------------------------------------


def test_settings_are_frozen() -> None:
    """Nobody changes settings once they are read, in no section."""
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.state_dir = Path("x")  # type: ignore[misc]  # that is the test
    with pytest.raises(ValidationError, match="frozen"):
        settings.http.port = 1  # type: ignore[misc]


def test_relative_paths_mean_the_directory_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, ~ and .. are resolved when settings are read: the parts run in other directories."""
    monkeypatch.setenv("HOME", "/house")
    settings = Settings.model_validate(
        {"state_dir": "state", "cache_dir": "~/cache", "models": {"local_roots": ["a/../models", "~/models", "/m/"]}}
    )
    assert settings.state_dir == tmp_path / "state"
    assert settings.cache_dir == Path("/house/cache")
    assert settings.models.local_roots == (tmp_path / "models", Path("/house/models"), Path("/m"))
    assert settings.store_url == f"sqlite:///{tmp_path}/state/registry.db"


def test_settings_mean_the_same_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that are sent to an actor don't look at its environment or its current directory."""
    monkeypatch.setenv("GREENPROMPT_HTTP__PORT", "8123")
    sent = Settings()
    packed = pickle.dumps(sent)
    monkeypatch.setenv("GREENPROMPT_HTTP__PORT", "1")
    monkeypatch.chdir("/")
    assert pickle.loads(packed) == sent


@pytest.mark.parametrize(
    ("http", "expected"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "0.0.0.0", "port": 9}, "http://0.0.0.0:9"),
        ({"public_url": "https://llm.example/"}, "https://llm.example"),
        ({"public_url": "https://llm.example/a/b"}, "https://llm.example/a/b"),
    ],
)
def test_base_url_has_no_slash_at_its_end(http: dict[str, object], expected: str) -> None:
    """The URL that clients use is the public one, else that of the interface."""
    assert Settings.model_validate({"http": http, "access": {"keys": True}}).base_url == expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "head.example"])
@pytest.mark.parametrize("access", ["keys", "insecure"])
def test_other_machines_need_keys_or_a_word(host: str, access: str) -> None:
    """A registry that other machines reach asks for keys, unless the operator says that it need not."""
    http = {"host": host, "haproxy": False}
    with pytest.raises(ValueError, match=r"access\.keys must be true, because http\.host"):
        Settings.model_validate({"http": http})
    assert Settings.model_validate({"http": http, "access": {access: True}}).http.host == host


def test_what_is_published_needs_keys() -> None:
    """A registry on loopback whose published URL is another machine's has a proxy in front: it asks for keys, too."""
    http = {"public_url": "https://llm.example"}
    with pytest.raises(ValueError, match=r"access\.keys must be true, because http\.public_url 'llm\.example'"):
        Settings.model_validate({"http": http})
    assert Settings.model_validate({"http": http, "access": {"keys": True}}).access.keys


def test_trusted_clients_need_haproxy() -> None:
    """Without HAProxy a client could claim any address."""
    access = {"keys": True, "trusted_clients": {"10.0.0.7": "lab"}}
    with pytest.raises(ValueError, match=r"trusted_clients needs http\.haproxy: true"):
        Settings.model_validate({"http": {"haproxy": False}, "access": access})


def test_trusted_proxies_need_haproxy() -> None:
    """Without HAProxy the setting would do nothing."""
    http = {"haproxy": False, "trusted_proxies": ["127.0.0.1"]}
    with pytest.raises(ValueError, match=r"trusted_proxies needs haproxy: true"):
        Settings.model_validate({"http": http, "access": {"keys": True}})


@pytest.mark.parametrize(
    ("proxies", "problem"),
    [
        (["0.0.0.0/0"], "names all addresses"),
        (["::/0"], "names all addresses"),
        (["10.0.0.1/24"], "not a valid IPv4 network"),
        (["front.example"], "not a valid"),
        ([1], "as text in quotes"),
        ([10.1], "as text in quotes"),
        ([b"\x0a\0\0\1"], "as text in quotes"),
        (["::ffff:10.0.0.0/120"], "write it as IPv4"),
        (["10.0.0.0/24"], r"10\.0\.0\.7/32 is in http\.trusted_proxies"),
    ],
)
def test_proxies_that_make_no_sense(proxies: list[str], problem: str) -> None:
    """Proxies are some networks, and a trusted client is none of them."""
    access = {"keys": True, "trusted_clients": {"10.0.0.7": "lab", "2001:db8::7": "lab"}}
    with pytest.raises(ValueError, match=problem):
        Settings.model_validate({"http": {"trusted_proxies": proxies}, "access": access})


def test_a_proxy_in_the_network_of_its_clients() -> None:
    """A network of clients may contain the proxy: the others in it are clients. Addresses have no mask."""
    access = {"keys": True, "trusted_clients": {"10.0.0.0/24": "lab", "2001:db8::/64": "lab"}}
    proxies = ["10.0.0.7", "2001:db8::7/128"]
    found = Settings.model_validate({"http": {"trusted_proxies": proxies}, "access": access}).http.trusted_proxies
    assert [str(network) for network in found] == ["10.0.0.7/32", "2001:db8::7/128"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    """A registry for this machine alone needs no keys."""
    assert not Settings.model_validate({"http": {"host": host, "haproxy": False}}).access.keys


@pytest.mark.parametrize(
    ("access", "problem"),
    [
        ({"keys": True, "insecure": True}, "exclude each other"),
        ({"trusted_clients": {"10.0.0.7/32": "lab"}}, "needs keys: true"),
        ({"keys": True, "trusted_clients": {"10.0.0.7/24": "lab"}}, "not a valid IPv4 network"),
        ({"keys": True, "trusted_clients": {"10.0.0.7": "a b"}}, "should match pattern"),
        ({"keys": True, "trusted_clients": {"0.0.0.0/0": "lab"}}, "names all addresses"),
        ({"keys": True, "trusted_clients": {167772167: "lab"}}, "as text in quotes"),
        ({"keys": True, "trusted_clients": {"::ffff:10.0.0.7/128": "lab"}}, "write it as IPv4"),
    ],
)
def test_access_that_makes_no_sense(access: dict[str, object], problem: str) -> None:
    """What contradicts itself is refused."""
    with pytest.raises(ValueError, match=problem):
        Settings.model_validate({"access": access})


def test_database_url_goes_before_the_embedded_one() -> None:
    """A database URL of the operator's is used as it is."""
    url = "postgresql+psycopg://x/y"
    assert Settings.model_validate({"database_url": url}).store_url == url


def test_limits_are_those_of_the_settings() -> None:
    """What the allocator decides by is what the operator chose, field by field; the defaults of both agree."""
    assert Settings().limits == Limits()
    settings = Settings.model_validate(
        {
            "leases": {"max_s": 1, "idle_s": 2},
            "queue": {
                "max_queued": 3,
                "max_queued_per_tenant": 4,
                "max_overtakes": 5,
                "max_overtake_s": 6,
                "deploy_attempts": 7,
                "wrapper_attempts": 8,
            },
        }
    )
    assert settings.limits == Limits(
        lease_max_s=1,
        lease_idle_s=2,
        max_queued=3,
        max_queued_per_tenant=4,
        max_overtakes=5,
        max_overtake_s=6,
        deploy_attempts=7,
        wrapper_attempts=8,
    )


def test_what_differs_is_named() -> None:
    """Fields by their dotted names, as in a file; a section that one of the two lacks is one field."""
    assert differing(Settings(), Settings()) == []
    given = {"leases": {"idle_s": 7.0}, "database_url": "sqlite:///x", "energy": {"grid": {"zone": "DEU"}}}
    other = Settings.model_validate(given)
    assert differing(Settings(), other) == differing(other, Settings())
    assert set(differing(Settings(), other)) == {"leases.idle_s", "database_url", "energy.grid"}
