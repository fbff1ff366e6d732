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

import checkpoints
import pytest
import torch
from hub_server import Hub, stored
from reference import REPO, pack, packing_model, random_images, reference_model
from safetensors.torch import load_file, save_file


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


def client(hub: Hub, home: Path, *command: str, token: str = "hf_alice") -> subprocess.CompletedProcess:
    """Runs Python with `command` as a user of `hub` whose caches are in `home`."""
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
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def script(hub: Hub, home: Path, code: str, token: str = "hf_alice") -> str:
    result = client(hub, home, "-c", textwrap.dedent(code), token=token)
    assert result.returncode == 0, result.stderr
    return result.stdout


def converter(hub: Hub, home: Path, *arguments: object, token: str = "hf_alice") -> subprocess.CompletedProcess:
    return client(hub, home, str(REPO / "convert_weights.py"), *map(str, arguments), token=token)


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
    from transformers import AutoImageProcessor, AutoModel

    batch = load_file({inputs!r})
    expected, pooled = batch.pop("expected"), batch.pop("pooled")
    for revision in {revisions!r}:
        model = AutoModel.from_pretrained({repo!r}, revision=revision, trust_remote_code=True)
        assert type(model).__name__ == "Aimv2PackingModel"
        with torch.no_grad():
            output = model(**batch)
        torch.testing.assert_close(output.last_hidden_state, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.pooler_output, pooled, rtol=0, atol=1e-5)
        processor = AutoImageProcessor.from_pretrained({repo!r}, revision=revision, trust_remote_code=True)
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
    code = LOAD.format(inputs=str(inputs), repo="alice/aimv2", revisions=["packed/v1", "v1.0", repo.commits[1].oid])
    assert "loaded" in script(hub, tmp_path / "b", code)
    assert hub.drop_downloads == 0

    for token in ("hf_wrong", "hf_bob", ""):
        result = client(hub, tmp_path / token / "c", "-c", textwrap.dedent(code), token=token)
        assert result.returncode != 0
        assert "alice/aimv2" in result.stderr
        assert not list((tmp_path / token / "c").rglob("*.safetensors"))


def test_interrupted_upload_and_rerun(hub, tmp_path, source, inputs):
    output = tmp_path / "out"
    assert converter(hub, tmp_path / "a", source, output, "--max-shard-size", "200KB").returncode == 0
    shards = sorted(output.glob("*.safetensors"))
    # More than the client and the converter try in one call.
    hub.drop_uploads = 1000
    arguments = ["convert_weights.py", str(output), "--push-to-hub", "alice/aimv2"]
    code = f"""
        import runpy, sys, time

        # The waits between attempts are too long for a test.
        time.sleep = lambda seconds: None
        sys.argv = {arguments!r}
        runpy.run_path({str(REPO / "convert_weights.py")!r}, run_name="__main__")
        """
    first = client(hub, tmp_path / "a", "-c", textwrap.dedent(code))
    assert first.returncode == 1
    assert "continuing, attempt 2" in first.stdout
    assert "the connection broke" in first.stderr and "Run the same command again" in first.stderr
    assert "Traceback" not in first.stderr
    assert len(hub.repos["alice/aimv2"].commits) == 1, "an upload that is not complete must not show"

    hub.drop_uploads = 0
    hub.objects[hashlib.sha256(shards[0].read_bytes()).hexdigest()] = shards[0].read_bytes()
    hub.fail_commits = 1
    second = converter(hub, tmp_path / "a", output, "--push-to-hub", "alice/aimv2")
    assert second.returncode == 0, second.stderr
    expected = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in shards[1:])
    assert sorted(hub.uploads) == expected, "only what is missing goes up"
    assert len(hub.repos["alice/aimv2"].commits) == 2

    third = converter(hub, tmp_path / "a", output, "--push-to-hub", "alice/aimv2")
    assert third.returncode == 0, third.stderr
    assert sorted(hub.uploads) == expected
    assert len(hub.repos["alice/aimv2"].commits) == 2, "nothing changed, nothing is committed"

    # Other shards take the place of these.
    assert converter(hub, tmp_path / "a", source, output, "--overwrite", "--push-to-hub", "alice/aimv2").returncode == 0
    names = hub.repos["alice/aimv2"].commits[-1].files
    assert [name for name in names if name.startswith("model") and "py" not in name] == ["model.safetensors"]
    code = LOAD.format(inputs=str(inputs), repo="alice/aimv2", revisions=["main"])
    assert "loaded" in script(hub, tmp_path / "b", code)


def test_what_the_hub_refuses_is_said_plainly(hub, tmp_path, source):
    output = tmp_path / "out"
    assert converter(hub, tmp_path / "a", source, output).returncode == 0
    hub.add_repo("alice/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    hub.add_repo("alice/public", {".gitattributes": b""})
    printed = script(
        hub,
        tmp_path / "a",
        f"""
        import os
        from pathlib import Path
        from hub_upload import push_to_hub

        for token, repo_id, private in (
            ("hf_wrong", "alice/x", False),
            ("", "alice/x", False),
            ("hf_bob", "alice/x", False),
            ("hf_alice", "alice/llama", False),
            ("hf_alice", "alice/public", True),
            ("hf_alice", "no spaces please", False),
        ):
            os.environ["HF_TOKEN"] = token
            try:
                push_to_hub(Path({str(output)!r}), repo_id, private)
            except ValueError as error:
                print("|", " ".join(str(error).split()))
            else:
                print("| no error")
        """,
    )
    wrong, none, forbidden, taken, public, invalid = printed.split("|")[1:]
    assert "the token is wrong or has expired" in wrong and "hf auth login" in wrong
    assert "hf auth login" in none
    assert "the token does not allow to write there" in forbidden and "don't have the rights" in forbidden
    assert "The name alice/llama is taken by a repo that is no packed AIMv2 model (model_type 'llama')" in taken
    assert "alice/public exists and is public, but --private was asked for: nothing was uploaded" in public
    assert "no spaces please" in invalid
    assert hub.uploads == []

    hub.full = True
    full = converter(hub, tmp_path / "a", output, "--push-to-hub", "alice/x")
    assert full.returncode == 1
    assert "storage is full" in full.stderr and "storage limit reached, please upgrade your plan" in full.stderr
    assert "Traceback" not in full.stderr


def test_push_to_hub_of_a_loaded_model_and_processor(hub, tmp_path, source, inputs):
    output = tmp_path / "out"
    assert converter(hub, tmp_path / "a", source, output).returncode == 0
    script(
        hub,
        tmp_path / "a",
        f"""
        from transformers import AutoImageProcessor, AutoModel

        AutoModel.from_pretrained({str(output)!r}, trust_remote_code=True).push_to_hub("alice/copy")
        AutoImageProcessor.from_pretrained({str(output)!r}, trust_remote_code=True).push_to_hub("alice/copy")
        """,
    )
    code = LOAD.format(inputs=str(inputs), repo="alice/copy", revisions=["main"])
    assert "loaded" in script(hub, tmp_path / "b", code)


def test_source_on_the_hub(hub, tmp_path, model, source):
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

    pickled = converter(hub, tmp_path / "a", "apple/aimv2-tiny", tmp_path / "out2")
    assert pickled.returncode == 1 and "pickle (pytorch_model.bin)" in pickled.stderr
    missing = converter(hub, tmp_path / "a", "apple/nothing", tmp_path / "out2")
    assert missing.returncode == 1 and "apple/nothing" in missing.stderr and "Traceback" not in missing.stderr


def test_verifying_a_repo_on_the_hub_does_not_run_its_code(hub, tmp_path, source):
    output = tmp_path / "out"
    assert converter(hub, tmp_path / "a", source, output).returncode == 0
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    hub.add_repo("alice/good", files)
    trap = b"raise SystemExit('the code of the repo was run')"
    hub.add_repo("alice/trap", files | {path: trap for path in files if path.endswith(".py")})
    good = converter(hub, tmp_path / "b", "alice/good", "--verify", "--reference", source)
    assert good.returncode == 0, good.stderr
    assert "Weights: equal, bit by bit." in good.stdout and "Note: the code" not in good.stdout
    trapped = converter(hub, tmp_path / "b", "alice/trap", "--verify")
    assert trapped.returncode == 0, trapped.stderr
    assert "is not this version's, which is compared instead" in trapped.stdout
