# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What a source says of its licence arrives; what people wrote into a card or a folder is neither lost nor leaked."""

import ast
import json
import os
import re
from pathlib import Path

import checkpoints
import pytest
from hub_server import Hub, stored
from huggingface_hub import metadata_load
from hypothesis import given
from hypothesis import strategies as st
from reference import reference_model
from test_hub import converter

from conversion.atomic_folder import atomic_folder
from conversion.hub_card import card_for, is_untouched, merged_card, sealed
from conversion.hub_upload import files_to_upload
from conversion.safetensors_files import safe_path
from convert_weights import parse_arguments, run


@pytest.fixture
def source(tmp_path) -> Path:
    model = reference_model()
    return checkpoints.save(tmp_path / "in", checkpoints.apple(model), checkpoints.apple_config(model))


def convert(source: Path, *arguments: str) -> Path:
    output = source.parent / "out"
    run(parse_arguments([str(source), str(output), *arguments]))
    return output


def front_matter(folder: Path) -> dict:
    return metadata_load(folder / "README.md") or {}


def test_a_link_to_the_sources_licence_leads_to_its_copy(source):
    (source / "LICENSE.md").write_text("NON-COMMERCIAL ONLY")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: ./LICENSE.md\n---\n")
    output = convert(source)
    assert front_matter(output)["license_link"] == "WEIGHTS_LICENSE.md"
    assert "other, mine, `WEIGHTS_LICENSE.md`." in (output / "README.md").read_text()
    assert (output / "WEIGHTS_LICENSE.md").read_text() == "NON-COMMERCIAL ONLY"
    again = source.parent / "again"
    run(parse_arguments([str(output), str(again)]))
    assert front_matter(again)["license_link"] == "WEIGHTS_LICENSE.md"
    assert (again / "WEIGHTS_LICENSE.md").read_text() == "NON-COMMERCIAL ONLY"


def test_a_list_of_licences_is_kept(source):
    (source / "README.md").write_text("---\nlicense:\n- cc-by-nc-4.0\n- mit\n---\n")
    output = convert(source)
    assert front_matter(output)["license"] == ["cc-by-nc-4.0", "mit"]
    card = (output / "README.md").read_text()
    assert "cc-by-nc-4.0, mit" in card and "does not state it" not in card


@pytest.mark.parametrize("link", ["javascript:alert(1)", "data:text/html,x", "NOTICE.txt", "../LICENSE", "ftp://h/x"])
def test_links_that_lead_nowhere_are_left_out_and_said(source, link, capsys):
    (source / "README.md").write_text(f"---\nlicense: other\nlicense_link: '{link}'\n---\n")
    output = convert(source)
    assert "license_link" not in front_matter(output)
    assert f"license_link '{link}' leads to no file that is copied: left out" in capsys.readouterr().err


def test_links_to_the_web_are_kept(source):
    (source / "README.md").write_text("---\nlicense: other\nlicense_link: https://example.org/l\n---\n")
    assert front_matter(convert(source))["license_link"] == "https://example.org/l"


def test_licences_go_by_their_names_and_are_texts(source, capsys):
    for name in ("LICENSE", "LICENCE-MODEL.txt", "license.md", "NOTICE", "Copying"):
        (source / name).write_bytes("Ångström © 2026\n".encode("latin-1"))
    for name in (
        "LICENSE.py",
        "LICENSE_config.json",
        "LICENSEconfig.json",
        "LICENSES.zip",
        "MYLICENSE",
        "LICENSE.safetensors",
    ):
        (source / name).write_text("print('no licence')")
    (source / "LICENSE-binary").write_bytes(b"\0ELF")
    with (source / "LICENSE-long.txt").open("wb") as file:
        # Sparse.
        file.truncate(2 << 30)
    output = convert(source)
    found = {path.name for path in output.iterdir() if "WEIGHTS_" in path.name}
    assert found == {f"WEIGHTS_{name}" for name in ("LICENSE", "LICENCE-MODEL.txt", "license.md", "NOTICE", "Copying")}
    error = capsys.readouterr().err
    assert "LICENSE-binary is no text" in error and "LICENSE-long.txt is longer than 1048576 bytes" in error


def test_names_of_tensors_write_no_html_into_the_card(tmp_path):
    model = reference_model()
    evil = "other\n\n<img src=x onerror=alert(1)>\n[x](javascript:y)|`"
    tensors = checkpoints.apple(model, "tower.") | {evil + ".weight": model.rms_norm.weight.data.clone()}
    source = checkpoints.save(tmp_path / "in", tensors, {"vision": checkpoints.apple_config(model)})
    card = (convert(source) / "README.md").read_text()
    assert "<img" not in card and "](javascript" not in card
    (row,) = [line for line in card.splitlines() if line.startswith("| left out of the source |")]
    assert "onerror" in row and row.count("|") == 3


CARD = '---\nlibrary_name: transformers\nlicense: mit\ntags:\n- a\n---\n\n# Mine\n\nmodel_id = "here"\n'


@pytest.mark.parametrize("name", [b"gr\xf6\xdfe", b'a\n"""b'])
def test_a_folder_of_any_name_has_a_card(source, name):
    output = source.parent / os.fsdecode(name)
    run(parse_arguments([str(source), str(output)]))
    stated = re.findall("^model_id = (.*)$", (output / "README.md").read_text("utf-8"), re.MULTILINE)
    assert [ast.literal_eval(text) for text in stated] == [os.fsdecode(name)]


def test_a_card_of_this_tool_is_known_until_it_is_edited():
    card = sealed(CARD)
    assert is_untouched(card) == (True, True) and is_untouched(CARD) == (False, False)
    assert is_untouched(card.replace("\n", "\r\n")) == (True, True)
    assert is_untouched(card.replace("# Mine", "# Yours")) == (True, False)
    assert is_untouched(card.replace("license: mit", "license: other")) == (False, True)
    assert is_untouched(card + "\n## My evaluation\n") == (False, False)
    renamed = card_for(card, "alice/m")
    assert 'model_id = "alice/m"' in renamed and is_untouched(renamed) == (True, True)
    edited = card.replace("# Mine", "# Yours")
    assert is_untouched(card_for(edited, "alice/m")) == (True, False)


@given(text=st.text(), fields=st.dictionaries(st.sampled_from(["license", "extra_gated_prompt", "tags"]), st.text()))
def test_no_card_that_others_wrote_is_changed_but_for_fields_that_it_lacks(text, fields):
    present = f"---\n{json.dumps(fields)}\n---\n{text}"
    merged, kept = merged_card(present, sealed(CARD))
    assert kept and merged.replace("\r\n", "\n").endswith(text.replace("\r\n", "\n"))
    assert merged_card(merged, sealed(CARD))[0] == merged


def test_front_matter_that_is_no_yaml_is_kept():
    present = "---\na: b: c\n---\ntext"
    assert merged_card(present, sealed(CARD)) == (present, True)


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


def test_what_others_wrote_on_the_hub_is_kept(hub, source, tmp_path):
    output = convert(source)
    theirs = b"---\nlicense: other\nextra_gated_prompt: You agree ...\ntags:\n- mine\n---\n# Ours\n"
    hub.add_repo("alice/gated", {"README.md": theirs, "LICENSE": b"MY TERMS"})
    first = converter(hub, tmp_path / "home", output, "--push-to-hub", "alice/gated")
    assert first.returncode == 0, first.stderr
    for name in ("README.md", "LICENSE"):
        assert f"{name} of alice/gated was not written by this tool: its text is kept" in first.stdout
    files = hub.repos["alice/gated"].commit("main").files
    assert files["LICENSE"].data == b"MY TERMS"
    card = files["README.md"].data.decode()
    assert card.endswith("---\n# Ours\n") and "extra_gated_prompt: You agree ..." in card and "license: other" in card
    assert "library_name: transformers" in card and "- mine" in card and "- aimv2" in card
    replaced = converter(hub, tmp_path / "home", output, "--push-to-hub", "alice/gated", "--overwrite-card")
    assert replaced.returncode == 0, replaced.stderr
    files = hub.repos["alice/gated"].commit("main").files
    assert b"MY TERMS" not in files["LICENSE"].data and b"extra_gated" not in files["README.md"].data


def test_a_second_upload_replaces_its_own_card_and_keeps_edits(hub, source, tmp_path):
    output = convert(source)
    for _ in range(2):
        result = converter(hub, tmp_path / "home", output, "--push-to-hub", "alice/m")
        assert result.returncode == 0 and "is kept" not in result.stdout, result.stderr
    repo = hub.repos["alice/m"]
    assert len(repo.commits) == 2, "nothing changed"
    files = dict(repo.commit("main").files)
    edited = files["README.md"].data + b"\n## My evaluation\n"
    repo.add("main", "edited on the Hub", {**files, "README.md": stored("README.md", edited)})
    run(parse_arguments([str(source), str(output), "--dtype", "bfloat16", "--overwrite"]))
    result = converter(hub, tmp_path / "home", output, "--push-to-hub", "alice/m")
    assert result.returncode == 0 and "README.md of alice/m was not written by this tool" in result.stdout
    assert repo.commit("main").files["README.md"].data == edited


def test_only_what_the_converter_writes_is_uploaded(hub, source, tmp_path):
    output = convert(source)
    (tmp_path / "key").write_text("PRIVATE")
    (output / "notes.txt").write_text("stray")
    (output / ".env").write_text("TOKEN=secret")
    (output / "linked.json").symlink_to(tmp_path / "key")
    (output / "more").mkdir()
    (output / "more" / "config.json").write_text("{}")
    result = converter(hub, tmp_path / "home", output, "--push-to-hub", "alice/m")
    assert result.returncode == 0, result.stderr
    uploaded = hub.repos["alice/m"].commit("main").files
    assert not {"notes.txt", ".env", "linked.json", "more/config.json"} & uploaded.keys()
    assert not any(b"PRIVATE" in file.data or b"secret" in file.data for file in uploaded.values())
    assert (
        "Not uploaded, because the converter does not write it: .env, linked.json, more/config.json, notes.txt"
        in result.stdout
    )


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "modeling_aimv2_packing.py"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_are_not_uploaded(source, tmp_path, name, kind):
    output = convert(source)
    if kind == "link":
        (output / name).rename(tmp_path / "elsewhere")
        (output / name).symlink_to(tmp_path / "elsewhere")
    else:
        (output / name).unlink()
        os.mkfifo(output / name)
    with pytest.raises(ValueError, match=f"{re.escape(name)} is a link or no file.*Nothing was uploaded"):
        files_to_upload(output)


def test_code_of_another_version_is_not_uploaded_in_part(source):
    output = convert(source)
    (output / "inference_aimv2_packing.py").write_text("")
    with pytest.raises(ValueError, match=r"does not write \(inference_aimv2_packing\.py\): convert the source again"):
        files_to_upload(output)


def test_a_repo_of_the_hubs_cache_is_uploaded_through_its_links(hub, source, tmp_path):
    output = convert(source)
    hub.add_repo("alice/a", {path.name: path.read_bytes() for path in output.iterdir()})
    result = converter(hub, tmp_path / "home", "alice/a", "--push-to-hub", "alice/b")
    assert result.returncode == 0, result.stderr
    assert hub.repos["alice/b"].commit("main").files.keys() >= {path.name for path in output.iterdir()}


@pytest.mark.parametrize("parent", ["snapshots", "models--a--b/snapshots"])
def test_a_folder_called_snapshots_is_no_leave_to_go_anywhere(tmp_path, parent):
    folder = tmp_path / parent / "0123"
    folder.mkdir(parents=True)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for place in (tmp_path, blobs, folder.parent):
        (place / "key").write_text("{}")
    for name, target in (("a", tmp_path / "key"), ("b", folder.parent / "key"), ("c", blobs / "key")):
        (folder / name).symlink_to(target)
    for name in ("a", "b", "c"):
        if name == "c" and "models--" in parent:
            assert safe_path(folder, name).read_text() == "{}"
        else:
            with pytest.raises(ValueError, match="leads out of"):
                safe_path(folder, name)
    blobs.rename(tmp_path / "real")
    blobs.symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match="leads out of"):
        safe_path(folder, "c")


@pytest.mark.parametrize("name", [".out.partial", ".out.previous"])
def test_links_beside_the_output_are_left_alone(tmp_path, name):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=f"{re.escape(name)} is a link"), atomic_folder(tmp_path / "out", True):
        pass
    assert (tmp_path / "precious" / "file").read_text() == "kept"
    assert (tmp_path / name).is_symlink() and not (tmp_path / "out").exists()


def test_a_source_of_an_earlier_download_is_converted_offline(hub, source, tmp_path):
    (source / "LICENSE").write_text("terms")
    hub.add_repo("alice/src", {path.name: path.read_bytes() for path in source.iterdir()})
    hub.add_repo("alice/never", {})
    offline = "import os; os.environ['HF_HUB_OFFLINE'] = '1'"
    online = converter(hub, tmp_path / "home", "alice/src", tmp_path / "online")
    assert online.returncode == 0, online.stderr
    cached = converter(hub, tmp_path / "home", "alice/src", tmp_path / "offline", setup=offline)
    assert cached.returncode == 0, cached.stderr
    assert "warning: the Hub is out of reach: alice/src is what an earlier download holds" in cached.stderr
    for path in (tmp_path / "online").iterdir():
        # But for the name of the folder in the card's example.
        expected = path.read_text().replace("online", "offline") if path.name == "README.md" else path.read_bytes()
        found = tmp_path / "offline" / path.name
        if path.name == "README.md":
            without_seal = [re.sub(r"<!-- convert_weights.*-->", "", text) for text in (expected, found.read_text())]
            assert without_seal[0] == without_seal[1]
        else:
            assert found.read_bytes() == expected
    never = converter(hub, tmp_path / "home", "alice/never", tmp_path / "x", setup=offline)
    assert never.returncode == 1 and "cannot be reached" in never.stderr and never.stderr.count("\n") == 1


def test_passwords_in_the_endpoint_are_not_printed(hub, tmp_path):
    unreachable = hub.url.replace("http://", "http://alice:hunter2@").rpartition(":")[0] + ":1"
    setup = f"import os; os.environ['HF_ENDPOINT'] = {unreachable!r}"
    result = converter(hub, tmp_path / "home", "alice/m", tmp_path / "x", setup=setup)
    assert result.returncode == 1 and "cannot be reached" in result.stderr and "hunter2" not in result.stderr
