"""A folder, a memory file system and a web server give the same tiles, in one request per span and tar; no URL runs
a command or is expanded, and no name leads out of the root."""

import hashlib
import os
import pickle
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gigamil.config.load import load_config
from gigamil.config.schema import RunConfig
from gigamil.errors import ConfigError, EnvironmentFault, ShardError
from gigamil.shards import read, storage
from gigamil.shards.manifest import FileDigest
from gigamil.shards.read import ShardSet
from gigamil.shards.storage import SCHEMES, LocalStorage, RemoteStorage, open_storage
from gigamil.testing.shards import make_shards, noise_jpegs
from gigamil.testing.web import Server

JPEGS = noise_jpegs(10, 16)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_shards(tmp_path / "shards", "a.b", JPEGS, tile_px=16, tiles_per_tar=4)
    make_shards(tmp_path / "shards", "c", JPEGS[:3], tile_px=16)
    make_shards(tmp_path / "shards", "none", [], tile_px=16)
    return tmp_path / "shards"


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    with Server(root) as server:
        yield server


@pytest.fixture
def memory(root: Path) -> Iterator[str]:
    files = fsspec.filesystem("memory")
    for path in root.rglob("*"):
        if path.is_file():
            files.pipe(f"/cohort/{path.relative_to(root)}", path.read_bytes())
    yield "memory://cohort"
    files.rm("/cohort", recursive=True)


@pytest.fixture(params=["memory", "http"])
def url(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("memory") if request.param == "memory" else request.getfixturevalue("server").url


def test_remote_shards_are_the_local_ones(url: str, root: Path) -> None:
    there, here = ShardSet(url), ShardSet(root)
    assert (there.is_remote, here.is_remote) == (True, False)
    assert there.manifest("a.b") == here.manifest("a.b")
    for start in range(11):
        for stop in range(start, 11):
            assert there.read_span("a.b", start, stop) == JPEGS[start:stop]
    assert (there.positions_um("c") == here.positions_um("c")).all()
    assert (there.mask("c") == here.mask("c")).all()
    there.verify("a.b")
    there.check_tiles(["a.b", "c"], 16, 0.5)
    copy = pickle.loads(pickle.dumps(there))  # noqa: S301 (our own bytes)
    assert copy.read_span("c", 1, 3) == JPEGS[1:3]


def test_one_ranged_request_per_span_and_tar(server: Server) -> None:
    shards = ShardSet(server.url)
    index = shards.index("a.b")
    assert server.requests == [("manifest.json", None), ("index.parquet", None)]
    server.requests.clear()
    shards.read_span("a.b", 2, 6)
    ends = index.offset + index.length - 1
    assert server.requests == [
        ("tiles-00000.tar", f"bytes={index.offset[2] - 512}-{ends[3]}"),
        ("tiles-00001.tar", f"bytes={index.offset[4] - 512}-{ends[5]}"),
    ]


def test_slides_are_those_of_the_cohort_table_where_a_server_lists_nothing(server: Server, root: Path) -> None:
    table = {"slide_id": ["c", "a.b", "none", "failed"], "tiles": [3, 10, 0, None]}
    pq.write_table(pa.table(table), root / "cohort.parquet")
    assert ShardSet(server.url).slide_ids == ("a.b", "c")


def test_slides_are_listed_where_there_is_no_table(memory: str) -> None:
    assert ShardSet(memory).slide_ids == ("a.b", "c")


@pytest.mark.parametrize("slide_id", ["../c", "a/b", "", "a\nb"])
def test_a_table_cannot_lead_elsewhere(server: Server, root: Path, slide_id: str) -> None:
    pq.write_table(pa.table({"slide_id": [slide_id], "tiles": [1]}), root / "cohort.parquet")
    with pytest.raises(ShardError, match=r"cohort\.parquet' names slides that no slide can be called"):
        ShardSet(server.url).slide_ids  # noqa: B018 (reads the table)


def test_a_table_that_is_none(server: Server, root: Path) -> None:
    other = pa.BufferOutputStream()
    pq.write_table(pa.table({"slide_id": ["c"], "status": ["ok"]}), other)
    for content in (b"<!doctype html><title>Log in</title>", b"", other.getvalue().to_pybytes()):
        (root / "cohort.parquet").write_bytes(content)
        with pytest.raises(ShardError, match=rf"'{server.url}/cohort.parquet' is not the table .* Check the URL\."):
            ShardSet(server.url).slide_ids  # noqa: B018 (reads the table)


def test_damage_on_a_server_is_named(server: Server, root: Path) -> None:
    tar = root / "slides" / "a.b" / "tiles-00001.tar"
    os.truncate(tar, 700)
    with pytest.raises(
        ShardError, match=rf"slide 'a\.b', 'tiles-00001\.tar': is cut short.*Copy '{server.url}/slides/a\.b'"
    ):
        ShardSet(server.url).read_span("a.b", 0, 10)
    tar.unlink()
    with pytest.raises(ShardError, match=r"'tiles-00001\.tar': cannot be read"):
        ShardSet(server.url).read_span("a.b", 0, 10)
    with pytest.raises(ShardError, match="slide 'other' has no shards: 'http.*other/manifest.json' is missing"):
        ShardSet(server.url).manifest("other")
    with pytest.raises(ShardError, match="which is no folder of this machine"):
        ShardSet(server.url).folder("c")


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_sound_tar_of_whole_blocks_is_sound(
    server: Server, root: Path, extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server answers 416 to a range that begins where the file ends."""
    half = (root / "slides" / "c" / "tiles-00000.tar").stat().st_size // 2
    monkeypatch.setattr(read, "_READ_BYTES", half + extra)
    monkeypatch.setattr(storage, "_RETRY_S", 0.0)
    ShardSet(server.url).verify("c")
    ShardSet(root).verify("c")


@pytest.mark.parametrize("change", ["longer", "a little shorter", "half", "empty", "missing"])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("is_remote", [True, False])
def test_a_tar_of_another_length_is_reported(
    server: Server, root: Path, is_remote: bool, blocks: int, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = root / "slides" / "c" / "tiles-00000.tar"
    size = tar.stat().st_size
    monkeypatch.setattr(read, "_READ_BYTES", size // blocks)
    monkeypatch.setattr(storage, "_RETRY_S", 0.0)
    if change == "missing":
        tar.unlink()
    else:
        os.truncate(tar, {"longer": size + 1, "a little shorter": size - 1, "half": size // 2, "empty": 0}[change])
    with pytest.raises(ShardError, match=r"slide 'c', 'tiles-00000\.tar': (is not what was written|cannot be read)"):
        ShardSet(server.url if is_remote else root).verify("c")


@pytest.mark.parametrize("is_remote", [True, False])
def test_an_empty_file_is_sound_until_it_grows(server: Server, root: Path, is_remote: bool) -> None:
    path = root / "slides" / "c" / "tissue.geojson"
    manifest = ShardSet(root).manifest("c")
    empty = FileDigest(name=path.name, bytes=0, sha256=hashlib.sha256().hexdigest())
    changed = manifest.model_copy(update={"tissue": empty})
    (root / "slides" / "c" / "manifest.json").write_text(changed.model_dump_json())
    path.write_bytes(b"")
    shards = ShardSet(server.url if is_remote else root)
    shards.verify("c")
    path.write_bytes(b"{}")
    with pytest.raises(ShardError, match=r"is not what was written: 2 bytes .* expected 0 with"):
        shards.verify("c")


def test_the_web_server_of_tests_refuses_a_range_beyond_the_end(server: Server, root: Path) -> None:
    size = (root / "slides" / "c" / "tiles-00000.tar").stat().st_size
    for begin in (size, size + 1):
        request = urllib.request.Request(f"{server.url}/slides/c/tiles-00000.tar")
        request.add_header("Range", f"bytes={begin}-{begin + 9}")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        with caught.value as answer:
            assert (answer.code, answer.headers["Content-Range"]) == (416, f"bytes */{size}")


def test_a_server_without_ranges_is_refused(root: Path) -> None:
    with Server(root, knows_ranges=False) as server, pytest.raises(ShardError, match="does not know range requests"):
        ShardSet(server.url).read_span("a.b", 1, 2)


@pytest.mark.parametrize(("failures", "is_read"), [(2, True), (3, False)])
def test_a_busy_server_is_asked_three_times(
    root: Path, failures: int, is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_RETRY_S", 0.0)
    with Server(root, failures=failures) as server:
        if is_read:
            assert ShardSet(server.url).manifest("c").num_tiles == 3
        else:
            with pytest.raises(ShardError, match="'manifest.json': cannot be read: .*503"):
                ShardSet(server.url).manifest("c")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("pipe:cat /etc/passwd", "is neither a local folder nor a URL"),
        ("pipe://cat /etc/passwd", "is neither a local folder nor a URL"),
        ("file:///etc", "is neither a local folder nor a URL"),
        ("simplecache::s3://bucket", "is neither a local folder nor a URL"),
        ("S3://bucket", "is neither a local folder nor a URL"),
        ("ssh://host/folder", "is neither a local folder nor a URL"),
        ("s3://bucket/{0..9999999999}", "is not a plain URL"),
        ("s3://bucket/$HOME", "is not a plain URL"),
        ("s3://bucket/*", "is not a plain URL"),
        ("s3://bucket/a b", "is not a plain URL"),
        ("s3://bucket/\x1b[31m", "is not a plain URL"),
        ("s3://bucket::file:///etc", "is not a plain URL"),
        ("https://", "is not a plain URL"),
        ("s3://" + "a" * 3000, "is not a plain URL"),
    ],
)
def test_urls_that_would_do_more_than_name_a_folder(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        ShardSet(url)
    assert "\x1b" not in str(caught.value)
    assert "memory" not in str(caught.value)  # nobody's shards outlive a process
    assert len(str(caught.value)) < 400


def test_a_configuration_may_name_a_url(memory: str, tmp_path: Path) -> None:
    config = load_config(None, [f"--bookkeeping.shards={memory}"])
    assert config.bookkeeping.shard_root == memory
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert ShardSet(config.bookkeeping.shard_root).slide_ids == ("a.b", "c")
    assert load_config(None, ["--bookkeeping.shards=a/b"]).bookkeeping.shard_root == Path.cwd() / "a" / "b"


def test_a_path_is_never_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path / "{0..9}$HOME", "s", JPEGS[:1], tile_px=16)
    assert ShardSet("{0..9}$HOME").read_span("s", 0, 1) == JPEGS[:1]
    assert isinstance(open_storage("a/b"), LocalStorage)


def test_a_scheme_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    for url, package in {"s3://b": "s3fs", "gcs://b": "gcsfs", "abfs://b": "adlfs", "https://b": "aiohttp"}.items():
        assert url.partition(":")[0] in SCHEMES
        with pytest.raises(EnvironmentFault, match=f"needs the package {package}: `pip install {package}`"):
            RemoteStorage(url).read("x")


class TestLinks:
    """A link below the root may be changed between a check and its use, and lead anywhere."""

    @pytest.fixture
    def secret(self, tmp_path: Path) -> Path:
        make_shards(tmp_path / "elsewhere", "c", JPEGS[:3], tile_px=16)
        return tmp_path / "elsewhere" / "slides" / "c"

    @pytest.mark.parametrize("name", ["manifest.json", "index.parquet", "tiles-00000.tar", "mask.png"])
    def test_a_file_that_is_a_link(self, root: Path, secret: Path, name: str) -> None:
        path = root / "slides" / "c" / name
        path.unlink()
        path.symlink_to(secret / name)
        with pytest.raises(ShardError, match=rf"'{name}': cannot be read: '.*{name}' is a link, and links below"):
            shards = ShardSet(root)
            shards.read_span("c", 0, 3)
            shards.mask("c")

    def test_a_slide_that_is_a_link(self, root: Path, secret: Path) -> None:
        (root / "slides" / "linked").symlink_to(secret)
        shards = ShardSet(root)
        assert "linked" not in shards.slide_ids
        with pytest.raises(ShardError, match="slides/linked' is a link, and links below"):
            shards.manifest("linked")

    def test_a_root_that_is_a_link_is_followed(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "short").symlink_to(root)
        assert ShardSet(tmp_path / "short").read_span("c", 0, 3) == JPEGS[:3]

    def test_a_fifo_is_not_waited_for(self, root: Path) -> None:
        path = root / "slides" / "c" / "tiles-00000.tar"
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ShardError, match="it is no regular file"):
            ShardSet(root).read_span("c", 0, 1)

    @pytest.mark.parametrize("slide_id", ["..", "../slides/c", "/etc", "c/../c", "a\0b"])
    def test_an_id_that_climbs(self, root: Path, slide_id: str) -> None:
        with pytest.raises(ShardError, match="is not a name below a folder"):
            ShardSet(root).manifest(slide_id)
