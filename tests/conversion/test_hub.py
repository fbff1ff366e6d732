# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The road to the Hub and back, with the real clients against a loopback Hub. They read their settings when they are
imported, so each step runs in a process of its own with a fresh cache.
"""

import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import pytest
import torch
from hub_server import Hub, stored
from reference import REPO, pack, packing_model, random_images, reference_model
from safetensors.torch import load_file, save_file

from convert_weights import parse_arguments, run


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


def client(hub: Hub, home: Path, code: str, *arguments: object, token: str = "hf_alice") -> subprocess.CompletedProcess:
    """Runs Python code as a user of `hub` whose caches are in `home`."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPO),
    }
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def converter(hub: Hub, home: Path, *arguments: object, setup: str = "pass") -> subprocess.CompletedProcess:
    """Runs `convert_weights.py` with these arguments, after `setup`."""
    code = f"import runpy; {setup}; runpy.run_path({str(REPO / 'convert_weights.py')!r}, run_name='__main__')"
    return client(hub, home, code, *arguments)


def convert(source: Path, output: Path, *arguments: str) -> Path:
    run(parse_arguments([str(source), str(output), *arguments]))
    return output


@pytest.fixture
def model():
    return reference_model(is_native=False, use_head=True)


@pytest.fixture
def source(tmp_path, model) -> Path:
    return checkpoints.save(tmp_path / "source", checkpoints.apple(model), checkpoints.apple_config(model))


@pytest.fixture
def inputs(tmp_path, model) -> Path:
    """Inputs with the outputs of the packed model, made without any Hub."""
    batch = pack(random_images([(4, 4), (3, 5)]))
    with torch.no_grad():
        output = packing_model(model)(**batch)
    save_file(batch | {"expected": output.last_hidden_state, "pooled": output.pooler_output}, tmp_path / "inputs")
    return tmp_path / "inputs"


LOAD = """
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoProcessor

    batch = load_file({inputs!r})
    expected, pooled = batch.pop("expected"), batch.pop("pooled")
    for revision in {revisions!r}:
        model = AutoModel.from_pretrained({repo!r}, revision=revision, trust_remote_code=True)
        assert type(model).__name__ == "Aimv2PackingAcceleratedModel"
        with torch.no_grad():
            output = model(**batch)
        torch.testing.assert_close(output.last_hidden_state, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.pooler_output, pooled, rtol=0, atol=1e-5)
        processor = AutoProcessor.from_pretrained({repo!r}, revision=revision, trust_remote_code=True)
        grid = processor(Image.new("RGB", (80, 60)), return_tensors="pt")["grid_thw"]
        assert grid.tolist() == [[1, 4, 4]], grid
    print("loaded")
"""


def test_private_upload_and_pinned_download(hub, tmp_path, source, inputs):
    result = converter(
        hub, tmp_path / "a", source, tmp_path / "out", "--max-shard-size", "200KB",
        "--push-to-hub", "alice/aimv2", "--private", "--hub-revision", "packed/v1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"Uploaded to {hub.url}/alice/aimv2/tree/packed/v1" in result.stdout
    repo = hub.repos["alice/aimv2"]
    assert repo.private
    assert [commit.title for commit in repo.commits] == ["initial commit", "Upload packed AIMv2"]
    assert repo.refs["main"] == repo.commits[0].oid and repo.refs["packed/v1"] == repo.commits[1].oid
    uploaded = repo.commits[1].files
    for path in (tmp_path / "out").iterdir():
        assert uploaded[path.name].data == path.read_bytes(), path.name
    assert len([name for name in uploaded if name.endswith(".safetensors")]) > 2
    assert 'model_id = "alice/aimv2"' in uploaded["README.md"].data.decode()

    # A download that is cut off is resumed; branch, tag and commit lead to the same.
    repo.tags["v1.0"] = repo.commits[1].oid
    hub.drop_downloads = 2
    revisions = ["packed/v1", "v1.0", repo.commits[1].oid]
    loaded = client(hub, tmp_path / "b", LOAD.format(inputs=str(inputs), repo="alice/aimv2", revisions=revisions))
    assert "loaded" in loaded.stdout, loaded.stderr
    assert hub.drop_downloads == 0

    strangers = client(
        hub,
        tmp_path / "c",
        """
        from transformers import AutoModel

        for token in ("hf_wrong", "hf_bob", False):
            try:
                AutoModel.from_pretrained("alice/aimv2", revision="packed/v1", trust_remote_code=True, token=token)
            except OSError as error:
                print("refused", "alice/aimv2" in str(error))
        """,
    )
    assert strangers.stdout.split() == ["refused", "True"] * 3, strangers.stderr
    assert not list((tmp_path / "c").rglob("*.safetensors"))


def test_interrupted_upload_and_rerun(hub, tmp_path, source):
    output = convert(source, tmp_path / "out", "--max-shard-size", "200KB")
    single = convert(source, tmp_path / "single")
    shards = sorted(output.glob("*.safetensors"))
    # More than the client and the converter try in one call, without their waits.
    hub.drop_uploads = 1000
    no_waits = "import time; time.sleep = lambda seconds: None"
    first = converter(hub, tmp_path / "a", output, "--push-to-hub", "alice/aimv2", setup=no_waits)
    assert first.returncode == 1
    assert "continuing, attempt 2" in first.stdout
    assert "the connection broke" in first.stderr and "Run the same command again" in first.stderr
    assert "Traceback" not in first.stderr
    assert len(hub.repos["alice/aimv2"].commits) == 1, "an upload that is not complete must not show"

    hub.drop_uploads = 0
    hub.objects[hashlib.sha256(shards[0].read_bytes()).hexdigest()] = shards[0].read_bytes()
    hub.fail_commits = 1
    second = client(
        hub,
        tmp_path / "a",
        """
        import sys
        from pathlib import Path
        from conversion.hub_upload import push_to_hub

        for folder in sys.argv[1:]:
            push_to_hub(Path(folder), "alice/aimv2")
        """,
        output,
        output,
        single,
    )
    assert second.returncode == 0, second.stderr
    assert "attempt 2" in second.stdout
    expected = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (*shards[1:], single / "model.safetensors")}
    assert len(hub.uploads) == len(expected) and set(hub.uploads) == expected, "only what is missing goes up"
    commits = hub.repos["alice/aimv2"].commits
    assert len(commits) == 3, "where nothing changed, nothing is committed"
    assert sorted(shard.name for shard in shards) == [x for x in sorted(commits[1].files) if x.endswith(".safetensors")]
    assert [x for x in commits[2].files if "safetensors" in x] == ["model.safetensors"], "other shards are gone"


def test_same_command_again_after_a_broken_upload(hub, tmp_path, source):
    command = [source, tmp_path / "out", "--dtype", "bfloat16", "--push-to-hub", "alice/aimv2"]
    no_waits = "import time; time.sleep = lambda seconds: None"
    hub.drop_uploads = 1000
    first = converter(hub, tmp_path / "a", *command, setup=no_waits)
    assert first.returncode == 1 and "Run the same command again" in first.stderr
    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    hub.drop_uploads = 0
    second = converter(hub, tmp_path / "a", *command, setup=no_waits)
    assert second.returncode == 0, second.stderr
    assert "out already holds this conversion" in second.stdout
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written
    assert "model.safetensors" in hub.repos["alice/aimv2"].commits[1].files


def test_another_conversion_is_not_uploaded_in_place_of_this(tmp_path, source, monkeypatch):
    monkeypatch.setattr("convert_weights.push_to_hub", None)
    convert(source, tmp_path / "out")
    other = reference_model(is_native=False, use_head=True)
    other.rms_norm.weight.data[5] += 1
    checkpoints.save(tmp_path / "other", checkpoints.apple(other), checkpoints.apple_config(other))
    config = checkpoints.apple_config(other) | {"rms_norm_eps": 1e-3}
    checkpoints.save(tmp_path / "eps", checkpoints.apple(reference_model(is_native=False, use_head=True)), config)
    for changed, *arguments in ((source, "--dtype", "bfloat16"), (tmp_path / "other",), (tmp_path / "eps",)):
        with pytest.raises(FileExistsError, match="exists and is another conversion"):
            convert(changed, tmp_path / "out", *arguments, "--push-to-hub", "alice/aimv2")


COMMANDS = """
    import os
    import sys
    from convert_weights import main

    for token, *arguments in {commands!r}:
        os.environ["HF_TOKEN"] = token
        sys.argv = ["convert_weights.py", *arguments]
        print("-----", file=sys.stderr)
        print("-----", main())
"""


def test_what_keeps_a_source_away_is_one_line_with_what_next(hub, tmp_path, source):
    output = convert(source, tmp_path / "out")
    hub.add_repo("alice/secret", {path.name: path.read_bytes() for path in output.iterdir()}, private=True)
    nobody = SimpleNamespace(url=hub.url.rpartition(":")[0] + ":1")
    results = []
    for server, home, commands in (
        (
            hub,
            "a",
            [
                ("hf_bob", "alice/secret", "x"),
                ("", "alice/secret", "x"),
                ("hf_alice", "alice/nosuch", "x"),
                ("hf_alice", "alice/secret", "x", "--revision", "v9"),
            ],
        ),
        (nobody, "b", [("hf_alice", "alice/secret", "--verify-code"), ("hf_alice", "alice/secret", "x")]),
    ):
        result = client(server, tmp_path / home, COMMANDS.format(commands=commands))
        results += result.stderr.split("-----\n")[1:]
        assert result.stdout.split() == ["-----", "1"] * len(commands), result.stderr
    for error, expected in zip(
        results,
        (
            "no repo on the Hub that is open to you. Check the name",
            "log in with `hf auth login`, or set HF_TOKEN",
            "alice/nosuch is no local path, and no repo on the Hub that is open to you",
            "alice/secret on the Hub has no branch, tag or commit 'v9'",
            f"the Hub at {nobody.url} cannot be reached",
            "Check the connection, or give the path",
        ),
        strict=True,
    ):
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert expected in error


def test_what_the_hub_refuses_is_said_plainly(hub, tmp_path, source):
    output = convert(source, tmp_path / "out")
    hub.add_repo("alice/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    hub.add_repo("alice/public", {".gitattributes": b""})
    hub.full = {"carol"}
    result = client(
        hub,
        tmp_path / "a",
        """
        import os
        import sys
        from pathlib import Path
        from conversion.hub_upload import push_to_hub

        for token, repo_id, private in (
            ("hf_wrong", "alice/x", False),
            ("", "alice/x", False),
            ("hf_bob", "alice/x", False),
            ("hf_alice", "alice/llama", False),
            ("hf_alice", "alice/public", True),
            ("hf_alice", "no spaces please", False),
            ("hf_carol", "carol/x", False),
        ):
            os.environ["HF_TOKEN"] = token
            try:
                push_to_hub(Path(sys.argv[1]), repo_id, private)
            except ValueError as error:
                print("|", " ".join(str(error).split()))
            else:
                print("| no error")
        """,
        output,
    )
    assert result.returncode == 0, result.stderr
    wrong, none, forbidden, taken, public, invalid, full = result.stdout.split("|")[1:]
    assert "the token is wrong or has expired" in wrong and "hf auth login" in wrong
    assert "hf auth login" in none
    assert "the token does not allow to write there" in forbidden and "don't have the rights" in forbidden
    assert "The name alice/llama is taken by a repo that is no packed AIMv2 model (model_type 'llama')" in taken
    assert "alice/public exists and is public, but --private was asked for: nothing was uploaded" in public
    assert "no spaces please" in invalid
    assert "storage is full" in full and "storage limit reached, please upgrade your plan" in full
    assert hub.uploads == []


def test_push_to_hub_of_a_loaded_model_and_processor(hub, tmp_path, source, inputs):
    pushed = client(
        hub,
        tmp_path / "a",
        """
        import sys
        from transformers import AutoModel, AutoProcessor

        AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).push_to_hub("alice/copy")
        AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True).push_to_hub("alice/copy")
        """,
        convert(source, tmp_path / "out"),
    )
    assert pushed.returncode == 0, pushed.stderr
    loaded = client(hub, tmp_path / "b", LOAD.format(inputs=str(inputs), repo="alice/copy", revisions=["main"]))
    assert "loaded" in loaded.stdout, loaded.stderr


def test_source_on_the_hub(hub, tmp_path, model):
    checkpoints.save(tmp_path / "shards", checkpoints.apple(model), checkpoints.apple_config(model), shards=2)
    files = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    files |= {
        "README.md": b"---\nlicense: apple-amlr\n---\n# AIMv2\n",
        "LICENSE": b"licence text",
        "flax_model.msgpack": b"not wanted",
        "modeling_aimv2.py": b"raise SystemExit('the code of the source was run')",
    }
    repo = hub.add_repo("apple/aimv2-tiny", {"pytorch_model.bin": b"pickle"})
    commit = repo.add("original", "the weights", {path: stored(path, data) for path, data in files.items()})
    output = tmp_path / "out"
    result = converter(hub, tmp_path / "a", "apple/aimv2-tiny", output, "--revision", "original", "--verify")
    assert result.returncode == 0, result.stderr
    assert "Weights: equal, bit by bit." in result.stdout and "Verdict: passed." in result.stdout
    for name, tensor in load_file(output / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    card = (output / "README.md").read_text()
    assert "base_model: apple/aimv2-tiny" in card and "license: apple-amlr" in card
    assert f"apple/aimv2-tiny at revision {commit.oid}" in card
    assert (output / "WEIGHTS_LICENSE").read_text() == "licence text"
    assert not list((tmp_path / "a").rglob("*.msgpack")) and not list((tmp_path / "a").rglob("modeling_aimv2.py"))

    refused = client(
        hub,
        tmp_path / "a",
        """
        from conversion.sources import read_source

        for source in ("apple/aimv2-tiny", "apple/nothing"):
            try:
                read_source(source)
            except (OSError, ValueError) as error:
                print("|", error)
        """,
    )
    pickled, missing = refused.stdout.split("|")[1:]
    assert "pickle (pytorch_model.bin)" in pickled
    assert "apple/nothing" in missing


def test_verifying_a_repo_on_the_hub_does_not_run_its_code(hub, tmp_path, source):
    output = convert(source, tmp_path / "out")
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    hub.add_repo("alice/good", files)
    trap = b"raise SystemExit('the code of the repo was run')"
    hub.add_repo("alice/trap", files | {path: trap for path in files if path.endswith(".py")} | {"more.py": trap})
    commands = [
        ("hf_alice", "alice/good", "--verify-code"),
        ("hf_alice", "alice/trap", "--verify-code"),
        ("hf_alice", "alice/good", "--verify", "--reference", str(source)),
        ("hf_alice", "alice/trap", "--verify"),
    ]
    downloaded = "print('weights:', list(__import__('pathlib').Path(os.environ['HF_HOME']).rglob('*.safetensors')))"
    watched = COMMANDS.replace('print("-----", main())', f'print("-----", main()); {downloaded}')
    result = client(hub, tmp_path / "b", watched.format(commands=commands))
    good_code, trap_code, good, trapped, end = result.stdout.split("-----")
    assert "Code: equal to this tree's" in good_code
    assert trap_code.startswith(" 0\nweights: []"), "only code and configurations are downloaded"
    assert "  modeling_aimv2_packing.py differs\n" in trap_code and "  more.py is not in this tree\n" in trap_code
    assert good.startswith(" 1\nweights: []") and "The code of alice/trap is not this tree's" in result.stderr
    assert "Weights: equal, bit by bit." in good and "Code: equal to this tree's" in good
    commit = hub.repos["alice/good"].commits[0].oid
    assert f"Compared: commit {commit}. It is the one to pin: revision='{commit}'.\n" in good_code
    assert trapped.startswith(" 0") and "Code: NOT this tree's" in trapped and "Verdict: FAILED." in trapped
    assert "  modeling_aimv2_packing.py differs\n" in trapped and end.startswith(" 1")
