"""The stages of `extract_features.py` without Ray: every kind of input, and what each refuses."""

import gzip
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from PIL import Image
from reference import REPO
from scaling import make_model_repo
from transformers import AutoModel, AutoProcessor


pytest.importorskip("ray", reason="needs requirements-scale.txt")

sys.path.append(str(REPO))
import extract_features
from extract_features import DoneIds, Encoder, Preprocessor, Settings, count_rows, list_input, read, run


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return make_model_repo(tmp_path_factory.mktemp("models") / "tiny", use_head=True)


@pytest.fixture(autouse=True)
def in_code_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray puts the workers."""
    monkeypatch.chdir(REPO)


def png(height: int, width: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


IMAGES = {f"{index}.png": png(30 + 40 * index, 250 - 35 * index, index) for index in range(5)}


def settings_of(repo: Path, source: Path, **changes) -> Settings:
    fields = {
        "image_column": "image",
        "id_column": None,
        "pooling": "mean",
        "dtype": "float32",
        "patch_features": None,
    }
    return Settings(model=str(repo), input=str(source), **{**fields, **changes})


def rows_of(settings: Settings, done: tuple[str, ...] = (), budget: int = 4096) -> dict[str, dict]:
    kind, files = list_input(settings.input)
    table = pa.table({"path": [path.encode() for path, _ in files], "name": [name for _, name in files]})
    preprocess, encode = Preprocessor(settings), Encoder(settings, budget, 1)
    rows = [
        row
        for images in read(table, kind, settings, DoneIds(done))
        for patches in preprocess(images)
        for features in encode(patches)
        for row in features.to_pylist()
    ]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def features_of(repo: Path, image: bytes, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The reference: transformers' own loading, one image alone; `(t, h, w, hidden_size)`."""
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    model = AutoModel.from_pretrained(repo, trust_remote_code=True, dtype=dtype).eval()
    inputs = processor(Image.open(io.BytesIO(image)), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).last_hidden_state.unflatten(0, inputs["grid_thw"][0].tolist())


def assert_is_mean(row: dict, features: torch.Tensor) -> None:
    assert row["error"] is None and row["grid_thw"] == list(features.shape[:3])
    torch.testing.assert_close(torch.tensor(row["embedding"]), features.mean((0, 1, 2)), rtol=0, atol=1e-5)


def archive_of(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def test_archives_give_their_images_and_broken_ones_an_error(repo: Path, tmp_path: Path) -> None:
    members = [*IMAGES.items(), ("0.txt", b"caption"), ("0.png", IMAGES["1.png"]), ("bad.jpg", b"no image")]
    (tmp_path / "part").mkdir()
    whole = archive_of(members)
    (tmp_path / "part/a.tar").write_bytes(whole)
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(archive_of(members[:1])))
    (tmp_path / "c.tar").write_bytes(whole[: whole.index(IMAGES["1.png"]) + 10])
    (tmp_path / "d.tar").write_bytes(b"no archive" * 100)

    rows = rows_of(settings_of(repo, tmp_path))
    expected = {f"part/a.tar/{name}": data for name, data in IMAGES.items()}
    expected |= {
        "part/a.tar/0.png#2": IMAGES["1.png"],
        "b.tar.gz/0.png": IMAGES["0.png"],
        "c.tar/0.png": IMAGES["0.png"],
    }
    for name, data in expected.items():
        assert_is_mean(rows.pop(name), features_of(repo, data))
    assert "cannot identify" in rows.pop("part/a.tar/bad.jpg")["error"]
    assert "unexpected end of data" in rows.pop("c.tar/1.png")["error"]
    assert "ReadError" in rows.pop("d.tar")["error"]
    assert set(rows) <= {"c.tar"}


@pytest.mark.parametrize("with_paths", [False, True])
def test_parquet_rows_are_images(repo: Path, tmp_path: Path, with_paths: bool) -> None:
    values = [*IMAGES.values(), b"no image", None]
    column = [{"bytes": value, "path": None} for value in values] if with_paths else values
    keys = list(range(100, 100 + len(values)))
    pq.write_table(pa.table({"image": column, "key": keys}), tmp_path / "a.parquet", row_group_size=3)

    for id_column, ids in ((None, [f"a.parquet#{row}" for row in range(len(values))]), ("key", list(map(str, keys)))):
        settings = settings_of(repo, tmp_path, id_column=id_column)
        rows = rows_of(settings)
        assert set(rows) == set(ids)
        for id_, data in zip(ids, IMAGES.values(), strict=False):
            assert_is_mean(rows[id_], features_of(repo, data))
        assert "cannot identify" in rows[ids[5]]["error"] and "NoneType" in rows[ids[6]]["error"]
        assert set(rows_of(settings, done=tuple(ids[:4]))) == set(ids[4:])


def test_parquet_without_the_columns_is_refused(repo: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"picture": [b""] * 3, "same": [1, 2, 1], "missing": [1, 2, None]}), file)
    fs = extract_features.fsspec.filesystem("file")
    with pytest.raises(ValueError, match="must have a column 'image', got"):
        count_rows(fs, [str(file)], settings_of(repo, tmp_path))
    for column in ("same", "missing"):
        with pytest.raises(ValueError, match="must hold a different value in each row"):
            count_rows(fs, [str(file)], settings_of(repo, tmp_path, image_column="picture", id_column=column))
    assert count_rows(fs, [str(file)], settings_of(repo, tmp_path, image_column="picture")) == 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_patch_features_are_those_of_the_model(repo: Path, tmp_path: Path, dtype: str) -> None:
    for name, data in IMAGES.items():
        (tmp_path / name).write_bytes(data)
    rows = rows_of(settings_of(repo, tmp_path, patch_features=dtype))
    for name, data in IMAGES.items():
        stored = torch.frombuffer(bytearray(rows[name]["patch_features"]), dtype=getattr(torch, dtype))
        expected = features_of(repo, data)
        actual = stored.view(*rows[name]["grid_thw"], -1).float()
        precision = torch.finfo(getattr(torch, dtype)).eps
        torch.testing.assert_close(actual, expected, rtol=precision, atol=1e-5)


def test_features_do_not_depend_on_the_packing(repo: Path, tmp_path: Path) -> None:
    for name, data in IMAGES.items():
        (tmp_path / name).write_bytes(data)
    settings = settings_of(repo, tmp_path, pooling="head")
    alone, together = rows_of(settings, budget=200), rows_of(settings, budget=10**6)
    assert alone.keys() == together.keys() == IMAGES.keys()
    for name, row in alone.items():
        np.testing.assert_allclose(row["embedding"], together[name]["embedding"], rtol=0, atol=1e-5)


def test_bfloat16_model_sees_what_its_processor_gives(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(IMAGES["0.png"])
    rows = rows_of(settings_of(repo, tmp_path, dtype="bfloat16", patch_features="bfloat16"))
    stored = torch.frombuffer(bytearray(rows["0.png"]["patch_features"]), dtype=torch.bfloat16)
    expected = features_of(repo, IMAGES["0.png"], torch.bfloat16)
    torch.testing.assert_close(stored.view_as(expected), expected, rtol=0, atol=0)


def test_unreadable_file_and_odd_names(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    odd = tmp_path / "caf\udce9 \n.png"
    odd.write_bytes(IMAGES["0.png"])
    settings = settings_of(repo, tmp_path)
    files = [(str(tmp_path / "gone.png"), "gone.png"), (str(odd), extract_features.printable(odd.name))]
    table = pa.table({"path": [extract_features.os.fsencode(path) for path, _ in files], "name": [n for _, n in files]})
    rows = [row for part in read(table, "image", settings, DoneIds([])) for row in part.to_pylist()]
    assert [row["id"] for row in rows] == ["gone.png", "caf\\xe9 \n.png"]
    assert rows[0]["error"].startswith("FileNotFoundError") and rows[1]["image"] == IMAGES["0.png"]


def test_input_is_listed_below_its_root(tmp_path: Path) -> None:
    for name in ("x/a.PNG", "x/y/b.jpeg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = ["x/a.PNG", "x/y/b.jpeg"]
    expected = ("image", [(str(tmp_path / name), name) for name in names])
    assert list_input(str(tmp_path)) == list_input(f"{tmp_path}/**") == list_input(f"file://{tmp_path}/") == expected
    assert list_input(f"{tmp_path}/x/y/*.jpeg")[1] == [(str(tmp_path / "x/y/b.jpeg"), "b.jpeg")]
    assert list_input(str(tmp_path / "x/a.PNG"))[1] == [(str(tmp_path / "x/a.PNG"), "a.PNG")]
    for nothing in ("none", "none/*.jpg", "notes.txt"):
        with pytest.raises(FileNotFoundError, match="must hold images"):
            list_input(str(tmp_path / nothing))
    (tmp_path / "more.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="one kind of file, got 1 archive, 2 image files"):
        list_input(str(tmp_path))


def test_done_ids_are_exact() -> None:
    done = DoneIds(str(number) for number in range(0, 20000, 2))
    assert len(done) == 10000
    assert all((str(number) in done) == (number % 2 == 0) for number in range(20000))
    assert "0" not in DoneIds([])


def run_with(monkeypatch: pytest.MonkeyPatch, repo: Path, source: Path, output: Path, *options: str) -> None:
    arguments = ["extract_features.py", "--model", str(repo), "--input", str(source), "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    run(extract_features.parse_arguments())


def test_what_cannot_work_is_refused_before_anything_starts(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "0.png").write_bytes(IMAGES["0.png"])
    monkeypatch.setattr(extract_features, "start_ray", lambda address: pytest.fail("Ray was started"))

    plain = make_model_repo(tmp_path / "plain")
    with pytest.raises(ValueError, match="needs a model with a head"):
        run_with(monkeypatch, plain, source, output, "--pooling", "head")
    (plain / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="preprocessor_config"):
        run_with(monkeypatch, plain, source, output)
    with pytest.raises(ValueError, match="at most 4096 patches"):
        run_with(monkeypatch, repo, source, output, "--patches-per-batch", "4095")
    with pytest.raises(SystemExit):
        run_with(monkeypatch, repo, source, output, "--num-workers", "0")
    assert not output.exists()

    output.mkdir()
    with FileLock(output / "_lock"), pytest.raises(ValueError, match="being written by another run"):
        run_with(monkeypatch, repo, source, output)
    (output / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"broken.parquet of `--output` cannot be read .*: delete it"):
        run_with(monkeypatch, repo, source, output)
