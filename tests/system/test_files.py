"""Files that appear whole or not at all, and what is refused before it is read."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lora_null.system.files import beside, read_json, replacing, require_regular


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("length", [1, 200, 255])
def test_names_of_any_legal_length_are_written(tmp_path, length):
    path = tmp_path / ("x" * length)
    for text in ("old", "new"):
        with replacing(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text(text)
    assert path.read_text() == "new" and names(tmp_path) == [path.name]
    # a character may take four bytes
    wide = tmp_path / ("\U0001f600" * 63)
    with replacing(wide) as temporary:
        temporary.write_text("wide")
    assert wide.read_text() == "wide"


def test_long_names_that_begin_alike_stay_apart(tmp_path):
    one, other = (beside(tmp_path / ("x" * 250 + end), "lock") for end in "ab")
    assert one != other and len(one.name) < 255
    assert beside(tmp_path / "short", "lock") == tmp_path / ".short.lock"


def test_threads_that_write_one_path_do_not_meet(tmp_path):
    path, started, errors = tmp_path / "file", threading.Barrier(8), []

    def write(number):
        try:
            for _ in range(20):
                with replacing(path) as temporary:
                    started.wait(10)
                    temporary.write_text(str(number) * 5000)
        except BaseException as error:
            errors.append(error)
            started.abort()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    text = path.read_text()
    assert len(text) == 5000 and len(set(text)) == 1 and names(tmp_path) == ["file"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="needs signals and locks")
def test_what_a_killed_process_left_is_removed_and_what_others_write_is_not(tmp_path):
    path = tmp_path / "file"
    code = (
        "import os, sys; from pathlib import Path; from lora_null.system.files import replacing\n"
        "with replacing(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert len(names(tmp_path)) == 1
    (tmp_path / ".file.notes.tmp").write_text("mine")
    with replacing(tmp_path / "file.other") as other, replacing(path) as alive:
        other.write_text("other")
        alive.write_text("first")
        with replacing(path) as temporary:
            temporary.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and names(tmp_path) == [".file.notes.tmp", "file", "file.other"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    with replacing(tmp_path / "link") as temporary:
        assert temporary.parent.name == "disk"
        temporary.write_text("text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_text() == "text"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_devices_and_vast_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with open(tmp_path / "vast", "wb") as file:
        file.truncate(2**40)
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match=rf"{name} is a pipe, a device or a socket; expected a JSON file"):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match=r"vast has 1,099,511,627,776 bytes; expected a JSON file of at most"):
        read_json(tmp_path / "vast")
    with pytest.raises(IsADirectoryError, match="is a folder; expected a thing"):
        require_regular(tmp_path, "a thing")
    for missing in (Path("nothing"), Path("vast") / "below"):
        with pytest.raises(FileNotFoundError, match="no such file; expected a JSON file"):
            read_json(tmp_path / missing)


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"r": ' + "9" * 5000 + "}", '{"r": NaN}', '{"r": -Infinity}', '{"r": 1e999}', "{", "\udcff"],
    ids=["deep", "digits", "nan", "infinity", "too large", "cut", "bytes"],
)
def test_json_that_no_writer_makes_is_refused_by_name(tmp_path, text):
    (tmp_path / "file").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"file is damaged .*expected a JSON object"):
        read_json(tmp_path / "file")
    (tmp_path / "file").write_text(json.dumps({"r": 1.5, "n": 10**400}))
    assert read_json(tmp_path / "file") == {"r": 1.5, "n": 10**400}
