"""--adapter-root: nothing below another directory is read, whatever the path looks like."""

import argparse
import os
from types import SimpleNamespace

import pytest

from sgl_bdlora import config, options_refused
from sgl_bdlora.adapters import AdapterError
from sgl_bdlora.adapters.root import confined


@pytest.fixture
def place(tmp_path):
    """A root with one adapter, a directory beside the root whose name begins alike, and one with an adapter elsewhere."""
    for folder in ("root/sql", "root/team/fr", "root-of-others/sql", "secret"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "adapter_config.json").write_text("{}")
        (tmp_path / folder / "adapter_model.safetensors").write_text("weights")
    return tmp_path


def refusal(path, root) -> str:
    with pytest.raises(AdapterError) as caught:
        confined("tuned", path, str(root))
    message = str(caught.value)
    for word in ("'tuned'", "--adapter-root", "Fix: "):
        assert word in message
    assert "\n" not in message
    return message


def test_without_a_root_every_path_is_left_alone():
    assert str(confined("tuned", "../secret", None)) == "../secret"


@pytest.mark.parametrize("path", ["sql", "./sql/", "team/../sql", "team/fr/../../sql"])
def test_relative_paths_start_at_the_root(place, monkeypatch, path):
    monkeypatch.chdir(place / "secret")
    assert confined("tuned", path, str(place / "root")) == place / "root" / "sql"


def test_absolute_paths_below_the_root(place):
    assert confined("tuned", str(place / "root/team/fr"), str(place / "root")) == place / "root/team/fr"


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../secret",
        "sql/../../secret",
        "team/fr/../../../secret",
        "../root-of-others/sql",
        "../root/../secret",
        "/",
    ],
)
def test_paths_that_leave_are_refused(place, path):
    assert repr(path) in refusal(path, place / "root")


def test_an_absolute_path_elsewhere_is_refused_alike_whether_it_exists_or_not(place):
    there, nowhere = str(place / "secret"), str(place / "nowhere")
    assert refusal(there, place / "root").replace("secret", "nowhere") == refusal(nowhere, place / "root")


def test_a_directory_that_is_a_link_out_is_refused(place):
    (place / "root/link").symlink_to(place / "secret")
    (place / "root/chain").symlink_to("link")
    (place / "root/up").symlink_to("../..")
    for path in ("link", "chain", str(place / "root/link"), "link/.", f"up/{place.name}/secret"):
        assert repr(path) in refusal(path, place / "root")


def test_a_link_out_in_the_middle_of_the_path_is_refused(place):
    (place / "secret/inner").mkdir()
    (place / "root/link").symlink_to(place / "secret")
    refusal("link/inner", place / "root")
    # The kernel follows the link before "..": this is the directory above "secret", not the root.
    refusal("link/../root-of-others/sql", place / "root")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "model-00001.safetensors", "notes.txt"]
)
def test_a_file_of_the_adapter_that_is_a_link_out_is_refused(place, name):
    file = place / "root/sql" / name
    file.unlink(missing_ok=True)
    file.symlink_to(place / "secret/adapter_model.safetensors")
    assert repr(name) in refusal("sql", place / "root")
    file.unlink()
    file.symlink_to("../../secret/not-there")
    assert repr(name) in refusal("sql", place / "root")


def test_links_that_stay_below_the_root_are_followed(place):
    (place / "root/alias").symlink_to("sql")
    file = place / "root/sql/adapter_model.safetensors"
    file.rename(place / "root/blob")
    file.symlink_to("../blob")
    assert confined("tuned", "alias", str(place / "root")) == place / "root/sql"


def test_the_root_may_itself_be_a_link(place):
    (place / "current").symlink_to("root")
    for path in ("sql", str(place / "current/sql"), str(place / "root/sql")):
        assert confined("tuned", path, str(place / "current")) == place / "root/sql"
    refusal("../secret", place / "current")


def test_odd_paths(place):
    (place / "root/loop").symlink_to("loop")
    assert repr("a\0b") in refusal("a\0b", place / "root")
    # Below the root but no directory: the reader says so.
    for path in ("loop", "~", "%2e%2e/secret", "sql/adapter_config.json", "x" * 5000):
        assert os.path.commonpath((confined("tuned", path, str(place / "root")), place / "root")) == str(place / "root")


def test_the_option_reaches_every_process_as_an_absolute_path(place, monkeypatch):
    monkeypatch.setenv(config.ENV, "{}")
    monkeypatch.chdir(place)
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    config.capture(parser.parse_args(["--adapter-root", "root"]))
    monkeypatch.chdir("/")
    assert config.options().adapter_root == str(place / "root")


def test_a_root_that_is_no_directory_is_refused(place, capsys):
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--adapter-root", str(place / "nowhere")])
    assert "--adapter-root" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--adapter-root"):
        config.Options(adapter_root=str(place / "nowhere"))


def test_back_ends_that_would_not_keep_it_are_refused(place, monkeypatch):
    monkeypatch.setenv(config.ENV, "{}")
    config.Options(adapter_root=str(place / "root")).publish()
    options_refused.refuse_unconfined(SimpleNamespace(lora_backend="bdlora"))
    with pytest.raises(SystemExit, match="csgmv"):
        options_refused.refuse_unconfined(SimpleNamespace(lora_backend="csgmv"))
